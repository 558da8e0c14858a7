"""A reward on the host scores one microbatch while the devices draw the next one, and every score belongs to its own picture."""

import json
from pathlib import Path

import numpy as np
import pytest
import several
import toy_config

from alignment_jax.rewards.base import Reward
from alignment_jax.training import build, loop


def length(images, prompts, metadata):
    """How many letters a prompt has; and how bright its picture is."""
    return np.array([len(p) for p in prompts], float), {"bright": images.mean((1, 2, 3))}


@pytest.mark.parametrize("microbatch", [16, 4, 6])  # 6: the last one is filled up
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
    draw, parts = ["rollout", "to_pictures"], -(-16 // microbatch)
    # devices run what they are given in order; the host, however slow, has one microbatch's pictures to score and one that is drawn
    late = draw * parts if microbatch == 6 else draw + [*draw, "score"] * (parts - 1)
    assert seen == [*late, "score"]
    assert 0 < float(metrics["reward/bright"]) < 255


PROCESSES = """
from alignment_jax.training import distributed
distributed.start()
import json, numpy as np, jax, test_host_rewards, toy_config
from alignment_jax.rewards.base import Reward
from alignment_jax.training import build, loop, sharding
build.reward = lambda config: Reward("length", test_host_rewards.length, device=False, differentiable=False)
out = {{}}
for microbatch in {sizes}:
    config = toy_config.get_config("plain1")
    config.batch.microbatch = microbatch
    session, state = loop.set_up(config)
    batch, given = next(session.run.source), []

    def prepare(key, extra, rolled, scores):
        given.append(scores)
        return session.programs.prepare(key, extra, rolled, scores)

    loop.one_step(session._replace(programs=session.programs._replace(prepare=prepare)), state, batch)
    out[microbatch] = [sharding.own(session.layout, given[0]).tolist(), [len(p) for p in batch["prompts"]]]
open({found!r} + str(jax.process_index()), "w").write(json.dumps(out))
"""


@pytest.mark.parametrize("sizes", [[4], pytest.param([8, 4, 6], marks=pytest.mark.slow)])
def test_each_process_scores_its_own_samples_of_every_microbatch(sizes, tmp_path):
    """Prompts of each process are its own, and so are the pictures of a microbatch that lie on its devices."""
    paths = f"{Path(__file__).parent}:{Path(__file__).parents[1]}"
    script = PROCESSES.format(sizes=sizes, found=str(tmp_path / "found"))
    codes, said = several.ended(several.start([["-c", script]] * 2, PYTHONPATH=paths))
    assert codes == [0, 0], said[0][-2000:] + said[1][-2000:]
    both = [json.loads((tmp_path / f"found{i}").read_text()) for i in (0, 1)]
    for found in both:
        assert all(scores == lengths and len(scores) == 8 for scores, lengths in found.values())
    assert both[0]["4"][1] != both[1]["4"][1]
