"""Each method against what is known exactly, on the linear-Gaussian chain."""

from functools import partial

import gaussian
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from alignment_jax.algorithms import advantages, losses
from alignment_jax.algorithms.ddpo import ddpo
from alignment_jax.algorithms.dpo import diffusion_dpo
from alignment_jax.algorithms.draft import draft
from alignment_jax.algorithms.nft import diffusion_nft
from alignment_jax.algorithms.raft import raft
from alignment_jax.algorithms.refl import refl
from alignment_jax.diffusion import NoiseSchedule, Sampler, Transition, log_prob, log_ratio, sampling_grid, transition
from alignment_jax.evaluation.kl import policy_kl
from alignment_jax.models import lora

T, KEY = 10, jax.random.key(0)
DATA = lambda n: {"cond": {}, "condition": {}, "prompt_id": jnp.zeros(n, jnp.int32)}  # noqa: E731
Y, K = 1.4, 2.0


def reward(keys, x0, condition):
    """-K/2 (x0 - y)^2, whose expected gradient is linear in the mean."""
    return -K / 2 * jnp.square(x0[:, 0] - Y)


def networks(theta, sampler):
    policy, reference = gaussian.policy(theta, sampler), gaussian.policy(jnp.zeros_like(theta), sampler)
    return {"policy": policy, "old": reference, "reference": reference, "reward": reward}


def gradient(algorithm, sampler, n, items=None, theta=None, keys=None):
    """Mean gradient and its standard error over n samples, with respect to theta [T]."""
    theta = jnp.zeros(sampler.num_steps) if theta is None else theta
    keys = jax.random.split(KEY, n) if keys is None else keys
    if items is None:
        items = algorithm.rollout(keys, {}, networks(theta, sampler), DATA(n))
        items = algorithm.anchor(keys, networks(theta, sampler), items)
    rows = n // 20
    chunks = [jax.tree.map(lambda x, i=i: x[i * rows : (i + 1) * rows], (keys, items)) for i in range(20)]
    step = jax.jit(jax.grad(lambda th, k, it: algorithm.loss(k, networks(th, sampler), it)[0].mean()))
    grads = np.stack([np.asarray(step(theta, *c), np.float64) for c in chunks])
    return grads.mean(0), grads.std(0, ddof=1) / np.sqrt(20)


def exact_gradient(sampler):
    """T1: d/dtheta E[-K/2 (x0 - y)^2] = -K (E x0 - y) c_k prod_{j<k} A_j."""
    _, _, C, _ = gaussian.recursion(sampler)
    return -K * (gaussian.law(sampler)[0] - Y) * C * gaussian.downstream(sampler)


def test_t1_draft_t_has_the_analytic_gradient():
    sampler = gaussian.chain(T)
    got, error = gradient(draft(sampler, (1,), k=T), sampler, 20000)
    assert np.all(np.abs(-got - exact_gradient(sampler)) < 5 * error + 1e-4)
    assert np.all(error < 0.05 * np.abs(exact_gradient(sampler)) + 1e-3)


def ddpo_items(sampler, n, theta=None, **kwargs):
    """DDPO's items with the reward itself as advantage (score-function form)."""
    theta = jnp.zeros(T) if theta is None else theta
    algorithm = ddpo(sampler, (1,), clip_range=0.2, adv_clip=1e9, **kwargs)
    keys = jax.random.split(KEY, n)
    rolled = algorithm.rollout(keys, {}, networks(theta, sampler), DATA(n))
    items, _, _ = algorithm.prepare(KEY, {}, rolled, reward(None, rolled["x0"], None))
    per = items["i"].size // n
    items |= {"advantage": jnp.repeat(reward(None, rolled["x0"], None), per), "first": jnp.zeros(per * n, bool), "cond": {}}
    item_keys = jax.random.split(KEY, len(items["i"]))
    return algorithm, algorithm.anchor(item_keys, networks(theta, sampler), items), item_keys, per


