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
    seen, drawn = [], []

    def score(images, prompts, metadata):
        seen.append(len(drawn))
        return length(images, prompts, metadata)

    config = toy_config.get_config("plain1")
    config.batch.microbatch = microbatch
    monkeypatch.setattr(build, "reward", lambda config: Reward("length", score, device=False, differentiable=False))
    session, state = loop.set_up(config)
    seen.clear()  # the probe
    batch, rewards, rollout, prepare = next(session.run.source), [], session.programs.rollout, session.programs.prepare

    def draw(*arguments):
        drawn.append(True)
        return rollout(*arguments)

    def watched(key, extra, rolled, scores):
        rewards.append(scores)
        return prepare(key, extra, rolled, scores)

    session = session._replace(programs=session.programs._replace(rollout=draw, prepare=watched))
    _, metrics = loop.one_step(session, state, batch)
    np.testing.assert_array_equal(np.asarray(rewards[0]), [len(p) for p in batch["prompts"]])
    parts = -(-16 // microbatch)
    assert seen == [parts] * (1 if microbatch == 6 else parts), "all rollouts are under way before the first picture is waited for"
    assert 0 < float(metrics["reward/bright"]) < 255
