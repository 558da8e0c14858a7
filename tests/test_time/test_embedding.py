"""Embeddings that climb: what moves and what does not, how far, and where the optimum of a linear world lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from alignment_jax.diffusion import Sampler, cosine, draw, guided, sampling_grid
from alignment_jax.rewards.base import Reward
from alignment_jax.test_time.embedding import date, movable, prompt_embedding, reneg
from alignment_jax.training import steering
from alignment_jax.training.programs import Guidance

STEPS, SCALE = 6, 3.0
SAMPLER = Sampler(cosine(t_max=0.98), sampling_grid(cosine(t_max=0.98), STEPS), "x0", eta=1.0)
BATCH = 4


def denoise(x, t, cond):
    """x0_hat = tanh(states summed) + 0.1 x + what sizes and masks say: every part of the condition has its say."""
    said = jnp.tanh((cond["states"] * cond["mask"][..., None]).sum(1)) + 0.2 * cond["pooled"]
    return said + 0.1 * x + 1e-3 * cond["time_ids"].sum(-1, keepdims=True)


def condition(batch, value):
    return {"states": jnp.full((batch, 3, 2), value), "pooled": jnp.zeros((batch, 2)), "time_ids": jnp.full((batch, 6), 512.0),
            "mask": jnp.array([[True, True, False]] * batch), "tokens": jnp.ones((batch, 3), jnp.int32)}  # fmt: skip


def drawn(method, reward, n=BATCH, sampler=SAMPLER, watch=None):
    """(x0, info) of a method on this network; watch(cond, null) sees every condition that the network is given."""
    keys, null = jax.random.split(jax.random.key(3), n), condition(1, 0.1)
    own = denoise if watch is None else lambda x, t, cond: (watch(cond), denoise(x, t, cond))[1]
    score = lambda keys, x0, condition: reward(x0)
    guide = lambda scale, null=null: guided(own, null, scale)
    networks = {"policy": guide(SCALE), "unguided": own, "guide": guide, "reward": score, "augmented": score}
    data = {"cond": condition(n, -0.2), "condition": {}, "null": null}
    steered = jax.jit(lambda keys: method.draw(keys, networks, data))(keys)
    return *steered, draw(keys, networks["policy"], data["cond"], sampler, (2,))[0]


def seen(method, reward, n=1):
    """The conditions and negative conditions [calls, 2 B, ...] that the network is given as a method draws."""
    calls = []
    watch = lambda cond: jax.debug.callback(lambda c: calls.append(jax.tree.map(np.asarray, c)), cond, ordered=True)
    jax.block_until_ready(drawn(method, reward, n, watch=watch)[0])
    jax.effects_barrier()
    return calls[: -STEPS]  # the plain chain comes last


linear = lambda x0: x0 @ jnp.array([1.0, -2.0])
CLIMBING = {"prompt_embedding": lambda **s: prompt_embedding(SAMPLER, (2,), **s),
            "reneg": lambda **s: reneg(SAMPLER, (2,), guidance=SCALE, **s)}  # fmt: skip


@pytest.mark.parametrize("name", CLIMBING)
@pytest.mark.parametrize("late", [0, 1, None, STEPS])
def test_the_reward_rises_and_is_that_of_the_walk_itself(name, late):
    """late: through the whole chain, the last step alone, a third, any step."""
    x0, info, plain = drawn(CLIMBING[name](iterations=8, learning_rate=0.05, late=late), linear)
    np.testing.assert_allclose(info["reward"], linear(x0), atol=1e-5)
    np.testing.assert_allclose(info["gain"], linear(x0) - linear(plain), atol=1e-5)
    assert float(info["gain"].min()) > 0.1, info
    assert float(info["moved"].min()) > 0.05


@pytest.mark.parametrize("name", CLIMBING)
def test_at_rate_zero_it_is_the_base(name):
    x0, info, plain = drawn(CLIMBING[name](iterations=3, learning_rate=0.0), linear)
    np.testing.assert_allclose(x0, plain, rtol=1e-6)
    assert (np.asarray(info["moved"]) == 0).all() and (np.asarray(info["iteration"]) == 0).all()


@pytest.mark.parametrize(("name", "moves"), [("prompt_embedding", 0), ("reneg", 1)])
def test_only_its_own_side_of_guidance_moves_and_sizes_never_do(name, moves):
    """The halves of every guided call: that of the prompt, then that of the negative."""
    calls = seen(CLIMBING[name](iterations=3, learning_rate=0.05), linear)
    for leaf in ("states", "pooled"):
        halves = np.stack([call[leaf].reshape(2, 1, *call[leaf].shape[1:]) for call in calls])
        changed = np.abs(halves - halves[:1]).max(tuple(range(2, halves.ndim))).max(0)
        assert changed[moves] > 0.01 and changed[1 - moves] == 0, (leaf, changed)
    assert all((call["time_ids"] == 512).all() and call["tokens"].dtype == np.int32 and call["mask"].dtype == bool for call in calls)


def test_a_first_step_of_the_negative_goes_against_the_guidance():
    """out = n + s (c - n): d out / d n = 1 - s < 0, so Adam's first step lowers n where the reward wants more, and raises it where less."""
    call = seen(CLIMBING["reneg"](iterations=1, learning_rate=0.05), linear)[-1]
    np.testing.assert_allclose(call["pooled"][1], [-0.05, 0.05], rtol=1e-3)
    np.testing.assert_allclose(call["states"][1, 0], [0.1 - 0.05, 0.1 + 0.05], rtol=1e-3)
    np.testing.assert_array_equal(call["states"][1, 2], np.float32([0.1, 0.1]))  # masked: no gradient


