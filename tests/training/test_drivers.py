"""Methods round other methods, and methods that judge steps, as configs name them."""

import runpy

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from alignment_jax.rewards.base import Reward
from alignment_jax.training import build, loop
from alignment_jax.training.selfcheck import tiny_config


def planned(**changes):
    config = runpy.run_path("configs/critters.py")["get_config"]("ddpo")
    for field, value in changes.items():
        config[field] = value
    bundle, shapes, _ = build.described(config)
    return build.planned(config, bundle, shapes, build.reward(config)).parts.algorithm


def test_any_pair_method_is_named_inside_the_driver():
    for loss in ("mapo", {"name": "diffusion_dpo", "beta": 2000.0}, {"name": "inpo", "steps": 2}):
        assert planned(method={"name": "online", "loss": loss}).needs.reward == "value"
    moved = planned(method={"name": "online", "loss": "diffusion_dpo", "generator": ("every", 10), "reference": ("every", 10)})
    assert dict(moved.needs.copies) == {"generator": ("every", 10), "reference": ("every", 10)}


@pytest.mark.parametrize("loss, said", [
    ({"name": "diffusion_dpo", "betta": 1.0}, "Did you mean 'beta'"), ("mappo", "Did you mean 'mapo'"),
    ({"beta": 1.0}, "needs a name"), ("ddpo", "pairs"), ("diffusion_kto", "rollout of its own"),
])  # fmt: skip
def test_what_cannot_be_inside_is_said(loss, said):
    with pytest.raises(ValueError, match=said):
        planned(method={"name": "online", "loss": loss})


CAPTIONS = ["a green bell monster", "a blue monster with horns on a green background"]
LENGTH = {
    "device": Reward("length", lambda params, x, condition: condition["words"].astype(jnp.float32),
                     encode=lambda prompts: {"words": np.array([len(p.split()) for p in prompts])}),
    "host": Reward("length", lambda images, prompts, metadata: (np.array([len(p.split()) for p in prompts], float), {}),
                   device=False, differentiable=False),
}  # fmt: skip


@pytest.mark.parametrize("where", ["host", pytest.param("device", marks=pytest.mark.slow)])
def test_the_reward_of_a_semi_online_loser_reads_its_caption(where, monkeypatch, tmp_path):
    """A caption counts if it is short: 4 words, not 9. Without the caption nothing could be scored; a dropped one is still read."""
    monkeypatch.setitem(build.REWARDS, "length", LENGTH[where])
    np.savez(tmp_path / "labels.npz", images=np.zeros((2, 32, 32, 3), np.uint8), prompts=np.array(CAPTIONS))
    config = tiny_config(reward="length", batch=ml_collections.ConfigDict({"prompts": 8, "group": 1}))
    config.method = ml_collections.ConfigDict({"name": "semi_online", "below": 6.0})
    config.data = ml_collections.ConfigDict({"labels": "npz", "path": str(tmp_path / "labels.npz"), "drop": 0.5})
    session, state = loop.set_up(config)
    for _ in range(2):
        batch = next(session.run.source)
        words = np.array([len(p.split()) for p in batch["prompts"]])
        state, metrics = loop.one_step(session, state, batch)
        np.testing.assert_allclose(float(metrics["reward/mean"]), words.mean(), rtol=1e-6)
        np.testing.assert_allclose(float(metrics["pairs/counted"]), (words < 6).mean(), rtol=1e-6)
    config.data = ml_collections.ConfigDict({"latents": str(tmp_path)})
    with pytest.raises(ValueError, match="'length' scores new pictures of the captions"):
        loop.set_up(config)


def test_a_host_reward_cannot_judge_steps():
    with pytest.raises(ValueError, match="inside the rollout.*runs on the host"):
        planned(method={"name": "spo"}, reward="jpeg_compressibility")
