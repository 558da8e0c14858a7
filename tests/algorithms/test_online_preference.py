"""Step-wise and online preference methods against closed forms, and the mistakes that their official codes teach."""

import gaussian
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from alignment_jax.algorithms.base import Needs
from alignment_jax.algorithms.d3po import d3po, step_pair
from alignment_jax.algorithms.dpo import diffusion_dpo
from alignment_jax.algorithms.kto import diffusion_kto
from alignment_jax.algorithms.mapo import mapo
from alignment_jax.algorithms.online import online, semi_online
from alignment_jax.algorithms.pairs import choose
from alignment_jax.algorithms.sft import sft
from alignment_jax.algorithms.spo import lpo, spo
from alignment_jax.diffusion import NoiseSchedule, Sampler, SamplingGrid, transition
from alignment_jax.rewards.base import Reward
from alignment_jax.training.checkpoint import Checkpointer
from alignment_jax.training.programs import step_value
from alignment_jax.training.state import TrainState, follow

KEY, T = jax.random.key(0), 4
SAMPLER = gaussian.chain(T)
NOISY = SAMPLER.stochastic()


def data(n, group=1):
    return {"cond": {}, "condition": {}, "prompt_id": jnp.arange(n) // group}


def to_the_right(x, x0, t, cond, condition):
    """A judge of states: minus the distance to a point far to the right."""
    return -jnp.abs(x[:, 0] - 50.0)


def networks(theta, judge=to_the_right):
    return {"policy": gaussian.policy(theta, SAMPLER), "reference": gaussian.policy(jnp.zeros(T), SAMPLER), "reward": judge}


def items_of(algorithm, n, group=1, reward=None, judge=to_the_right):
    """(items at theta = ref, info) of n samples; reward(x0) -> [n] for methods that are scored at the end."""
    nets, extra = networks(jnp.zeros(T), judge), algorithm.init(KEY)
    rolled = jax.jit(lambda k: algorithm.rollout(k, extra, nets, data(n, group)))(jax.random.split(KEY, n))
    items, _, info = algorithm.prepare(KEY, extra, rolled, None if reward is None else reward(rolled["x0"][:, 0]))
    items = {**items, "cond": {}}
    return jax.jit(lambda it: algorithm.anchor(None, nets, it))(items), info


def at_the_reference(algorithm, items):
    """(losses, info) of the compiled loss, as the loop computes it."""
    return jax.jit(lambda it: algorithm.loss(None, networks(jnp.zeros(T)), it))(items)


def gradients(algorithm, items, chunks=20):
    """d loss / d theta [T], and its standard error, at theta = ref."""
    rows = len(items["i"]) // chunks * chunks
    split = jax.tree.map(lambda x: x[:rows].reshape(chunks, -1, *x.shape[1:]), items)
    one = jax.grad(lambda theta, it: algorithm.loss(None, networks(theta), it)[0].mean())
    found = np.asarray(jax.jit(jax.vmap(one, (None, 0)))(jnp.zeros(T), split), np.float64)
    return found.mean(0), found.std(0, ddof=1) / chunks**0.5


def normal_cdf(x):
    return np.asarray(jax.scipy.stats.norm.cdf(x))


# -- D3PO ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_d3po_at_the_reference_has_ratio_one_loss_log_2_and_the_closed_gradient(shared):
    """-beta C_k D_k / sqrt(pi V) at step k: D_k what arrives at the end, V = Var(x0), or Var(x0 | x_T) with a shared start."""
    n, beta = 12000, 0.7
    algorithm = d3po(SAMPLER, (1,), group=2, beta=beta, shared_start=shared)
    items, _ = items_of(algorithm, n, 2, lambda x0: 3 * x0)
    value, info = at_the_reference(algorithm, items)
    assert np.asarray(info["ratio/deviation_max"]).max() < 1e-5
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    A, _, C, _ = gaussian.recursion(SAMPLER)
    variance = gaussian.law(SAMPLER)[1] - (np.prod(A) ** 2 if shared else 0.0)
    want = np.where(NOISY, -beta * C * gaussian.downstream(SAMPLER) / np.sqrt(np.pi * variance), 0.0) / NOISY.sum()
    got, error = gradients(algorithm, items)
    assert np.all(np.abs(got - want) < 5 * error + 1e-7) and np.all(error[NOISY] < 0.15 * np.abs(want[NOISY]))
    starts = items["x"][items["i"] == 0]
    assert np.array_equal(starts[:, 0], starts[:, 1]) == shared


def test_in_the_loop_the_ratio_to_the_reference_starts_at_one():
    """Up to the rounding of two compiled programs, whose share of the clip range, .1, is nothing; then it moves."""
    first, second = worlds.run_steps("spo", 2, n=16, size=24)[-1]
    assert first["ratio/deviation_max"] < 2e-6 and abs(first["loss"] - np.log(2)) < 1e-5
    assert second["ratio/deviation_max"] > 1e-4


def memoryless(variance: float) -> Sampler:
    """One step, x0 = a theta + s z with s^2 = variance: a policy whose likelihood is a Gaussian's."""
    a, s = np.float32((1 - variance) ** 0.5), np.float32(variance**0.5)
    schedule = NoiseSchedule(lambda t: a * (1 - t), lambda t: t + s * (1 - t), 0.0, 1.0)
    grid = SamplingGrid(np.array([1, 0], np.float32), np.array([0, a], np.float32), np.array([1, s], np.float32))
    return Sampler(schedule, grid, "x0", eta=1.0)


def constant(theta):
    return lambda x, t, cond: jnp.broadcast_to(theta, x.shape)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_d3po_on_one_step_is_dpo_on_its_likelihood(reduce):
    """Also the convention: a mean over D entries is the sum's beta divided by D."""
    sampler, n, d, beta = memoryless(0.25), 64, 3, 2.0
    algorithm = d3po(sampler, (d,), group=2, beta=beta, clip_range=0.99, reduce=reduce)
    nets = lambda th: {"policy": constant(th), "reference": constant(0.0)}  # noqa: E731
    rolled = algorithm.rollout(jax.random.split(KEY, n), algorithm.init(KEY), nets(0.0), data(n, 2))
    items, _, _ = algorithm.prepare(KEY, algorithm.init(KEY), rolled, rolled["x0"].sum(1))
    items = algorithm.anchor(None, nets(0.0), {**items, "cond": {}})
    x0 = np.asarray(rolled["x0"], np.float64).reshape(-1, 2, d)
    order = np.argsort(-x0.sum(2), axis=1)
    winner, loser = (np.take_along_axis(x0, order[:, j : j + 1, None], 1)[:, 0] for j in (0, 1))
    theta = 0.05

    def log_p(x, th):
        return -np.square(x - 0.75**0.5 * th).sum(1) / (2 * 0.25)

    u = beta * ((log_p(winner, theta) - log_p(winner, 0)) - (log_p(loser, theta) - log_p(loser, 0)))
    u = u / d if reduce == "mean" else u
    np.testing.assert_allclose(algorithm.loss(None, nets(theta), items)[0], np.logaddexp(0, -u), rtol=1e-4)


def test_ties_and_failed_rewards_teach_d3po_nothing():
    algorithm = d3po(SAMPLER, (1,), group=2)
    rolled = {"x": jax.random.normal(KEY, (40, T + 1, 1))}
    for rewards in (jnp.zeros(40), jnp.full(40, jnp.nan)):
        items, _, info = algorithm.prepare(KEY, algorithm.init(KEY), rolled, rewards)
        assert info["pairs/counted"] == 0 and np.all(np.asarray(items["weight"]) == 0.0)
    items = algorithm.anchor(None, networks(jnp.zeros(T)), {**items, "cond": {}})
    assert np.all(gradients(algorithm, items)[0] == 0.0)
    half = jnp.arange(40) // 2 % 2 == 0  # every other pair is a tie: the rest is not diluted
    items, _, info = algorithm.prepare(KEY, algorithm.init(KEY), rolled, jnp.where(half, 0.0, jnp.arange(40.0)))
    assert info["pairs/counted"] == 0.5 and abs(float(items["weight"].mean()) - 1) < 1e-6
    assert np.all(np.asarray(items["row"])[np.asarray(items["weight"]) > 0] % 2 == 1)  # the winners' rows


def test_outside_the_clip_a_pair_is_frozen_and_inside_it_is_not():
    anchor, loss = step_pair(memoryless(0.25), beta=1.0, clip_range=0.1, reduce="mean")
    x_prev = jnp.array([[[0.5], [-0.5]]])
    items = {"x": jnp.zeros((1, 1, 1)), "x_prev": x_prev, "i": jnp.zeros(1, jnp.int32), "weight": jnp.ones(1), "cond": {}}
    items = anchor(None, {"reference": constant(0.0)}, items)
    slope = jax.grad(lambda th: loss(None, {"policy": constant(th)}, items)[0].sum())
    assert float(slope(0.0)) < -0.1 and float(slope(2.0)) == 0.0


# -- SPO and LPO ---------------------------------------------------------------------------------------------------------


def test_spo_with_two_candidates_points_exactly_to_the_preferred_side():
    """-beta C_k / (s_k sqrt(pi)) at every step, whatever x_t: only because both candidates come from the same x_t."""
    beta = 0.7
    algorithm = spo(SAMPLER, (1,), k=2, beta=beta, threshold=0.0, start=0.0)
    items, info = items_of(algorithm, 4000)
    assert items["x"].shape[1] == 1 and info["pairs/counted"] == 1.0
    value, said = at_the_reference(algorithm, items)
    np.testing.assert_allclose(value, np.log(2), rtol=2e-5)
    assert np.asarray(said["ratio/deviation_max"]).max() < 1e-5
    _, _, C, std = gaussian.recursion(SAMPLER)
    want = np.where(NOISY, -beta * C / np.sqrt(np.pi) / np.where(NOISY, std, 1.0), 0.0) / NOISY.sum()
    got, error = gradients(algorithm, items)
    assert np.all(np.abs(got - want) < 5 * error + 1e-7) and np.all(error[NOISY] < 0.1 * np.abs(want[NOISY]))

    # the trap: candidates of two different x_t credit the step with what came before it, and lose s / sqrt(s^2 + Var mu)
    half = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), {k: items[k] for k in ("x", "x_prev", "i", "mean_ref")})
    side = jax.random.bernoulli(KEY, shape=(2, half["i"].shape[1], 1))
    y = jnp.where(side, half["x_prev"][:, :, 0], half["x_prev"][:, :, 1])
    order = lambda z: jnp.stack([jnp.where(y[0] > y[1], z[0], z[1]), jnp.where(y[0] > y[1], z[1], z[0])], 1)  # noqa: E731
    across = {"x": order(half["x"][:, :, 0]), "x_prev": order(y), "mean_ref": order(half["mean_ref"][:, :, 0]), "i": half["i"][0],
              "weight": jnp.ones(len(half["i"][0])), "cond": {}}  # fmt: skip
    A, _, _, _ = gaussian.recursion(SAMPLER)
    variance = [1.0]  # of the chain's states
    for i in range(T):
        variance.append(A[i] ** 2 * variance[i] + std[i] ** 2)
    lost = std / np.sqrt(std**2 + A**2 * np.array(variance[:T]))
    wrong, error = gradients(algorithm, across)
    assert np.all(np.abs(wrong - want * lost) < 5 * error + 1e-7) and lost[NOISY].max() < 0.95 and lost[NOISY].min() < 0.2