def test_t1_ddpo_is_an_unbiased_estimate_of_the_same_gradient():
    sampler = gaussian.chain(T)
    algorithm, items, keys, per = ddpo_items(sampler, 40000)
    used = sampler.stochastic()
    got, error = gradient(algorithm, sampler, len(keys), items, keys=keys)
    want = exact_gradient(sampler) / per
    assert np.all(np.abs(-got - want)[used] < 5 * error[used] + 1e-5)
    assert np.all(got[~used] == 0.0)


def test_t2_ppo_at_the_old_parameters_is_the_score_function_gradient_and_the_ratio_is_one():
    sampler = gaussian.chain(T)
    algorithm, items, keys, _ = ddpo_items(sampler, 200)
    theta = jnp.zeros(T)
    ratio = algorithm.loss(keys, networks(theta, sampler), items)[1]["ratio/deviation_max"]
    assert np.all(np.asarray(ratio) == 0.0)

    def score_function(theta):
        times = jnp.asarray(sampler.grid.t)[items["i"]]
        step = transition(sampler, items["i"], items["x"], networks(theta, sampler)["policy"](items["x"], times, None))
        return -(items["advantage"] * log_prob(step, items["x_prev"], reduce="mean")).mean()

    ppo = jax.grad(lambda th: algorithm.loss(keys, networks(th, sampler), items)[0].mean())(theta)
    np.testing.assert_allclose(ppo, jax.grad(score_function)(theta), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [64, 24, 16])
def test_the_ratio_before_the_first_update_is_exactly_one(dtype, size):
    """In float32 and bfloat16, whatever the microbatch: the anchor is a mean, not a log-probability.

    In float32 it is the anchor that another program has stored (first_update=False), not the mean that stands in for it.
    """
    *_, log = worlds.run_steps("ddpo", 3, n=32, size=size, dtype=dtype, first_update=dtype == jnp.bfloat16)
    assert all(step["ratio/deviation_max"] == 0.0 and step["ratio/clip_fraction"] == 0.0 for step in log)


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_t3_the_penalised_optimum_is_the_tilt_only_as_far_as_the_noise_reaches(eta):
    """max E[lam x0] - KL has the shift lam Var(x0 | x_T), which is the tilt's lam Var(x0) only for memoryless chains.

    At that optimum DRaFT's reward gradient and DDPO's KL gradient cancel, the path KL is lam^2 Var / 2, and the gain
    touches the frontier sqrt(2 Var KL) (T18). The bias at eta = .5 is reproduced, not tuned away.
    """
    sampler, lam = gaussian.chain(T, eta), 0.8
    _, _, C, std = gaussian.recursion(sampler)
    down = gaussian.downstream(sampler)
    noisy = sampler.stochastic()
    theta = np.where(noisy, lam * std**2 * down / C, 0.0)
    gain = gaussian.law(sampler, theta)[0] - gaussian.law(sampler)[0]
    reachable = float((std**2 * down**2)[noisy].sum())
    variance = gaussian.law(sampler)[1]
    np.testing.assert_allclose(gain, lam * reachable, rtol=1e-6)
    assert (reachable / variance > 0.97) if eta == 1.0 else (0.4 < reachable / variance < 0.9)

    th = jnp.asarray(theta, jnp.float32)
    kl = policy_kl(KEY, gaussian.policy(th, sampler), gaussian.policy(0 * th, sampler), None, sampler,
                   jax.random.normal(KEY, (16, 1)))  # fmt: skip
    np.testing.assert_allclose(kl, lam**2 * reachable / 2, rtol=1e-3)
    np.testing.assert_allclose(gain, np.sqrt(2 * reachable * float(kl[0])), rtol=1e-3)

    algorithm = ddpo(sampler, (1,), clip_range=0.2, kl_weight=1.0)
    keys = jax.random.split(KEY, 4)
    rolled = algorithm.rollout(keys, {}, networks(th, sampler), DATA(4))
    items, _, _ = algorithm.prepare(KEY, {}, rolled, jnp.zeros(4))  # A = 0: pure KL
    keys = jax.random.split(KEY, len(items["i"]))
    items = algorithm.anchor(keys, networks(th, sampler), {**items, "cond": {}}) | {"first": jnp.zeros(len(keys), bool)}
    kl_gradient = jax.grad(lambda t: algorithm.loss(keys, networks(t, sampler), items)[0].mean())(th)
    per = noisy.sum()
    np.testing.assert_allclose(np.asarray(kl_gradient)[noisy] * per, (lam * C * down)[noisy], rtol=2e-3)


