"""Preference methods on given data: closed forms, limits between methods, and what odd data does to them."""

import json
from functools import partial

import gaussian
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from alignment_jax.algorithms import losses
from alignment_jax.algorithms.dpo import diffusion_dpo, loser_share, residual
from alignment_jax.algorithms.inpo import inpo, invert, smpo
from alignment_jax.algorithms.kto import diffusion_kto
from alignment_jax.algorithms.mapo import mapo, odds
from alignment_jax.algorithms.rankdpo import rank_dpo, win_rate, worth
from alignment_jax.algorithms.spin import spin
from alignment_jax.data import prompts as files
from alignment_jax.data.sources import label_source, list_source
from alignment_jax.diffusion import (
    NoiseSchedule,
    Sampler,
    guided,
    guided_away,
    normal,
    rectified_flow,
    sample,
    sampling_grid,
    target,
)

KEY, N, LOG2 = jax.random.key(0), 6, np.log(2)
KEYS = jax.random.split(KEY, N)


def one_time(alpha: float, sigma: float, prediction: str = "eps", flow: bool = False) -> Sampler:
    """A schedule of one noise level, so that expectations over t are trivial."""
    schedule = NoiseSchedule(lambda t: np.float32(alpha) + 0 * t, lambda t: np.float32(sigma) + 0 * t, 0.0, 1.0, flow=flow)
    return Sampler(schedule, sampling_grid(schedule, 1), prediction)


HALF = one_time(0.5**0.5, 0.5**0.5)
REFERENCE = jnp.array([0.5, 0.2, -0.1])


def networks(w):
    """Linear networks of three weights; every copy is the reference."""
    net = lambda w: lambda x, t, c: w * x  # noqa: E731
    return {"policy": net(w), **dict.fromkeys(["reference", "previous"], net(REFERENCE))}


def pictures(n=N, seed=1):
    return jax.random.normal(jax.random.key(seed), (n, 3))


def pairs(**more):
    return {"winner": pictures(seed=1), "loser": pictures(seed=2), "cond": {}, **more}


def items_of(algorithm, data, w=REFERENCE, keys=KEYS):
    """(keys, items) of a step that starts at w."""

    @jax.jit  # many small programs, one for each operation, take longer to compile
    def start(w, keys, data):
        items, _, _ = algorithm.prepare(KEY, {}, algorithm.rollout(keys, {}, networks(w), data), None)
        n = next(len(x) for k, x in items.items() if k != "cond")
        keys = keys if n == len(keys) else jax.random.split(KEY, n)
        return keys, algorithm.anchor(keys, networks(w), {"cond": {}, **items})

    return start(w, keys, data)


def value(algorithm, w, data, start=None, keys=KEYS):
    """(losses, info) at w of a step that starts at `start` (default w)."""
    keys, items = items_of(algorithm, data, w if start is None else start, keys)
    return algorithm.loss(keys, networks(w), items)


def gradient(algorithm, data, w=REFERENCE, keys=KEYS):
    keys, items = items_of(algorithm, data, w, keys)
    return jax.jit(jax.grad(lambda w: algorithm.loss(keys, networks(w), items)[0].mean()))(w)


def error(w, x0, keys=KEYS, sampler=HALF):
    """The denoising error by hand, eps networks."""
    x_t, _, eps = losses.noised(keys, x0, sampler.schedule)
    return jnp.square(w * x_t - eps).mean(1)


MOVED = REFERENCE + jnp.array([0.2, -0.1, 0.3])
PAIRWISE = {"dpo": partial(diffusion_dpo, beta=3.0), "inpo": partial(inpo, beta=3.0, steps=2), "smpo": partial(smpo, beta=3.0, steps=2),
            "kto": partial(diffusion_kto, beta=3.0), "mapo": mapo}  # fmt: skip


# links


def test_links_have_their_values_at_the_reference():
    want = {"logistic": LOG2, "rdpo": LOG2, "ipo": 1.0, "hinge": 1.0, "dmpo": 1.61446}
    assert set(want) == set(losses.LINKS)
    for name, number in want.items():
        np.testing.assert_allclose(losses.LINKS[name](jnp.float32(0.0)), number, rtol=1e-5)
        assert jax.grad(losses.LINKS[name])(jnp.float32(0.0)) < 0


@pytest.mark.parametrize(("link", "minimiser"), [
    (partial(losses.logistic, label_smoothing=0.1), 2.19722), (losses.dmpo, 4.59512), (losses.ipo, 0.5),
    (partial(losses.dmpo, label_smoothing=0.1), 2.19722),
])  # fmt: skip
def test_bounded_links_are_least_at_their_known_margins(link, minimiser):
    """cDPO and DMPO at logit(1 - e), IPO at 1/2: the target margin, where logistic DPO has none."""
    assert abs(float(jax.grad(link)(jnp.float32(minimiser)))) < 1e-5
    assert float(link(jnp.float32(minimiser - 0.3))) > float(link(jnp.float32(minimiser))) < float(link(jnp.float32(minimiser + 0.3)))


def test_rdpo_over_flipped_labels_is_the_clean_loss_and_has_no_lower_bound():
    u = jnp.linspace(-3, 3, 13)
    for e in (0.1, 0.3):
        link = partial(losses.rdpo, label_smoothing=e)
        np.testing.assert_allclose((1 - e) * link(u) + e * link(-u), losses.logistic(u), atol=2e-6)
        np.testing.assert_allclose(jax.grad(link)(jnp.float32(50.0)), -e / (1 - 2 * e), rtol=1e-5)


def test_logistic_is_ipo_of_a_quarter_of_the_margin_to_second_order():
    u = jnp.array([-0.1, 0.05, 0.1])
    np.testing.assert_allclose(losses.logistic(u) - LOG2, (losses.ipo(u / 4) - 1) / 2, atol=1e-6)