def test_the_optimum_of_a_concave_reward_is_found():
    """r = -|x0 - target|^2 with a target in reach: the embedding leads there, from any noise."""
    target = jnp.array([0.7, -0.3])
    reward = lambda x0: -jnp.square(x0 - target).sum(-1)
    x0, _, plain = drawn(prompt_embedding(SAMPLER, (2,), iterations=300, learning_rate=0.01, late=0), reward)
    assert float(jnp.abs(plain - target).max()) > 0.5
    np.testing.assert_allclose(x0, jnp.broadcast_to(target, x0.shape), atol=0.02)


def test_guidance_of_one_has_no_negative_and_is_refused():
    bundle = worlds.mixture_bundle()
    sampler = Sampler(bundle.schedule, sampling_grid(bundle.schedule, 4), "x0")
    with pytest.raises(ValueError, match="guidance_scale=1 has none"):
        steering.method("reneg", {}, bundle, sampler, Guidance(1.0), Reward("near", worlds.near))


@pytest.mark.parametrize("rho", [0.5, 2.0])
def test_each_update_of_date_is_exactly_rho_long_over_all_that_moves(rho):
    """Before steps 0, 2 and 4 of six (never the last), from the last embedding on; the step itself sees the new one."""
    calls = seen(date(SAMPLER, (2,), every=2, rho=rho), linear)
    states, pooled = ([call[leaf][0] for call in calls] for leaf in ("states", "pooled"))
    flat = np.stack([np.concatenate([a.ravel(), b.ravel()]) for a, b in zip(states, pooled)])
    jumps = np.linalg.norm(np.diff(flat, axis=0), axis=1)
    np.testing.assert_allclose(jumps[jumps > 0], rho, rtol=1e-4)
    assert len(calls) == STEPS + 3 and (jumps > 0).sum() == 3
    np.testing.assert_array_equal(np.stack([call["pooled"][1] for call in calls]), 0.0)  # the negative half


def test_date_leaves_the_last_step_alone_and_may_begin_again_each_time():
    every = seen(date(SAMPLER, (2,), every=1, rho=0.5), linear)
    assert len(every) == STEPS + STEPS - 1
    _, info, _ = drawn(date(SAMPLER, (2,), every=1, rho=0.5, accumulate=False), linear)
    np.testing.assert_allclose(info["moved"], 0.5, rtol=1e-4)
    _, info, _ = drawn(date(SAMPLER, (2,), every=1, rho=0.5), linear)
    assert float(info["moved"].min()) > 1.0


def test_date_raises_the_reward_and_its_inner_updates_raise_it_more():
    gains = []
    for updates in (0, 1, 3):
        x0, info, plain = drawn(date(SAMPLER, (2,), every=2, rho=0.2, updates=updates), linear)
        np.testing.assert_allclose(info["reward"], linear(x0), atol=1e-5)
        gains.append(float((linear(x0) - linear(plain)).min()))
    assert gains[0] == 0 and gains[2] > gains[1] > 0.05, gains


@pytest.mark.parametrize("reward", [lambda x: jnp.zeros(len(x)), lambda x: jnp.full(len(x), jnp.nan), lambda x: jnp.sqrt(0 * x[:, 0])])
def test_a_reward_without_a_gradient_moves_nothing(reward):
    """g = 0 has no direction: 0 / 0 would make the whole sample NaN. The last one's gradient is itself not a number."""
    x0, info, plain = drawn(date(SAMPLER, (2,), every=1), reward)
    np.testing.assert_allclose(x0, plain, rtol=1e-6)
    np.testing.assert_array_equal(info["moved"], 0.0)


def test_date_with_a_second_order_solver_keeps_its_history():
    """One walk, not pieces of one: a piece would begin without the clean prediction of the step before."""
    solver = Sampler(SAMPLER.schedule, SAMPLER.grid, "x0", solver="dpmsolver++")
    x0, _, plain = drawn(date(solver, (2,), every=2, rho=1e-9), linear, sampler=solver)
    np.testing.assert_allclose(x0, plain, atol=1e-5)


def test_what_moves_of_a_condition():
    c, rebuild = movable(condition(1, 0.5), 3)
    assert sorted(x.shape for x in c) == [(3, 2), (3, 3, 2)]
    back = rebuild([x + 1 for x in c])
    np.testing.assert_array_equal(back["states"], 1.5)
    assert back["time_ids"].shape == (3, 6) and back["mask"].dtype == bool


@pytest.mark.parametrize(("make", "message"), [
    (lambda: prompt_embedding(SAMPLER, (2,), late=STEPS + 1), r"late lie in 0\.\.6"),
    (lambda: reneg(SAMPLER, (2,), guidance=2.0, iterations=-1), "at least 0"),
    (lambda: date(SAMPLER, (2,), every=0), "every >= 1"),
    (lambda: date(SAMPLER, (2,), rho=-1.0), "rho >= 0"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused_when_the_method_is_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()
