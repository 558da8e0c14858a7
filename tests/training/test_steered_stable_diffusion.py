"""Every test-time method on Stable Diffusion folders of toy size, with a CLIP-family reward, as `sample --method` draws with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_clip
import tiny_sd
from PIL import Image
from steered import ETA, OFF, SCALE, SETTINGS

from alignment_jax.test_time import TEST_TIME
from alignment_jax.training.generate import generate

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red house", "the cat on the moon", "the sea"]
QUICK = {("sdxl", "das")}
CASES = [pytest.param(kind, name, marks=() if (kind, name) in QUICK else pytest.mark.slow)
         for kind in ("sd15", "sdxl") for name in TEST_TIME]  # fmt: skip
SMALL = {"dno": {"iterations": 2, "permutations": 1}, "reno": {"iterations": 2}, "prompt_embedding": {"iterations": 2},
         "reneg": {"iterations": 2}, "path_search": {"rounds": 1}}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models sd15 and sdxl, a scorer, prompts."""
    root = tmp_path_factory.mktemp("steered")
    (root / "scorers").mkdir()
    tiny_clip.write(root / "scorers")
    for kind in ("sd15", "sdxl"):
        tiny_sd.write(kind, root / kind)
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return root


def drawn(folder, kind, name, settings, out):
    """(pictures [3,H,W,3], info.json)."""
    sampling = {"num_steps": 4, "eta": ETA.get(name, 0.0), "guidance_scale": SCALE.get(name, 3.0), "scheduler": "ddim"}
    generate(model=str(folder / kind), weights_file="shipped", run=None, scale=None, prompts=str(folder / "prompts.txt"), out=str(out),
             seed=3, samples=1, noise=None, save_arrays=False, settings=sampling,
             method={"name": name, **settings} if settings is not None else None,
             reward=str({"name": "pick_score", "weights": str(folder / "scorers" / "clip")}))  # fmt: skip
    info = json.loads((out / "info.json").read_text()) if settings is not None else {}
    return np.stack([np.asarray(Image.open(p)) for p in sorted(out.glob("0*.png"))]), info


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_off_gives_the_base_samplers_pictures_and_on_gives_others(folder, kind, name, tmp_path):
    plain, _ = drawn(folder, kind, name, None, tmp_path / "plain")
    off, _ = drawn(folder, kind, name, OFF[name], tmp_path / "off")
    np.testing.assert_array_equal(off, plain)
    on, info = drawn(folder, kind, name, SETTINGS[name] | SMALL.get(name, {}), tmp_path / "on")
    assert on.shape == plain.shape and on.std() > 5 and (on != plain).any(), name
    if TEST_TIME[name].reward:
        assert len(info["reward"]) == len(PROMPTS) and np.isfinite(info["reward"]).all()


def test_from_the_command_line_a_batch_of_prompts_follows_a_clip_reward(folder, tmp_path):
    def sample(out, *more):
        command = [sys.executable, "-m", "alignment_jax", "sample", f"--model={folder / 'sd15'}", f"--prompts={folder / 'prompts.txt'}",
                   f"--out={tmp_path / out}", "--seed=3", "--num_steps=2", "--guidance_scale=3", *more]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]

    reward = f"--reward={{'name': 'pick_score', 'weights': '{folder / 'scorers' / 'clip'}'}}"
    for n in (1, 4):
        sample(str(n), "--method=best_of_n", f"--option=n={n}", reward)
    one, four = (np.array(json.loads((tmp_path / n / "info.json").read_text())["reward"]) for n in "14")
    assert (four >= one - 1e-5).all() and four.mean() > one.mean()


def test_a_reward_of_other_pictures_is_refused_by_size(folder, tmp_path):
    caption = "a green bell monster with horns, one big eye and a smile on a blue background"
    with pytest.raises(ValueError, match=r"read pictures of 32 x 32, RGB; got \[16, 16, 3\]"):
        generate(model=str(folder / "sd15"), weights_file="shipped", run=None, scale=None, prompts=caption, out=str(tmp_path / "out"),
                 seed=0, samples=1, noise=None, save_arrays=False, settings={"num_steps": 2}, method={"name": "best_of_n", "n": 2},
                 reward="critters_proxy")  # fmt: skip