def test_t7_refl_at_the_last_step_is_draft_1():
    """For a deterministic chain that ends at alpha = 1: there the last step's mean is its clean prediction."""
    sampler = gaussian.chain(T, 0.0)
    one = draft(sampler, (1,), k=1)
    other = refl(sampler, (1,), window=1.0 / T)
    keys = jax.random.split(KEY, 40)
    a, _ = gradient(one, sampler, 40, keys=keys)
    b, _ = gradient(other, sampler, 40, keys=keys)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
    assert abs(a[-1]) > 1e-3


def test_draft_k_gives_no_gradient_to_earlier_steps_and_equals_the_whole_chain_on_later_ones():
    """T17 and the split scan: steps outside the last K get exactly 0."""
    sampler = gaussian.chain(T)
    keys = jax.random.split(KEY, 100)
    whole, _ = gradient(draft(sampler, (1,), k=T), sampler, 100, keys=keys)
    last, _ = gradient(draft(sampler, (1,), k=3), sampler, 100, keys=keys)
    assert np.all(last[:-3] == 0.0) and np.all(last[-3:] != 0.0) and np.all(whole != 0.0)


def test_a_chain_and_its_gradient_are_one_program_whatever_their_length():
    """The network stands in a program twice, forward and backward, and does not with every step that it goes back through."""
    net = lambda w: lambda x, t, c: jnp.tanh(w * x)  # noqa: E731
    sampler, counts = gaussian.chain(6), []
    for k in (2, 6):
        x, z = jnp.zeros((8, 1)), jnp.zeros((k, 8, 1))
        end = lambda w, k=k, x=x, z=z: losses.chained(net(w), None, sampler, x, z, 6 - k).sum()  # noqa: E731
        counts.append(jax.jit(jax.grad(end)).lower(1.0).as_text().count("tanh"))
    assert counts[0] == counts[1] > 0


def test_draft_lv_averages_the_last_step_without_bias():
    sampler = gaussian.chain(T, 0.0)
    linear = {"reward": lambda k, x, c: x[:, 0]}
    keys = jax.random.split(KEY, 16)

    def grads(algorithm):
        nets = lambda th: networks(th, sampler) | linear  # noqa: E731
        items = algorithm.rollout(keys, {}, nets(jnp.zeros(T)), DATA(16))
        return jax.grad(lambda th: algorithm.loss(keys, nets(th), items)[0].mean())(jnp.zeros(T))

    np.testing.assert_allclose(grads(draft(sampler, (1,), k=1)), grads(draft(sampler, (1,), k=1, lv=3)), rtol=1e-5)


def fixed_time(alpha2: float) -> Sampler:
    """A schedule of one time only, so that expectations over t are trivial."""
    a, s = np.float32(alpha2**0.5), np.float32((1 - alpha2) ** 0.5)
    schedule = NoiseSchedule(lambda t: a + 0 * t, lambda t: s + 0 * t, 0.0, 1.0)
    return Sampler(schedule, sampling_grid(schedule, 1), "x0")


