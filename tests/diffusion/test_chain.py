"""Schedules, parameterisations, transitions, log-probabilities and sampling against closed forms in float64."""

import gaussian
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from alignment_jax import diffusion as d

KEY = jax.random.key(0)


@pytest.mark.parametrize("make", [d.linear, d.scaled_linear, d.zero_terminal_snr, d.cosine])
def test_variance_is_preserved_and_snr_falls(make):
    s = make()
    t = jnp.linspace(s.t_min, s.t_max, 50)
    np.testing.assert_allclose(s.alpha(t) ** 2 + s.sigma(t) ** 2, 1.0, atol=2e-3 if s.discrete else 1e-5)
    assert np.all(np.diff(s.alpha(t)) < 0)


def test_scaled_linear_matches_stable_diffusion_and_zero_terminal_snr_ends_in_pure_noise():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    abar = np.cumprod(1 - betas)
    s = d.scaled_linear()
    np.testing.assert_allclose(np.asarray(s.alpha(jnp.arange(1000.0))) ** 2, abar, rtol=1e-5)
    assert abs(float(s.alpha(jnp.array(0.0))) ** 2 - 0.99915) < 1e-5
    z = d.zero_terminal_snr()
    assert float(z.alpha(jnp.array(999.0))) == 0.0
    np.testing.assert_allclose(float(z.alpha(jnp.array(0.0))), float(s.alpha(jnp.array(0.0))), rtol=1e-6)


def test_spacings_are_those_of_diffusers():
    s = d.scaled_linear()
    assert d.sampling_grid(s, 5, "leading", steps_offset=1).t[:-1].tolist() == [801, 601, 401, 201, 1]
    assert d.sampling_grid(s, 5, "trailing").t[:-1].tolist() == [999, 799, 599, 399, 199]
    assert d.sampling_grid(s, 5, "linspace").t[:-1].tolist() == [999, 749, 500, 250, 0]
    flow = d.sampling_grid(d.rectified_flow(), 4, shift=3.0)
    np.testing.assert_allclose(flow.t, [1, 0.9, 0.75, 0.5, 0], atol=1e-6)
    with pytest.raises(ValueError, match="spacing 'uniform' does not fit"):
        d.sampling_grid(s, 5)


