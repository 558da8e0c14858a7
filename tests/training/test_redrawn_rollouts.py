"""A test-time method as the rollout of a training method."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from alignment_jax.rewards.base import Reward
from alignment_jax.test_time.best_of_n import best_of_n
from alignment_jax.training import steering
from alignment_jax.training.programs import Guidance, build


def run(name: str, n: int | None, steps: int = 1, lora: bool = False, reward=worlds.near):
    """(mean training reward of the last step, trained parameters) with best-of-n for the rollout; None: its own."""
    parts, programs, state, frozen, sampler = worlds.mixture_run(name, lora=lora)
    if n is not None:
        method = best_of_n(sampler, (2,), n=n)
        parts = parts._replace(redraw=partial(steering.redrawn, method, parts.bundle, Guidance(), Reward("near", reward)))
        programs = build(parts)
    rewards = 0.0
    for number in range(steps):
        data = worlds.mixture_data("prompts", jax.random.key(number))
        rolled = programs.rollout(state, frozen, jax.random.split(jax.random.key(number), 64), data)
        rewards = float(worlds.near(None, rolled["x0"], None).mean())
        state, _ = worlds.one_step(parts, programs, state, frozen, data, number)
    return rewards, state.trained


@pytest.mark.parametrize("name", ["raft", "online"])
def test_with_one_particle_training_is_what_it_was_bit_for_bit(name):
    for a, b in zip(*(jax.tree.leaves(run(name, n, lora=True)[1]) for n in (None, 1)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_raft_on_the_best_of_four_learns_from_better_samples():
    alone, steered = (run("raft", n)[0] for n in (None, 4))
    assert steered > alone + 0.3
    assert run("raft", 4, 8)[0] > run("raft", None, 8)[0]


def test_the_steered_network_is_the_tuned_one_with_its_low_rank_factors():
    """The trap: a method bound to the base would go on drawing the base's samples while the policy moves away."""
    parts, _, state, frozen, sampler = worlds.mixture_run("raft", lora=True)
    moved = jax.tree.map(lambda x: x + 0.3, state.trained)
    data, keys = worlds.mixture_data("prompts", jax.random.key(0)), jax.random.split(jax.random.key(1), 64)
    redraw = partial(steering.redrawn, best_of_n(sampler, (2,), n=1), parts.bundle, Guidance(), parts.reward)
    programs = build(parts._replace(redraw=redraw))
    redrawn, plain = (p.rollout(state._replace(trained=moved), frozen, keys, data)["x0"] for p in (programs, build(parts)))
    np.testing.assert_array_equal(redrawn, plain)
    assert jnp.abs(redrawn - programs.rollout(state, frozen, keys, data)["x0"]).max() > 0.1


def test_a_method_that_keeps_its_chain_is_refused():
    with pytest.raises(ValueError, match="learn from samples alone"):
        run("ddpo", 2)