def test_a_judge_of_clean_predictions_that_ranks_alike_gives_the_same_pairs_as_one_of_states():
    clean = lambda x, x0, t, cond, condition: -jnp.abs(x0[:, 0] - 50.0)  # noqa: E731
    algorithm = spo(SAMPLER, (1,), k=3, threshold=0.0, start=0.0)
    a, b = (items_of(algorithm, 60, judge=judge)[0] for judge in (to_the_right, clean))
    np.testing.assert_array_equal(a["x_prev"], b["x_prev"])


def test_the_walk_goes_on_from_a_random_candidate_and_is_the_samplers_own():
    """Kolmogorov-Smirnov against the chain's exact law; walking on from the best would shift it by a standard deviation."""
    n = 3000
    items, _ = items_of(spo(SAMPLER, (1,), k=4, threshold=0.0, start=0.0), n)
    A, B, _, std = gaussian.recursion(SAMPLER)
    mean, variance = 0.0, 1.0
    for i in np.flatnonzero(NOISY):
        x = np.sort(np.asarray(items["x"][np.asarray(items["i"]) == i]).ravel())
        distance = np.abs(normal_cdf((x - mean) / variance**0.5) - (np.arange(n) + 0.5) / n).max()
        assert distance < 1.95 / n**0.5, (i, distance)
        mean, variance = A[i] * mean + B[i], A[i] ** 2 * variance + std[i] ** 2


