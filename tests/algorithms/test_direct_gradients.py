"""DRTune and SRPO against what is known exactly."""

from functools import partial

import gaussian
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment_jax.algorithms.draft import alignprop, draft
from alignment_jax.algorithms.drtune import drtune, responses
from alignment_jax.algorithms.guidance_distillation import guidance_distillation
from alignment_jax.algorithms.losses import noised
from alignment_jax.algorithms.srpo import srpo
from alignment_jax.diffusion import Sampler, guided, rectified_flow, sample, sampling_grid
from alignment_jax.rewards.base import Reward, Tower
from alignment_jax.rewards.relative import relative

T, KEY, N = 10, jax.random.key(0), 6
DATA = {"cond": {}, "condition": {}}
linear_reward = lambda keys, x0, condition: x0[:, 0]  # noqa: E731


def reward(keys, x0, condition):
    return -jnp.square(x0[:, 0] - 1.4)


def curved(w):
    """A network that bends, so that its Jacobians matter."""
    return lambda x, t, cond: jnp.tanh(x * w[0] + w[1]) + 0.3 * x * w[2]


def gradient(algorithm, nets, w, keys, extra=None):
    rolled = algorithm.rollout(keys, {}, nets(w), DATA)
    items, _, _ = algorithm.prepare(KEY, {}, rolled, None)
    items = {**items, "cond": {}, **(extra or {})}
    item_keys = keys if len(jax.tree.leaves(items)[0]) == len(keys) else jax.random.split(KEY, len(items["i"]))
    return jax.grad(lambda w: algorithm.loss(item_keys, nets(w), items)[0].mean())(w)


def with_cut_inputs(sampler, w, keys, k):
    """Autodiff through the chain whose network inputs are cut off, the last k steps trained: what DRTune's payload must equal."""
    x_T = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (1,)))(keys)
    times = jnp.asarray(sampler.grid.t[: T - k])

    def end(w):
        def cut(x, t, cond):
            output = curved(w)(jax.lax.stop_gradient(x), t, cond)
            early = (t[0] >= times.min()) if k < T else False
            return jnp.where(early, jax.lax.stop_gradient(output), output)

        x0, _ = sample(jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys), cut, {}, sampler, x_T)
        return -reward(None, x0, None).mean()

    return jax.grad(end)(w)


@pytest.mark.parametrize("k", [1, T])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_t7_the_two_phases_of_drtune_are_autodiff_with_cut_inputs(k, eta):
    sampler, w, keys = gaussian.chain(T, eta), jnp.array([0.7, 0.2, 1.0]), jax.random.split(KEY, N)
    nets = lambda w: {"policy": curved(w), "reward": reward}  # noqa: E731
    if k == 1:  # any step may be drawn: keep those at the end
        algorithm = drtune(sampler, (1,), k=1)
        rolled = algorithm.rollout(keys, {}, nets(w), DATA)
        last = {"x": sample_states(sampler, w, keys)[-2][:, None], "i": jnp.full((N, 1), T - 1),
                "weight": jnp.full((N, 1), responses(sampler)[T, T - 1])}  # fmt: skip
        items, _, _ = algorithm.prepare(KEY, {}, {**rolled, **last}, None)
        got = jax.grad(lambda w: algorithm.loss(keys, nets(w), {**items, "cond": {}})[0].mean())(w)
    else:
        got = gradient(drtune(sampler, (1,), k=T), nets, w, keys)
    np.testing.assert_allclose(got, with_cut_inputs(sampler, w, keys, k), rtol=2e-5, atol=1e-7)


def sample_states(sampler, w, keys):
    x_T = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (1,)))(keys)
    return sample(jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys), curved(w), {}, sampler, x_T, keep=True)[1].x


def test_t7_drtune_is_draft_where_the_network_ignores_its_input():
    sampler, keys = gaussian.chain(T), jax.random.split(KEY, N)
    times = jnp.asarray(sampler.grid.t[:-1])
    blind = lambda th: lambda x, t, cond: th[jnp.argmin(jnp.abs(times[None] - t[:, None]), 1)][:, None] + 0 * x  # noqa: E731
    th = 0.1 * jnp.arange(T)
    # the two draw other noise, which a linear reward does not see
    nets = lambda th: {"policy": blind(th), "reward": linear_reward}  # noqa: E731
    both = [gradient(drtune(sampler, (1,), k=T), nets, th, keys), chain_gradient(sampler, nets, th, keys)]
    np.testing.assert_allclose(*both, rtol=1e-5)


def chain_gradient(sampler, nets, th, keys):
    algorithm = draft(sampler, (1,), k=T)
    items = algorithm.rollout(keys, {}, nets(th), DATA)
    return jax.grad(lambda th: algorithm.loss(keys, nets(th), items)[0].mean())(th)