# Diffusion-DPO


@pytest.mark.parametrize("link", sorted(losses.LINKS))
def test_dpo_takes_every_link(link):
    """The ipo branch of a widely copied script names an argument that is not there."""
    got, info = value(diffusion_dpo(HALF, beta=3.0, link=link), MOVED, pairs())
    np.testing.assert_allclose(got, losses.LINKS[link](info["margin"]), rtol=1e-6)
    drift = [error(MOVED, x) - error(REFERENCE, x) for x in (pairs()["winner"], pairs()["loser"])]
    np.testing.assert_allclose(info["margin"], -1.5 * (drift[0] - drift[1]), rtol=1e-4, atol=1e-5)


def test_dpo_gradient_at_the_reference_is_a_quarter_of_beta_times_that_of_the_errors_difference():
    """The factor 1/2 in front of beta, which half of the codes lack."""
    want = jax.grad(lambda w: (error(w, pairs()["winner"]) - error(w, pairs()["loser"])).mean())(REFERENCE)
    np.testing.assert_allclose(gradient(diffusion_dpo(HALF, beta=3.0), pairs()), 0.75 * want, rtol=1e-5)


def test_the_negative_network_learns_from_swapped_labels():
    """NPO: u -> -u, and the loss of the swapped pairs; the safeguard then guards the other side."""
    swapped = pairs(winner=pairs()["loser"], loser=pairs()["winner"])
    for kwargs in ({}, {"safeguard": 0.5}):
        plain, negative = (diffusion_dpo(HALF, beta=3.0, negative=n, **kwargs) for n in (False, True))
        got, info = value(negative, MOVED, pairs())
        np.testing.assert_allclose(got, losses.logistic(-value(plain, MOVED, pairs())[1]["margin"]), rtol=1e-5)
        np.testing.assert_array_equal(got, value(plain, MOVED, swapped)[0])
        np.testing.assert_allclose(gradient(negative, pairs(), MOVED), gradient(plain, swapped, MOVED), rtol=1e-6)


@pytest.mark.parametrize("kind", ["eps", "v", "x0", "flow"])
def test_errors_in_one_space_are_those_of_every_parameterisation(kind):
    """err_eps = alpha err_v = (1 - t) err_flow, err_x0 = -sigma err_v = -t err_flow, whatever the network puts out."""
    flow = kind == "flow"
    alpha, sigma = (0.7, 0.3) if flow else (0.8, 0.6)
    sampler = one_time(alpha, sigma, kind, flow)
    keys, x0 = KEYS, pictures()
    x_t, t, eps = losses.noised(keys, x0, sampler.schedule)
    clean = 0.3 * x_t + 0.1  # a denoiser, put out in the network's own form
    noise = (x_t - alpha * clean) / sigma
    net = lambda x, t, c: target(kind, clean, noise, jnp.full(N, alpha), jnp.full(N, sigma))  # noqa: E731
    got = {space: residual(net, x_t, t, eps, x0, {}, sampler, space) for space in ("native", "eps", "x0")}
    np.testing.assert_allclose(got["x0"], clean - x0, atol=2e-6)
    np.testing.assert_allclose(got["eps"], noise - eps, atol=2e-6)
    factors = {"eps": (1, -sigma / alpha), "v": (alpha, -sigma), "x0": (-alpha / sigma, 1), "flow": (alpha, -sigma)}[kind]
    for space, factor in zip(("eps", "x0"), factors, strict=True):
        np.testing.assert_allclose(got[space], factor * got["native"], rtol=2e-5, atol=2e-6)


def bradley_terry_optimum(space: str, n: int = 40_000, beta: float = 4.0) -> float:
    """x ~ N(0, 1), labels by Bradley-Terry of 1.3 x, a flow network whose one parameter is the policy's mean, at t = 1/2."""
    sampler = one_time(0.5, 0.5, "flow", True)
    k = jax.random.split(KEY, 4)
    a, b = jax.random.normal(k[0], (n, 1)), jax.random.normal(k[1], (n, 1))
    first = jax.random.uniform(k[2], (n, 1)) < jax.nn.sigmoid(1.3 * (a - b))
    data, keys = {"winner": jnp.where(first, a, b), "loser": jnp.where(first, b, a), "cond": {}}, jax.random.split(k[3], n)
    net = lambda th: lambda x, t, c: 0 * x - th  # E[eps - x0 | x_t] at alpha = sigma: minus the mean  # noqa: E731
    algorithm = diffusion_dpo(sampler, beta=beta, weight_space=space)
    items = algorithm.anchor(keys, {"reference": net(0.0)}, data)
    slope = jax.grad(lambda th: algorithm.loss(keys, {"policy": net(th)}, items)[0].mean())
    step, theta = jax.jit(lambda th: (slope(th), jax.grad(slope)(th))), jnp.float32(0.2)
    for _ in range(8):
        g, h = step(theta)
        theta = theta - jnp.clip(g / jnp.maximum(h, 1e-3), -0.3, 0.3)
    return float(theta)


@pytest.mark.parametrize(("space", "optimum"), [("native", 0.325), ("eps", 1.3), ("x0", 1.3)])
def test_flow_dpo_finds_the_bradley_terry_optimum_in_its_weight_space(space, optimum):
    """theta* = 1.3 / (beta c^2), c = d output / d theta: 1 in the flow's own space, 1 - t in that of the noise."""
    assert abs(bradley_terry_optimum(space) - optimum) < 0.03 * optimum


def test_flow_dpo_learns_on_a_rectified_flow(monkeypatch):
    monkeypatch.setitem(worlds.FLOW_SDE, "diffusion_dpo", None)
    parts, _, start, frozen, sampler = worlds.mixture_run("diffusion_dpo")
    assert sampler.schedule.flow
    state = worlds.run_steps("diffusion_dpo", 25)[2]
    assert worlds.mean_reward(parts, state.trained, frozen, sampler) > worlds.mean_reward(parts, start.trained, frozen, sampler) + 0.4


