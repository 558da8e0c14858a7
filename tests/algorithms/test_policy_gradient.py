"""Policy gradients of DDPO, DPOK and the GRPO family against closed forms, against each other, and against known mistakes."""


import gaussian
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

from alignment_jax.algorithms.critic import critic
from alignment_jax.algorithms.ddpo import ddpo
from alignment_jax.algorithms.dpok import dpok
from alignment_jax.algorithms.grpo import dance_grpo, flow_grpo, mix_grpo
from alignment_jax.algorithms.kl import compared, penalty
from alignment_jax.diffusion import (
    Sampler,
    log_prob,
    rectified_flow,
    sample,
    sampling_grid,
    scaled_linear,
    transition,
)

T, KEY, Y, K = 10, jax.random.key(0), 1.4, 2.0
VP, FLOW = {"ddpo": ddpo, "dpok": dpok}, {"flow_grpo": flow_grpo, "dance_grpo": dance_grpo, "mix_grpo": mix_grpo}


def flow_chain(steps=T, sde=("sqrt", 0.7)):
    schedule = rectified_flow(t_max=0.999)
    return Sampler(schedule, sampling_grid(schedule, steps), "flow", flow_sde=sde)


def flow_policy(theta, sampler):
    """denoise(x, t, cond): the exact velocity of N(M, S2) plus theta [T] at each step."""
    times = jnp.asarray(sampler.grid.t[:-1])

    def denoise(x, t, cond):
        a, s = 1 - t[:, None], t[:, None]
        slope = (s - a * gaussian.S2) / (a**2 * gaussian.S2 + s**2)
        step = jnp.argmin(jnp.abs(times[None] - t[:, None]), 1)
        return slope * (x - a * gaussian.M) - gaussian.M + theta[step][:, None]

    return denoise


def networks(theta, sampler, value=lambda x, i, c: jnp.zeros(len(x))):
    policy = flow_policy if sampler.schedule.flow else gaussian.policy
    return {"policy": policy(theta, sampler), "reference": policy(jnp.zeros_like(theta), sampler), "critic": value}


def reward(x0):
    return -K / 2 * jnp.square(x0[:, 0] - Y)


def made(name, group=8, **kwargs):
    """(algorithm, sampler) of a method on its chain."""
    sampler = flow_chain() if name in FLOW else gaussian.chain(T)
    return (FLOW | VP)[name](sampler, (1,), group=group, **kwargs), sampler


