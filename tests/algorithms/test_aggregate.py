"""Several rewards under one method: closed forms of duals and of the maximin, scales that do not matter, methods left as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from scipy.special import ndtri

from alignment_jax.algorithms.aggregate import aggregated
from alignment_jax.algorithms.base import Algorithm, Needs
from alignment_jax.evaluation.metrics import describe
from alignment_jax.rewards.base import Reward
from alignment_jax.training.programs import build

KEY = jax.random.key(0)
Z = ndtri((np.arange(256) + 0.5) / 256)
Z = (Z / Z.std()).astype(np.float32)  # a sample of N(0, 1) with exact moments


def told(reward="value"):
    """A method that hands on the reward it is given."""
    return Algorithm(Needs("prompts", reward), lambda keys, networks, items: (-items["r"], {}),
                     prepare=lambda key, extra, rollout, rewards: ({"r": rewards}, extra, {}))  # fmt: skip


def several(how, m=2, inner=None, **kwargs):
    names = [f"r{j}" for j in range(m)]
    return aggregated(inner or told(), None, (2,), names=names, how=how, **kwargs)


def aggregate(method, rewards, extra=None):
    """(the reward that the method is given, memory, info)."""
    extra = method.init(KEY) if extra is None else extra
    items, extra, info = method.prepare(KEY, extra, {}, jnp.asarray(rewards, jnp.float32))
    return np.asarray(items["r"]), extra, info


@pytest.mark.parametrize("b, dual, reached", [(0.7, 1.875, 0.7), (0.3, 0.0, 0.4)])
def test_the_dual_reaches_its_closed_form_and_is_zero_where_the_bound_is_met(b, dual, reached):
    # r = a x on N(m, s^2); the best answer to mu at KL weight 1 is N(m + mu a s^2, s^2), so mu* = max(0, (b - a m) / (a^2 s^2))
    a, m, s2 = 0.8, 0.5, 0.25
    method = several("constrained", 1, bounds=(b,), step=0.3, decay=0.5)

    def once(carry, _):
        extra, mu = carry
        r = a * (m + mu * a * s2 + s2**0.5 * Z)[:, None]
        _, extra, info = method.prepare(KEY, extra, {}, r)
        return (extra, info["coefficient/r0"]), info["rewards/r0"]

    (_, mu), means = jax.lax.scan(once, (method.init(KEY), jnp.float32(0)), None, 300)
    assert mu == pytest.approx(dual, abs=2e-3) and means[-1] == pytest.approx(reached, abs=1e-3)
    assert mu * (means[-1] - b) == pytest.approx(0.0, abs=1e-3)  # slackness


def test_the_dual_of_a_reward_in_other_units_is_the_same_step():
    # without the first batch's std one step size suits no two rewards
    rewards = np.stack([Z, 1000 * Z], 1)
    method = several("constrained", bounds=(0.5, 500.0), step=0.1)
    _, extra, info = aggregate(method, rewards)
    np.testing.assert_allclose(extra["rewards"].state, [0.05, 0.05], rtol=1e-4)
    np.testing.assert_allclose(info["coefficient/r0"], 1000 * info["coefficient/r1"], rtol=1e-4)


def test_two_groups_meet_at_the_maximin_point():
    # r_1 = -(x - 1)^2, r_2 = -(x + 1)^2 / 2: equal, and no step helps both, at x = (sqrt 2 - 1) / (sqrt 2 + 1)
    method = several("maxmin", step=0.05, decay=0.0)

    def once(carry, _):
        extra, x = carry
        r = lambda x: jnp.stack([-((x - 1) ** 2), -((x + 1) ** 2) / 2])  # noqa: E731
        _, extra, info = method.prepare(KEY, extra, {}, jnp.broadcast_to(r(x), (4, 2)))
        c = jnp.stack([info["coefficient/r0"], info["coefficient/r1"]])
        return (extra, x + 0.02 * c @ jax.jacobian(r)(x)), c

    (_, x), c = jax.lax.scan(once, (method.init(KEY), jnp.float32(-0.9)), None, 4000)
    want = (2**0.5 - 1) / (2**0.5 + 1)
    assert x == pytest.approx(want, abs=1e-3)
    np.testing.assert_allclose(c[-1].sum(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(c[-1][0] * 2 * (1 - want), c[-1][1] * (1 + want), rtol=1e-2)  # the gradients cancel


def test_one_group_alone_is_the_plain_method():
    rewards = Z[:, None]
    np.testing.assert_allclose(aggregate(several("maxmin", 1), rewards)[0], Z, rtol=1e-6)


def test_a_rewards_unit_and_origin_do_not_matter_once_normalised():
    rng = np.random.default_rng(0)
    batches = rng.normal(size=(5, 64, 2))
    method, plain = several("normalised", weights=(1.0, 2.0)), several("weighted", weights=(1.0, 2.0))
    extra = other = None
    for batch in batches:
        changed = batch * [300.0, 0.01] + [50.0, -3.0]
        one, extra, _ = aggregate(method, batch, extra)
        two, other, _ = aggregate(method, changed, other)
        np.testing.assert_allclose(one, two, atol=2e-3)
    assert np.abs(aggregate(plain, batches[0])[0] - aggregate(plain, changed)[0]).max() > 10
    grouped = several("advantages", weights=(1.0, 2.0), size=8)
    np.testing.assert_allclose(aggregate(grouped, batches[0])[0], aggregate(grouped, batches[0] * [300.0, 10.0])[0], atol=2e-3)


def test_running_moments_start_without_bias_and_forget():
    method = several("normalised", 1, decay=0.9)
    _, extra, _ = aggregate(method, 3 + 2 * Z[:, None])
    np.testing.assert_allclose([extra["rewards"].mean[0], extra["rewards"].variance[0]], [3, 4], rtol=1e-4)
    _, extra, _ = aggregate(method, 5 + 2 * Z[:, None], extra)
    np.testing.assert_allclose(extra["rewards"].mean[0], (0.9 * 3 + 5) / 1.9, rtol=1e-4)


def test_a_failed_reward_counts_only_where_its_column_does():
    rewards = np.array([[1.0, np.nan], [2.0, 5.0]])
    np.testing.assert_array_equal(aggregate(several("weighted", weights=(1.0, 0.0)), rewards)[0], [1, 2])
    got, _, info = aggregate(several("weighted"), rewards)
    assert np.isnan(got[0]) and got[1] == 7 and info["rewards/r1"] == 5 and info["rewards/worst"] == 1.5
    _, extra, _ = aggregate(several("normalised"), np.full((4, 2), np.nan))
    assert np.isfinite(aggregate(several("normalised"), np.stack([Z, Z], 1), extra)[0]).all()  # a lost batch poisons nothing


def test_what_is_logged_is_in_the_catalogue():
    for name in aggregate(several("maxmin"), np.stack([Z, -Z], 1))[2]:
        assert describe(name)


def two(params, x, condition):
    """The mixture's reward beside a second one that pulls the other way."""
    near = worlds.near(params, x, condition)
    return jnp.stack([near, -jnp.square(x + jnp.asarray(worlds.CENTRES[3])).sum(-1)], -1)