def test_the_margin_before_the_first_update_is_exactly_0():
    """In bfloat16, where a reference of another precision than the policy's gives margins of order 1."""
    log = worlds.run_steps("diffusion_dpo", 1, n=32, size=16, dtype=jnp.bfloat16, beta=5000.0)[-1]
    assert log[0]["margin"] == 0.0 and log[0]["implicit_accuracy"] == 0.5


# the safeguard of SDPO


def test_the_safeguard_has_its_limits():
    """Orthogonal or opposed: nothing is held back; aligned: 1 - mu; a loser of three times the size: a third of that."""
    won = jnp.array([[1.0, 2.0, 0.0]] * 4)
    lost = jnp.stack([jnp.array([2.0, -1.0, 5.0]), -won[0], won[0], 3 * won[0]])
    np.testing.assert_allclose(loser_share(won, lost, 0.9), [1.0, 1.0, 0.1, 0.1 / 3], rtol=1e-5)
    np.testing.assert_allclose(loser_share(won, lost, 0.0), [1.0, 1.0, 1.0, 1 / 3], rtol=1e-5)
    assert np.isfinite(loser_share(0 * won, lost, 0.5)).all()


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
def test_under_the_safeguard_no_step_raises_its_winners_error(mu):
    """-<g_w - lambda g_l, g_w> <= -mu |g_w|^2 for every pair that collides, and so for every batch of them."""
    won, lost = (jax.random.normal(jax.random.key(i), (500, 4)) * jnp.array([1.0, 2.0][i]) for i in (0, 1))
    share = loser_share(won, lost, mu)
    kept = (won * (won - share[:, None] * lost)).sum(1)
    assert np.all(kept >= mu * (won * won).sum(1) - 1e-4)
    assert float(((won * (won - lost)).sum(1) < 0).mean()) > 0.1  # what it guards against
    np.testing.assert_array_equal(share[:7], loser_share(won[:7], lost[:7], mu))  # whatever else is in the batch


def test_the_safeguard_changes_gradients_and_no_value():
    plain, guarded = diffusion_dpo(HALF, beta=3.0), diffusion_dpo(HALF, beta=3.0, safeguard=1.0)
    np.testing.assert_array_equal(value(plain, MOVED, pairs())[0], value(guarded, MOVED, pairs())[0])
    assert not np.allclose(gradient(plain, pairs(), MOVED), gradient(guarded, pairs(), MOVED), rtol=1e-3)
    same = pairs(loser=pairs()["winner"])  # aligned: with mu = 1 the winner's descent is all that is left
    want = jax.grad(lambda w: error(w, same["winner"]).mean())(MOVED)
    np.testing.assert_allclose(gradient(guarded, same, MOVED), 0.75 * want, rtol=1e-4)


# Diffusion-KTO


def labelled(desirable):
    return {"x0": pictures(), "desirable": jnp.asarray(desirable, jnp.float32), "cond": {}}


def test_kto_at_the_reference_is_half_its_weights_and_its_gradient_is_beta_over_4():
    d = np.array([1, 1, 0, 1, 0, 0.0])
    got, info = value(diffusion_kto(HALF, data="desirable", beta=3.0, desirable_weight=2.0), REFERENCE, labelled(d))
    np.testing.assert_allclose(got, 0.5 * (2 * d + 1 - d), rtol=1e-6)
    assert np.all(np.asarray(info["implicit_accuracy"]) == 0.5)
    algorithm = diffusion_kto(HALF, data="desirable", beta=3.0)
    drift = jax.grad(lambda w: error(w, pictures()).mean())(REFERENCE)
    np.testing.assert_allclose(gradient(algorithm, labelled(np.ones(N))), 0.75 * drift, rtol=1e-5)
    np.testing.assert_allclose(gradient(algorithm, labelled(np.zeros(N))), -0.75 * drift, rtol=1e-5)


def test_kto_on_pairs_has_half_the_gradient_of_dpo_at_the_reference():
    """For one factor of the margin: KTO's beta is half of Diffusion-DPO's. A pair is two items, hence the 2."""
    got, want = gradient(diffusion_kto(HALF, beta=3.0), pairs()), gradient(diffusion_dpo(HALF, beta=6.0), pairs())
    np.testing.assert_allclose(2 * got, 0.5 * want, rtol=1e-5)


def test_kto_holds_each_picture_against_the_mean_of_the_whole_batch():
    """z is the clamped mean of g at the step's first parameters and the loss's own (t, eps); a constant, with no gradient."""
    algorithm, d = diffusion_kto(HALF, data="desirable", beta=3.0), np.array([1, 0, 0, 1, 1, 0.0])
    sign = 2 * d - 1
    for w in (MOVED, REFERENCE - 0.1 * jax.grad(lambda w: error(w, pictures()).mean())(REFERENCE)):
        g = error(REFERENCE, pictures()) - error(w, pictures())
        z = max(float(g.mean()), 0.0)
        got, info = value(algorithm, w, labelled(d))
        np.testing.assert_allclose(info["margin"], sign * 3.0 * (g - z), atol=2e-5)
        np.testing.assert_allclose(got, 1 - jax.nn.sigmoid(sign * 3.0 * (g - z)), atol=1e-5)
        by_hand = jax.grad(lambda w, z=z: (1 - jax.nn.sigmoid(3 * sign * (error(REFERENCE, pictures()) - error(w, pictures()) - z))).mean())
        np.testing.assert_allclose(gradient(algorithm, labelled(d), w), by_hand(w), atol=1e-5)
    assert z > 0  # the second w denoises better, the first worse: there z is 0
    order = np.array([3, 1, 5, 0, 2, 4])
    mixed = {"x0": pictures()[order], "desirable": jnp.asarray(d[order], jnp.float32), "cond": {}}
    np.testing.assert_allclose(value(algorithm, w, mixed, keys=KEYS[order])[0], got[order], rtol=1e-5)


