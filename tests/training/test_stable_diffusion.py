"""Every method trains a Stable Diffusion of toy size: steps through the loop, and whole runs from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
import tiny_sd
from PIL import Image

from alignment_jax import weights
from alignment_jax.algorithms import ALGORITHMS
from alignment_jax.evaluation.metrics import describe
from alignment_jax.training import loop
from alignment_jax.training.export import export

ROOT = Path(__file__).parents[2]
CAPTIONS = ["a red house", "a cat on the moon", "the sea", "a blue house"]
METHODS = {
    "sft": {}, "raft": {}, "rwr": {"lam": 1.0}, "lee": {"low": -10.0, "high": 0.0}, "ddpo": {"clip_range": 0.1}, "dpok": {},
    "dance_grpo": {}, "mix_grpo": {"window": 1}, "diffusion_nft": {}, "awm": {}, "adjoint_matching": {"lam": 1.0}, "prdp": {},
    "guidance_distillation": {}, "diffusion_dpo": {"beta": 100.0}, "diffusion_kto": {"beta": 100.0}, "mapo": {},
    "spin": {"beta": 100.0}, "inpo": {"beta": 100.0, "steps": 2}, "smpo": {"beta": 100.0, "steps": 2}, "rank_dpo": {"beta": 100.0},
    "d3po": {}, "spo": {"k": 2, "threshold": 0.0, "start": 0.0}, "lpo": {"k": 2, "threshold": 0.0},
    "online": {"loss": {"name": "diffusion_dpo", "beta": 100.0}}, "semi_online": {"loss": {"name": "diffusion_dpo", "beta": 100.0}},
    "drtune": {"k": 2}, "srpo": {}, "refl": {"window": 0.7}, "draft": {"k": 1}, "alignprop": {"mean_k": 1.0, "std_k": 0.5},
}  # fmt: skip
FLOWS = {"flow_grpo"}  # for rectified flows alone
PAIRS, LABELS = ("diffusion_dpo", "diffusion_kto", "mapo", "inpo", "smpo"), ("sft", "guidance_distillation", "spin", "semi_online")
STILL = ("raft", "ddpo", "dpok", "dance_grpo", "mix_grpo", "diffusion_nft", "d3po", "spo", "lpo", "online", "prdp", "rank_dpo")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with sd15/, sdxl/, labels/, pairs.npz and prompts.txt."""
    root = tmp_path_factory.mktemp("world")
    for kind in ("sd15", "sdxl"):
        tiny_sd.write(kind, root / kind)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, len(CAPTIONS), 16, 16, 3), np.uint8)
    (root / "labels").mkdir()
    for i, image in enumerate(images[0]):
        Image.fromarray(image).save(root / "labels" / f"{i}.png")
    rows = [json.dumps({"file": f"{i}.png", "prompt": caption}) for i, caption in enumerate(CAPTIONS)]
    (root / "labels" / "captions.jsonl").write_text("\n".join(rows))
    np.savez(root / "pairs.npz", winner=images[0], loser=images[1], prompts=np.array(CAPTIONS))
    np.savez(root / "lists.npz", list=images.swapaxes(0, 1), score=np.arange(8.0).reshape(4, 2), prompts=np.array(CAPTIONS))
    (root / "prompts.txt").write_text("\n".join(CAPTIONS))
    return root


def settings(world, kind, name, lora):
    """A config, as a dictionary, of three steps on two pictures a step."""
    labels, pairs = {"labels": "folder", "path": str(world / "labels"), "drop": 0.25}, {"pairs": str(world / "pairs.npz")}
    data = dict.fromkeys(LABELS, labels) | dict.fromkeys(PAIRS, pairs) | {"rank_dpo": {"lists": str(world / "lists.npz")}}
    data = data.get(name, {"prompts": str(world / "prompts.txt")})
    scorers = {"value": "jpeg_compressibility", "gradient": "own_reward:warmth", "step": "own_reward:warmth",
               "state": "own_reward:latent_level", None: ""}  # fmt: skip
    reward = scorers[ALGORITHMS[name].reward]
    return {
        "seed": 0, "steps": 3, "checkpoint_every": 0, "evaluate_every": 0, "evaluation": None, "model": str(world / kind),
        "weights": "shipped", "reward": reward, "method": {"name": name, **METHODS[name]}, "optimizer": {"learning_rate": 1e-3},
        "batch": {"prompts": 1, "group": 2}, "data": data,
        "sampling": {"num_steps": 3 if name == "srpo" else 2, "eta": 1.0, "guidance_scale": 3.0, "scheduler": "ddim"},
        "lora": {"rank": 2, "targets": "ddpo-pytorch"} if lora else {},
    }  # fmt: skip