def test_pairs_within_the_threshold_weigh_nothing_and_no_pair_at_all_is_no_nan():
    algorithm = spo(SAMPLER, (1,), k=2, threshold=0.3, start=0.0)
    for judge in (lambda x, *_: jnp.zeros(len(x)), lambda x, *_: jnp.full(len(x), jnp.nan), lambda x, *_: 0.1 * jnp.sign(x[:, 0])):
        items, info = items_of(algorithm, 40, judge=judge)
        assert info["pairs/counted"] == 0.0 and np.all(np.asarray(items["weight"]) == 0.0)
    assert np.all(np.asarray(at_the_reference(algorithm, items)[0]) == 0.0) and np.all(gradients(algorithm, items)[0] == 0.0)


def test_the_dynamic_threshold_grows_linearly_with_the_steps_std():
    sampler = gaussian.chain(8)
    std = gaussian.recursion(sampler)[3][sampler.stochastic()]
    least = 0.35 + 0.15 * (std - std.min()) / np.ptp(std)
    algorithm = lpo(sampler, (1,), threshold=(0.35, 0.5))
    for share in (0.34, 0.4, 0.45, 0.51):
        rolled = {"gap": jnp.full((1, len(std)), 2 * np.arctanh(share)), "x": jnp.zeros((1, len(std), 1, 1)),
                  "x_prev": jnp.zeros((1, len(std), 2, 1))}  # fmt: skip
        items, _, _ = algorithm.prepare(KEY, {}, rolled, None)
        np.testing.assert_array_equal(np.asarray(items["weight"]) > 0, share > least)


