"""A run whose gold is a score, not a share of right pictures, is measured and reported; precomputed latents train."""

import json
import re

import jax
import ml_collections
import numpy as np
import pytest
from toy_model import toy

from alignment_jax.training import build, loop
from alignment_jax.training.precompute import precompute


def config(**changes):
    return ml_collections.ConfigDict({
        "name": "toy", "seed": 0, "steps": 1, "checkpoint_every": 0, "evaluate_every": 1, "early_stop": False, "model": "toy_model:toy",
        "weights": "init", "reward": "jpeg_compressibility", "trainable": "unet", "lora": {}, "sampling": {"num_steps": 3, "eta": 1.0},
        "method": {"name": "ddpo", "advantage": "prompt", "min_count": 2}, "optimizer": {"learning_rate": 1e-2},
        "batch": {"prompts": 4, "group": 1}, "data": {"prompts": ["a", "bb", "ccc"]},
        "evaluation": {"judge": "jpeg_incompressibility", "prompts": ["a", "bb", "cccc", "d"], "num_prompts": 2, "samples": 2,
                       "quick_prompts": 2, "blend": (0.5,), "blend_prompts": 2, "chunk": 2, "scale": 1.0, "seed": 1},
        **changes,
    })  # fmt: skip


def test_a_judge_that_scores_leaves_no_unknown_numbers_in_the_report(tmp_path):
    loop.train(config(), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name in ("base", "aligned"):
        for value in (summary[name]["gold"], summary[name]["proxy"], summary[name]["diversity"]["pixel_right"]):
            assert value["mean"] is not None and value["n"] > 0
        assert summary[name]["gold"]["mean"] == pytest.approx(-summary[name]["proxy"]["mean"])
        assert summary[name]["attribute"] == {}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert all(np.isfinite(row["gold/all"]) and np.isfinite(row["kl/path"]) for row in rows)
    page = re.sub(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+", "", (tmp_path / "report.html").read_text())
    assert not re.search(r"\bnan\b|None|all right|right samples|Real renders", page)
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_precomputed_latents_train_as_their_pictures_do(tmp_path):
    bundle, rng = toy(64), np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    texts = ["a", "bb", "ccc", "d", "ee", "f"]
    read = lambda rows: {"images": images[rows], "prompts": [texts[i] for i in rows]}
    params = bundle.init(jax.random.key(0))
    precompute(bundle, params, read, 6, tmp_path / "latents", batch=2, part=4, dtype="float32")
    common = {"method": {"name": "sft"}, "reward": "", "evaluation": None, "model_options": {"side": 64}}
    session, state = loop.set_up(config(**common, data={"latents": str(tmp_path / "latents"), "labels": "folder", "drop": 0.5}))
    batch = next(session.run.source)
    data = loop.device_batch(session, batch)
    assert data["x0"].shape == (4, 8, 8, 3) and data["cond"]["length"].shape == (4, 1)
    kept = np.asarray(data["cond"]["length"][:, 0]) > 0
    np.testing.assert_allclose(np.asarray(data["cond"]["length"])[kept, 0], [len(texts[i]) for i in batch["prompt_id"][kept]])
    want = bundle.encode(params, images[batch["prompt_id"]] / np.float32(255))
    np.testing.assert_allclose(data["x0"], want, atol=1e-5)
    state, metrics = loop.one_step(session, state, batch)
    assert np.isfinite(float(metrics["loss"])) and int(state.step) == 1
    with pytest.raises(ValueError, match=r"latents of toy: winner is not there; wanted \[8, 8, 3\]"):
        loop.set_up(config(**{**common, "method": {"name": "diffusion_dpo"}}, data={"latents": str(tmp_path / "latents")}))


def test_per_prompt_statistics_count_the_prompts_by_themselves():
    made = config()
    bundle, params = build.model(made)
    plan = build.planned(made, bundle, params, build.reward(made))
    assert plan.parts.algorithm.init(jax.random.key(0))["memory"].values.shape == (3, 32)


def test_a_reward_on_the_command_line_may_be_a_dictionary():
    made = build.reward(config(reward="[('jpeg_compressibility', 2.0)]"))
    assert made.name == "2 jpeg_compressibility" and not made.differentiable
    assert build.reward(config(reward="{'name': 'jpeg_compressibility'}")).name == "jpeg_compressibility"