def leaves(tree):
    return [np.array(x) for x in jax.tree.leaves(tree)]


def trains(world, kind, name, lora):
    """Three steps: finite losses, every trained array moves, no other does."""
    assert set(METHODS) == set(ALGORITHMS) - FLOWS
    session, state = loop.set_up(ml_collections.ConfigDict(settings(world, kind, name, lora)))
    before, frozen = leaves(state.trained), leaves(session.frozen["params"])
    sizes = sum(x.size for x in before)
    assert sizes < 0.1 * sum(x.size for x in jax.tree.leaves(session.run.params["unet"])) if lora else set(state.trained) == {"unet"}
    for _ in range(3):
        state, metrics = loop.one_step(session, state, next(session.run.source))
        assert np.isfinite(float(metrics["loss"])), metrics
        assert float(metrics["grad_norm"]) > 0 or name in STILL, metrics
    moved = [bool(np.any(a != b)) for a, b in zip(before, leaves(state.trained), strict=True)]
    assert all(moved), (name, sum(moved), len(moved))
    assert all(np.array_equal(a, b) for a, b in zip(frozen, leaves(session.frozen["params"]), strict=True))
    if name == "ddpo":
        assert float(metrics["ratio/deviation_max"]) == 0.0
    if ALGORITHMS[name].reward == "value":
        assert -100.0 < float(metrics["reward/mean"]) < 0.0


CASES = [pytest.param(kind, name, lora, marks=() if (kind, name, lora) == ("sd15", "ddpo", True) else pytest.mark.slow)
         for name in sorted(METHODS) for kind in ("sd15", "sdxl") for lora in (True, False)]  # fmt: skip


@pytest.mark.parametrize("kind, name, lora", CASES)
def test_every_method_trains_every_kind(kind, name, lora, world):
    trains(world, kind, name, lora)


def cli(world, *arguments):
    """A command's standard output; both tests' programs share a cache."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "JAX_COMPILATION_CACHE_DIR": str(world / "cache")}
    done = subprocess.run([sys.executable, "-m", "alignment_jax", *map(str, arguments)], capture_output=True, text=True,
                          cwd=ROOT, env=env)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def config_file(path, config):
    """A user's own config file."""
    path.write_text(f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({config!r})\n")
    return path


@pytest.mark.parametrize("name", [pytest.param("sft", marks=pytest.mark.slow), "draft"])
def test_a_run_from_the_command_line_is_sampled_and_exported(name, world, tmp_path):
    """Both forms of data, pictures with captions and prompts, and both ways of training."""
    lora = name == "draft"
    file = config_file(tmp_path / "mine.py", settings(world, "sd15", name, lora) | {"optimizer": {"learning_rate": 0.05}})
    said = cli(world, "train", f"--config={file}", f"--workdir={tmp_path / 'run'}", "--config.steps=2")
    assert f"method          {name}, 2 steps" in said and ("(LoRA)" in said) == lora
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2] and all(np.isfinite(row["loss"]) for row in log)
    assert all(describe(key) for row in log for key in row)
    assert sum(x.size for x in jax.tree.leaves(weights.load(tmp_path / "run" / "trained.safetensors"))) > 1000
    if not lora:
        return
    cli(world, "sample", f"--run={tmp_path / 'run'}", f"--prompts={world / 'prompts.txt'}", f"--out={tmp_path / 'o'}", "--save_arrays")
    tuned = np.load(tmp_path / "o" / "images.npy")
    assert tuned.shape == (len(CAPTIONS), 16, 16, 3) and (tmp_path / "o" / "0003.png").exists()
    export(tmp_path / "run", tmp_path / "lora", "kohya")
    cli(world, "sample", f"--model={world / 'sd15'}", f"--prompts={world / 'prompts.txt'}", f"--out={tmp_path / 'p'}", "--save_arrays",
        f"--lora={tmp_path / 'lora' / 'pytorch_lora_weights.safetensors'}", "--num_steps=2", "--eta=1", "--guidance_scale=3",
        "--scheduler=ddim")  # fmt: skip
    np.testing.assert_allclose(np.load(tmp_path / "p" / "images.npy"), tuned, atol=1e-4)
