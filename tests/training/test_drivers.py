"""Methods round other methods, and methods that judge steps, as configs name them."""

import runpy

import pytest

from alignment_jax.training import build


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


def test_a_host_reward_cannot_judge_steps():
    with pytest.raises(ValueError, match="inside the rollout.*runs on the host"):
        planned(method={"name": "spo"}, reward="jpeg_compressibility")
