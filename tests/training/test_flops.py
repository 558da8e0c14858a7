"""Model FLOPs: closed forms, agreement with XLA's own count where nothing loops, and nothing counted twice."""

import jax
import jax.numpy as jnp
import pytest
import toy_config

from alignment_jax import platform
from alignment_jax.diffusion import recomputed
from alignment_jax.models.critters import critters
from alignment_jax.training import flops


def counted(function, *arguments):
    return flops.count(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_products_and_convolutions_by_hand():
    a, b = jnp.zeros((3, 5, 7)), jnp.zeros((3, 7, 2))
    assert counted(lambda a, b: a @ b, a, b) == 2 * 3 * 5 * 7 * 2
    x, kernel = jnp.zeros((4, 10, 10, 6)), jnp.zeros((3, 3, 6, 8))
    conv = lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert counted(conv, x, kernel) == 2 * 4 * 8 * 8 * 8 * 9 * 6
    grouped = lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"),
                                                             feature_group_count=2)  # fmt: skip
    assert counted(grouped, x, jnp.zeros((3, 3, 3, 8))) == 2 * 4 * 8 * 8 * 8 * 9 * 3


def test_scans_count_as_often_as_they_run_and_of_branches_the_largest():
    w = jnp.zeros((4, 4))
    one = 2 * 4**3
    assert counted(lambda w: jax.lax.scan(lambda x, _: (x @ w, None), w, None, length=10)[0], w) == 10 * one
    assert counted(lambda w: jax.lax.cond(w[0, 0] > 0, lambda x: x @ x @ x, lambda x: x, w), w) == 2 * one


@pytest.mark.parametrize("network", ["pixel_unet", "gradient"])
def test_a_network_counts_as_xla_counts_it(network):
    """But for padding, which XLA leaves out of convolutions (a fifth on pictures so small), and its additions and exponentials."""
    bundle = critters()
    params = jax.eval_shape(bundle.init, jax.random.key(0))
    cond = jax.eval_shape(bundle.encode_text, params, jnp.zeros((2, 24), jnp.int32))
    x, t = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    function = bundle.denoise if network == "pixel_unet" else jax.grad(lambda *a: bundle.denoise(*a).sum())
    with platform.assumed("tpu"):  # there convolutions have XLA's own gradients
        mine = counted(function, params, x, t, cond)
        theirs = jax.jit(function).lower(params, x, t, cond).cost_analysis()["flops"]
    assert 0.9 < mine / theirs < 1.25


def test_what_is_recomputed_does_not_count():
    w = jnp.zeros((4, 4))
    chain = lambda w: recomputed(lambda x: jnp.sin(jnp.sin(x @ w) @ w), True)(w).sum()
    counts = []
    for recomputes in (True, False):
        with platform.assumed("tpu", recomputes):
            counts.append(counted(jax.grad(chain), w) / (2 * 4**3))
    assert counts == [8.0, 6.0]


def test_a_step_grows_with_its_calls():
    """A DDPO step is linear in the chain's length: a call to draw and a call with its gradient for each step of each sample."""
    config = toy_config.get_config("plain4")
    of = []
    for config.sampling.num_steps in (2, 4, 8):
        of.append(flops.one_step(config))
    assert of[0] > 0 and of[2] - of[1] == 2 * (of[1] - of[0])


def test_utilisation_is_a_share_of_a_known_peak(monkeypatch):
    assert flops.utilisation(3e12, 2.0) == {"model_tflops": 1.5 / jax.device_count()}
    monkeypatch.setattr(jax, "devices", lambda: [type("Device", (), {"device_kind": "TPU v5 lite"})] * 4)
    assert flops.utilisation(197e12 * 4, 2.0) == {"model_tflops": 98.5, "mfu": 0.5}
