"""The critters network as a rectified flow is the same model: its ODE gives the pictures of the variance preserving chain."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from alignment_jax.diffusion import Sampler, sample, sampling_grid
from alignment_jax.diffusion.schedule import SamplingGrid
from alignment_jax.training import build


def test_the_flow_draws_the_same_pictures():
    bundles = {}
    for flow in (False, True):
        config = ml_collections.ConfigDict({"model": "critters", "weights": "shipped", "seed": 0, "model_options": {"flow": flow}})
        bundles[flow], params = build.model(config)
    tokens = bundles[False].tokenize(["a green bell monster with horns, one big eye and a smile on a blue background", "a red monster"])
    cond, noise = bundles[False].encode_text(params, jnp.asarray(tokens)), jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    grid = sampling_grid(bundles[False].schedule, 4)
    t = grid.sigma / (grid.alpha + grid.sigma)  # where sigma / alpha is the same
    grids = {False: grid, True: SamplingGrid(t, 1 - t, t)}
    starts = {False: noise, True: noise * np.hypot(t[0], 1 - t[0])}
    x0 = [sample(jax.random.key(1), lambda *a, b=bundles[flow]: b.denoise(params, *a), cond,
                 Sampler(bundles[flow].schedule, grids[flow], "x0"), starts[flow])[0] for flow in (False, True)]  # fmt: skip
    np.testing.assert_allclose(x0[0], x0[1], atol=2e-4)


def test_the_noisiest_time_is_one_that_the_network_knows():
    flow, tuned = (build.model(ml_collections.ConfigDict({"model": "critters", "weights": "shipped", "seed": 0,
                                                          "model_options": {"flow": f}})) for f in (True, False))  # fmt: skip
    cond, x = tuned[0].encode_text(tuned[1], jnp.asarray(tuned[0].tokenize(["a red monster"]))), jnp.ones((1, 32, 32, 3))
    np.testing.assert_allclose(flow[0].denoise(flow[1], x, jnp.ones(1), cond), tuned[0].denoise(tuned[1], x, jnp.full(1, 0.98), cond))
