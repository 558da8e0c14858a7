"""Reward guidance: closed forms on a Gaussian, what each paper's push is, and what a sample may depend on."""

import dataclasses
from functools import partial

import gaussian
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment_jax import diffusion as d
from alignment_jax.test_time import guidance as g
from alignment_jax.training import steering

M, V = 0.5, 0.64
INF = float("inf")


def network(schedule):
    """E[eps | x_t] of x0 ~ N(M, V)."""
    return lambda x, t, c: gaussian.exact(x, schedule.alpha(t)[:, None], schedule.sigma(t)[:, None], M, V)


def linear(slope=1.0):
    return lambda x0: slope * x0.sum(-1)


def quadratic(centre=2.0):
    return lambda x0: -0.5 * jnp.square(x0 - centre).sum(-1)


def run(method, reward, sampler, keys, *, policy=None, unguided=None, augmented=None):
    """(x0, info) of a method on the Gaussian."""
    score = lambda keys, x0, condition: reward(x0)  # noqa: E731
    policy = network(sampler.schedule) if policy is None else policy
    networks = {"policy": policy, "unguided": unguided or policy, "reward": score, "augmented": augmented or score}
    empty = jnp.zeros(len(keys))
    return jax.jit(lambda keys: method.draw(keys, networks, {"cond": {"c": empty}, "condition": {}}))(keys)


def keys(n=8):
    return jax.random.split(jax.random.key(3), n)


def one_step(t=0.5, schedule=None):
    """A chain of one step from time t: its sample is the clean prediction there, pushed."""
    schedule = schedule or d.cosine(t_max=0.98)
    grid = d.sampling_grid(schedule, 1, t_start=t)
    return d.Sampler(schedule, grid, "eps")


def seen(sampler, n=8):
    """(x, x0_hat, alpha, sigma, V_t) at the start of a chain of one step, with the keys of `keys(n)`."""
    x = d.initial(d.fold_in(keys(n), 0), sampler, (n, 1))
    a, s = float(sampler.grid.alpha[0]), float(sampler.grid.sigma[0])
    x0 = (x - s * gaussian.exact(x, a, s, M, V)) / a
    return x, x0, a, s, V * s**2 / (a**2 * V + s**2)


def affine(method, reward, sampler, n=64):
    """(mean, variance) of a deterministic chain whose sample is an affine function of x_T ~ N(0, 1): by its slope, no sampling."""
    x_T = np.asarray(d.initial(d.fold_in(keys(n), 0), sampler, (n, 1)), np.float64)[:, 0]
    x0 = np.asarray(run(method, reward, sampler, keys(n))[0], np.float64)[:, 0]
    slope, offset = np.polyfit(x_T, x0, 1)
    assert np.abs(slope * x_T + offset - x0).max() < 1e-3
    return offset, slope**2


# -- classifier guidance ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_a_linear_reward_is_followed_exactly(alpha):
    """p(x0) exp(x0 / alpha) of N(m, v) is N(m + v / alpha, v); the chain reaches it as its steps grow many."""
    schedule, error = d.cosine(t_max=0.999), []
    for steps in (50, 400):
        sampler = d.Sampler(schedule, d.sampling_grid(schedule, steps), "eps")
        mean, variance = affine(g.classifier_guidance(sampler, (1,), alpha=alpha), linear(), sampler)
        error.append((abs(mean - (M + V / alpha)) / (V / alpha), abs(variance / V - 1)))
    assert error[1][0] < 0.01 and error[1][1] < 0.02, error
    assert error[1][1] < error[0][1] / 4, error


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_quadratic_reward_is_over_guided_by_its_known_factor(t, prediction):
    """The exact tilted posterior mean moves by V_t (c - x0_hat) / (alpha + V_t), the plug-in by V_t (c - x0_hat) / alpha."""
    sampler, alpha = dataclasses.replace(one_step(t), prediction=prediction), 0.3
    x, x0, a, s, variance = seen(sampler)

    def policy(x, t, c):
        eps = gaussian.exact(x, a, s, M, V)
        return d.target(prediction, (x - s * eps) / a, eps, a, s)

    got, info = run(g.classifier_guidance(sampler, (1,), alpha=alpha), quadratic(), sampler, keys(), policy=policy)
    exact = variance * (2.0 - x0) / (alpha + variance)
    np.testing.assert_allclose((got - x0) / exact, (alpha + variance) / alpha, rtol=2e-3)
    np.testing.assert_allclose(info["reward"], quadratic()(got), rtol=1e-5)