def items_of(algorithm, sampler, n=64, theta=None, rewards=None, advantage=None):
    """The items of a rollout of n samples in groups of eight, anchored; advantage: instead of the method's own."""
    theta = jnp.zeros(sampler.num_steps) if theta is None else theta
    keys, extra = jax.random.split(KEY, n), algorithm.init(KEY)
    data = {"cond": {}, "condition": {}, "prompt_id": jnp.arange(n) // 8}

    @jax.jit
    def items(rewards):
        rolled = algorithm.rollout(keys, extra, networks(theta, sampler), data)
        items, *_ = algorithm.prepare(KEY, extra, rolled, reward(rolled["x0"]) if rewards is None else rewards)
        items |= {"cond": {}, "first": jnp.zeros(len(items["i"]), bool)}
        if advantage is not None:
            items["advantage"] = advantage(rolled["x0"])[items["row"]]
        return algorithm.anchor(keys, networks(theta, sampler), items)

    return items(rewards) if not isinstance(rewards, list) else [items(r) for r in rewards]


def gradient(algorithm, sampler, items, theta=None, **kwargs):
    """The gradient of the mean loss with respect to the shifts theta [T]."""
    theta = jnp.zeros(sampler.num_steps) if theta is None else theta
    keys = jax.random.split(KEY, len(items["i"]))
    step = jax.jit(jax.grad(lambda th, it: algorithm.loss(keys, networks(th, sampler, **kwargs), it)[0].mean()))
    return np.asarray(step(theta, items))


def exact_gradient(sampler):
    """d/dtheta E[-K/2 (x0 - y)^2] = -K (E x0 - y) c_k prod_{j<k} A_j."""
    return -K * (gaussian.law(sampler)[0] - Y) * gaussian.recursion(sampler)[2] * gaussian.downstream(sampler)


def per_sample(algorithm, sampler, items, n, **kwargs):
    """Gradients [n, T] of each sample's summed loss: an item's gradient touches only its own step's shift."""
    th = jnp.zeros(sampler.num_steps)

    def one(item):
        item = jax.tree.map(lambda x: x[None], item)
        return jax.grad(lambda t: algorithm.loss(jax.random.split(KEY, 1), networks(t, sampler, **kwargs), item)[0].sum())(th)

    each = np.asarray(jax.jit(jax.vmap(one))({k: v for k, v in items.items() if k != "cond"} | {"cond": {}}), np.float64)
    return each.reshape(n, -1, sampler.num_steps).sum(1)


def test_t1_the_score_function_is_an_unbiased_estimate_of_the_gradient_and_at_the_start_importance_sampling_is_the_same():
    sampler, n = gaussian.chain(T), 20000
    sf, is_ = (ddpo(sampler, (1,), estimator=e, clip_range=0.2, adv_clip=1e9) for e in ("sf", "is"))
    items = items_of(sf, sampler, n, advantage=reward)
    each = per_sample(sf, sampler, items, n)
    noisy = sampler.stochastic()
    error = each.std(0) / np.sqrt(n)
    assert np.all(np.abs(-each.mean(0) - exact_gradient(sampler))[noisy] < 4 * error[noisy])
    assert np.all(each[:, ~noisy] == 0.0)
    np.testing.assert_allclose(gradient(is_, sampler, items), gradient(sf, sampler, items), rtol=1e-4, atol=1e-5)


def test_t2_the_score_function_is_that_of_the_present_policy_away_from_the_old_one_too():
    sampler = gaussian.chain(T)
    algorithm = ddpo(sampler, (1,), estimator="sf")
    items = items_of(algorithm, sampler)
    theta = 0.2 * jnp.arange(T) / T

    def surrogate(th):
        t = jnp.asarray(sampler.grid.t)[items["i"]]
        step = transition(sampler, items["i"], items["x"], gaussian.policy(th, sampler)(items["x"], t, None))
        return -(items["advantage"] * log_prob(step, items["x_prev"], reduce="mean")).mean()

    np.testing.assert_allclose(gradient(algorithm, sampler, items, theta), jax.grad(surrogate)(theta), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, dtype", [*((name, jnp.float32) for name in ("dpok", *FLOW)), ("mix_grpo", jnp.bfloat16)])
def test_the_ratio_before_the_first_update_is_exactly_one(name, dtype):
    """In float32 against the mean that another program has stored, and with GRPO-Guard's ratio for MixGRPO."""
    options = {"estimator": "ratio_norm"} if name == "mix_grpo" else {}
    *_, log = worlds.run_steps(name, 1, n=16, size=8, dtype=dtype, first_update=dtype == jnp.bfloat16, **options)
    assert all(step["ratio/deviation_max"] == 0.0 and step["ratio/clip_fraction"] == 0.0 for step in log)


def test_t14_likelihoods_are_float32_because_bfloat16_rounds_by_more_than_the_clip_range():
    sampler = gaussian.chain(T)
    x = jax.random.normal(KEY, (64, 256))
    step = transition(sampler, 3, x.astype(jnp.bfloat16), x.astype(jnp.bfloat16))
    value = log_prob(step, step.mean + step.std * jax.random.normal(jax.random.key(1), x.shape), reduce="mean")
    assert step.mean.dtype == value.dtype == jnp.float32
    assert np.abs(value - value.astype(jnp.bfloat16).astype(jnp.float32)).max() > 1e-4


def test_a_sample_that_left_the_clip_range_the_wrong_way_comes_back_where_a_clamped_ratio_has_no_gradient():
    """DPOK's official code clamps: zero gradient for A > 0 and rho < 1 - e, and for A < 0 and rho > 1 + e."""
    algorithm, sampler = made("dpok", clip_range=0.05, kl_weight=0.0)
    items = items_of(algorithm, sampler, 8)
    item = jax.tree.map(lambda x: x[3:4], {k: v for k, v in items.items() if k != "cond"}) | {"cond": {}}
    i = int(item["i"][0])

    @jax.jit
    def loss(shift, a):
        theta = jnp.zeros(T).at[i].set(shift)
        return algorithm.loss(None, networks(theta, sampler), item | {"advantage": jnp.full(1, a), "scored": jnp.ones(1, bool)})[0][0]

    @jax.jit
    def ratio(shift):
        t = jnp.asarray(sampler.grid.t)[item["i"]]
        at = [transition(sampler, item["i"], item["x"], gaussian.policy(jnp.zeros(T).at[i].set(s), sampler)(item["x"], t, None))
              for s in (shift, 0.0)]  # fmt: skip
        return jnp.exp(log_prob(at[0], item["x_prev"], reduce="mean") - log_prob(at[1], item["x_prev"], reduce="mean"))[0]

    seen = set()
    for a in (1.0, -1.0):
        for shift in (0.5, -0.5):
            rho, got = ratio(shift), jax.grad(loss)(shift, a)
            clamped = jax.grad(lambda s, a=a: -a * jnp.clip(ratio(s), 0.95, 1.05))(shift)
            wrong_way = (float(rho) < 1) == (a > 0)
            seen.add(wrong_way)
            assert abs(rho - 1) > 0.05 and clamped == 0.0
            np.testing.assert_allclose(got, -a * jax.grad(ratio)(shift) if wrong_way else 0.0, rtol=1e-3)
    assert seen == {True, False}


def conditional(sampler):
    """x0 | x_k ~ N(slope x_k + offset, variance) along the chain, each [T] float64."""
    A, B, _, std = gaussian.recursion(sampler)
    slope, offset, variance = np.ones(T + 1), np.zeros(T + 1), np.zeros(T + 1)
    for i in reversed(range(T)):
        slope[i], offset[i] = slope[i + 1] * A[i], slope[i + 1] * B[i] + offset[i + 1]
        variance[i] = slope[i + 1] ** 2 * std[i] ** 2 + variance[i + 1]
    return slope[:-1], offset[:-1], variance[:-1]


def test_a_baseline_leaves_the_expected_gradient_as_it_is_and_the_true_value_makes_it_less_noisy():
    sampler, n = gaussian.chain(T), 20000
    algorithm = dpok(sampler, (1,), clip_range=0.2, adv_clip=1e9, kl_weight=0.0)
    slope, offset, variance = (jnp.asarray(v, jnp.float32) for v in conditional(sampler))
    items = items_of(algorithm, sampler, n, advantage=reward)
    noisy, spread = sampler.stochastic(), {}
    values = {
        "none": lambda x, i, c: jnp.zeros(len(x)), "odd": lambda x, i, c: 3.0 * x[:, 0] - 2.0 + i,
        "true": lambda x, i, c: -K / 2 * (jnp.square(slope[i] * x[:, 0] + offset[i] - Y) + variance[i]),
    }  # fmt: skip
    for name, value in values.items():
        each = per_sample(algorithm, sampler, items, n, value=value)
        error = each.std(0) / np.sqrt(n)
        spread[name] = error[noisy].mean()
        assert np.all(np.abs(-each.mean(0) - exact_gradient(sampler))[noisy] < 4 * error[noisy]), name
    assert spread["true"] < 0.7 * spread["none"], spread


def test_the_critic_learns_the_conditional_mean():
    """Its error falls to the closed form E Var(x0 | x_k), which goes from all of Var(x0) to none of it along the chain."""
    sampler, n = gaussian.chain(T), 4000
    algorithm = dpok(sampler, (1,), kl_weight=0.0)
    items = items_of(algorithm, sampler, n, advantage=lambda x0: x0[:, 0])
    network = critic((1,), T, width=32, layers=2)
    params = network.init(KEY, {"label": jnp.ones((1, 3, 4))})
    cond = {"label": jnp.ones((len(items["i"]), 3, 4))}
    assert np.all(np.asarray(network.apply(params, items["x"], items["i"], cond)) == 0.0)
    cond = {"label": cond["label"][:512]}
    tx = optax.adam(1e-2)

    @jax.jit
    def fit(params, memory, key):
        rows = jax.random.randint(key, (512,), 0, len(items["i"]))
        x, i, r = (items[k][rows] for k in ("x", "i", "advantage"))
        grads = jax.grad(lambda p: jnp.square(network.apply(p, x, i, cond) - r).mean())(params)
        updates, memory = tx.update(grads, memory)
        return optax.apply_updates(params, updates), memory

    memory = tx.init(params)
    for key in jax.random.split(KEY, 400):
        params, memory = fit(params, memory, key)
    error = np.square(network.apply(params, items["x"], items["i"], {"label": jnp.ones((len(items["i"]), 3, 4))}) - items["advantage"])
    noisy = sampler.stochastic()
    got = np.array([error[np.asarray(items["i"]) == i].mean() for i in np.flatnonzero(noisy)])
    np.testing.assert_allclose(got, conditional(sampler)[2][noisy], rtol=0.2, atol=5e-3)


def test_dpok_without_a_value_is_ddpo_with_the_same_penalty():
    algorithm, sampler = made("dpok", kl_weight=0.3, clip_range=0.2)
    theta = 0.1 * jnp.arange(T) / T
    items = items_of(algorithm, sampler, theta=theta)
    other = ddpo(sampler, (1,), kl_weight=0.3, clip_range=0.2)
    np.testing.assert_array_equal(gradient(algorithm, sampler, items, theta), gradient(other, sampler, items, theta))


@pytest.mark.parametrize("world", ["vp", "flow"])
def test_t10_penalties_are_their_closed_forms_and_multiples_of_each_other(world):
    """Exact c^2 theta^2 / 2 s^2; DPOK's code leaves the weight c^2 / 2 s^2 out, Flow-GRPO's leaves |dt| out."""
    sampler = flow_chain() if world == "flow" else gaussian.chain(T)
    theta = jnp.linspace(0.1, 0.4, T)
    i = jnp.asarray(np.flatnonzero(sampler.stochastic()))
    x = jax.random.normal(KEY, (len(i), 3))
    nets = networks(theta, sampler)
    now, ref = (transition(sampler, i, x, nets[k](x, jnp.asarray(sampler.grid.t)[i], None)) for k in ("policy", "reference"))
    get = {k: np.asarray(penalty(k, sampler, i, now, compared(k, ref), reduce="mean")) for k in ("exact", "eps", "x0", "v")}
    unit = lambda o: transition(sampler, i, 0 * x, o + 0 * x).mean[:, 0]  # noqa: E731
    c, std, th = np.asarray(unit(1.0) - unit(0.0), np.float64), np.asarray(now.std, np.float64), np.asarray(theta[i], np.float64)
    alpha, sigma = (np.asarray(a, np.float64)[i] for a in sampler.grid[1:])
    np.testing.assert_allclose(get["exact"], c**2 * th**2 / (2 * std**2), rtol=1e-3)
    np.testing.assert_allclose(get["v" if world == "flow" else "eps"], th**2, rtol=1e-3)  # the network's own output
    np.testing.assert_allclose(get["x0"], th**2 * (sigma**2 if world == "flow" else sigma**2 / alpha**2), rtol=1e-3)
    np.testing.assert_allclose(get["eps"], th**2 * (alpha**2 if world == "flow" else 1.0), rtol=1e-3)
    total = penalty("exact", sampler, i, now, compared("exact", ref), reduce="sum")
    np.testing.assert_allclose(total, 3 * get["exact"], rtol=1e-4)
    if world == "flow":
        dt = np.abs(np.diff(sampler.grid.sigma))[i]
        without = penalty("no_dt", sampler, i, now, compared("no_dt", ref), reduce="mean")
        np.testing.assert_allclose(without, dt * get["exact"], rtol=1e-5)


def test_the_weights_of_stable_diffusions_steps_are_the_measured_ones():
    """c^2 / 2 s^2 of 50 DDIM steps at eta = 1: the last two weigh 40 to 75 times a usual one, which an unweighted KL hides."""
    schedule = scaled_linear()
    sampler = Sampler(schedule, sampling_grid(schedule, 50, "leading", steps_offset=1, set_alpha_to_one=False), "eps", eta=1.0)
    i, x = jnp.arange(50), jnp.zeros((50, 1))
    now, ref = (transition(sampler, i, x, x + o) for o in (1.0, 0.0))
    weight = np.asarray(penalty("exact", sampler, i, now, compared("exact", ref), reduce="sum"))
    np.testing.assert_allclose(weight[[0, 25, 48, 49]], [0.131, 0.071, 5.36, 0.50], rtol=0.02)
    np.testing.assert_allclose(weight.sum(), 11.0, rtol=0.02)


def test_t9_the_normalised_ratio_has_mean_zero_and_one_spread_at_every_noise_level():
    """Raw log-ratios have the mean -d^2 / 2 s^2 and the std d / s for means that moved by d: clipping is one-sided and uneven."""
    sampler, n, d = gaussian.chain(T), 20000, 0.03
    C, std = gaussian.recursion(sampler)[2:]
    noisy = np.flatnonzero(sampler.stochastic())
    theta = jnp.asarray(np.where(sampler.stochastic(), d / C, 0.0), jnp.float32)
    u = {}
    for estimator in ("is", "ratio_norm"):
        algorithm = ddpo(sampler, (1,), estimator=estimator, clip_range=1e9)
        items = items_of(algorithm, sampler, n)
        rho = -algorithm.loss(None, networks(theta, sampler), items | {"advantage": jnp.ones(len(items["i"]))})[0]
        u[estimator] = np.log(np.asarray(rho, np.float64)).reshape(n, -1)
    np.testing.assert_allclose(u["is"].mean(0), -(d**2) / (2 * std[noisy] ** 2), rtol=0.3, atol=5e-3)
    np.testing.assert_allclose(u["is"].std(0), d / std[noisy], rtol=0.05)
    np.testing.assert_allclose(u["ratio_norm"].mean(0), 0.0, atol=4 * d / np.sqrt(n))
    np.testing.assert_allclose(u["ratio_norm"].std(0), d, rtol=0.05)


@pytest.mark.parametrize("world", ["vp", "flow"])
def test_noise_scale_zero_is_the_ode_and_one_is_the_sampler(world):
    sampler, ode = (flow_chain(), flow_chain(sde=None)) if world == "flow" else (gaussian.chain(T), gaussian.chain(T, 0.0))
    net, x_T = networks(jnp.zeros(T), sampler)["policy"], jax.random.normal(KEY, (64, 1))
    walk = lambda s, **kw: sample(KEY, net, None, s, x_T, **kw)[0]  # noqa: E731
    np.testing.assert_array_equal(walk(sampler, noise_scale=jnp.ones(T)), walk(sampler))
    np.testing.assert_allclose(walk(sampler, noise_scale=jnp.zeros(T)), walk(ode), atol=2e-6)
    assert not np.allclose(walk(sampler), walk(ode), atol=1e-2)


@pytest.mark.parametrize("rule", [("sqrt", 0.7), ("constant", 0.7)])
def test_t9_noise_in_a_window_keeps_the_marginals(rule):
    """SDE steps inside, ODE steps outside: as steps grow the end is still N(m, .25), by float64 from the transition's own coefficients."""
    steps = 1000
    sampler = flow_chain(steps, rule)
    scale, idx = jnp.zeros(steps).at[300:600].set(1.0), jnp.arange(steps)
    net = flow_policy(jnp.zeros(steps), sampler)
    at = [transition(sampler, idx, jnp.full((steps, 1), v), net(jnp.full((steps, 1), v), jnp.asarray(sampler.grid.t[:-1]), None),
                     noise_scale=scale) for v in (0.0, 1.0)]  # fmt: skip
    B = np.asarray(at[0].mean, np.float64)[:, 0]
    A, std = np.asarray(at[1].mean, np.float64)[:, 0] - B, np.asarray(at[0].std, np.float64)
    assert np.all(std[:300] == 0) and np.all(std[600:] == 0) and np.all(std[300:600] > 0)
    mean, var = 0.0, 1.0
    for i in range(steps):
        mean, var = A[i] * mean + B[i], A[i] ** 2 * var + std[i] ** 2
    assert abs(mean - gaussian.M) < 5e-3 and abs(var - gaussian.S2) < 5e-3


def test_a_window_of_all_steps_is_flow_grpo():
    flow, sampler = made("flow_grpo", kl_weight=0.3, clip_range=0.2)
    mix = mix_grpo(sampler, (1,), group=8, window=T - 1, kl_weight=0.3, clip_range=0.2, advantage="group_batch_std")
    theta = 0.1 * jnp.arange(T) / T
    a, b = (items_of(m, sampler, theta=theta) for m in (flow, mix))
    for name in ("x", "x_prev", "i", "advantage", "mean_old"):
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    np.testing.assert_array_equal(gradient(flow, sampler, a, 2 * theta), gradient(mix, sampler, b, 2 * theta))


def test_steps_outside_the_window_are_the_odes_and_get_exactly_no_gradient_while_it_moves_without_compiling_again():
    sampler, ode = flow_chain(), flow_chain(sde=None)
    algorithm = mix_grpo(sampler, (1,), group=8, window=4, stride=2, every=2, clip_range=0.2)
    keys, theta = jax.random.split(KEY, 16), jnp.zeros(T)
    data = {"cond": {}, "condition": {}, "prompt_id": jnp.arange(16) // 8}
    rollout = jax.jit(lambda e: algorithm.rollout(keys, e, networks(theta, sampler), data))
    prepare = jax.jit(lambda e, r: algorithm.prepare(KEY, e, r, reward(r["x0"])))
    grad = jax.jit(jax.grad(lambda th, it: algorithm.loss(keys, networks(th, sampler), it)[0].mean()))
    anchor = jax.jit(lambda it: algorithm.anchor(keys, networks(theta, sampler), it))
    extra, starts = algorithm.init(KEY), []
    for _ in range(9):
        rolled = rollout(extra)
        items, extra, info = prepare(extra, rolled)
        first = int(info["window"])
        starts.append(first)
        inside = (np.arange(T) >= first) & (np.arange(T) < first + 4)
        got = np.asarray(grad(theta, anchor(items | {"cond": {}, "first": jnp.zeros(len(items["i"]), bool)})))
        assert np.all(got[~inside] == 0.0) and np.all(got[inside] != 0.0)
        for k in range(T):
            x, t = rolled["x"][:, k], jnp.full(16, sampler.grid.t[k])
            moved = transition(ode, k, x, networks(theta, sampler)["policy"](x, t, None)).mean
            assert np.allclose(moved, rolled["x"][:, k + 1], atol=3e-6) == (not inside[k]), (first, k)
    assert starts == [0, 0, 2, 2, 4, 4, 5, 5, 0]  # nine noisy steps: the last place is cut short to stay inside
    assert rollout._cache_size() == prepare._cache_size() == grad._cache_size() == 1


def test_dance_grpo_shares_the_start_of_a_group_and_trains_a_random_part_of_the_steps():
    algorithm, sampler = made("dance_grpo")
    extra = algorithm.init(KEY)
    keys, data = jax.random.split(KEY, 24), {"cond": {}, "condition": {}, "prompt_id": jnp.arange(24) // 8}
    starts = []
    for _ in range(2):
        rolled = algorithm.rollout(keys, extra, networks(jnp.zeros(T), sampler), data)
        items, extra, _ = algorithm.prepare(KEY, extra, rolled, reward(rolled["x0"]))
        start = np.asarray(rolled["x"])[:, 0, 0].reshape(3, 8)
        assert np.all(start == start[:, :1]) and len(set(start[:, 0])) == 3
        assert len(set(np.asarray(rolled["x0"])[:, 0])) == 24
        starts.append(start[0, 0])
    assert starts[0] != starts[1]
    chosen = np.sort(np.asarray(items["i"]).reshape(24, 5), 1)  # 60 % of nine
    assert np.all(np.diff(chosen, axis=1) > 0) and len({tuple(c) for c in chosen}) > 10


@pytest.mark.parametrize("name", [*VP, *FLOW])
def test_equal_rewards_teach_nothing_and_a_rewards_unit_does_not_matter(name):
    algorithm, sampler = made(name, clip_range=0.2, **({} if name == "dance_grpo" else {"kl_weight": 0.0}))
    r = jax.random.normal(jax.random.key(5), (64,))
    rewards = [jnp.full(64, 0.1), jnp.full(64, jnp.nan), r, 1e6 * r + 1e5]
    step = jax.jit(jax.grad(lambda th, it: algorithm.loss(None, networks(th, sampler), it)[0].mean()))
    equal, failed, one, other = (np.asarray(step(jnp.zeros(T), items)) for items in items_of(algorithm, sampler, rewards=rewards))
    assert np.all(equal == 0.0) and np.all(failed == 0.0)
    np.testing.assert_allclose(other, one, rtol=0.02, atol=1e-3 * np.abs(one).max())


@pytest.mark.parametrize("name", FLOW)
def test_groups_of_one_are_refused(name):
    with pytest.raises(ValueError, match="batch.group must be 2 or more; got 1"):
        made(name, group=1)


@pytest.mark.parametrize("make, message", [
    (lambda: flow_grpo(gaussian.chain(T), (1,), group=8), "rectified flow: set sampling.flow_sde"),
    (lambda: dance_grpo(flow_chain(sde=None), (1,), group=8), "DanceGRPO needs a sampler with noise.*flow_sde"),
    (lambda: dpok(gaussian.chain(T, 0.0), (1,)), "DPOK needs a sampler with noise"),
    (lambda: mix_grpo(flow_chain(), (1,), group=8, window=10), "window must have 1 to 9 steps"),
    (lambda: mix_grpo(flow_chain(), (1,), group=8, every=0), "1 or more; got 4, 1 and 0"),
    (lambda: ddpo(gaussian.chain(T), (1,), estimator="reinforce"), "estimator must be one of is, sf"),
    (lambda: ddpo(gaussian.chain(T), (1,), kl="no_dt"), "no flow_sde; choose kl='exact'"),
    (lambda: ddpo(gaussian.chain(T), (1,), kl="reverse"), "kl must be one of exact"),
    (lambda: ddpo(gaussian.chain(T), (1,), timestep_fraction=0.0), "timestep_fraction in"),
    (lambda: ddpo(gaussian.chain(T), (1,), clip_range=0.0), "clip_range and adv_clip must be above 0"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_when_the_method_is_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()