def test_t8_nft_has_the_denoising_gradient_times_2r_minus_1_and_tilts_exponentially():
    sampler, n, a = fixed_time(0.5), 200_000, 0.4
    alpha, sigma = np.sqrt(0.5), np.sqrt(0.5)
    v = 1.0 / (alpha**2 / sigma**2 + 1 / gaussian.S2)  # Var(x0 | x_t)
    posterior = lambda x: v * (alpha * x / sigma**2 + gaussian.M / gaussian.S2)  # noqa: E731
    x0 = gaussian.M + np.sqrt(gaussian.S2) * jax.random.normal(KEY, (n, 1))
    keys = jax.random.split(jax.random.key(1), n)
    for beta in (1.0, 0.5):
        algorithm = diffusion_nft(sampler, (1,), beta=beta, reference_weight=0.0, adaptive=False)

        def grad(shift, r, algorithm=algorithm):
            nets = lambda s: {"policy": lambda x, t, c: posterior(x) + s, "old": lambda x, t, c: posterior(x)}  # noqa: E731
            items = algorithm.anchor(keys, nets(0.0), {"x0": x0, "cond": {}, "r": r})
            return jax.grad(lambda s: algorithm.loss(keys, nets(s), items)[0].mean())(jnp.float32(shift))

        def sft_grad(weight):
            x_t, _, _ = losses.noised(keys, x0, sampler.schedule)
            return (weight * 2 * (posterior(x_t) - x0)[:, 0]).mean()

        for r in (0.0, 0.25, 1.0):
            np.testing.assert_allclose(grad(0.0, jnp.full(n, r)), sft_grad(2 * r - 1), atol=2e-5)
        assert abs(float(grad(0.0, jnp.full(n, 0.5)))) < 1e-6
        r = 0.5 + a * (x0[:, 0] - gaussian.M)
        g0, g1 = float(grad(0.0, r)), float(grad(1.0, r))
        np.testing.assert_allclose(g0 / (g0 - g1), 2 * a / beta * v, rtol=0.03)  # a quadratic: one Newton step


def test_t11_advantages_are_centred_invariant_and_never_blow_up():
    r = jax.random.normal(KEY, (24,))
    for std in ("group", "batch"):
        a = advantages.group(r, 6, std=std)
        np.testing.assert_allclose(a.reshape(-1, 6).sum(1), 0.0, atol=1e-4)
        np.testing.assert_allclose(advantages.group(7 * r + 3, 6, std=std), a, atol=2e-3)
    np.testing.assert_allclose(advantages.leave_one_out(r, 6).reshape(-1, 6).sum(1), 0.0, atol=1e-5)
    equal = jnp.concatenate([jnp.full(6, 0.1), r[6:]])
    assert np.all(np.asarray(advantages.group(equal, 6))[:6] == 0.0)
    failed = r.at[2].set(jnp.nan).at[5].set(jnp.inf)
    a = np.asarray(advantages.group(failed, 6))
    assert a[2] == 0.0 and a[5] == 0.0 and np.isfinite(a).all() and abs(a[:6].sum()) < 1e-4
    assert np.all(np.asarray(advantages.batch(jnp.full(8, 3.3))) == 0.0)
    assert float(advantages.zero_groups(advantages.group(equal, 6), 6)) == 0.25


def test_per_prompt_statistics_are_those_of_the_last_rewards_of_that_prompt():
    memory = advantages.history(3, 4)
    ids = jnp.array([0, 0, 0, 1])
    a, memory = advantages.per_prompt(jnp.array([1.0, 2.0, 3.0, 10.0]), ids, memory, min_count=3)
    np.testing.assert_allclose(a[:3], (np.array([1, 2, 3]) - 2) / np.std([1, 2, 3]), rtol=1e-4)
    np.testing.assert_allclose(a[3], (10 - 4) / np.std([1, 2, 3, 10]), rtol=1e-4)  # too few of its own: the batch's
    _, memory = advantages.per_prompt(jnp.array([4.0, 5.0, jnp.nan]), jnp.array([0, 0, 0]), memory, min_count=3)
    assert sorted(np.asarray(memory.values[0]).tolist()) == [2.0, 3.0, 4.0, 5.0]  # the oldest went, the failed never came