def test_a_latent_judge_needs_neither_decoder_nor_clean_predictions():
    """The compiled rollout calls the network once a step with a latent scorer, and once more for candidates with another."""

    class Parts:
        class bundle:
            @staticmethod
            def decode(params, x0):
                decoded.append(1)
                return x0

    decoded, calls = [], {}
    for noisy in (True, False):
        Parts.reward = Reward("r", lambda params, x, condition: x[:, 0], noisy=noisy)
        judge = lambda *a: step_value(Parts, {"params": None, "reward": None}, *a)  # noqa: E731
        nets = {"policy": lambda x, t, cond: jnp.tanh(x), "reward": judge}
        algorithm = lpo(SAMPLER, (1,), k=2)
        program = jax.jit(lambda k, a=algorithm, n=nets: a.rollout(k, {}, n, data(8)))
        calls[noisy] = program.lower(jax.random.split(KEY, 8)).compile().as_text().count(" tanh(")
        assert bool(decoded) != noisy
    assert calls[True] < calls[False], calls


# -- pairs and the driver ------------------------------------------------------------------------------------------------


def exact_dpo(beta):
    """DPO with the exact likelihood of the one-step policy: the pair loss of the closed forms."""

    def make(sampler):
        anchor, loss = step_pair(sampler, beta=beta, clip_range=1 - 1e-6, reduce="sum")

        def of(items):
            x = jnp.stack([items["winner"], items["loser"]], 1)
            return {"x": jnp.zeros_like(x[:, :1]), "x_prev": x, "i": jnp.zeros(len(x), jnp.int32), "weight": jnp.ones(len(x)),
                    "cond": {}}  # fmt: skip

        def soft(keys, nets, items):
            pair = {**of(items), "mean_ref": items["mean_ref"]}
            mu = transition(sampler, 0, pair["x"][:, 0], nets["policy"](pair["x"][:, 0], jnp.ones(len(keys)), {}))
            ref = pair["mean_ref"][:, 0]
            ratio = ((mu.mean - ref)[:, None] * (2 * pair["x_prev"] - (mu.mean + ref)[:, None]) / (2 * mu.std**2)).sum(-1)
            u, p = beta * (ratio[:, 0] - ratio[:, 1]), items["preference"]
            return p * jax.nn.softplus(-u) + (1 - p) * jax.nn.softplus(u), {"margin": u}

        inner = diffusion_dpo(sampler)
        fix = lambda keys, nets, items: {**items, "mean_ref": anchor(keys, nets, of(items))["mean_ref"]}  # noqa: E731
        return inner._replace(loss=soft, anchor=fix)

    return make


V, SLOPE, BETA = 0.25, 1.2, 0.8
ONE = memoryless(V)
SCALE = (1 - V) ** 0.5  # of theta in the mean


def nets_of(theta, reference):
    return {"policy": constant(theta), "unguided": constant(theta), "reference": constant(reference)}


