"""Best-of-n: the law of a maximum, and what is picked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import chain, exact, law

from alignment_jax.test_time.best_of_n import best_of_n, pick


def test_the_best_of_two_of_a_gaussian_is_its_known_maximum():
    """E max of two = m + s / sqrt(pi), Var max = s^2 (1 - 1/pi), with the chain's own mean and variance."""
    sampler = chain(10, eta=0.0)

    def denoise(x, t, cond):
        return exact(x, sampler.schedule.alpha(t)[:, None], sampler.schedule.sigma(t)[:, None])

    n = 20000
    x0, reward = best_of_n(jax.random.key(0), denoise, {"c": jnp.zeros(n)}, sampler, (1,), lambda x, c: 3.0 * x[:, 0],
                           {"c": jnp.zeros(n)}, n=2)  # fmt: skip
    mean, variance = law(sampler)
    want, spread = mean + (variance / np.pi) ** 0.5, variance * (1 - 1 / np.pi)
    assert abs(float(x0.mean()) - want) < 4 * (spread / n) ** 0.5
    assert abs(float(x0.var()) - spread) < 0.03 * spread
    np.testing.assert_allclose(reward, 3.0 * x0[:, 0])


def test_each_condition_keeps_its_own_best_and_a_failed_score_never_wins():
    samples = jnp.arange(6.0).reshape(2, 3, 1)
    best, score = pick(samples, jnp.array([[1.0, jnp.nan, 0.5], [jnp.nan, -3.0, -2.0]]))
    np.testing.assert_array_equal(best[:, 0], [0.0, 5.0])
    np.testing.assert_array_equal(score, [1.0, -2.0])


def test_conditions_go_with_their_samples():
    """cond is repeated n times side by side: sample i of prompt p must see prompt p."""
    sampler = chain(4, eta=0.0)
    cond = {"c": jnp.arange(3.0)}
    x0, _ = best_of_n(jax.random.key(1), lambda x, t, c: x * 0.0 + c["c"][:, None], cond, sampler, (1,),
                      lambda x, c: -jnp.square(c["c"] - 1.0) + 0 * x[:, 0], cond, n=4)  # fmt: skip
    alone, _ = best_of_n(jax.random.key(1), lambda x, t, c: x * 0.0 + 1.0, cond, sampler, (1,), lambda x, c: 0 * x[:, 0], cond, n=4)
    np.testing.assert_allclose(x0[1], alone[1], rtol=1e-6)
    assert abs(float(x0[0, 0] - alone[0, 0])) > 1e-3


def test_n_below_one_is_refused():
    with pytest.raises(ValueError, match="n must be at least 1"):
        best_of_n(jax.random.key(0), None, {}, None, (1,), None, {}, n=0)