def test_over_guidance_makes_the_whole_chain_narrower_than_its_target():
    """Target of -(x - 2)^2 / 2 at alpha: precision 1 / v + 1 / alpha; plug-in guidance ends narrower, and nearer the centre."""
    alpha, schedule = 0.5, d.cosine(t_max=0.999)
    sampler = d.Sampler(schedule, d.sampling_grid(schedule, 200), "eps")
    mean, variance = affine(g.classifier_guidance(sampler, (1,), alpha=alpha), quadratic(), sampler)
    precision = 1 / V + 1 / alpha
    target = (M / V + 2.0 / alpha) / precision
    assert variance < 0.9 / precision and target + 0.03 < mean < 2.0, (mean, variance)


def test_the_same_on_a_rectified_flow():
    """score = -eps / sigma there too: a linear reward gives N(m + v / alpha, v)."""
    schedule, alpha = d.rectified_flow(t_max=0.999), 0.5
    sampler = d.Sampler(schedule, d.sampling_grid(schedule, 300), "flow")

    def flow(x, t, c):
        a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        eps = gaussian.exact(x, a, s, M, V)
        x0 = M + a * V / (a**2 * V + s**2) * (x - a * M)
        return eps - x0

    x_T = np.asarray(d.initial(d.fold_in(keys(), 0), sampler, (8, 1)))[:, 0]
    x0 = np.asarray(run(g.classifier_guidance(sampler, (1,), alpha=alpha), linear(), sampler, keys(), policy=flow)[0])[:, 0]
    slope, offset = np.polyfit(x_T, x0, 1)
    assert abs(offset - (M + V / alpha)) < 0.02 and abs(slope**2 / V - 1) < 0.03


def test_with_noise_the_linear_tilt_holds_too():
    schedule, alpha, n = d.cosine(t_max=0.999), 0.5, 4000
    sampler = d.Sampler(schedule, d.sampling_grid(schedule, 200), "eps", eta=1.0)
    x0 = run(g.classifier_guidance(sampler, (1,), alpha=alpha), linear(), sampler, keys(n))[0]
    assert abs(float(x0.mean()) - (M + V / alpha)) < 4 * (V / n) ** 0.5 + 0.02
    assert abs(float(x0.var()) / V - 1) < 0.1


@pytest.mark.parametrize("t", [0.2, 0.6])
def test_without_the_network_the_jacobian_is_that_of_unit_data(t):
    """d x0_hat / d x_t = alpha V_t / sigma^2; for data of variance 1 the two ways are one, for others they are not."""
    sampler = one_step(t)
    x = d.initial(d.fold_in(keys(), 0), sampler, (8, 1))
    for variance, same in ((1.0, True), (V, False)):
        policy = lambda x, t, c, v=variance: gaussian.exact(x, sampler.grid.alpha[0], sampler.grid.sigma[0], M, v)  # noqa: E731
        x0 = [run(g.classifier_guidance(sampler, (1,), alpha=0.4, through_network=through), quadratic(), sampler, keys(), policy=policy)[0]
              for through in (True, False)]  # fmt: skip
        assert np.allclose(*x0, rtol=1e-4) == same, (x, x0)


# -- DPS --------------------------------------------------------------------------------------------------------------


