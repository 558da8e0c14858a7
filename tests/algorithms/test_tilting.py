"""Methods that sample the tilt p_ref exp(lam r), and weighted likelihood, against what is known exactly."""

from functools import partial

import gaussian
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment_jax.algorithms import losses
from alignment_jax.algorithms.adjoint_matching import adjoint_matching, lean_adjoints, memoryless
from alignment_jax.algorithms.awm import awm
from alignment_jax.algorithms.nft import diffusion_nft
from alignment_jax.algorithms.prdp import agreement, prdp
from alignment_jax.algorithms.raft import raft
from alignment_jax.algorithms.rwr import lee, rwr
from alignment_jax.algorithms.sft import sft
from alignment_jax.diffusion import NoiseSchedule, Sampler, log_ratio, rectified_flow, sampling_grid, transition

T, KEY, LAM = 10, jax.random.key(0), 1.5
Y, K = 1.5, 2.0


def linear_reward(keys, x0, condition):
    return x0[:, 0]


def quadratic_reward(keys, x0, condition):
    return -K / 2 * jnp.square(x0[:, 0] - Y)


def made(algorithm, nets, n, *, rewards=None, prompt_id=None):
    """(keys, items) of n samples, through rollout, prepare and anchor."""

    def run():
        keys = jax.random.split(KEY, n)
        data = {"cond": {}, "condition": {}, "prompt_id": jnp.arange(n) // 8 if prompt_id is None else prompt_id}
        rolled = algorithm.rollout(keys, algorithm.init(KEY), nets, data)
        items, _, _ = algorithm.prepare(KEY, {}, rolled, rewards(rolled["x0"]) if rewards else None)
        item_keys = jax.random.split(KEY, len(jax.tree.leaves(items)[0]))
        return item_keys, algorithm.anchor(item_keys, nets, {**items, "cond": {}}) | {"first": jnp.zeros(len(item_keys), bool)}

    return jax.jit(run)()


def tilted_shift(sampler, lam):
    """theta [T] of the penalised optimum of a linear reward: the mean of step k moves by lam s_k^2 prod_{j<k} A_j."""
    _, _, C, std = gaussian.recursion(sampler)
    return jnp.asarray(np.where(sampler.stochastic(), lam * std**2 * gaussian.downstream(sampler) / C, 0.0), jnp.float32)


def three(theta, sampler, reward=linear_reward):
    policy, reference = gaussian.policy(theta, sampler), gaussian.policy(0 * theta, sampler)
    return {"policy": policy, "unguided": policy, "reference": reference, "reward": reward}


# Adjoint Matching


def curved(sampler):
    """A network with its own two numbers at each step, so that Jacobians count and steps can be told apart."""
    times = jnp.asarray(sampler.grid.t[:-1])

    def net(w, x, t, cond):
        i = jnp.argmin(jnp.abs(times[None] - t[:, None]), 1)
        return jnp.tanh(x * w[i, :1] + w[i, 1:]) + 0.3 * x

    return net, jax.random.normal(jax.random.key(5), (sampler.num_steps, 2))


def bend(keys, x0, condition):
    return jnp.sin(2 * x0).sum(1) - 0.3 * jnp.square(x0).sum(1)


@pytest.mark.parametrize("index", ["next", "same"])
def test_t5_the_first_gradient_is_minus_twice_that_of_draft_t_with_the_next_index_only(index):
    """The paper's and its code's same-index adjoint is O(dt) off: on eight coarse steps its gradient points elsewhere."""
    sampler, n = gaussian.chain(8), 6
    net, w = curved(sampler)
    nets = lambda w: dict.fromkeys(("policy", "unguided"), partial(net, w)) | {"reference": partial(net, w0), "reward": bend}  # noqa: E731
    w0, algorithm = w, adjoint_matching(sampler, (3,), lam=1.0, timestep_fraction=1.0, adjoint_index=index)
    keys, items = made(algorithm, nets(w), n)
    got = jax.jit(jax.grad(lambda w: algorithm.loss(keys, nets(w), items)[0].sum() / n))(w)

    data = {"cond": {}, "condition": {}}
    x = jax.jit(lambda: algorithm.rollout(jax.random.split(KEY, n), {}, nets(w), data))()["x"].swapaxes(0, 1)
    used = np.flatnonzero(sampler.stochastic())
    noises = jnp.zeros((8, n, 3))
    for i in used:  # the chain's own noise, read back from its states
        step = transition(sampler, i, x[i], net(w, x[i], jnp.full(n, sampler.grid.t[i]), None))
        noises = noises.at[i].set((x[i + 1] - step.mean) / step.std)
    end = lambda w: losses.chained(partial(net, w), None, sampler, x[0], noises, 0)  # noqa: E731
    want = -2 * jax.jit(jax.grad(lambda w: bend(None, end(w), None).mean()))(w)
    if index == "next":
        np.testing.assert_allclose(got[used], want[used], rtol=2e-3, atol=1e-4 * float(jnp.abs(want).max()))
    else:
        assert np.linalg.norm((got - want)[used]) > 0.1 * np.linalg.norm(want[used])
    assert np.all(got[~sampler.stochastic()] == 0.0) and np.all(want[-1] != 0.0)  # a step without noise has no control

    gradient = jax.grad(lambda x: bend(None, x, None).sum())(end(w))
    lean = jax.jit(lambda: lean_adjoints(partial(net, w), None, sampler, x, -gradient))()
    reach = lambda x_T: bend(None, losses.chained(partial(net, w), None, sampler, x_T, noises, 0), None).sum()  # noqa: E731
    whole = jax.jit(jax.grad(reach))(x[0])
    np.testing.assert_allclose(lean[0], -whole, rtol=2e-3, atol=1e-5)  # == autodiff of the unrolled reward
    assert lean.shape == (9, n, 3)


def test_adjoint_matching_has_no_loss_left_at_the_exact_tilt_of_a_linear_reward():
    """There the adjoint is -lam prod A on every path, so that the residual vanishes item by item; nowhere else."""
    sampler = gaussian.chain(T)
    theta = tilted_shift(sampler, LAM)
    algorithm = adjoint_matching(sampler, (1,), lam=LAM, timestep_fraction=1.0)
    keys, items = made(algorithm, three(theta, sampler), 16)
    at = jax.jit(lambda th: algorithm.loss(keys, three(th, sampler), items))
    value, info = at(theta)
    assert float(value.max()) < 1e-6 < 1e-3 < float(at(0 * theta)[0].mean())
    gain = gaussian.law(sampler, theta)[0] - gaussian.law(sampler)[0]
    per = sampler.stochastic().sum()
    np.testing.assert_allclose(info["kl/step"].mean() * per, LAM * gain / 2, rtol=1e-3)  # KL = lam^2 V / 2, gain = lam V


def test_t3_t5_the_linear_quadratic_optimum_is_a_fixed_point_and_its_mean_is_the_tilts():
    """Shift + s^2 E[a_{k-1}] = 0 there. The same-index adjoint would move away from it."""
    sampler, n = gaussian.chain(T), 20000
    A, B, C, std = gaussian.recursion(sampler)
    curvature, centre, G, target = K, Y, np.zeros(T), np.zeros(T)
    for k in range(T - 1, -1, -1):  # V_{k-1} = -curvature / 2 (x - centre)^2
        G[k], target[k] = std[k] ** 2 * curvature / (1 + std[k] ** 2 * curvature), centre
        curvature, centre = A[k] ** 2 * curvature / (1 + std[k] ** 2 * curvature), (centre - B[k]) / A[k]
    shift = jnp.asarray(np.where(std > 0, G * (target - B) / C, 0.0), jnp.float32)
    slope = jnp.asarray(np.where(std > 0, -G * A / C, 0.0), jnp.float32)
    times = jnp.asarray(sampler.grid.t[:-1])

    def policy(params):
        plain = gaussian.policy(params[0], sampler)
        return lambda x, t, c: plain(x, t, c) + params[1][jnp.argmin(jnp.abs(times[None] - t[:, None]), 1)][:, None] * x

    nets = lambda p: {"policy": policy(p), "unguided": policy(p), "reference": policy((0 * shift, 0 * slope)), "reward": quadratic_reward}  # noqa: E731
    scores = {}
    for index in ("next", "same"):
        algorithm = adjoint_matching(sampler, (1,), lam=1.0, timestep_fraction=1.0, adjoint_index=index)
        keys, items = made(algorithm, nets((shift, slope)), n)
        chunks = jax.tree.map(lambda x: x.reshape(20, -1, *x.shape[1:]), (keys, items))
        one = lambda c, a=algorithm: jax.grad(lambda p: a.loss(c[0], nets(p), c[1])[0].mean())((shift, slope))  # noqa: E731
        grads = np.stack(jax.jit(lambda c, f=one: jax.lax.map(f, c))(chunks), 1).astype(np.float64)[:, :, sampler.stochastic()]
        scores[index] = np.abs(grads.mean(0)) / (grads.std(0, ddof=1) / np.sqrt(20) + 1e-9)
    assert scores["next"].max() < 5 and scores["same"].max() > 15, {k: v.max() for k, v in scores.items()}

    m, v = gaussian.law(sampler)
    mean = 0.0
    for k in range(T):
        mean = (1 - G[k]) * (A[k] * mean + B[k]) + G[k] * target[k]
    tilt = (m / v + K * Y) / (1 / v + K)
    np.testing.assert_allclose(mean, tilt, rtol=5e-3)


def test_adjoint_matching_takes_the_last_quarter_always_and_the_rest_at_random():
    sampler = gaussian.chain(20)
    algorithm = adjoint_matching(sampler, (1,), lam=1.0, timestep_fraction=0.5)
    _, items = made(algorithm, three(jnp.zeros(20), sampler), 64)
    chosen = np.asarray(items["i"]).reshape(64, -1)
    assert chosen.shape[1] == 10 and 19 not in chosen  # half of the 19 steps with noise
    assert all(len(set(row)) == 10 and {15, 16, 17, 18} <= set(row) for row in chosen.tolist())
    assert len(np.unique(chosen)) == 19


def test_adjoint_matching_loss_clip_stops_the_gradient_of_outliers_and_failed_rewards_teach_nothing():
    sampler = gaussian.chain(T)
    algorithm = adjoint_matching(sampler, (1,), lam=1.0, timestep_fraction=1.0, loss_clip=1.6)
    steep = lambda k, x, c: jnp.where(jnp.arange(len(x)) < 4, 1.0, 300.0) * x[:, 0]  # noqa: E731
    keys, items = made(algorithm, three(jnp.zeros(T), sampler, steep), 8)
    value, info = algorithm.loss(keys, three(jnp.zeros(T), sampler), items)
    assert np.all(np.asarray(value) <= 1.6 / T + 1e-6)
    rows, clipped = np.asarray(items["row"]), np.asarray(info["loss_clipped"])
    assert np.all(clipped[rows < 4] == 0) and clipped[rows >= 4].mean() > 0.5
    grads = jax.grad(lambda th: (clipped * algorithm.loss(keys, three(th, sampler), items)[0]).sum())(jnp.zeros(T))
    assert np.all(np.asarray(grads) == 0.0)

    broken = lambda k, x, c: jnp.where(jnp.arange(len(x)) == 2, jnp.nan, 1.0) * x[:, 0]  # noqa: E731
    keys, items = made(algorithm, three(jnp.zeros(T), sampler, broken), 8)
    grad = lambda it: jax.grad(lambda th: algorithm.loss(keys, three(th, sampler), it)[0].sum())(jnp.zeros(T))  # noqa: E731
    clean = {**items, "scored": jnp.asarray(np.asarray(items["row"]) != 2), "adjoint": jnp.nan_to_num(items["adjoint"])}
    assert np.all(np.isfinite(grad(items))) and np.array_equal(grad(items), grad(clean))


def flow(rule, steps=40):
    schedule = rectified_flow(t_min=0.0, t_max=1.0)
    return Sampler(schedule, sampling_grid(schedule, steps), "flow", flow_sde=rule)


def start_share(sampler) -> float:
    """The share of Var(x_0) that comes from x_T, on x_0 ~ N(0, 1/4) with its exact velocity."""
    def net(x, t):
        a, s = 1 - t, t
        return (s - a * gaussian.S2) / (a**2 * gaussian.S2 + s**2) * x

    carried, var = 1.0, 1.0
    for i in range(sampler.num_steps):
        x = jnp.ones((1, 1))
        step = transition(sampler, i, x, net(x, float(sampler.grid.t[i])))
        A, s = float(step.mean[0, 0]), float(step.std)
        carried, var = A * carried, A**2 * var + s**2
    return carried**2 / var


def test_adjoint_matching_takes_memoryless_samplers_only_and_says_what_to_set():
    """Elsewhere the tilt is reached in part only (the value-function bias): eta .5 reaches .6 of it.

    Of a sample's variance Flow-GRPO's a = .7 leaves four hundredths to the start, half of that a almost half.
    """
    shares = [start_share(flow(("sqrt", a))) for a in (2**0.5, 0.7, 0.35)]
    assert np.allclose(shares, (0.0, 0.038, 0.457), atol=2e-3) and shares[0] < 1e-6, shares
    assert memoryless(flow(("sqrt", 1.4142))) and memoryless(gaussian.chain(T, 1.0))
    adjoint_matching(flow(("sqrt", 1.4142)), (1,))
    for sampler in (gaussian.chain(T, 0.5), gaussian.chain(T, 0.0), flow(("sqrt", 0.7)), flow(("constant", 1.4142))):
        with pytest.raises(ValueError, match=r"memoryless.*set sampling.eta=1.*flow_sde"):
            adjoint_matching(sampler, (1,))
    for bad, message in (({"adjoint_index": "both"}, "adjoint_index"), ({"timestep_fraction": 0.0}, "timestep_fraction"),
                         ({"loss_clip": -1.0}, "loss_clip")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            adjoint_matching(gaussian.chain(T), (1,), **bad)


# PRDP


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_t4_the_residual_vanishes_at_the_tilt_only_where_a_pair_shares_its_start(eta):
    """With starts of their own the residual of a pair has rms sqrt(2) lam prod A at the very optimum: V(x_T) does not cancel."""
    sampler, n = gaussian.chain(T, eta), 4000
    theta = tilted_shift(sampler, LAM)
    algorithm = prdp(sampler, (1,), group=8, beta=1 / LAM)
    value = lambda **kw: algorithm.loss(*swap(made(algorithm, three(theta, sampler), n, rewards=lambda x: x[:, 0], **kw)))[0]  # noqa: E731
    swap = lambda made: (made[0], three(theta, sampler), made[1])  # noqa: E731
    assert float(value().max()) < 1e-7
    rms = np.sqrt(float(value(prompt_id=jnp.arange(n)).mean()))
    np.testing.assert_allclose(rms, np.sqrt(2) * LAM * np.prod(gaussian.recursion(sampler)[0]), rtol=0.05)


def pair_loss(theta, items, sampler, rewards, beta, group):
    """The paper's loss, written with every pair of every group."""
    R = 0.0
    for i in range(T - 1):  # the last step has no noise
        x, t = items["x"][:, i], jnp.full(len(items["x"]), sampler.grid.t[i])
        now, ref = (transition(sampler, i, x, three(theta, sampler)[name](x, t, None)) for name in ("policy", "reference"))
        R = R + log_ratio(now.mean, ref.mean, now.std, items["x"][:, i + 1], reduce="sum")
    e = (R - rewards / beta).reshape(-1, group)
    d = (e[:, :, None] - e[:, None])[:, *np.triu_indices(group, 1)]
    return jnp.square(d).mean()


def test_prdp_items_have_the_loss_and_gradient_of_all_pairs_and_bound_it_later():
    sampler, theta, beta = gaussian.chain(T), 0.3 * jax.random.normal(KEY, (T,)), 0.7
    algorithm = prdp(sampler, (1,), group=4, beta=beta, clip_range=1e9)
    reward = lambda x: jnp.sin(3 * x[:, 0])  # noqa: E731
    keys, items = made(algorithm, three(theta, sampler), 32, rewards=reward)
    mine = jax.jit(lambda th: algorithm.loss(keys, three(th, sampler), items)[0].mean())
    theirs = jax.jit(lambda th: pair_loss(th, items, sampler, reward(items["x"][:, -1]), beta, 4))
    np.testing.assert_allclose(mine(theta), theirs(theta), rtol=1e-4)
    np.testing.assert_allclose(jax.grad(mine)(theta), jax.grad(theirs)(theta), rtol=1e-3, atol=1e-3)
    for moved in (theta + 0.1, 0 * theta):
        assert float(mine(moved)) > float(theirs(moved))
    # r + const changes nothing
    shifted = made(algorithm, three(theta, sampler), 32, rewards=lambda x: reward(x) + 5.0)[1]
    np.testing.assert_allclose(algorithm.loss(keys, three(theta, sampler), shifted)[0].mean(), mine(theta), rtol=1e-3)


def test_prdp_at_the_reference_is_the_policy_gradient_of_the_reward_with_the_groups_mean_as_baseline():
    """grad = -(2 dr / beta) grad(dR) over pairs, that is 4 G / (G - 1) times REINFORCE on r / beta."""
    sampler, beta, group = gaussian.chain(T), 0.5, 4
    algorithm = prdp(sampler, (1,), group=group, beta=beta)
    theta = jnp.zeros(T)
    keys, items = made(algorithm, three(theta, sampler), 32, rewards=lambda x: x[:, 0])
    got = jax.jit(jax.grad(lambda th: algorithm.loss(keys, three(th, sampler), items)[0].mean()))(theta)
    r = items["x"][:, -1, 0]
    a = (r.reshape(-1, group) - r.reshape(-1, group).mean(1, keepdims=True)).reshape(-1) / beta

    def score(th):
        total = 0.0
        for i in range(T - 1):
            x = items["x"][:, i]
            step = transition(sampler, i, x, gaussian.policy(th, sampler)(x, jnp.full(32, sampler.grid.t[i]), None))
            total = total + log_ratio(step.mean, items["mean_ref"][:, i], step.std, items["x"][:, i + 1], reduce="sum")
        return (a * total).mean()

    np.testing.assert_allclose(got, -4 * group / (group - 1) * jax.jit(jax.grad(score))(theta), rtol=1e-3, atol=1e-3)


def test_prdp_clipping_stops_a_sample_that_went_too_far_the_good_way_and_not_one_that_went_the_bad_way():
    """The trap of clamping alone (as DPOK's code does): samples that drift out the wrong way could never come back."""
    sampler = gaussian.chain(T)
    clipped, free = (prdp(sampler, (1,), group=2, beta=0.5, clip_range=c) for c in (3e-5, 1e9))
    keys, items = made(clipped, three(jnp.zeros(T), sampler), 64, rewards=lambda x: x[:, 0])

    def at(algorithm, theta):
        losses_ = lambda th: algorithm.loss(keys, three(th, sampler), items)  # noqa: E731
        return jax.jit(lambda th: (*losses_(th), jax.jacrev(lambda t: losses_(t)[0])(th)))(theta)

    start, _, first = at(free, jnp.zeros(T))
    np.testing.assert_allclose(at(clipped, jnp.zeros(T))[2], first, rtol=1e-4, atol=1e-3)  # inactive before the first update
    moved, _, slopes = at(free, jnp.full(T, 3e-3))
    value, info, kept = at(clipped, jnp.full(T, 3e-3))
    out = np.asarray(info["ratio/clip_fraction"]) == 1.0
    good, bad = out & np.asarray(moved < start - 1e-4), out & np.asarray(moved > start + 1e-4)
    assert good.sum() > 5 and bad.sum() > 5 and float(info["log_ratio/moved_max"].max()) > 3e-5
    assert np.all(np.asarray(kept)[good] == 0.0)
    np.testing.assert_allclose(value[bad], moved[bad], rtol=1e-5)
    np.testing.assert_allclose(kept[bad], slopes[bad], rtol=1e-4, atol=1e-5)


def test_prdp_groups_share_their_start_within_a_step_and_not_between_steps():
    """Whatever the microbatch: the start comes from the prompt's number, for no microbatch sees its group."""
    sampler = gaussian.chain(T)
    algorithm = prdp(sampler, (1,), group=4)
    nets, keys = three(jnp.zeros(T), sampler), jax.random.split(KEY, 16)
    data = {"cond": {}, "condition": {}, "prompt_id": jnp.arange(16) // 4}
    extra = algorithm.init(KEY)
    rolled = algorithm.rollout(keys, extra, nets, data)
    x_T = np.asarray(rolled["x"][:, 0, 0]).reshape(4, 4)
    assert np.all(x_T == x_T[:, :1]) and len(np.unique(x_T)) == 4 and len(np.unique(rolled["x"][:, -1])) == 16
    part = algorithm.rollout(keys[1::3], extra, nets, jax.tree.map(lambda x: x[1::3], data))
    np.testing.assert_allclose(part["x"], rolled["x"][1::3], rtol=1e-6)
    _, later, _ = algorithm.prepare(jax.random.key(3), extra, rolled, rolled["x0"][:, 0])
    assert not np.any(algorithm.rollout(keys, later, nets, data)["x"][:, 0] == rolled["x"][:, 0])


def test_prdp_failed_rewards_and_lonely_samples_teach_nothing_and_agreement_counts_ties_half():
    sampler = gaussian.chain(T)
    algorithm = prdp(sampler, (1,), group=4)
    fail = lambda x: jnp.where(jnp.arange(8) == 1, jnp.nan, jnp.where(jnp.arange(8) > 4, jnp.inf, x[:, 0]))  # noqa: E731
    keys, items = made(algorithm, three(jnp.zeros(T), sampler), 8, rewards=fail)
    value = np.asarray(algorithm.loss(keys, three(jnp.zeros(T), sampler), items)[0])
    assert np.isfinite(value).all() and np.array_equal(value > 0, [True, False, True, True, False, False, False, False])
    r = jnp.array([[0.0, 1.0, 2.0]])
    assert float(agreement(0 * r, r)) == 0.5 and float(agreement(r, r)) == 1.0 and float(agreement(-r, r)) == 0.0
    assert float(agreement(r, r.at[0, 0].set(jnp.nan))) == 1.0


def test_prdp_refuses_what_does_not_fit():
    for sampler, kwargs, message in ((gaussian.chain(T, 0.0), {}, "sampler with noise"), (gaussian.chain(T), {"group": 1}, "group"),
                                     (gaussian.chain(T), {"beta": 0.0}, "beta")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            prdp(sampler, (1,), **kwargs)


# on the forward process: RWR, RAFT, Lee et al., NFT, AWM


def fixed_time(alpha2: float) -> Sampler:
    """A schedule of one time only, so that expectations over t are trivial."""
    a, s = np.float32(alpha2**0.5), np.float32((1 - alpha2) ** 0.5)
    schedule = NoiseSchedule(lambda t: a + 0 * t, lambda t: s + 0 * t, 0.0, 1.0)
    return Sampler(schedule, sampling_grid(schedule, 1), "x0")


ALPHA = SIGMA = 0.5**0.5
POSTERIOR = 1.0 / (ALPHA**2 / SIGMA**2 + 1 / gaussian.S2)  # Var(x0 | x_t)


def posterior(x):
    return POSTERIOR * (ALPHA * x / SIGMA**2 + gaussian.M / gaussian.S2)


def shifted(s):
    net = lambda x, t, c: posterior(x) + s  # noqa: E731
    base = lambda x, t, c: posterior(x)  # noqa: E731
    return {"policy": net, "unguided": net, "old": base, "ema": base, "reference": base}


def pictures(n):
    return gaussian.M + gaussian.S2**0.5 * jax.random.normal(KEY, (n, 1))


def regression(algorithm, x0, rewards):
    """gradient(s) of the loss on samples x0, with the prediction shifted by s."""
    items, _, _ = algorithm.prepare(KEY, algorithm.init(KEY), {"x0": x0, "cond": {}}, rewards)
    keys = jax.random.split(jax.random.key(1), len(items["row"]))
    items = algorithm.anchor(keys, shifted(0.0), {**items, "cond": {}}) | {"first": jnp.zeros(len(keys), bool)}
    return jax.jit(jax.grad(lambda s: algorithm.loss(keys, shifted(s), items)[0].mean()))


def newton(gradient):
    """The minimiser of a quadratic."""
    g0, g1 = float(gradient(jnp.float32(0.0))), float(gradient(jnp.float32(1.0)))
    return g0 / (g0 - g1)


@pytest.mark.parametrize("per_prompt", [False, True])
def test_t8_rwr_tilts_exponentially_by_a_lam_that_multiplies_the_reward(per_prompt):
    """Velocity shift lam Var(x0 | x_t). The code's 'temperature' multiplies r: a division would give 1 / lam. Softmax in
    small groups is biased towards weaker tilts, which is why a prompt's group must not be small."""
    x0 = pictures(200_000)
    algorithm = rwr(fixed_time(0.5), (1,), group=2000, lam=0.8, per_prompt=per_prompt)
    np.testing.assert_allclose(newton(regression(algorithm, x0, x0[:, 0])), 0.8 * POSTERIOR, rtol=0.03)
    small = rwr(fixed_time(0.5), (1,), group=2, lam=0.8, per_prompt=True)
    assert newton(regression(small, x0, x0[:, 0])) < 0.7 * 0.8 * POSTERIOR


def test_rwr_lies_between_sft_and_best_of_n():
    x0, sampler = pictures(64), fixed_time(0.5)
    prepared = lambda a, r=x0[:, 0]: a.prepare(KEY, {}, {"x0": x0, "cond": {}}, r)[0]  # noqa: E731
    np.testing.assert_array_equal(prepared(rwr(sampler, (1,), lam=0.0))["weight"], 1.0)
    sharp = np.asarray(prepared(rwr(sampler, (1,), group=8, lam=1e6, per_prompt=True))["weight"]).reshape(8, 8)
    np.testing.assert_array_equal(sharp, 8.0 * np.eye(8)[np.asarray(x0).reshape(8, 8).argmax(1)])
    sparse = prepared(rwr(sampler, (1,), group=8, percentile=75, per_prompt=True, draws=3))
    theirs = prepared(raft(sampler, (1,), group=8, top=2, draws=3))
    assert sorted(sparse) == sorted(theirs) and all(np.array_equal(sparse[k], theirs[k]) for k in theirs)
    top = prepared(rwr(sampler, (1,), percentile=90))["row"]
    assert set(np.asarray(top).tolist()) == set(np.argsort(-np.asarray(x0)[:, 0])[:6].tolist())


def test_rwr_weights_ignore_shifts_and_failed_rewards_and_survive_huge_ones():
    x0, sampler = pictures(32), fixed_time(0.5)
    r = x0[:, 0]

    def weights(r, **kwargs):
        algorithm = rwr(sampler, (1,), group=8, lam=2.0, **kwargs)
        return np.asarray(algorithm.prepare(KEY, {}, {"x0": x0, "cond": {}}, r)[0]["weight"])

    np.testing.assert_allclose(weights(r + 100.0), weights(r), rtol=1e-4)
    np.testing.assert_allclose(weights(r).mean(), 1.0, rtol=1e-5)
    for failed in (r.at[3].set(jnp.nan).at[5].set(jnp.inf), 1e30 * r, jnp.full(32, jnp.nan)):
        for per_prompt in (False, True):
            assert np.isfinite(weights(failed, per_prompt=per_prompt)).all()
    assert np.all(weights(r.at[3].set(jnp.nan).at[5].set(jnp.inf))[[3, 5]] == 0) and np.all(weights(jnp.full(32, jnp.nan)) == 0)
    for bad, message in (({"per_prompt": True, "group": 1}, "group"), ({"percentile": 100.0}, "percentile"), ({"refresh": -1}, "refresh")):
        with pytest.raises(ValueError, match=message):
            rwr(sampler, (1,), **{"group": 8, **bad})


@pytest.mark.parametrize("factory", [partial(raft, top=1), partial(rwr, percentile=50, per_prompt=True)])
def test_t13_best_of_two_has_its_known_moments(factory):
    """m + s / sqrt(pi) and s^2 (1 - 1 / pi): the spread that every greedy round costs."""
    x0 = pictures(100_000)
    best = np.asarray(factory(fixed_time(0.5), (1,), group=2).prepare(KEY, {}, {"x0": x0, "cond": {}}, x0[:, 0])[0]["x0"])
    np.testing.assert_allclose(best.mean(), gaussian.M + 0.5 / np.sqrt(np.pi), atol=0.005)
    np.testing.assert_allclose(best.var(), 0.25 * (1 - 1 / np.pi), rtol=0.02)


def test_lee_with_a_reward_of_one_is_1_plus_beta_times_sft():
    x0, sampler = pictures(64), fixed_time(0.5)
    weighted = regression(lee(sampler, (1,), beta=0.5), x0, jnp.ones(64))
    keys = jax.random.split(jax.random.key(1), 64)
    plain = jax.grad(lambda s: sft(sampler).loss(keys, shifted(s), {"x0": x0, "cond": {}})[0].mean())
    for s in (0.0, 0.7):
        np.testing.assert_allclose(weighted(s), 1.5 * plain(s), rtol=1e-5)


def test_lee_ends_at_the_posterior_mean_of_the_reweighted_reference():
    """E[(r + beta) x0 | x_t] / E[r + beta | x_t], by quadrature; and a weight is never negative, whatever the reward."""
    sampler, n, beta = fixed_time(0.5), 200_000, 0.3
    x0 = pictures(n)
    r = lambda x: jax.nn.sigmoid(4 * (x - 0.5))  # noqa: E731
    nodes, w = np.polynomial.hermite_e.hermegauss(60)

    def optimum(x_t):
        at = posterior(x_t) + POSTERIOR**0.5 * nodes[None]
        mass = w * (r(at) + beta)
        return ((mass * at).sum(1) / mass.sum(1))[:, None]

    algorithm = lee(sampler, (1,), beta=beta, snr_gamma=None)
    items = {**algorithm.prepare(KEY, {}, {"x0": x0, "cond": {}}, r(x0[:, 0]))[0], "cond": {}}
    keys = jax.random.split(jax.random.key(1), n)

    def features(base):
        net = lambda c: {"unguided": lambda x, t, _: base(x) + (c * jnp.concatenate([x**0, x, x**2], 1)).sum(1, keepdims=True)}  # noqa: E731
        return np.asarray(jax.jit(jax.grad(lambda c: algorithm.loss(keys, net(c), items)[0].mean()))(jnp.zeros(3)))

    assert np.abs(features(optimum)).max() < 5e-3 < 5e-2 < np.abs(features(posterior)).max()
    rewards = jnp.array([-3.0, 0.5, 7.0, jnp.nan])
    mapped, _, info = lee(sampler, (1,), beta=0.0).prepare(KEY, {}, {"x0": x0[:4], "cond": {}}, rewards)
    np.testing.assert_array_equal(mapped["weight"], [0.0, 0.5, 1.0, 0.0])
    np.testing.assert_allclose(info["reward/outside"], 2 / 3, rtol=1e-6)
    for bad in ({"beta": -1.0}, {"low": 1.0, "high": 1.0}):
        with pytest.raises(ValueError, match="low below high"):
            lee(sampler, (1,), **bad)


def test_awm_on_policy_has_the_denoising_gradient_times_the_advantage():
    """A = const is SFT or, below 0, its opposite; new and old see one (t, eps), else the ratio would not start at 1."""
    x0, sampler = pictures(64), fixed_time(0.5)
    algorithm = awm(sampler, (1,), group=8, draws=1, reference_weight=0.0, ema_weight=0.0)
    keys = jax.random.split(jax.random.key(1), 64)
    plain = jax.grad(lambda s: algorithm_error(s, x0, keys, sampler).mean())
    for a in (1.0, -0.4):
        items = {"x0": x0, "cond": {}, "advantage": jnp.full(64, a), "first": jnp.zeros(64, bool)}
        items = algorithm.anchor(keys, shifted(0.2), items)
        value, info = algorithm.loss(keys, shifted(0.2), items)
        assert np.all(np.asarray(info["ratio/deviation_max"]) == 0.0) and np.allclose(value, -a)
        got = jax.grad(lambda s, it=items: algorithm.loss(keys, shifted(s), it)[0].mean())(0.2)
        np.testing.assert_allclose(got, a * plain(0.2), rtol=1e-5)
        # further out: the good side is cut at rho = 2, the bad side (A < 0) never, it only fades with rho
        far = jax.grad(lambda s, it=items: algorithm.loss(keys, shifted(s), it)[0].mean())(3.0)
        assert np.sign(far) == np.sign(a * plain(3.0)) and abs(far) < abs(a * plain(3.0))


def algorithm_error(s, x0, keys, sampler):
    x_t, _, _ = losses.noised(keys, x0, sampler.schedule)
    return jnp.square(posterior(x_t) + s - x0)[:, 0]


@pytest.mark.parametrize("method", ["awm", "diffusion_nft"])
def test_awm_and_nft_held_by_the_reference_stop_at_the_exponential_tilt(method):
    """x0_theta = x0_ref + Cov(A, x0 | x_t) / w: for a linear reward the tilt of lam = 1 / (5 w std r). At that point a step
    from the policy's own samples leads nowhere."""
    n, w = 400_000, 0.1
    lam = 1 / (5 * w * gaussian.S2**0.5)
    shift = lam * POSTERIOR
    x0 = pictures(n) + lam * gaussian.S2  # the tilt's own samples
    kwargs = {"group": 8, "reference_weight": w, "draws": 1, "advantage": "batch"}
    make = partial(awm, ema_weight=0.0) if method == "awm" else partial(diffusion_nft, adaptive=False)
    algorithm = make(fixed_time(0.5), (1,), **kwargs)
    items, _, _ = algorithm.prepare(KEY, {}, {"x0": x0, "cond": {}}, x0[:, 0])
    keys = jax.random.split(jax.random.key(1), n)

    def gradient(s):
        here = shifted(s) | {"old": shifted(s)["policy"]}
        it = algorithm.anchor(keys, here, {**items, "cond": {}}) | {"first": jnp.zeros(n, bool)}
        nets = lambda s: shifted(s) | {"old": here["old"]}  # noqa: E731
        return float(jax.grad(lambda s: algorithm.loss(keys, nets(s), it)[0].mean())(jnp.float32(s)))

    at_reference = gradient(0.0)
    assert abs(gradient(shift)) < 0.03 * abs(at_reference), (gradient(shift), at_reference)
    assert gradient(0.5 * shift) < -0.2 * abs(at_reference) < 0.2 * abs(at_reference) < gradient(1.5 * shift)


def test_awm_refuses_a_clip_range_of_nothing():
    with pytest.raises(ValueError, match="clip_range"):
        awm(fixed_time(0.5), (1,), clip_range=0.0)