@pytest.mark.parametrize("utility", ["kto", "loss_averse", "risk_seeking"])
def test_kto_utilities_rise_and_flipping_label_and_gain_changes_nothing(utility):
    from alignment_jax.algorithms.kto import UTILITIES

    h = jnp.linspace(-3, 3, 7)
    assert np.all(np.diff(UTILITIES[utility](h)) < 0)
    curvature = {"kto": 0.0, "loss_averse": 1.0, "risk_seeking": -1.0}[utility]  # of -U at 0: none, convex, concave
    assert np.sign(np.round(jax.grad(jax.grad(UTILITIES[utility]))(jnp.float32(0.0)), 6)) == curvature
    if utility == "kto":
        np.testing.assert_allclose(1 - UTILITIES[utility](h), UTILITIES[utility](-h), atol=1e-6)
    one = diffusion_kto(HALF, data="desirable", beta=3.0, utility=utility)
    a, b = (value(one, MOVED, labelled(d))[0] for d in (np.ones(N), np.zeros(N)))
    half = value(one, MOVED, labelled(np.full(N, 0.5)))[0]
    np.testing.assert_allclose(half, (a + b) / 2, rtol=1e-5, atol=1e-6)  # a probability weighs both labels


def test_kto_learns_from_single_labelled_pictures():
    kwargs = {"data": "desirable", "beta": 25.0}
    parts, _, start, frozen, sampler = worlds.mixture_run("diffusion_kto", **kwargs)
    state = worlds.run_steps("diffusion_kto", 30, **kwargs)[2]
    assert worlds.mean_reward(parts, state.trained, frozen, sampler) > worlds.mean_reward(parts, start.trained, frozen, sampler) + 0.4


# MaPO


def test_mapo_odds_have_their_values_and_no_hole_at_zero():
    np.testing.assert_allclose(odds(jnp.array([0.0, 0.1, 0.3]), 0.5), [1.0, 0.975208, 0.926874], atol=2e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(partial(odds, s=0.5)))(jnp.array([0.0, 1e-6])), -0.25, rtol=1e-4)
    m = jnp.geomspace(1e-6, 50, 200)
    assert np.all(np.diff(odds(m, 0.5)) < 1e-7) and np.isfinite(odds(m, 0.5)).all()


def test_mapo_has_no_reference_and_is_sft_plus_a_margin():
    algorithm = mapo(HALF, beta=0.2, margin_scale=5.0)
    assert dict(algorithm.needs.copies) == {}
    only = {"policy": networks(MOVED)["policy"]}  # any other network would be a KeyError
    got, info = algorithm.loss(KEYS, only, pairs())
    m_w, m_l = (error(MOVED, pairs()[side]) for side in ("winner", "loser"))
    u = 5.0 * (odds(m_w, 0.5) - odds(m_l, 0.5))
    np.testing.assert_allclose(got, m_w + 0.2 * np.log1p(np.exp(-u)), rtol=1e-5)
    np.testing.assert_allclose(info["margin"], u, rtol=1e-4, atol=1e-5)
    got, _ = algorithm.loss(KEYS, only, pairs(loser=pairs()["winner"]))
    np.testing.assert_allclose(got, m_w + 0.2 * LOG2, rtol=1e-5)


# SPIN


def spin_gradient(shift: float, n: int = 2000) -> tuple[float, float, float]:
    """(gradient of the policy's mean, its standard error, loss) when the data is the model's own law moved by `shift`."""
    sampler = gaussian.chain(5, 0.0)

    def net(theta):
        def denoise(x, t, cond):
            alpha, sigma = sampler.schedule.alpha(t)[:, None], sampler.schedule.sigma(t)[:, None]
            return gaussian.exact(x, alpha, sigma, m=gaussian.M + theta)

        return denoise

    algorithm, keys = spin(sampler, (1,), beta=20.0), jax.random.split(KEY, n)
    x0, _ = sample(KEY, net(0.0), {}, sampler, jax.random.normal(jax.random.key(8), (n, 1)))
    same = {name: net(0.0) for name in ("previous", "reference")}
    items = algorithm.rollout(jax.random.split(jax.random.key(9), n), {}, same, {"x0": x0 + shift, "cond": {}})
    assert "x0" not in items and not np.allclose(items["loser"], x0)
    items = algorithm.anchor(keys, same, items)
    each = jax.jit(jax.vmap(jax.grad(lambda th, k, it: algorithm.loss(k[None], {"policy": net(th)},
                                     jax.tree.map(lambda x: x[None], it))[0][0]), (None, 0, 0)))  # fmt: skip
    grads = np.asarray(each(0.0, keys, items))
    loss = algorithm.loss(keys, {"policy": net(0.0)}, items)[0].mean()
    return grads.mean(), grads.std() / np.sqrt(n), float(loss)


def test_spin_rests_where_the_generator_is_the_data_and_else_moves_towards_it():
    g, s, loss = spin_gradient(0.0)
    assert abs(g) < 4 * s and abs(loss - LOG2) < 1e-6
    for shift in (0.3, -0.3):
        g, s, loss = spin_gradient(shift)
        assert -np.sign(shift) * g > 4 * s and abs(loss - LOG2) < 1e-6


def test_spin_plays_against_the_last_iterate():
    """The generator and the reference follow together, and at every third step the margin starts at 0 again."""
    assert dict(spin(HALF, (3,), every=3).needs.copies) == {"previous": ("every", 3), "reference": ("every", 3)}
    log = worlds.run_steps("spin", 7, n=16, size=16, every=3)[-1]
    assert [i for i, row in enumerate(log) if abs(row["margin"]) < 1e-6] == [0, 3, 6]