def test_dps_steps_along_the_unsquared_norm():
    """r = -|2 - x|^2: the shift is zeta grad r / |2 - x0_hat| = 2 zeta sign(2 - x0_hat) d x0_hat / d x_t, after the step."""
    sampler = one_step(0.5)
    _, x0, a, s, variance = seen(sampler)
    got = run(g.dps(sampler, (1,), zeta=0.7), lambda x: -jnp.square(x - 2.0).sum(-1), sampler, keys())[0]
    np.testing.assert_allclose(got - x0, 2 * 0.7 * jnp.sign(2.0 - x0) * a * variance / s**2, rtol=1e-3)
    shifted = run(g.dps(sampler, (1,), zeta=0.7, ceiling=5.0), lambda x: 5.0 - jnp.square(x - 2.0).sum(-1), sampler, keys())[0]
    np.testing.assert_allclose(shifted, got, rtol=1e-4)


def test_dps_leaves_what_has_reached_the_ceiling_alone():
    sampler = one_step(0.5)
    x0 = seen(sampler)[1]
    np.testing.assert_allclose(run(g.dps(sampler, (1,)), lambda x: 1.0 + 3.0 * x[:, 0] ** 2, sampler, keys())[0], x0, rtol=1e-5)


# -- universal guidance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_backward_guidance_is_that_many_steps_of_ascent(steps):
    """On -(x - 2)^2 / 2: Delta = (2 - x0_hat)(1 - (1 - rate)^m), the clean prediction moved by it, eps by -alpha / sigma of it."""
    sampler = one_step(0.6)
    x0 = seen(sampler)[1]
    method = g.universal_guidance(sampler, (1,), alpha=INF, backward=steps, rate=0.2, recurrences=1)
    np.testing.assert_allclose(run(method, quadratic(), sampler, keys())[0] - x0, (2.0 - x0) * (1 - 0.8**steps), rtol=1e-3)


def test_backward_guidance_comes_on_top_of_the_forward_one_and_starts_from_the_unguided_prediction():
    sampler = one_step(0.6)
    x0 = seen(sampler)[1]
    forward, backward, both = (
        run(g.universal_guidance(sampler, (1,), alpha=alpha, backward=m, rate=0.2, recurrences=1), quadratic(), sampler, keys())[0] - x0
        for alpha, m in ((0.4, 0), (INF, 3), (0.4, 3)))  # fmt: skip
    np.testing.assert_allclose(both, forward + backward, rtol=1e-3)
    alone = run(g.classifier_guidance(sampler, (1,), alpha=0.4), quadratic(), sampler, keys())[0] - x0
    np.testing.assert_allclose(forward, alone, rtol=1e-4)


# -- FreeDoM ----------------------------------------------------------------------------------------------------------


def pair(sampler, scale=3.0):
    """(guided, conditional) networks of three dimensions whose eps_cond - eps_null is a known function of x."""
    gap = lambda x: 0.3 * jnp.sin(3 * x) + 0.1  # noqa: E731
    conditional = lambda x, t, c: 0.5 * x  # noqa: E731
    return (lambda x, t, c: conditional(x, t, c) + (scale - 1) * gap(x)), conditional, gap


def test_freedom_pushes_by_a_share_of_classifier_free_guidance():
    """rms of the shift = share w rms(eps_cond - eps_null) of the same sample, whatever the reward's scale."""
    sampler, n = one_step(0.5), 6
    guided, conditional, gap = pair(sampler)
    x = d.initial(d.fold_in(keys(n), 0), sampler, (n, 3))
    plain = run(g.freedom(sampler, (3,), guidance=3.0, share=0.0), linear(), sampler, keys(n), policy=guided, unguided=conditional)[0]
    for slope in (1.0, 1e4):
        method = g.freedom(sampler, (3,), guidance=3.0, share=0.2, repeats=1, window=(0.0, 1.0))
        got = run(method, lambda x0, slope=slope: slope * jnp.sin(x0).sum(-1), sampler, keys(n), policy=guided, unguided=conditional)[0]
        np.testing.assert_allclose(g.rms(got - plain), 0.2 * 3.0 * g.rms(gap(x)), rtol=1e-3)