@pytest.mark.parametrize("k", [1, 3, T])
def test_alignprop_with_a_fixed_cut_is_draft_k(k):
    """Its outputs are cut, not its states: the parameters get the same gradient."""
    sampler, w, keys = gaussian.chain(T, 0.0), jnp.array([0.7, 0.2, 1.0]), jax.random.split(KEY, N)
    nets = lambda w: {"policy": curved(w), "reward": reward}  # noqa: E731
    grads = [jax.grad(lambda w, a=a: a.loss(keys, nets(w), a.rollout(keys, {}, nets(jax.lax.stop_gradient(w)), DATA))[0].mean())(w)
             for a in (alignprop(sampler, (1,), mean_k=k, std_k=0.0), draft(sampler, (1,), k=k))]  # fmt: skip
    np.testing.assert_allclose(*grads, rtol=2e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("method", [partial(draft, k=1), partial(draft, k=4), partial(draft, k=T), alignprop])
def test_steps_that_are_made_again_have_the_gradient_of_those_that_are_kept(method, eta):
    """And are what is asked for, on CPU too, where a chain is short of memory first."""
    w, keys = jnp.array([0.7, 0.2, 1.0]), jax.random.split(KEY, N)
    nets = lambda w: {"policy": curved(w), "reward": reward}  # noqa: E731
    algorithms = [method(gaussian.chain(T, eta), (1,), remat=remat) for remat in (False, True)]
    kept, again = (gradient(algorithm, nets, w, keys) for algorithm in algorithms)
    np.testing.assert_allclose(again, kept, rtol=1e-5)
    traced = [str(jax.make_jaxpr(lambda w: gradient(algorithm, nets, w, keys))(w)) for algorithm in algorithms]  # noqa: B023
    assert ["remat" in text for text in traced] == [False, True]


def test_guidance_distillation_is_zero_at_the_guided_teacher_and_pulls_towards_it():
    """The teacher's two calls, u + w (c - u), in one; its gradient elsewhere is that of a square in clean predictions."""
    sampler, keys, scale = gaussian.chain(T, 0.0), jax.random.split(KEY, 32), 3.0
    teacher = lambda x, t, cond: 0.4 * x + cond["c"]  # noqa: E731
    both = guided(teacher, {"c": jnp.zeros((1, 1))}, scale)
    items = {"x0": jax.random.normal(KEY, (32, 1)), "cond": {"c": jnp.ones((32, 1))}}
    algorithm = guidance_distillation(sampler, teacher_scale=scale)
    assert algorithm.needs.guidance == {"policy": 1.0, "teacher": scale}
    student = lambda s: {"policy": lambda x, t, cond: 0.4 * x + s * cond["c"], "teacher": both}  # noqa: E731
    loss = lambda s: algorithm.loss(keys, student(s), items)[0].mean()  # noqa: E731
    assert float(loss(scale)) < 1e-10 and float(loss(1.0)) > 0.1
    x_t, t, _ = noised(keys, items["x0"], sampler.schedule)
    ratio = jnp.square(sampler.schedule.sigma(t) / sampler.schedule.alpha(t)).mean()  # x0 = (x - sigma eps) / alpha
    np.testing.assert_allclose(jax.grad(loss)(1.0), 2 * (1.0 - scale) * ratio, rtol=1e-4)


def test_drtune_overweights_early_steps_by_the_jacobians_it_drops_and_the_discount_takes_it_back():
    """The known bias: 106 times at the noisiest of ten steps, none at the last."""
    sampler = gaussian.chain(T)
    A = gaussian.recursion(sampler)[0]
    _, _, C, _ = gaussian.recursion(sampler)
    exact = C * np.array([np.prod(A[i + 1 :]) for i in range(T)])
    ratio = responses(sampler)[T] / exact
    assert abs(ratio[-1] - 1) < 1e-5 and 100 < ratio[0] < 110 and np.all(np.diff(ratio) < 0)
    keys = jax.random.split(KEY, N)
    nets = lambda th: {"policy": gaussian.policy(th, sampler), "reward": linear_reward}  # noqa: E731
    plain, less = (gradient(drtune(sampler, (1,), k=T, discount=g), nets, jnp.zeros(T), keys) for g in (1.0, 0.5))
    np.testing.assert_allclose(less / plain, 0.5 ** np.arange(T - 1, -1, -1), rtol=1e-4)


def test_early_stops_take_the_reward_at_the_clean_prediction_of_their_step():
    """Every row of the responses is the derivative of x0-hat there; steps after it have none."""
    sampler, w, keys = gaussian.chain(T, 0.0), jnp.array([0.7, 0.2, 1.0]), jax.random.split(KEY, 2)
    table = responses(sampler)
    assert np.all(np.triu(table[:T], 1) == 0.0) and np.all(table[:T].diagonal() != 0.0)
    x_T = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (1,)))(keys)

    def clean(bump, m):
        times = jnp.asarray(sampler.grid.t[:-1])
        states = sample_states(sampler, w, keys)
        held = lambda x, t, c: (curved(w)(states[jnp.argmin(jnp.abs(times - t[0]))], t, c)  # noqa: E731
                                + bump[jnp.argmin(jnp.abs(times - t[0]))])  # fmt: skip
        return sample(keys, held, {}, sampler, x_T, keep=True)[1].x0[m].mean()

    for m in (0, 4, T - 1):
        np.testing.assert_allclose(jax.grad(clean)(jnp.zeros(T), m), table[m], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["flow", "vp"])