def round_of(algorithm, theta, reference, key, n, x0=None, extra=None):
    """items of one step of the driver."""
    keys = jax.random.split(key, n)
    given = data(n, 4) | ({} if x0 is None else {"x0": x0})
    extra = algorithm.init(KEY) if extra is None else extra
    rolled = algorithm.rollout(keys, extra, nets_of(theta, reference), given)
    items, extra, info = algorithm.prepare(key, extra, rolled, SLOPE * rolled["x0"][:, 0])
    keys = jax.random.split(key, len(items["winner"]))
    items = algorithm.anchor(keys, nets_of(theta, reference), {**items, "cond": {}})
    return keys, items, extra, info


def slope_of(algorithm, keys, items, theta, reference):
    return jax.grad(lambda th: algorithm.loss(keys, nets_of(th, reference), items)[0].mean())(theta)


@pytest.mark.parametrize("rule", ["frozen", ("every", 8)])
def test_a1a_a_fixed_reference_gives_one_tilt_for_every_round_and_a_moving_one_adds_one_a_round(rule):
    """mean m + v a / beta after any round, or m + k v a / beta after k rounds; soft Bradley-Terry labels, exact likelihood."""
    algorithm = online(ONE, (1,), group=4, loss=exact_dpo(BETA), sure=1.0, pairs="all", reference=rule)
    assert algorithm.needs.copies == {"reference": rule}

    @jax.jit
    def newton(theta, reference, key):
        keys, items, _, _ = round_of(algorithm, theta, reference, key, 64)
        g = lambda th: slope_of(algorithm, keys, items, th, reference)  # noqa: E731
        return theta - g(theta) / jax.grad(g)(theta)

    theta, reference, ends = jnp.float32(0.3), jnp.float32(0.3), []
    for step in range(1, 25):
        theta = newton(theta, reference, jax.random.fold_in(KEY, step))
        reference = follow(algorithm.needs.copies["reference"], reference, theta, step)
        if step % 8 == 0:
            ends.append(float(SCALE * (theta - 0.3)))
    tilt = V * SLOPE / BETA
    np.testing.assert_allclose(ends, [tilt] * 3 if rule == "frozen" else [tilt, 2 * tilt, 3 * tilt], rtol=2e-3)


def test_a1b_an_annotator_that_cannot_tell_leaves_parameters_where_they_are():
    algorithm = online(ONE, (1,), group=4, loss=exact_dpo(BETA), tie=1e9)
    keys, items, _, info = round_of(algorithm, 0.3, 0.3, KEY, 64)
    assert float(info["pairs/ties"]) == 1.0 and abs(float(slope_of(algorithm, keys, items, 0.3, 0.3))) < 1e-7
    assert float(slope_of(algorithm, keys, items, 0.6, 0.3)) > 0  # away from the reference it pulls back


def test_a1c_once_samples_are_like_the_data_semi_online_learns_nothing():
    algorithm, n = semi_online(ONE, (1,), loss=exact_dpo(BETA)), 4000

    def found(mean):
        x0 = mean + V**0.5 * jax.random.normal(jax.random.key(5), (n, 1))
        keys, items, _, _ = round_of(algorithm, 0.3, 0.3, KEY, n, x0)
        one = lambda k, it: slope_of(algorithm, k, it, 0.3, 0.3)  # noqa: E731
        slopes = np.asarray(jax.vmap(one)(keys.reshape(20, -1), jax.tree.map(lambda x: x.reshape(20, -1, *x.shape[1:]), items)))
        return slopes.mean(), slopes.std(ddof=1) / 20**0.5

    same, error = found(SCALE * 0.3)
    assert abs(same) < 4 * error
    better, error = found(SCALE * 0.3 + 0.5)
    assert better < -10 * error


def test_semi_online_counts_only_losers_below_the_bar():
    algorithm = semi_online(ONE, (1,), loss=exact_dpo(BETA), below=0.1)
    assert algorithm.needs.data == "labels" and algorithm.needs.reward == "value"
    _, items, _, _ = round_of(algorithm, 0.3, 0.3, KEY, 40, jnp.ones((40, 1)))
    np.testing.assert_array_equal(np.asarray(items["of_driver"]) > 0, SLOPE * np.asarray(items["loser"])[:, 0] < 0.1)
    assert np.all(np.asarray(items["winner"]) == 1.0)