@pytest.mark.parametrize("name", ["freedom", "universal_guidance", "dps", "classifier_guidance"])
def test_a_sample_does_not_depend_on_what_else_is_in_its_batch(name):
    """The official FreeDoM divides by one rms of the whole batch: a neighbour with a gradient a million times as large stops it."""
    schedule = d.cosine(t_max=0.98)
    sampler = d.Sampler(schedule, d.sampling_grid(schedule, 6), "eps", eta=1.0)
    guided, conditional, _ = pair(sampler)
    settings = {"freedom": {"guidance": 3.0}, "universal_guidance": {"alpha": 20.0, "backward": 1, "recurrences": 2},
                "dps": {"repeats": 2}}  # fmt: skip
    method = getattr(g, name)(sampler, (3,), **settings.get(name, {}))

    def drawn(strength):
        """Rows' rewards differ in scale; repeat() keeps the condition with its row."""
        networks = {"policy": guided, "unguided": conditional, "reward": lambda k, x0, c: -c["s"] * jnp.square(x0 - 1).sum(-1)}
        networks["augmented"] = networks["reward"]
        data = {"cond": {"c": jnp.zeros(len(strength))}, "condition": {"s": strength}}
        return method.draw(keys(4)[: len(strength)], networks, data)[0]

    calm, loud = drawn(jnp.array([0.1, 0.1, 0.1, 0.1])), drawn(jnp.array([0.1, 0.1, 1e5, jnp.nan]))
    np.testing.assert_allclose(calm[:2], loud[:2], rtol=1e-5)
    np.testing.assert_allclose(calm[:1], drawn(jnp.array([0.1])), rtol=1e-4, atol=1e-5)
    assert np.isfinite(loud[3]).all()


# -- the block: window, time travel, views ------------------------------------------------------------------------------


def test_outside_the_window_nothing_is_asked_of_the_reward():
    """Calls: every step one of the network; a backward of it and a reward in the window alone, and one reward at the end."""
    sampler = d.Sampler(d.cosine(t_max=0.98), d.sampling_grid(d.cosine(t_max=0.98), 10), "x0")
    cost = steering.cost("classifier_guidance", {"window": (0.3, 0.7)}, sampler)
    assert cost["network"] == 10 and cost["network backward"] == 4 and cost["reward"] == 5, cost
    free = steering.cost("classifier_guidance", {"through_network": False}, sampler)
    assert free["network"] == 10 and "network backward" not in free and free["reward"] == 11, free


@pytest.mark.parametrize(("name", "given", "calls"), [
    ("classifier_guidance", {"repeats": 3}, 30), ("universal_guidance", {"recurrences": 4, "backward": 2}, 40),
    ("dps", {"repeats": 2, "window": (0.0, 0.5)}, 15)])  # fmt: skip
def test_steps_taken_again_cost_as_much_again(name, given, calls):
    sampler = d.Sampler(d.cosine(t_max=0.98), d.sampling_grid(d.cosine(t_max=0.98), 10), "x0")
    assert steering.cost(name, given, sampler)["network"] == calls


