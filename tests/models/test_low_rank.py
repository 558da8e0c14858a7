"""LoRA as a transformation of a tree, and as a path beside every layer that it adapts."""

import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from alignment_jax.models import lora
from alignment_jax.training import build

CODE = """
import jax, jax.numpy as jnp
from alignment_jax.models import lora
params = {f"layer_{i}": {"kernel": jnp.ones((4, 3 + i))} for i in range(8)}
factors = lora.init(jax.random.key(0), params, rank=2)
for change in (lora.merge, lora.attach):
    print(jax.jit(change).lower(params, factors, 1.0).as_text())
"""
KEY = jax.random.key(0)


class Net(nn.Module):
    """Every kind of layer that is adapted: dense, convolutions with stride and padding, one of them rematerialised."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = nn.silu(nn.Conv(8, (3, 3), padding=1, dtype=self.dtype, name="conv")(x))
        x = nn.silu(nn.remat(nn.Conv)(8, (3, 3), strides=2, padding=((0, 1), (0, 1)), dtype=self.dtype, name="down.0")(x))
        x = nn.Conv(6, (1, 1), dtype=self.dtype, name="point")(x)
        return nn.Dense(5, dtype=self.dtype, use_bias=False, name="out")(x)


def adapted_net(dtype=jnp.float32):
    net, x = Net(dtype), jax.random.normal(KEY, (2, 8, 8, 4))
    params = net.init(KEY, x)["params"]
    factors = jax.tree.map(lambda v: v + 0.1, lora.init(KEY, params, rank=3))
    apply = lambda params, x: net.apply({"params": params}, x)  # noqa: E731
    return apply, params, factors, x


def test_both_forms_are_the_same_program_in_every_process():
    """The order of a set of words differs between processes; a program in another order misses the compilation cache."""
    texts = set()
    for seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", CODE], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        texts.add(done.stdout)
    assert len(texts) == 1


def test_the_path_beside_a_layer_is_the_merged_kernel():
    apply, params, factors, x = adapted_net()
    merged = apply(lora.merge(params, factors, 0.7), x)
    beside = jax.jit(lambda f: lora.adapted(apply)(lora.attach(params, f, 0.7), x))(factors)
    np.testing.assert_allclose(beside, merged, atol=1e-5)
    assert float(jnp.abs(merged - apply(params, x)).max()) > 0.1


def test_scale_zero_is_the_base_bitwise():
    apply, params, factors, x = adapted_net()
    np.testing.assert_array_equal(lora.adapted(apply)(lora.attach(params, factors, 0.0), x), apply(params, x))


def test_small_changes_survive_16_bit_parameters():
    """The trap: in a merged bfloat16 kernel a change below half the spacing of its numbers vanishes altogether."""
    apply, params, factors, x = adapted_net()
    params = jax.tree.map(lambda v: v.astype(jnp.bfloat16), params)
    whole = jax.tree.map(lambda v: v.astype(jnp.float32), params)
    scale = 1e-4  # of factors of size .1: the first tens of steps
    change = apply(lora.merge(whole, factors, scale), x) - apply(whole, x)
    error = lambda y: float(jnp.linalg.norm(y - apply(params, x) - change) / jnp.linalg.norm(change))  # noqa: E731
    assert error(apply(lora.merge(params, factors, scale), x)) > 0.5
    assert error(lora.adapted(apply)(lora.attach(params, factors, scale), x)) < 0.02


def test_a_kernel_that_no_layer_applies_is_named():
    """The trap: a network that multiplies by its kernel itself would be sampled as the base, and nobody told."""
    apply, params, factors, x = adapted_net()
    factors["matrix"] = lora.init(KEY, {"kernel": jnp.eye(5)}, rank=2)
    mixed = lambda params, x: apply(params, x) @ params["matrix"]["kernel"]  # noqa: E731
    params = lora.attach({**params, "matrix": {"kernel": jnp.eye(5)}}, factors)
    assert lora.unreached(mixed, params, x) == ["matrix"]
    assert lora.unreached(apply, lora.attach(*adapted_net()[1:3]), x) == []


def test_a_run_on_such_a_network_is_refused_before_anything_compiles():
    config = ml_collections.ConfigDict({
        "model": "toy_model:toy", "seed": 0, "steps": 1, "reward": "jpeg_compressibility", "method": {"name": "ddpo"},
        "sampling": {"eta": 1.0},
        "optimizer": {"learning_rate": 1e-3}, "batch": {"prompts": 2}, "lora": {"rank": 2}, "weights": "init",
    })  # fmt: skip
    bundle, shapes, _ = build.described(config)
    with pytest.raises(ValueError, match=r"unet.*no flax Dense or Conv.*lora.targets"):
        build.planned(config, bundle, shapes, build.reward(config))