# InPO and SmPO


def gaussian_net(kind, schedule):
    """The exact network of N(M, S2), whatever it puts out."""

    def denoise(x, t, cond):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        v = alpha**2 * gaussian.S2 + sigma**2
        clean = gaussian.M + alpha * gaussian.S2 / v * (x - alpha * gaussian.M)
        return target(kind, clean, sigma / v * (x - alpha * gaussian.M), schedule.alpha(t), schedule.sigma(t))

    return denoise


def inversion_by_hand(sampler, x0, t, steps, renoise):
    """float64, one sample at a time, on the linear network eps = sigma (x - alpha M) / V."""
    schedule = sampler.schedule
    of = lambda t: (float(schedule.alpha(jnp.float32(t))), float(schedule.sigma(jnp.float32(t))))  # noqa: E731
    x, a, s = float(x0), 1.0, 0.0
    grid = np.linspace(schedule.t_min, schedule.t_max, steps + 1)[1:]
    for until in np.round(grid) if schedule.discrete else grid:
        a1, s1 = of(min(until, t))
        eps = lambda x, a=a1, s=s1: s * (x - a * gaussian.M) / (a**2 * gaussian.S2 + s**2)  # noqa: E731
        found = [eps(x)]
        for _ in range(renoise + 1):
            e = np.mean(found)
            new = a1 / a * (x - s * e) + s1 * e
            found.append(eps(new))
        x, a, s = new, a1, s1
        if until >= t:
            break
    return x


@pytest.mark.parametrize("renoise", [0, 1, 2])
def test_inversion_has_its_closed_form_for_every_time_of_one_batch(renoise):
    """Each row ends exactly at its own t, as it does alone: the official code takes one t a batch, and alpha at another time."""
    sampler = gaussian.chain(10)
    t = jnp.array([0.0, 3.0, 100.0, 101.0, 437.0, 999.0])
    x0 = jnp.linspace(-0.6, 1.7, 6)[:, None]
    net = gaussian_net("eps", sampler.schedule)
    got = invert(net, x0, t, {}, sampler, steps=10, renoise=renoise)
    want = [inversion_by_hand(sampler, x, float(s), 10, renoise) for x, s in zip(x0[:, 0], t, strict=True)]
    np.testing.assert_allclose(got[:, 0], want, rtol=2e-5, atol=1e-5)
    for row in (1, 4):
        np.testing.assert_allclose(invert(net, x0[row : row + 1], t[row : row + 1], {}, sampler, renoise=renoise), got[row : row + 1],
                                   rtol=1e-6)  # fmt: skip


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow"])
def test_inversion_is_one_for_all_parameterisations_and_tends_to_the_ode(kind):
    """x_t = alpha m + sqrt(alpha^2 s^2 + sigma^2) (x0 - m) / s in the limit; the error falls as 1 / steps, and ReNoise cuts it."""
    from alignment_jax.diffusion import cosine

    schedule = rectified_flow(0.0, 0.98) if kind == "flow" else cosine(0.0, 0.98)
    sampler = Sampler(schedule, sampling_grid(schedule, 4), kind)
    t, x0 = jnp.array([0.3, 0.6, 0.98]), jnp.array([[0.1], [1.2], [-0.4]])
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    ode = alpha * gaussian.M + jnp.sqrt(alpha**2 * gaussian.S2 + sigma**2) * (x0 - gaussian.M) / np.sqrt(gaussian.S2)
    error = {(k, r): float(jnp.abs(invert(gaussian_net(kind, schedule), x0, t, {}, sampler, steps=k, renoise=r) - ode).max())
             for k, r in ((50, 0), (200, 0), (50, 1))}  # fmt: skip
    assert error[200, 0] < 0.35 * error[50, 0] and error[50, 1] < error[50, 0] and error[200, 0] < 0.05, error
    if kind != "flow":
        eps = invert(gaussian_net("eps", schedule), x0, t, {}, Sampler(schedule, sampler.grid, "eps"), steps=7)
        np.testing.assert_allclose(invert(gaussian_net(kind, schedule), x0, t, {}, sampler, steps=7), eps, rtol=1e-4, atol=1e-5)


def test_the_inverted_noise_of_a_models_own_sample_is_its_seed_noise():
    """To the solver's error, which halves as steps double."""
    off = []
    for steps in (50, 100):
        schedule = gaussian.chain().schedule
        sampler = Sampler(schedule, sampling_grid(schedule, steps, "trailing"), "eps")
        net = gaussian_net("eps", schedule)
        seed = normal(KEY, (64, 1))
        t = jnp.full(64, 999.0)
        x0, _ = sample(KEY, net, {}, sampler, seed)
        x_t = invert(net, x0, t, {}, sampler, steps=steps, renoise=1)
        off.append(float(jnp.abs(x_t - seed).max()))
    assert off[1] < 0.05 and off[1] < 0.6 * off[0], off


def test_noise_drawn_anew_keeps_the_spread_of_the_inversion():
    sampler, n = gaussian.chain(10), 20_000
    x0, t = gaussian.M + 0.5 * jax.random.normal(KEY, (n, 1)), jnp.full(n, 600.0)
    net, keys = gaussian_net("eps", sampler.schedule), jax.random.split(KEY, n)
    run = jax.jit(partial(invert, net, sampler=sampler, steps=10), static_argnames="eta")
    plain, fresh = run(x0, t, {}), run(x0, t, {}, eta=0.3, keys=keys)
    assert 0.02 < float(jnp.abs(plain - fresh).mean())
    assert abs(float(fresh.std() / plain.std()) - 1) < 0.1


def inverting(factory, **kwargs):
    return factory(gaussian.chain(10), beta=3.0, steps=3, **kwargs)


