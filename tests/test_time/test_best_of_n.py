"""Best-of-n: the law of a maximum, and what is picked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import chain, exact, law

from alignment_jax.test_time.base import pick
from alignment_jax.test_time.best_of_n import best_of_n


def drawn(sampler, denoise, cond, reward, n):
    keys = jax.random.split(jax.random.key(1), len(cond["c"]))
    networks = {"policy": denoise, "reward": lambda keys, x0, condition: reward(x0, condition)}
    x0, info = best_of_n(sampler, (1,), n=n).draw(keys, networks, {"cond": cond, "condition": cond})
    return x0, info["reward"]


@pytest.mark.parametrize(("n", "expected"), [(2, 0.5642), (4, 1.0294), (8, 1.4236), (16, 1.7660)])
def test_the_best_of_n_of_a_gaussian_is_its_known_maximum(n, expected):
    """E max of n standard normals, with the chain's own mean and variance; of two also Var max = s^2 (1 - 1 / pi)."""
    sampler, size = chain(10, eta=0.0), 8000

    def denoise(x, t, cond):
        return exact(x, sampler.schedule.alpha(t)[:, None], sampler.schedule.sigma(t)[:, None])

    x0, reward = drawn(sampler, denoise, {"c": jnp.zeros(size)}, lambda x, c: 3.0 * x[:, 0], n)
    mean, variance = law(sampler)
    assert abs(float(x0.mean()) - (mean + variance**0.5 * expected)) < 4 * (variance / size) ** 0.5
    if n == 2:
        assert abs(float(x0.var()) / variance - (1 - 1 / np.pi)) < 0.05
    np.testing.assert_allclose(reward, 3.0 * x0[:, 0])


def test_each_condition_keeps_its_own_best_and_a_failed_score_never_wins():
    samples = jnp.arange(6.0).reshape(2, 3, 1)
    best, score = pick(samples, jnp.array([[1.0, jnp.nan, 0.5], [jnp.nan, -3.0, -2.0]]))
    np.testing.assert_array_equal(best[:, 0], [0.0, 5.0])
    np.testing.assert_array_equal(score, [1.0, -2.0])


def test_conditions_go_with_their_samples():
    """cond is repeated n times side by side: sample i of prompt p must see prompt p."""
    sampler, cond = chain(4, eta=0.0), {"c": jnp.arange(3.0)}
    x0, _ = drawn(sampler, lambda x, t, c: x * 0.0 + c["c"][:, None], cond, lambda x, c: -jnp.square(c["c"] - 1.0) + 0 * x[:, 0], 4)
    alone, _ = drawn(sampler, lambda x, t, c: x * 0.0 + 1.0, cond, lambda x, c: 0 * x[:, 0], 4)
    np.testing.assert_allclose(x0[1], alone[1], rtol=1e-6)
    assert abs(float(x0[0, 0] - alone[0, 0])) > 1e-3


def test_n_below_one_is_refused():
    with pytest.raises(ValueError, match="n must be at least 1"):
        best_of_n(chain(4), (1,), n=0)