def test_a1d_order_and_ages_of_the_buffer_survive_a_resume(tmp_path):
    """Earlier pairs come back newest first with their own condition, until they are max_age steps old."""
    algorithm = online(ONE, (1,), group=2, buffer=6, max_age=3, sure=0.5, cond={"c": jax.ShapeDtypeStruct((1, 2), jnp.float32)})
    prepare = jax.jit(algorithm.prepare)

    def step(extra, number):
        x0 = jnp.arange(4.0)[:, None] + 10 * number  # two groups of two: the second one wins
        rolled = {"x0": x0, "cond": {"c": jnp.full((4, 2), number, jnp.float32)}}
        return prepare(KEY, extra, rolled, x0[:, 0])

    straight, resumed = algorithm.init(KEY), algorithm.init(KEY)
    for number in range(5):
        items, straight, info = step(straight, number)
        if number == 2:
            whole = lambda extra: TrainState(jnp.int32(2), {"w": jnp.ones(1)}, {"m": jnp.ones(1)}, {}, {}, None, extra, KEY)  # noqa: E731
            keeper = Checkpointer(tmp_path)
            keeper.save(whole(resumed), {})
            resumed = keeper.restore(whole(algorithm.init(KEY)))[0].extra
            keeper.close()
        again, resumed, _ = step(resumed, number)
        jax.tree.map(np.testing.assert_array_equal, again, items)
    np.testing.assert_array_equal(items["winner"][:, 0], [41, 43, 31, 33, 21, 23, 11, 13])
    np.testing.assert_array_equal(items["cond"]["c"][:, 0], [4, 4, 3, 3, 2, 2, 1, 1])
    np.testing.assert_allclose(items["of_driver"], np.array([1, 1, 1, 1, 1, 1, 0, 0]) * 8 / 6)  # the oldest is 3 steps old
    assert float(info["pairs/age"]) == 1.0


@pytest.mark.parametrize("n, mean, variance", [(2, 1 / np.pi**0.5, 1 - 1 / np.pi), (4, 1.029375, 0.491715)])
def test_best_and_worst_of_n_have_the_moments_of_order_statistics(n, mean, variance):
    algorithm = online(ONE, (1,), group=n, loss=exact_dpo(BETA))
    groups = 6000
    keys = jax.random.split(KEY, groups * n)
    rolled = jax.jit(lambda k: algorithm.rollout(k, {}, nets_of(0.0, 0.0), data(groups * n, n)))(keys)
    items, _, _ = algorithm.prepare(KEY, algorithm.init(KEY), rolled, 5 * rolled["x0"][:, 0])
    for side, sign in (("winner", 1), ("loser", -1)):
        x = np.asarray(items[side], np.float64).ravel() / V**0.5
        assert abs(x.mean() - sign * mean) < 5 * (variance / groups) ** 0.5
        assert abs(x.var() - variance) < 0.06 * variance