def run(name, count, how="", **kwargs):
    parts, programs, state, frozen, sampler = worlds.mixture_run(name)
    if how:
        method = aggregated(parts.algorithm, sampler, (2,), names=("near", "far"), how=how, **kwargs)
        parts = parts._replace(algorithm=method, reward=Reward("two", two))
        programs = build(parts)
        state = programs.init(jax.random.key(2), state.trained, frozen["null"])
    for number in range(count):
        data = worlds.mixture_data("prompts", jax.random.fold_in(jax.random.key(7), number), 32)
        state, info = worlds.one_step(parts, programs, state, frozen, data, number, 32)
    return state, info


@pytest.mark.parametrize("name", ["ddpo", "refl"])
def test_a_weight_on_one_reward_alone_is_the_method_without_the_other(name):
    plain, aggregated_ = run(name, 2)[0], run(name, 2, "weighted", weights={"near": 1.0, "far": 0.0})[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), plain.trained, aggregated_.trained)


def test_a_method_of_gradients_follows_its_dual():
    # the far reward starts below its bound: its dual rises from 0 and is what moves the policy
    state, info = run("draft", 6, "constrained", bounds={"far": -1.0}, weights={"near": 0.0}, step=1.0)
    _, later = run("draft", 14, "constrained", bounds={"far": -1.0}, weights={"near": 0.0}, step=1.0)
    assert info["coefficient/far"] > 0 and info["coefficient/near"] == 0
    assert later["rewards/far"] > info["rewards/far"] + 0.1


def test_what_does_not_fit_is_refused():
    for kwargs, said in (
        ({"how": "sum"}, "choose one of weighted"), ({"how": "weighted", "weights": (1.0,)}, "1 weights for 2 rewards"),
        ({"how": "weighted", "weights": {"r9": 1.0}}, "no reward of this run; there are r0, r1"),
        ({"how": "constrained"}, "needs at least one"), ({"how": "maxmin", "bounds": (1.0, None)}, "belong to how='constrained'"),
        ({"how": "advantages", "size": 1}, "batch.group of 2 or more"), ({"how": "maxmin", "step": 0.0}, "step must be above 0"),
        ({"how": "weighted", "inner": told(None)}, "asks for no reward"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            several(**kwargs)
    with pytest.raises(ValueError, match=r"wants rewards \[B, 2\]"):
        several("weighted").prepare(KEY, several("weighted").init(KEY), {}, jnp.zeros(4))