def test_t13_raft_keeps_the_best_of_two_with_its_known_moments():
    """m + s / sqrt(pi) and s^2 (1 - 1 / pi); ranks within the prompt, not over the batch."""
    sampler, n = fixed_time(0.5), 100_000
    algorithm = raft(sampler, (1,), group=2, top=1)
    x0 = gaussian.M + 0.5 * jax.random.normal(KEY, (n, 1))
    items, _, _ = algorithm.prepare(KEY, {}, {"x0": x0, "cond": {}}, x0[:, 0])
    best = np.asarray(items["x0"])
    assert len(best) == n // 2
    assert abs(best.mean() - (gaussian.M + 0.5 / np.sqrt(np.pi))) < 5e-3
    assert abs(best.var() - 0.25 * (1 - 1 / np.pi)) < 3e-3
    shifted = x0[:, 0] + jnp.repeat(jnp.arange(n // 2) * 10.0, 2)  # prompts of unequal difficulty change nothing
    again, _, _ = algorithm.prepare(KEY, {}, {"x0": x0, "cond": {}}, shifted)
    assert np.mean(np.asarray(again["x0"]) == best) > 0.99


def test_t16_lora_at_scale_zero_is_the_base_bitwise():
    params = worlds.mixture_bundle().init(KEY)
    factors = jax.tree.map(lambda x: x + 0.3, lora.init(KEY, params, rank=3))
    same = jax.tree.map(np.array_equal, lora.merge(params, factors, 0.0), params)
    assert all(jax.tree.leaves(same))
    fresh = lora.merge(params, lora.init(KEY, params, rank=3), 1.0)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, fresh, params)))
    assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, lora.merge(params, factors, 1.0), params)))
    with pytest.raises(ValueError, match="match no kernel"):
        lora.init(KEY, params, rank=2, targets="nowhere")


def test_t17_steps_left_out_of_a_window_have_exactly_zero_gradient():
    sampler = gaussian.chain(T)
    algorithm, items, keys, _ = ddpo_items(sampler, 60)
    keep = items["i"] < 4
    masked = {**items, "advantage": jnp.where(keep, items["advantage"], 0.0)}
    got, _ = gradient(algorithm, sampler, len(keys), masked, keys=keys)
    assert np.all(got[4:] == 0.0) and np.all(got[:4] != 0.0)


def test_t18_a_linear_reward_is_climbed_steadily_and_the_kl_grows():
    sampler = gaussian.chain(T)
    algorithm = draft(sampler, (1,), k=T)
    theta, means, kls = jnp.zeros(T), [], []
    keys = jax.random.split(KEY, 64)
    linear = {"reward": lambda k, x, c: x[:, 0]}
    nets = lambda th: networks(th, sampler) | linear  # noqa: E731
    for _ in range(4):
        items = algorithm.rollout(keys, {}, nets(theta), DATA(64))
        theta = theta - 0.1 * jax.grad(lambda th, it=items: algorithm.loss(keys, nets(th), it)[0].mean())(theta)
        means.append(gaussian.law(sampler, theta)[0])
        usable = np.asarray(theta) * sampler.stochastic()
        kls.append(float(policy_kl(KEY, gaussian.policy(jnp.asarray(usable, jnp.float32), sampler),
                                   gaussian.policy(0 * theta, sampler), None, sampler, jnp.zeros((2, 1)))[0]))  # fmt: skip
    assert np.all(np.diff(means) > 0) and np.all(np.diff(kls) > 0)


def dpo_optimum(shared: bool, n: int = 100_000, beta: float = 4.0) -> float:
    """Preference T1: x ~ N(0, 1), labels by Bradley-Terry with reward 1.3 x, one parameter, the policy's mean."""
    schedule = NoiseSchedule(lambda t: np.float32(0.5**0.5) + 0 * t, lambda t: np.float32(0.5**0.5) + 0 * t, 0.0, 1.0)
    sampler = Sampler(schedule, sampling_grid(schedule, 1), "eps")
    k = jax.random.split(KEY, 4)
    a, b = jax.random.normal(k[0], (n, 1)), jax.random.normal(k[1], (n, 1))
    first = jax.random.uniform(k[2], (n, 1)) < jax.nn.sigmoid(1.3 * (a - b))
    winner, loser = jnp.where(first, a, b), jnp.where(first, b, a)
    net = lambda th: lambda x, t, c: 0.5**0.5 * (x - 0.5**0.5 * th)  # noqa: E731
    algorithm = diffusion_dpo(sampler, beta=beta)
    keys = jax.random.split(k[3], n)

    def loss(theta):
        nets = {"policy": net(theta), "reference": net(0.0)}
        if shared:
            items = algorithm.anchor(keys, nets, {"winner": winner, "loser": loser, "cond": {}})
            return algorithm.loss(keys, nets, items)[0].mean()
        w, l = ({"winner": x, "loser": x, "cond": {}} for x in (winner, loser))
        errors = [algorithm.loss(kk, nets, algorithm.anchor(kk, nets, it))[1]["winner_drift"]
                  for kk, it in ((keys, w), (jax.random.split(k[0], n), l))]  # fmt: skip
        return jax.nn.softplus(0.5 * beta * (errors[0] - errors[1])).mean()

    step = jax.jit(lambda th: (jax.grad(loss)(th), jax.grad(jax.grad(loss))(th)))
    theta = jnp.float32(0.3)
    for _ in range(12):
        g, h = step(theta)
        theta = theta - jnp.clip(g / jnp.maximum(h, 1e-3), -0.3, 0.3)
    return float(theta)