def test_inpo_measures_errors_where_its_own_inversion_ends():
    """eps = (x_t - alpha x0) / sigma at the sampled t, one t a pair; no gradient passes the inversion, and the start is log 2."""
    algorithm = inverting(inpo)
    keys, items = items_of(algorithm, pairs(), MOVED)
    schedule = gaussian.chain().schedule
    alpha, sigma = schedule.alpha(items["t"])[:, None], schedule.sigma(items["t"])[:, None]
    m = []
    for side in ("winner", "loser"):
        x_t = items[f"{side}_t"]
        want = invert(networks(MOVED)["policy"], items[side], items["t"], {}, gaussian.chain(), steps=3, eta=0.1,
                      keys=jax.vmap(jax.random.fold_in, (0, None))(keys, 2))  # fmt: skip
        np.testing.assert_allclose(x_t, want, rtol=1e-6)
        eps = (x_t - alpha * items[side]) / sigma
        m += [jnp.square(w * x_t - eps).mean(1) for w in (MOVED, REFERENCE)]
    got, info = algorithm.loss(keys, networks(MOVED), items)
    np.testing.assert_allclose(info["margin"], -1.5 * ((m[0] - m[1]) - (m[2] - m[3])), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(value(algorithm, REFERENCE, pairs())[0], LOG2, rtol=1e-6)
    assert len(set(np.asarray(items["t"]).tolist())) > 1


def test_smpo_is_inpo_at_a_sure_label_and_silent_at_a_tie():
    plain, smooth = inverting(inpo, renoise=1), inverting(smpo, gamma=1.0)
    np.testing.assert_array_equal(value(plain, MOVED, pairs())[0], value(smooth, MOVED, pairs(preference=jnp.ones(N)))[0])
    tie = pairs(preference=jnp.full(N, 0.5))
    np.testing.assert_allclose(value(smooth, MOVED, tie)[0], LOG2, rtol=1e-6)
    assert np.all(np.asarray(gradient(smooth, tie, MOVED)) == 0.0)
    strong = inverting(smpo, gamma=10.0)  # (2p - 1) gamma multiplies the margin inside the link
    got, info = value(strong, MOVED, pairs(preference=jnp.full(N, 0.6)))
    np.testing.assert_allclose(got, losses.logistic(2.0 * info["margin"]), rtol=1e-5)
    flipped = value(strong, MOVED, pairs(preference=jnp.full(N, 0.4)))[0]  # signed: the scorer overrules the order
    np.testing.assert_allclose(flipped, losses.logistic(-2.0 * info["margin"]), rtol=1e-5)


# RankDPO


def lists(score, seed=1, k=None):
    k = np.shape(score)[1] if k is None else k
    return {"list": jax.random.normal(jax.random.key(seed), (N, k, 3)), "score": jnp.asarray(score, jnp.float32), "cond": {}}


def test_rankdpo_of_two_is_dpo_times_its_weight():
    """(2^1 - 2^0)(1 / log 2 - 1 / log 3) = .5325, and half of Diffusion-DPO's beta."""
    weight = 1 / np.log(2) - 1 / np.log(3)
    data = lists([[0.1, 7.0]] * N)
    pair = {"winner": data["list"][:, 1], "loser": data["list"][:, 0], "cond": {}}
    rank, dpo = rank_dpo(HALF, beta=3.0), diffusion_dpo(HALF, beta=6.0)
    np.testing.assert_allclose(value(rank, MOVED, data)[0], weight * value(dpo, MOVED, pair)[0], rtol=1e-5)
    np.testing.assert_allclose(gradient(rank, data, MOVED), weight * gradient(dpo, pair, MOVED), rtol=1e-4)
    for name in ("winner_drift", "loser_drift", "implicit_accuracy", "margin"):
        np.testing.assert_allclose(value(rank, MOVED, data)[1][name], value(dpo, MOVED, pair)[1][name], rtol=1e-4, atol=1e-5)


def test_the_worth_of_a_pair_is_its_discounted_gain():
    score = np.array([[0.3, 0.9, -1.0, 0.5]])
    psi = np.asarray(win_rate(jnp.asarray(score, jnp.float32)[:, :, None]))[0]
    np.testing.assert_allclose(psi, [1 / 3, 1.0, 0.0, 2 / 3], rtol=1e-6)
    rank, gain = {0: 3, 1: 1, 2: 4, 3: 2}, 2**psi - 1
    got = np.asarray(worth(jnp.asarray(psi)[None]))[0]
    for i in range(4):
        for j in range(4):
            want = abs(gain[i] - gain[j]) * abs(1 / np.log(1 + rank[i]) - 1 / np.log(1 + rank[j])) if psi[i] > psi[j] else 0.0
            np.testing.assert_allclose(got[i, j], want, atol=1e-6)


def test_rankdpo_does_not_depend_on_the_order_in_a_list_even_with_equal_scores():
    score = np.array([[1.0, 2.0, 2.0, 0.0]] * N)
    data, order = lists(score), np.array([2, 0, 3, 1])
    mixed = {**data, "list": data["list"][:, order], "score": data["score"][:, order]}
    a, b = (value(rank_dpo(HALF, beta=3.0), MOVED, x) for x in (data, mixed))
    np.testing.assert_allclose(a[0], b[0], rtol=1e-5)
    np.testing.assert_allclose(a[1]["implicit_accuracy"], b[1]["implicit_accuracy"], rtol=1e-6)


def test_a_list_of_equals_teaches_nothing():
    for score in (np.ones((N, 3)), np.full((N, 3), np.nan)):
        got, info = value(rank_dpo(HALF), MOVED, lists(score))
        assert np.all(np.asarray(got) == 0.0) and np.all(np.asarray(info["implicit_accuracy"]) == 0.5)
        assert np.all(np.asarray(gradient(rank_dpo(HALF), lists(score), MOVED)) == 0.0)
        assert all(np.isfinite(x).all() for x in info.values())


def test_a_picture_without_a_score_counts_in_no_pair():
    psi = win_rate(jnp.array([[[0.3], [jnp.nan], [1.0], [0.5]]]))
    without = worth(win_rate(jnp.array([[[0.3], [1.0], [0.5]]])))
    got = np.asarray(worth(psi))[0]
    np.testing.assert_allclose(np.delete(np.delete(got, 1, 0), 1, 1), without[0], rtol=1e-6)
    assert np.all(got[1] == 0) and np.all(got[:, 1] == 0)


def test_several_rewards_vote_by_their_order_alone():
    """psi is the mean over rewards, whatever their scales: one that is always louder does not win alone."""
    score = jnp.array([[[1.0, 900.0], [2.0, 100.0], [3.0, 500.0]]])
    np.testing.assert_allclose(win_rate(score)[0], [0.5, 0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(win_rate(score * jnp.array([1000.0, 1e-3]) - 7.0)[0], [0.5, 0.25, 0.75], rtol=1e-6)


def test_one_picture_twice_in_a_list_is_harmless():
    data = lists([[2.0, 1.0]] * N)
    data["list"] = jnp.repeat(data["list"][:, :1], 2, 1)
    assert np.all(np.asarray(value(rank_dpo(HALF), MOVED, data)[1]["margin"]) == 0.0)
    np.testing.assert_allclose(gradient(rank_dpo(HALF, beta=3.0), data, MOVED), 0.0, atol=1e-5)


# guidance away from a second network


def test_guidance_away_from_oneself_is_plain_guidance():
    net = lambda x, t, c: x * c["a"] + jnp.sin(x) * t[:, None]  # noqa: E731
    x, t, cond, null = pictures(), jnp.linspace(0, 1, N), {"a": pictures(seed=3)}, {"a": jnp.full((1, 3), 0.3)}
    for rescale in (0.0, 0.7):
        got = guided_away(net, net, null, 7.5, rescale=rescale)(x, t, cond)
        np.testing.assert_allclose(got, guided(net, null, 7.5, rescale=rescale)(x, t, cond), rtol=1e-5)
    other = lambda x, t, c: 2 * x - c["a"]  # noqa: E731
    got = guided_away(net, other, null, 3.0)(x, t, cond)
    np.testing.assert_allclose(got, other(x, t, null) + 3 * (net(x, t, cond) - other(x, t, null)), rtol=1e-5)


def test_at_scale_1_the_negative_network_is_never_asked():
    def never(x, t, c):
        raise AssertionError

    net = lambda x, t, c: x + c  # noqa: E731
    np.testing.assert_array_equal(guided_away(net, never, 0.0, 1.0)(pictures(), None, 1.0), pictures() + 1.0)


# odd data


@pytest.mark.parametrize("name", PAIRWISE)
def test_two_identical_pictures_prefer_nothing(name):
    """The margin is exactly 0 and the gradient that of no preference: 0, or for MaPO its fine-tuning term's alone."""
    algorithm, same = PAIRWISE[name](HALF), pairs(loser=pairs()["winner"])
    info = value(algorithm, MOVED, same)[1]
    if name != "kto":  # which has no margin of a pair
        assert np.all(np.asarray(info["margin"]) == 0.0) and np.all(np.asarray(info["implicit_accuracy"]) == 0.5)
    want = jax.grad(lambda w: error(w, same["winner"]).mean())(MOVED) if name == "mapo" else jnp.zeros(3)
    np.testing.assert_allclose(gradient(algorithm, same, MOVED), want, atol=2e-5)


@pytest.mark.parametrize("name", PAIRWISE)
def test_ties_alone_keep_the_reference(name):
    """A batch of ties has no gradient at the reference, and the order of its pictures does not count anywhere."""
    algorithm, tie = PAIRWISE[name](HALF), {"preference": jnp.full(N, 0.5)}
    if name != "mapo":
        np.testing.assert_allclose(gradient(algorithm, pairs(**tie)), 0.0, atol=2e-6)
    swapped = pairs(winner=pairs()["loser"], loser=pairs()["winner"], **tie)
    np.testing.assert_allclose(gradient(algorithm, pairs(**tie), MOVED), gradient(algorithm, swapped, MOVED), atol=2e-5)


@pytest.mark.parametrize(("build", "message"), [
    (lambda: diffusion_dpo(HALF, link="rpdo"), "link 'rpdo' is not known; choose one of logistic, rdpo"),
    (lambda: diffusion_dpo(HALF, beta=0.0), "beta .* above 0; got 0.0"),
    (lambda: diffusion_dpo(HALF, weight_space="v"), "weight_space 'v' is not known; choose one of native, eps, x0"),
    (lambda: diffusion_dpo(HALF, label_smoothing=0.5), r"in \[0, 0.5\); got 0.5"),
    (lambda: diffusion_dpo(HALF, link="ipo", label_smoothing=0.1), "link 'ipo' has no label_smoothing"),
    (lambda: inpo(HALF, safeguard=1.2), r"in \[0, 1\], or None; got 1.2"),
    (lambda: inpo(HALF, steps=0), "steps >= 1"),
    (lambda: smpo(HALF, gamma=0.0), "gamma .* above 0; got 0.0"),
    (lambda: diffusion_kto(HALF, data="labels"), "data 'labels' is not known; choose pairs, or desirable"),
    (lambda: diffusion_kto(HALF, utility="cpt"), "utility 'cpt' is not known; choose one of kto"),
    (lambda: diffusion_kto(HALF, undesirable_weight=-1.0), "must not be negative"),
    (lambda: mapo(HALF, margin_scale=0.0), "margin_scale and snr_value are above 0"),
    (lambda: spin(HALF, (3,), every=0), "at least 1; got 0"),
    (lambda: rank_dpo(HALF, beta=-1.0), "beta .* above 0; got -1.0"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused_when_a_method_is_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# data files

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (4, 8, 8, 3), np.uint8)
TEXTS = ["a", "b", "c", "d"]
TOKENS = lambda texts: np.array([[len(t), ord(t[0]) if t else 0] for t in texts], np.int32)  # noqa: E731


def stored(tmp_path, **arrays):
    np.savez(tmp_path / "set.npz", **arrays)
    return str(tmp_path / "set.npz")


def test_ranked_lists_are_read_and_drawn(tmp_path):
    ranked = RNG.integers(0, 256, (4, 3, 8, 8, 3), np.uint8)
    score = np.array([[1, 2, 3], [3, 2, 1], [1, 1, 1], [np.nan, 1, 0]])
    read = files.load_lists(stored(tmp_path, list=ranked, score=score, prompts=TEXTS))
    batch = next(list_source(read, TOKENS, batch=4, seed=0, drop=0.0))
    rows = batch["prompt_id"]
    assert sorted(rows.tolist()) == [0, 1, 2, 3]
    np.testing.assert_array_equal(batch["list"], ranked[rows])
    np.testing.assert_array_equal(batch["score"], score[rows].astype(np.float32))
    np.testing.assert_array_equal(batch["tokens"], TOKENS(TEXTS)[rows])
    dropped = next(list_source(read, TOKENS, batch=4, seed=0, drop=1.0))
    np.testing.assert_array_equal(dropped["tokens"], np.repeat(TOKENS([""]), 4, 0))


@pytest.mark.parametrize(("change", "message"), [
    ({"score": np.ones((4, 3))}, "none of its 4 lists ranks anything"),
    ({"score": np.full((4, 3), np.nan)}, "none of its 4 lists ranks anything"),
    ({"score": np.ones((4, 2))}, r"score must be \[N, K\] or \[N, K, M\] .* got \[4, 2\] for 4 lists of 3"),
    ({"list": IMAGES}, r"list must be uint8 \[N,K,H,W,C\]; got uint8 \(4, 8, 8, 3\)"),
    ({"prompts": TEXTS[:2]}, "equally long"),
    ({"score": None}, "lacks score; it has"),
])  # fmt: skip
def test_lists_that_rank_nothing_are_refused(tmp_path, change, message):
    arrays = {"list": RNG.integers(0, 256, (4, 3, 8, 8, 3), np.uint8), "score": np.arange(12).reshape(4, 3), "prompts": TEXTS} | change
    with pytest.raises(ValueError, match=message):
        files.load_lists(stored(tmp_path, **{k: v for k, v in arrays.items() if v is not None}))
    with pytest.raises(FileNotFoundError, match="no ranked lists at .* an .npz with list, score, prompts"):
        files.load_lists(str(tmp_path / "none.npz"))


@pytest.mark.parametrize("form", ["npz", "folder"])
def test_pictures_with_a_desirable_label_are_read_and_drawn(tmp_path, form):
    from PIL import Image

    d = [1, 0, 0.25, 1]
    path = str(tmp_path)
    if form == "npz":
        path = stored(tmp_path, images=IMAGES, prompts=TEXTS, desirable=d)
    else:
        rows = [{"file": f"{i}.png", "prompt": t, "desirable": v} for i, (t, v) in enumerate(zip(TEXTS, d, strict=True))]
        for row, image in zip(rows, IMAGES, strict=True):
            Image.fromarray(image).save(tmp_path / row["file"])
        (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    images, captions, desirable = files.LABELS[form](path)
    np.testing.assert_array_equal(images, IMAGES)
    assert captions == TEXTS
    batch = next(label_source(images, captions, TOKENS, batch=4, seed=0, desirable=files.both_kinds(desirable)))
    np.testing.assert_array_equal(batch["desirable"], np.array(d, np.float32)[batch["prompt_id"]])
    assert batch["desirable"].dtype == np.float32


def test_missing_wrong_and_one_sided_labels_are_refused(tmp_path):
    plain = files.labelled(stored(tmp_path, images=IMAGES, prompts=TEXTS))
    assert len(plain) == 2 and "desirable" not in next(label_source(*plain, TOKENS, batch=2, seed=0))
    with pytest.raises(ValueError, match="config.data.labels has no \"desirable\""):
        files.both_kinds(None)
    for labels, kind in (([1, 1, 0.5, 1], "good"), ([0, 0, 0, 0.5], "bad")):
        with pytest.raises(ValueError, match=f"all 4 pictures of config.data.labels are marked {kind} .* or use the method sft"):
            files.both_kinds(np.array(labels))
    for wrong in (1.5, np.nan, -1):
        with pytest.raises(ValueError, match=r"row 3: desirable must be in \[0, 1\]"):
            files.labelled(stored(tmp_path, images=IMAGES, prompts=TEXTS, desirable=[1, 0, wrong, 1]))
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png", "prompt": "a", "desirable": 1}\n{"file": "a.png", "prompt": "b"}')
    from PIL import Image

    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match='1 of its 2 rows have "desirable"; give it in all of them, or in none'):
        files.folder(str(tmp_path))


def test_pairs_without_any_preference_are_refused(tmp_path):
    both = {"winner": IMAGES, "loser": IMAGES[::-1], "prompts": TEXTS}
    assert (files.load_pairs(stored(tmp_path, **both))["preference"] == 1).all()
    for change in ({"preference": np.full(4, 0.5)}, {"loser": IMAGES}):
        with pytest.raises(ValueError, match="none of its 4 pairs prefers one picture to another"):
            files.load_pairs(stored(tmp_path, **both | change))
    with pytest.raises(ValueError, match=r"row 2: preference must be in \[0, 1\]; got nan"):
        files.load_pairs(stored(tmp_path, **both, preference=[1, np.nan, 1, 1]))
