"""A reward on the host scores one microbatch while the devices draw the next ones, and every score belongs to its own picture."""

import numpy as np
import pytest
import toy_config

from alignment_jax.rewards.base import Reward
from alignment_jax.training import build, loop


def length(images, prompts, metadata):
    """How many letters a prompt has; and how bright its picture is."""
    return np.array([len(p) for p in prompts], float), {"bright": images.mean((1, 2, 3))}


@pytest.mark.parametrize("microbatch", [16, 8, 4, 6])  # 6: the last one is filled up
def test_scores_belong_to_their_pictures(monkeypatch, microbatch):
    seen = []

    def score(images, prompts, metadata):
        seen.append("score")
        return length(images, prompts, metadata)

    config = toy_config.get_config("plain1")
    config.batch.microbatch = microbatch
    monkeypatch.setattr(build, "reward", lambda config: Reward("length", score, device=False, differentiable=False))
    session, state = loop.set_up(config)
    seen.clear()  # the probe
    batch, rewards, programs = next(session.run.source), [], session.programs

    def watched(name):
        def call(*arguments):
            seen.append(name)
            return getattr(programs, name)(*arguments)

        return call

    def prepare(key, extra, rolled, scores):
        rewards.append(scores)
        return programs.prepare(key, extra, rolled, scores)

    named = {name: watched(name) for name in ("rollout", "to_pictures")}
    session = session._replace(programs=programs._replace(prepare=prepare, **named))
    _, metrics = loop.one_step(session, state, batch)
    np.testing.assert_array_equal(np.asarray(rewards[0]), [len(p) for p in batch["prompts"]])
    parts = -(-16 // microbatch)
    # devices run what they are given in order: the first pictures are there while the other rollouts are under way
    assert seen == ["rollout", "to_pictures"] * parts + ["score"] * (1 if microbatch == 6 else parts)
    assert 0 < float(metrics["reward/bright"]) < 255