def test_preference_t1_diffusion_dpo_finds_the_bradley_terry_optimum():
    assert abs(dpo_optimum(shared=True) - 1.30) < 0.04


def test_preference_t1_independent_noise_in_a_pair_misses_it():
    """The trap that shared noise guards against: .50 instead of 1.30."""
    assert abs(dpo_optimum(shared=False) - 0.50) < 0.05


def test_diffusion_dpo_at_the_reference_is_log_2_and_swapping_negates_the_margin():
    sampler = fixed_time(0.5)
    keys = jax.random.split(KEY, 6)
    net = lambda w: lambda x, t, c: w * x  # noqa: E731
    items = {"winner": jax.random.normal(KEY, (6, 3)), "loser": jax.random.normal(jax.random.key(2), (6, 3)), "cond": {}}
    swapped = items | {"winner": items["loser"], "loser": items["winner"]}
    algorithm = diffusion_dpo(sampler, beta=3.0)
    nets = lambda w: {"policy": net(w), "reference": net(0.5)}  # noqa: E731

    def run(w, items, algorithm=algorithm):
        return algorithm.loss(keys, nets(w), algorithm.anchor(keys, nets(w), items))

    value, info = run(0.5, items)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    assert np.all(np.asarray(info["implicit_accuracy"]) == 0.5)
    margins = [np.asarray(run(0.8, it)[1]["margin"]) for it in (items, swapped)]
    np.testing.assert_allclose(margins[0], -margins[1], rtol=1e-4)
    for link, want in (("ipo", 1.0), ("hinge", 1.0)):
        np.testing.assert_allclose(run(0.5, items, diffusion_dpo(sampler, link=link))[0], want, rtol=1e-6)
    tie = run(0.8, items | {"preference": jnp.full(6, 0.5)})[0]
    np.testing.assert_allclose(tie, run(0.8, swapped | {"preference": jnp.full(6, 0.5)})[0], rtol=1e-5)
    u = np.log(0.9 / 0.1)  # cDPO's minimiser
    slope = jax.grad(partial(losses.logistic, label_smoothing=0.1))(jnp.float32(u))
    assert abs(float(slope)) < 1e-6 and abs(u - 2.19722) < 1e-5


def test_log_ratio_keeps_what_a_difference_of_log_probabilities_loses():
    """Far from the mean, the difference of two sums is off by more than the clip range; the difference of means is not."""
    x = 30.0 + jax.random.normal(KEY, (1, 4096))
    mean, std = jnp.zeros((1, 4096)), jnp.float32(0.05)
    step = lambda m: Transition(m, std, m)  # noqa: E731
    naive = log_prob(step(mean + 1e-7), x, reduce="mean") - log_prob(step(mean), x, reduce="mean")
    exact = np.mean((1e-7) * (2 * np.asarray(x, np.float64) - 1e-7) / (2 * 0.05**2))
    assert abs(float(naive[0]) - exact) > 1e-4
    assert abs(float(log_ratio(mean + 1e-7, mean, std, x, reduce="mean")[0]) - exact) < 1e-6
