"""KL estimates against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment_jax.diffusion import Sampler, cosine, sampling_grid, transition
from alignment_jax.evaluation.kl import best_of_n_kl, path_kl, policy_kl


@pytest.mark.parametrize(("n", "nats"), [(1, 0.0), (2, 0.193), (4, 0.636), (8, 1.204), (16, 1.835), (32, 2.497),
                                         (64, 3.175), (128, 3.860), (256, 4.549)])  # fmt: skip
def test_best_of_n_has_its_golden_values(n: int, nats: float) -> None:
    assert best_of_n_kl(n) == pytest.approx(nats, abs=6e-4)


def test_best_of_n_is_the_kl_of_the_maximum_of_n() -> None:
    u = (np.arange(200_000) + 0.5) / 200_000  # the best of n has density n u^(n-1) in the base's quantile u
    density = 4 * u**3
    assert best_of_n_kl(4) == pytest.approx(np.mean(density * np.log(density)), abs=1e-6)


def test_best_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="n >= 1"):
        best_of_n_kl(0)


def test_path_kl_of_shifted_chains_is_the_sum_of_the_gaussians_kl() -> None:
    key = jax.random.key(0)
    reference = jax.random.normal(key, (5, 3, 2, 2))
    shift = jnp.array([0.1, 0.2, 0.0, 0.3, 0.4]).reshape(5, 1, 1, 1)
    std = jnp.array([1.0, 0.5, 0.7, 0.2, 0.3])
    expected = 4 * (0.1**2 / 1 + 0.2**2 / 0.5**2 + 0.3**2 / 0.2**2 + 0.4**2 / 0.3**2) / 2
    np.testing.assert_allclose(path_kl(reference + shift, reference, std), np.full(3, expected), rtol=1e-4)
    per_sample = path_kl(reference + shift, reference, jnp.broadcast_to(std[:, None], (5, 3)))
    np.testing.assert_allclose(per_sample, np.full(3, expected), rtol=1e-4)


def test_steps_without_noise_and_entries_that_do_not_exist_are_left_out() -> None:
    mean = jnp.ones((2, 1, 4))
    mask = jnp.array([[True, True, False, False]])
    got = path_kl(mean, 0 * mean, jnp.array([1.0, 0.0]), mask)
    np.testing.assert_allclose(got, [2 * 0.5], rtol=1e-6)
    assert jnp.isfinite(jax.grad(lambda m: path_kl(m, 0 * mean, jnp.array([1.0, 0.0])).sum())(mean)).all()


def test_policy_kl_of_constant_drift_is_known_under_jit() -> None:
    schedule = cosine()
    sampler = Sampler(schedule, sampling_grid(schedule, 6), "eps", eta=1.0)
    zero = jnp.zeros((1, 1))
    gaps = [transition(sampler, i, zero, zero + 0.1).mean - transition(sampler, i, zero, zero).mean for i in range(6)]
    stds = [transition(sampler, i, zero, zero).std for i in range(6)]
    expected = sum(float(g[0, 0] ** 2 / (2 * s**2)) * 3 for g, s in zip(gaps, stds, strict=True) if s > 1e-4)
    x_T = jax.random.normal(jax.random.key(1), (4, 3))
    policy, reference = (lambda x, t, c: 0 * x + 0.1), (lambda x, t, c: 0 * x)
    measure = jax.jit(lambda key: policy_kl(key, policy, reference, None, sampler, x_T))
    np.testing.assert_allclose(measure(jax.random.key(0)), np.full(4, expected), rtol=2e-3)
    assert expected > 0


def test_a_deterministic_chain_has_no_path_kl_and_says_so() -> None:
    schedule = cosine()
    sampler = Sampler(schedule, sampling_grid(schedule, 4), "eps", eta=0.0)
    with pytest.raises(ValueError, match="eta=1"):
        policy_kl(jax.random.key(0), lambda x, t, c: x, lambda x, t, c: x, None, sampler, jnp.zeros((1, 2)))