def test_freedoms_steps_are_those_of_its_code():
    """Of 100 steps, index 99 first: guided for 70 > index >= 30, three times each for 70 > index >= 40. The network is called
    twice for guidance and once more where its strength is asked for."""
    schedule = d.scaled_linear()
    sampler = d.Sampler(schedule, d.sampling_grid(schedule, 100, "leading", steps_offset=1), "eps", eta=1.0)
    asked = []

    def unguided(x, t, c):
        jax.debug.callback(lambda t: asked.append(int(t[0])), t)
        return network(schedule)(x, t, c)

    method = g.freedom(sampler, (1,), guidance=3.0)
    jax.block_until_ready(run(method, linear(), sampler, keys(2), unguided=unguided))
    jax.effects_barrier()
    index = (np.array(sorted(asked)) - 1) // 10
    assert {int(i): int((index == i).sum()) for i in set(index)} == {i: 3 if i >= 40 else 1 for i in range(30, 70)}


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_time_travel_without_a_gradient_keeps_the_law(eta):
    """A constant reward pushes nothing, and steps undone by the forward process and taken again leave N(m, v) as it is."""
    schedule, n = d.cosine(t_max=0.999), 6000
    sampler = d.Sampler(schedule, d.sampling_grid(schedule, 60), "eps", eta=eta)
    x0 = run(g.universal_guidance(sampler, (1,), recurrences=4), lambda x0: 0.0 * x0.sum(-1), sampler, keys(n))[0]
    assert abs(float(x0.mean()) - M) < 4 * (V / n) ** 0.5 + 0.01
    assert abs(float(x0.var()) / V - 1) < 0.1


def test_the_last_of_the_repeats_is_not_put_back_to_noise():
    """One step, taken three times, ends at the clean prediction of the last: with a far stronger pull than noise, at the centre."""
    sampler = one_step(0.5)
    method = g.universal_guidance(sampler, (1,), alpha=INF, backward=60, rate=0.5, recurrences=3)
    np.testing.assert_allclose(run(method, quadratic(), sampler, keys())[0], 2.0, atol=1e-3)


@pytest.mark.parametrize("solver", ["dpmsolver++", "lcm"])
def test_other_solvers_are_pushed_too_and_unpushed_as_they_are(solver):
    """dpmsolver++ looks back to the step before, which must be carried; with time travel there is none, and it is refused."""
    schedule = d.cosine(t_max=0.98)
    sampler = d.Sampler(schedule, d.sampling_grid(schedule, 16), "eps", solver=solver)
    plain = d.draw(keys(), network(schedule), {"c": jnp.zeros(8)}, sampler, (1,))[0]
    still = run(g.classifier_guidance(sampler, (1,)), lambda x0: 0.0 * x0.sum(-1), sampler, keys())[0]
    np.testing.assert_allclose(still, plain, rtol=1e-4, atol=1e-5)
    assert float((run(g.classifier_guidance(sampler, (1,), alpha=0.5), linear(), sampler, keys())[0] - plain).min()) > 0.3
    if solver == "dpmsolver++":
        with pytest.raises(ValueError, match="looks back"):
            g.classifier_guidance(sampler, (1,), repeats=3)


def test_the_gradient_is_the_mean_over_views():
    """Each view has a key of its own, of its sample: with noise on the slope, many views come near the mean slope."""
    sampler = one_step(0.5)
    x0 = seen(sampler)[1]

    def augmented(keys, x0, condition):
        slope = 1.0 + jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 7)))(keys)
        return slope * x0[:, 0]

    moved = [run(g.classifier_guidance(sampler, (1,), views=n), linear(), sampler, keys(), augmented=augmented)[0] - x0 for n in (1, 400)]
    steady = run(g.classifier_guidance(sampler, (1,)), linear(), sampler, keys())[0] - x0
    np.testing.assert_allclose(moved[1] / steady, 1.0, atol=0.25)
    assert float((moved[0] / steady).std()) > 0.4


@pytest.mark.parametrize(("make", "message"), [
    (partial(g.classifier_guidance, alpha=0.0), "alpha must be above 0"), (partial(g.classifier_guidance, alpha=-1.0), "alpha"),
    (partial(g.dps, zeta=-1.0), "zeta"), (partial(g.universal_guidance, rate=0.0), "rate"),
    (partial(g.universal_guidance, backward=-1), "backward"), (partial(g.universal_guidance, recurrences=0), "at least 1"),
    (partial(g.freedom, guidance=3.0, share=-0.1), "share"), (partial(g.freedom, guidance=3.0, travel=(0.6, 0.3)), "travel is two shares"),
    (partial(g.dps, window=(0.0, 1.5)), "window is two shares"), (partial(g.dps, views=0), "views")])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(one_step(), (1,))
