"""LoRA as a transformation of a tree."""

import os
import subprocess
import sys

CODE = """
import jax, jax.numpy as jnp
from alignment_jax.models import lora
params = {f"layer_{i}": {"kernel": jnp.ones((4, 3 + i))} for i in range(8)}
factors = lora.init(jax.random.key(0), params, rank=2)
print(jax.jit(lora.merge).lower(params, factors, 1.0).as_text())
"""


def test_merging_is_the_same_program_in_every_process():
    """The order of a set of words differs between processes; a program in another order misses the compilation cache."""
    texts = set()
    for seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", CODE], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        texts.add(done.stdout)
    assert len(texts) == 1