def test_labels_are_bradley_terrys_and_pairs_are_the_asked_ones():
    rewards = jnp.array([0.0, 1.0, 3.0, jnp.nan, 2.0, 2.0, 2.0, 2.0])
    made = choose(KEY, rewards, 4, sure=1.0, temperature=2.0)
    np.testing.assert_array_equal(made.winner[:1], [2])
    np.testing.assert_array_equal(made.loser[:1], [0])
    np.testing.assert_allclose(made.preference, [1 / (1 + np.exp(-1.5)), 0.5], rtol=1e-6)
    np.testing.assert_array_equal(made.counts, [1, 0])  # a picture against itself says nothing
    made = choose(KEY, rewards, 4, kind="all", sure=0.7)
    np.testing.assert_array_equal(made.counts, [1, 1, 0, 1, 0, 0] + [1] * 6)
    np.testing.assert_allclose(np.asarray(made.preference)[[0, 1, 3]], [1, 1, 1])
    np.testing.assert_array_equal(made.preference[6:], 0.5)
    assert np.all(np.asarray(rewards[made.winner] >= rewards[made.loser])[[0, 1, 3]])
    many = choose(KEY, jnp.tile(jnp.array([0.0, 1.0]), 4000), 2, drawn=True)
    won = np.asarray(many.winner) % 2
    assert abs(won.mean() - 1 / (1 + np.exp(-1))) < 4 * 0.5 / 4000**0.5 and np.all(np.asarray(many.preference) == 1)
    two = choose(KEY, jnp.arange(40.0), 4, kind="random")
    assert np.all(np.asarray(two.winner) // 4 == np.asarray(two.loser) // 4) and np.all(np.asarray(two.winner) > np.asarray(two.loser))


@pytest.mark.parametrize("loss", [diffusion_dpo, mapo])
def test_samples_are_guided_and_an_inner_loss_without_guidance_sees_the_bare_policy(loss):
    """The trap: one name for both would train on the guided output, or sample without guidance."""
    algorithm = online(SAMPLER, (1,), group=2, loss=loss, generator=("every", 4))
    assert "policy" not in algorithm.needs.guidance and algorithm.needs.copies["generator"] == ("every", 4)
    seen = []
    nets = {name: (lambda x, t, cond, name=name: seen.append(name) or 0 * x) for name in ("policy", "unguided", "reference", "generator")}
    rolled = algorithm.rollout(jax.random.split(KEY, 4), algorithm.init(KEY), nets, data(4))
    assert set(seen) == {"generator"}
    items, _, _ = algorithm.prepare(KEY, algorithm.init(KEY), rolled, jnp.arange(4.0))
    seen.clear()
    keys = jax.random.split(KEY, 2)
    algorithm.loss(keys, nets, algorithm.anchor(keys, nets, {**items, "cond": {}}))
    assert set(seen) == {"unguided", *loss(SAMPLER).needs.copies}


def test_an_inner_method_that_prepares_its_items_keeps_their_conditions_and_weights():
    """By "row", or by handing on what it is given."""

    def singles(sampler):  # winner and loser as two items
        def prepare(key, extra, rollout, rewards):
            n = len(rollout["winner"])
            return {"x0": jnp.concatenate([rollout["winner"], rollout["loser"]]), "row": jnp.tile(jnp.arange(n), 2)}, extra, {}

        return diffusion_dpo(sampler)._replace(prepare=prepare)

    algorithm = online(ONE, (1,), group=2, loss=singles)
    rolled = {"x0": jnp.arange(6.0)[:, None], "cond": {"c": jnp.arange(6.0)[:, None]}}
    items, _, _ = algorithm.prepare(KEY, algorithm.init(KEY), rolled, jnp.array([0.0, 1, 3, 2, 4, jnp.nan]))
    np.testing.assert_array_equal(items["x0"][:, 0], [1, 2, 4, 0, 3, 4])
    np.testing.assert_array_equal(items["cond"]["c"][:, 0], [1, 2, 4, 1, 2, 4])
    np.testing.assert_allclose(items["of_driver"], [1.5, 1.5, 0, 1.5, 1.5, 0])


@pytest.mark.parametrize("make, message", [
    (lambda: d3po(gaussian.chain(4, 0.0), (1,)), "D3PO needs a sampler with noise"),
    (lambda: spo(gaussian.chain(4, 0.0), (1,)), "needs a sampler with noise"),
    (lambda: d3po(SAMPLER, (1,), group=1), "batch.group must be 2 or more"),
    (lambda: d3po(SAMPLER, (1,), pairs="best"), "choose one of best_worst, all, random"),
    (lambda: d3po(SAMPLER, (1,), clip_range=1.0), r"clip_range in \(0, 1\)"),
    (lambda: d3po(SAMPLER, (1,), reduce="max"), "reduce must be 'mean' or 'sum'"),
    (lambda: spo(SAMPLER, (1,), k=1), "k must be 2 or more"),
    (lambda: spo(SAMPLER, (1,), start=0.99), "leaves no step with noise"),
    (lambda: spo(SAMPLER, (1,), threshold=(0.5, 0.3)), "threshold in"),
    (lambda: online(SAMPLER, (1,), loss=sft), "learns from given pairs alone.*needs labels"),
    (lambda: online(SAMPLER, (1,), loss=diffusion_kto), "rollout of its own"),
    (lambda: online(SAMPLER, (1,), loss=mapo, reference=("every", 3)), "has no reference network"),
    (lambda: online(SAMPLER, (1,), buffer=8), "needs max_age of 2 steps or more and cond"),
    (lambda: online(SAMPLER, (1,), generator="sometimes"), "generator follows the policy by"),
    (lambda: online(SAMPLER, (1,), temperature=0.0), "temperature must be above 0"),
])  # fmt: skip
def test_what_cannot_work_is_refused_when_the_method_is_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_driver_asks_for_what_its_loss_asks_for():
    assert online(SAMPLER, (1,)).needs == Needs("prompts", "value", {"reference": "frozen"}, {"reference": 1.0})
