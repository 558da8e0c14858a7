"""A Stable Diffusion run from the command line with its evaluation: reward and judge on CLIP, one watched prompt, the report."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_clip
import tiny_sd
from PIL import Image

from alignment_jax.evaluation.statistics import flatten, interval
from alignment_jax.training.evaluate import _alarm

ROOT = Path(__file__).parents[2]


def settings(kind, folder):
    """A config, as a dictionary, of two steps; four prompts are judged and one is watched."""
    clip = str(folder / "scorers" / "clip")
    return {
        "name": f"tiny:{kind}", "seed": 0, "steps": 2, "checkpoint_every": 0, "evaluate_every": 1, "early_stop": True,
        "model": str(folder / kind), "weights": "shipped", "reward": {"name": "pick_score", "weights": clip},
        "method": {"name": "draft", "k": 1}, "optimizer": {"learning_rate": 0.02}, "batch": {"prompts": 2, "group": 1},
        "data": {"prompts": str(folder / "prompts.txt")}, "lora": {"rank": 2, "targets": "ddpo-pytorch"},
        "sampling": {"num_steps": 2, "eta": 0.0, "guidance_scale": 3.0, "scheduler": "ddim"},
        "evaluation": {"judge": {"name": "aesthetic", "weights": clip, "head": str(folder / "scorers" / "linear.safetensors")},
                       "prompts": str(folder / "held_out.txt"), "num_prompts": 4, "samples": 2, "quick_prompts": 1, "blend": (0.5,),
                       "chunk": 4, "scale": 1.0, "base_guidance_scale": 5.0, "seed": 1},
    }  # fmt: skip


def strict(text):
    """JSON without NaN and Infinity, which are none."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_run_is_judged_and_reported_without_unknown_numbers(kind, tmp_path):
    """The trap: one watched prompt has no interval over prompts, and its bounds were written as NaN."""
    (tmp_path / "scorers").mkdir()
    tiny_clip.write(tmp_path / "scorers")
    tiny_sd.write(kind, tmp_path / kind)
    (tmp_path / "prompts.txt").write_text("a red house\na cat on the moon\nthe sea")
    (tmp_path / "held_out.txt").write_text("a dog\na red moon\nthe blue cat\nthe cat\na house")
    (tmp_path / "mine.py").write_text("from ml_collections import ConfigDict\n\n\ndef get_config():\n"
                                      f"    return ConfigDict({settings(kind, tmp_path)!r})\n")  # fmt: skip
    run = tmp_path / "run"
    done = subprocess.run([sys.executable, "-m", "alignment_jax", "train", f"--config={tmp_path / 'mine.py'}", f"--workdir={run}"],
                          capture_output=True, text=True, cwd=ROOT, env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "NaN" not in done.stderr

    rows = [strict(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert {"gold/all", "proxy", "diversity/pixel_right", "kl/path"} <= row.keys() and all(np.isfinite(v) for v in row.values())
        assert "diversity/pixel_right/low" not in row and row["diversity/pixel_right/n"] == 1

    summary = strict((run / "summary.json").read_text())
    assert summary["kl"] > 0 and summary["trained_parameters"] > 1000 and isinstance(summary["alarm"]["fired"], bool)
    for name in ("base", "aligned"):
        for value in (summary[name]["gold"], summary[name]["proxy"], summary[name]["diversity"]["pixel_right"]):
            assert value["low"] <= value["mean"] <= value["high"] and value["n"] in (4, 8)
    # the base of the alarm is that of the report's own prompts
    assert f"{summary['base']['proxy']['mean']:.3f}" in summary["alarm"]["reason"]

    page = (run / "report.html").read_text()
    pictures = [Image.open(io.BytesIO(base64.b64decode(b))).convert("RGB")
                for b in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)]  # fmt: skip
    shots = [np.asarray(p) for p in pictures if p.size == (16, 16)]
    # base, tuned and best of 2 of four prompts, then the pairs of three prompts' groups of two
    assert len(shots) == 4 * 3 + 3 * 2 * 2 and all(shot.std() > 10 for shot in shots)
    before, after = np.stack(shots[0:12:3]), np.stack(shots[1:12:3])
    assert all(np.any(b != a) for b, a in zip(before, after, strict=True))  # training, and guidance, changed every picture
    assert len(pictures) - len(shots) == 4  # curves and panel, light and dark
    whole = np.asarray(Image.open(run / "before_after.png").convert("RGB"))
    assert min(whole.shape[:2]) > 100 and whole.std() > 10
    said = re.sub(r"<[^>]+>", " ", re.sub(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+|<style>(?s:.*?)</style>", "", page))
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b|all right", said)
    assert "the first 4 of 4" in said and f"--run {run} " in said


def near(mean):
    return interval(mean, mean - 0.01, mean + 0.01, 64)


def row(step, proxy, gold):
    return {"step": step, **flatten("proxy", near(proxy)), **flatten("gold/all", near(gold))}


def test_means_of_different_prompts_do_not_fire_the_alarm():
    """The trap: the base on the watched prompts beside the tuned model on the report's made a rise and a fall of nothing."""
    points = [{"proxy": near(p), "gold": near(0.5), "diversity": {"pixel_right": near(0.3)}} for p in (0.60, 0.61)]
    alarm = _alarm(points, [row(0, 0.2, 0.9), row(1, 0.2, 0.9)], 1)
    assert not alarm["fired"] and "did not clearly rise: 0.600" in alarm["reason"]
    assert _alarm(points, [], 1) == alarm
    fell = [row(0, 0.2, 0.9), row(1, 0.4, 0.7), row(2, 0.6, 0.2)]
    assert _alarm(points, fell, 2)["reason"].startswith("On the prompts watched while training: Over-optimised")
    assert not _alarm(points, [*fell[:1], row(1, 0.4, 0.91), *fell[2:]], 1)["fired"]  # judged is the state of step 1
    points[1] |= {"proxy": near(0.9), "gold": near(0.3)}
    assert _alarm(points, [], 1)["fired"]