@pytest.mark.parametrize("kind", d.PREDICTIONS)
def test_predict_inverts_target(kind):
    x0, eps = jax.random.normal(KEY, (4, 3)), jax.random.normal(jax.random.key(1), (4, 3))
    t = jnp.array([0.1, 0.4, 0.7, 0.95])
    s = d.rectified_flow() if kind == "flow" else d.cosine()
    a, sig = s.alpha(t), s.sigma(t)
    out = d.predict(kind, d.target(kind, x0, eps, a, sig), s.add_noise(x0, eps, t), a, sig)
    np.testing.assert_allclose(out[0], x0, atol=1e-4)
    np.testing.assert_allclose(out[1], eps, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_transition_is_ddim_of_the_paper(eta):
    sampler = gaussian.chain(10, eta)
    x, out = jax.random.normal(KEY, (5, 2)), jax.random.normal(jax.random.key(1), (5, 2))
    a, s = (np.asarray(v, np.float64) for v in (sampler.grid.alpha, sampler.grid.sigma))
    for i in range(10):
        step = d.transition(sampler, i, x, out)
        abar, abar_prev = a[i] ** 2, a[i + 1] ** 2
        var = eta**2 * (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)
        x0 = (np.asarray(x) - np.sqrt(1 - abar) * np.asarray(out)) / np.sqrt(abar)
        mean = np.sqrt(abar_prev) * x0 + np.sqrt(max(1 - abar_prev - var, 0)) * np.asarray(out)
        np.testing.assert_allclose(step.mean, mean, atol=2e-3)
        np.testing.assert_allclose(step.std, np.sqrt(var), atol=1e-4)


def test_log_prob_is_the_normal_density_and_its_ratio_has_no_cancellation():
    step = d.Transition(jnp.zeros((3, 4)) + 0.3, jnp.array(0.5), jnp.zeros((3, 4)))
    x = jax.random.normal(KEY, (3, 4))
    want = stats.norm(0.3, 0.5).logpdf(np.asarray(x))
    np.testing.assert_allclose(d.log_prob(step, x, reduce="sum"), want.sum(1), rtol=1e-5)
    np.testing.assert_allclose(d.log_prob(step, x, reduce="mean"), want.mean(1), rtol=1e-5)
    mask = jnp.array([[1, 1, 0, 0]] * 3)
    np.testing.assert_allclose(d.log_prob(step, x, reduce="sum", mask=mask), want[:, :2].sum(1), rtol=1e-5)
    other = step.mean + 0.01
    want_ratio = stats.norm(0.31, 0.5).logpdf(np.asarray(x)) - want
    np.testing.assert_allclose(d.log_ratio(other, step.mean, step.std, x, reduce="sum"), want_ratio.sum(1), rtol=1e-3, atol=1e-6)
    assert np.all(np.asarray(d.log_ratio(step.mean, step.mean, step.std, 100 * x, reduce="sum")) == 0.0)
    with pytest.raises(ValueError, match="reduce must be"):
        d.log_prob(step, x, reduce="max")


def test_bf16_log_probabilities_are_off_by_more_than_the_clip_range():
    """T14, why the path is float32: rounding to bf16 moves a mean log-probability by more than DDPO's clip of 1e-4."""
    step = d.Transition(jnp.zeros((1, 16384)), jnp.array(0.1), jnp.zeros((1, 16384)))
    x = 0.1 * jax.random.normal(KEY, (1, 16384))
    half = d.Transition(step.mean.astype(jnp.bfloat16), step.std, step.x0)
    full = d.log_prob(step, x, reduce="mean")
    assert abs(float(d.log_prob(half, x.astype(jnp.bfloat16), reduce="mean").astype(jnp.bfloat16)[0]) - float(full[0])) > 1e-4
    assert full.dtype == jnp.float32 and d.log_prob(half, x, reduce="mean").dtype == jnp.float32


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_exact_denoiser_of_a_gaussian_gives_the_recursions_law(eta):
    sampler = gaussian.chain(20, eta)
    n = 40000
    x0, path = d.sample(KEY, gaussian.policy(jnp.zeros(20), sampler), None, sampler,
                        jax.random.normal(jax.random.key(5), (n, 1)), keep=True)  # fmt: skip
    mean, var = gaussian.law(sampler)
    assert abs(float(x0.mean()) - mean) < 4 * np.sqrt(var / n)
    assert abs(float(x0.var()) - var) < 4 * var * np.sqrt(2 / n)
    assert path.x.shape == (21, n, 1) and np.array_equal(path.x[-1], x0)


@pytest.mark.parametrize("start", [1.0, 0.9995])
def test_a_flow_sde_begins_with_the_noise_of_its_second_time(start):
    """Flow-GRPO's own: a sqrt(t / (1 - t)) has no value at t = 1, and just below it one that drowns the picture."""
    grid = d.sampling_grid(d.rectified_flow(t_max=start), 8)
    sampler = d.Sampler(d.rectified_flow(), grid, "flow", flow_sde=("sqrt", 0.7))
    x = jax.random.normal(KEY, (4, 2))
    t0, t1 = float(grid.t[0]), float(grid.t[1])
    step = d.transition(sampler, 0, x, jnp.zeros_like(x))
    np.testing.assert_allclose(step.std, 0.7 * np.sqrt(t0 / (1 - t1)) * np.sqrt(t0 - t1), rtol=1e-5)
    later = d.transition(sampler, 1, x, jnp.zeros_like(x)).std
    np.testing.assert_allclose(later, 0.7 * np.sqrt(t1 / (1 - t1)) * np.sqrt(t1 - float(grid.t[2])), rtol=1e-5)


@pytest.mark.parametrize("rule", [("sqrt", 0.7), ("constant", 0.3)])
def test_flow_sde_and_ode_have_the_same_marginals_as_steps_grow(rule):
    """T9, by the float32 transition's own coefficients: a few steps shrink the variance, 2000 give .25 both ways."""
    schedule = d.rectified_flow(t_max=0.999)

    def end(steps, sde):
        sampler = d.Sampler(schedule, d.sampling_grid(schedule, steps), "flow", flow_sde=sde)
        mean, var = 0.0, 1.0
        t = np.asarray(sampler.grid.t, np.float64)
        idx = jnp.arange(steps)
        a, s = 1 - t[:-1], t[:-1]
        total = a**2 * gaussian.S2 + s**2
        slope = (s - a * gaussian.S2) / total  # E[eps - x0 | x] = slope x + offset
        offset = -slope * a * gaussian.M - gaussian.M
        outputs = [jnp.asarray((slope * x + offset)[:, None], jnp.float32) for x in (0.0, 1.0)]
        at = [d.transition(sampler, idx, jnp.full((steps, 1), x), o) for x, o in zip((0.0, 1.0), outputs)]
        B = np.asarray(at[0].mean, np.float64)[:, 0]
        A, std = np.asarray(at[1].mean, np.float64)[:, 0] - B, np.asarray(at[0].std, np.float64)
        for i in range(steps):
            mean, var = A[i] * mean + B[i], A[i] ** 2 * var + std[i] ** 2
        return mean, var

    for steps, tolerance in ((2000, 6e-3), (200, 3e-2)):
        ode, sde = end(steps, None), end(steps, rule)
        assert abs(sde[0] - ode[0]) < tolerance and abs(sde[1] - ode[1]) < tolerance
    assert abs(end(2000, rule)[1] - gaussian.S2) < 8e-3
    limit = end(50, (rule[0], 1e-4))
    np.testing.assert_allclose(limit, end(50, None), atol=1e-4)


def test_a_sample_does_not_depend_on_its_batch_when_keys_are_given():
    sampler = gaussian.chain(6)
    keys = jax.random.split(KEY, 8)
    x_T = d.normal(keys, (8, 2))
    net = gaussian.policy(jnp.zeros(6), sampler)
    whole, _ = d.sample(keys, net, None, sampler, x_T)
    part, _ = d.sample(keys[2:5], net, None, sampler, x_T[2:5])
    np.testing.assert_array_equal(whole[2:5], part)


def test_hooks_see_and_change_the_walk():
    sampler = gaussian.chain(6)
    net = gaussian.policy(jnp.zeros(6), sampler)
    x_T = jax.random.normal(KEY, (4, 2))
    plain, _ = d.sample(KEY, net, None, sampler, x_T)
    shifted, _ = d.sample(KEY, net, None, sampler, x_T, control=lambda i, x, out: out + jnp.where(i == 0, 1.0, 0.0))
    theta = jnp.zeros(6).at[0].set(1.0)
    np.testing.assert_allclose(shifted, d.sample(KEY, gaussian.policy(theta, sampler), None, sampler, x_T)[0], atol=1e-6)
    quiet, _ = d.sample(KEY, net, None, sampler, x_T, noise=lambda key, i, step: step.mean)
    assert not np.allclose(plain, quiet)
    flip = lambda key, i, s: d.State(s.x[::-1], s.x0[::-1], s.carry + 1, s.cond)  # noqa: E731
    _, count = d.sample(KEY, net, None, sampler, x_T, select=flip, carry=jnp.zeros(()))
    assert float(count) == 6
    halfway, _ = d.sample(KEY, net, None, sampler, x_T, stop=3)
    rest, _ = d.sample(KEY, net, None, sampler, halfway, start=3)
    np.testing.assert_array_equal(rest, plain)
    with pytest.raises(ValueError, match="do not lie in a chain"):
        d.sample(KEY, net, None, sampler, x_T, start=6)


def test_masked_sequences_and_points_walk_the_same_chain():
    """A sample is an array with any trailing shape; entries outside a mask take no part in likelihoods."""
    sampler = gaussian.chain(5)
    net = lambda x, t, c: 0.1 * x * c["mask"][..., None]  # noqa: E731
    mask = jnp.arange(7)[None] < jnp.array([[3], [7]])
    x0, path = d.sample(KEY, net, {"mask": mask}, sampler, jax.random.normal(KEY, (2, 7, 3)), keep=True)
    assert x0.shape == (2, 7, 3)
    step = d.transition(sampler, 1, path.x[1], net(path.x[1], None, {"mask": mask}))
    changed = jnp.where(mask[..., None], path.x[2], 1e6)
    a, b = (d.log_prob(step, x, reduce="sum", mask=mask[..., None]) for x in (path.x[2], changed))
    np.testing.assert_array_equal(a, b)


def test_guidance_and_blending_reduce_to_the_networks_bitwise():
    x, t = jax.random.normal(KEY, (3, 2)), jnp.full((3,), 0.5)
    net = lambda x, t, c: x * c["w"]  # noqa: E731
    cond, null = {"w": jnp.full((3, 1), 2.0)}, {"w": jnp.full((1, 1), 0.5)}
    np.testing.assert_array_equal(d.guided(net, null, 1.0)(x, t, cond), net(x, t, cond))
    np.testing.assert_allclose(d.guided(net, null, 3.0)(x, t, cond), 0.5 * x + 3 * 1.5 * x, rtol=1e-6)
    grad = jax.grad(lambda n: d.guided(net, {"w": n}, 3.0, detach_null=True)(x, t, cond).sum())(null["w"])
    assert float(jnp.abs(grad).max()) == 0.0
    other = lambda x, t, c: jnp.sin(x)  # noqa: E731
    np.testing.assert_array_equal(d.blended(net, other, jnp.float32(1.0))(x, t, cond), net(x, t, cond))
    np.testing.assert_array_equal(d.blended(net, other, jnp.float32(0.0))(x, t, cond), other(x, t, cond))


def test_blending_two_gaussians_of_one_variance_gives_the_blended_mean():
    """DeRa: N(0, v) and N(mu, v) -> N(lam mu, v) at every step."""
    sampler = gaussian.chain(10, 0.0)

    def net(m):
        def denoise(x, t, c):
            return gaussian.exact(x, sampler.schedule.alpha(t)[:, None], sampler.schedule.sigma(t)[:, None], m=m)

        return denoise

    x_T = jax.random.normal(KEY, (64, 1))
    ends = [d.sample(KEY, net(m), None, sampler, x_T)[0] for m in (0.0, 0.6)]
    mixed = d.sample(KEY, d.blended(net(1.0), net(0.0), 0.6), None, sampler, x_T)[0]
    np.testing.assert_allclose(mixed, ends[1], atol=2e-5)
    assert not np.allclose(ends[0], ends[1])


def test_a_second_order_solver_begun_in_the_middle_takes_its_first_step_by_first_order():
    """Trap: the state that the walk begins with was taken for the step before's clean prediction."""
    schedule = d.cosine(t_max=0.98)
    made = {solver: d.Sampler(schedule, d.sampling_grid(schedule, 20), "x0", solver=solver) for solver in ("ddim", "dpmsolver++")}
    net = lambda x, t, c: jnp.tanh(x) * (1 - t)[:, None]  # noqa: E731
    x = jax.random.normal(KEY, (5, 2))
    walk = lambda solver, start, stop: d.sample(KEY, net, None, made[solver], x, start=start, stop=stop)[0]  # noqa: E731
    np.testing.assert_allclose(walk("dpmsolver++", 7, 8), walk("ddim", 7, 8), atol=1e-6)
    assert not np.allclose(walk("dpmsolver++", 7, 9), walk("ddim", 7, 9), atol=1e-5)
