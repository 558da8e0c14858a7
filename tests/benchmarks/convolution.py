"""Gradients of convolutions in and outside a loop on CPU, XLA's own and those of models/convolution.py; CPU-seconds of one core.

  taskset -c 0 python tests/benchmarks/convolution.py
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from process import seconds

from alignment_jax.models.convolution import convolution
from alignment_jax.training import build

NHWC = ("NHWC", "HWIO", "NHWC")
STEPS = 8


def layer(own: bool, unroll: int) -> float:
    """Steps of gradient descent by input and kernel through two convolutions 96 to 96 of 16 x 16 x 16 positions."""
    conv = lambda x, k: (convolution if own else jax.lax.conv_general_dilated)(x, k, (1, 1), "SAME", dimension_numbers=NHWC)
    value = lambda x, k: jnp.square(conv(jnp.tanh(conv(x, k)), k)).sum()

    def step(state, _):
        gradients = jax.grad(value, (0, 1))(*state)
        return jax.tree.map(lambda a, g: a - 1e-5 * g, state, gradients), None

    x, k = jax.random.normal(jax.random.key(0), (16, 16, 16, 96)), 0.05 * jax.random.normal(jax.random.key(1), (3, 3, 96, 96))
    program = jax.jit(lambda s: jax.lax.scan(step, s, None, STEPS, unroll=unroll)[0])
    return min(seconds(lambda: jax.block_until_ready(program((x, k)))))


def network(unroll: int) -> float:
    """Steps of gradient descent by the critters UNet's input, batch 16."""
    bundle, params = build.model(ConfigDict({"model": "critters", "weights": "shipped", "seed": 0}))
    cond = bundle.encode_text(params, jnp.asarray(bundle.tokenize([""] * 16)))
    value = lambda x, p: jnp.square(bundle.denoise(p, x, jnp.full(16, 0.5), cond)).sum()
    step = lambda p: lambda x, _: (x - 1e-3 * jax.grad(value)(x, p), None)
    x = jax.random.normal(jax.random.key(0), (16, *bundle.sample_shape))
    program = jax.jit(lambda x, p: jax.lax.scan(step(p), x, None, STEPS, unroll=unroll)[0])
    return min(seconds(lambda: jax.block_until_ready(program(x, params))))


if __name__ == "__main__":
    for own in (False, True):
        print(f"two layers, {'own' if own else 'XLA'}: scanned {layer(own, 1):.2f}, unrolled {layer(own, STEPS):.2f}", flush=True)
    print(f"the critters UNet: scanned {network(1):.2f}, unrolled {network(STEPS):.2f}", flush=True)