def test_recovery_is_exact_for_the_true_velocity_at_any_time_and_in_both_directions(schedule):
    """At a network that knows x0 and the noise, S is the reward of x0 itself; k = 0 and no words give the plain reward."""
    if schedule == "flow":
        flow = rectified_flow()
        sampler = Sampler(flow, sampling_grid(flow, T), "flow")
    else:
        sampler = gaussian.chain(T, 0.0)
    x0, n, keys = jax.random.normal(KEY, (200, 1)), jax.random.normal(jax.random.key(1), (200, 1)), jax.random.split(KEY, 200)
    true = (lambda x, t, c: n - x0) if schedule == "flow" else (lambda x, t, c: n)
    algorithm = srpo(sampler, (1,), ceiling=None, discount=(0.0, 0.0), discount_inversion=(0.0, 0.0))
    items = {"x0": x0, "noise": n, "cond": {}, "condition": {}}
    loss, info = algorithm.loss(keys, {"policy": true, "reward": linear_reward}, items)
    np.testing.assert_allclose(info["reward"], x0[:, 0], atol=2e-4)
    sign = np.sign(np.asarray(loss) * np.asarray(-x0[:, 0]))
    np.testing.assert_allclose(np.abs(loss), np.abs(x0[:, 0]), atol=2e-4)
    assert 0.35 < (sign < 0).mean() < 0.65  # half of the items are inversions, whose S is that of r-


def test_both_directions_raise_the_reward():
    """The trap: inversion moves against the output, so that with the roles unswapped half of the items would descend."""
    flow = rectified_flow()
    sampler = Sampler(flow, sampling_grid(flow, T), "flow")
    keys, x0 = jax.random.split(KEY, 64), jax.random.normal(KEY, (64, 1))
    items = {"x0": x0, "noise": jax.random.normal(jax.random.key(2), (64, 1)), "cond": {}, "condition": {}}
    algorithm = srpo(sampler, (1,), ceiling=None)
    shift = lambda s: {"policy": lambda x, t, c: x - s, "reward": linear_reward}  # noqa: E731
    each = jax.jacobian(lambda s: algorithm.loss(keys, shift(s), items)[0])(jnp.float32(0.0))
    assert np.all(np.asarray(each) < 0)  # a larger s draws cleaner predictions upwards: every item must want it


def test_what_both_prompts_like_cancels_in_a_relative_reward():
    """A hack that scores whatever the words leaves S unchanged at k = 0."""
    score = lambda p, x, c: x.mean((1, 2, 3)) * 100 + c["length"]  # noqa: E731
    plain = Reward("plain", score, encode=lambda prompts: {"length": np.array([float(len(p)) for p in prompts])})
    made = relative(plain, "long and natural", "flat")
    condition = made.encode(["a cat"])
    dull, hacked = (made.score(None, jnp.full((1, 4, 4, 3), v), condition) for v in (0.1, 0.9))
    np.testing.assert_allclose(hacked[:, 0] - hacked[:, 1], dull[:, 0] - dull[:, 1], rtol=1e-5)
    assert float(dull[0, 0] - dull[0, 1]) == len("long and natural") - len("flat")


@pytest.mark.parametrize("bad", [{"k": 0}, {"k": T + 1}, {"early_stop": 1.5}, {"discount": 0.0}])
def test_drtune_refuses_what_cannot_be(bad):
    with pytest.raises(ValueError, match="got"):
        drtune(gaussian.chain(T), (1,), **bad)


def test_a_relative_reward_needs_one_that_reads_prompts():
    with pytest.raises(ValueError, match="does not read the prompt"):
        relative(Reward("sharpness", lambda p, x, c: x.mean((1, 2, 3))), "a", "b")


def test_a_relative_reward_looks_at_the_picture_once():
    looks = []
    tower = Tower("t", lambda p, x: looks.append(1) or x.mean((1, 2)) * p, lambda p, f, c: (f * c["text"]).sum(-1) + p)
    encode = lambda prompts: {"text": np.array([[float(len(p))] * 3 for p in prompts])}  # noqa: E731
    plain = Reward("plain", tower.score, {"tower": 2.0, "head": 0.5}, encode, tower=tower)
    made = relative(plain, "long words", "no")
    x, condition = jax.random.uniform(KEY, (2, 4, 4, 3)), made.encode(["a cat", "sea"])
    got = made.score(made.params, x, condition)
    assert len(looks) == 1
    np.testing.assert_allclose(got, np.stack([plain.score(plain.params, x, condition[side]) for side in "+-"], -1), rtol=1e-6)
