"""Gradients of long attentions on CPU by how many scores the backward pass holds at a time; one process a line, one core.

  taskset -c 0 python tests/benchmarks/attention.py
Columns: CPU-seconds of value and gradient by q, k and v (the least of three, after one that compiles), and the peak memory.
"""

import subprocess
import sys

from process import memory, seconds

CASES = ((16, 1024, 8, 4), (4, 1024, 8, 40), (2, 4096, 8, 40), (16, 256, 8, 8), (4, 256, 8, 8))
LIMITS = (0, 2**20, 2**21, 2**22, 2**23, 2**24)  # 0: all scores are kept from the forward pass


def measure(case: tuple[int, ...], limit: int) -> None:
    import jax
    import jax.numpy as jnp

    from alignment_jax.models import attention

    attention.KEPT, attention.SCORES = (0, limit) if limit else (2**62, 0)
    q, k, v = (jax.random.normal(jax.random.key(i), case) for i in range(3))
    program = jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(attention.attention(*x))), (0, 1, 2)))
    took = min(seconds(lambda: jax.block_until_ready(program(q, k, v))))
    print(f"[B,N,H,D] {list(case)} at a time {limit or 'all, kept'}: {took:.2f} s, {memory('VmHWM'):.0f} MB", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(tuple(map(int, sys.argv[1].split(","))), int(sys.argv[2]))
    else:
        for case in CASES:
            for limit in LIMITS:
                subprocess.run([sys.executable, __file__, ",".join(map(str, case)), str(limit)], check=True)
