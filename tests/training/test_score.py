"""`score`: pictures from files, of any kind, get the numbers that the scorers' originals give."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_clip
from PIL import Image

from alignment_jax.training.score import score

ROOT = Path(__file__).parents[2]
HPS = {k: {**v, "hidden_act": "gelu"} if isinstance(v, dict) else v
       for k, v in json.loads(str(tiny_clip.fixture("whole")["config"])).items()}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny CLIP with its heads, and pngs/, images.npy and prompts.txt of the fixtures' two pictures."""
    root = tiny_clip.write(tmp_path_factory.mktemp("clip"))
    images = tiny_clip.fixture("pixels")["images"][:2]
    (root / "pngs").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(root / "pngs" / f"{i}.png")
    np.save(root / "images.npy", images)
    prompts = tiny_clip.fixture("scores")["prompts"][[0, 4]].tolist()
    (root / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in prompts))
    return root


def options(name, folder):
    """The arguments of a scorer of the fixtures."""
    clip = {"weights": str(folder / "clip")}
    return {"clip_score": clip, "pick_score": clip, "safety": {"weights": str(folder / "safety")},
            "hps": {"weights": str(folder / "hps.safetensors"), "version": "v2.1", "tokenizer": str(folder / "clip"), "config": HPS},
            "aesthetic_v1": {**clip, "version": "v1", "head": str(folder / "v1.safetensors")},
            "aesthetic_linear": {**clip, "head": str(folder / "linear.safetensors")}}[name]  # fmt: skip


NAMES = ("clip_score", "pick_score", "hps", "safety", "aesthetic_v1", "aesthetic_linear")


@pytest.mark.parametrize("name", NAMES)
def test_exact_scores_of_files_are_those_of_the_original(name, folder, tmp_path):
    want = tiny_clip.fixture("scores")[f"{name}/exact"]
    for images in ("pngs", "images.npy"):
        got = score(reward=name.split("_v")[0].split("_lin")[0], options={**options(name, folder), "mode": "exact"},
                    images=str(folder / images), prompts=str(folder / "prompts.jsonl"), out=str(tmp_path / "s.json"))  # fmt: skip
        assert np.abs(np.array([row["score"] for row in got["scores"]]) - want).max() <= 1e-4 * np.abs(want).max()
    stored = json.loads((tmp_path / "s.json").read_text())
    assert stored == got and abs(stored["mean"] - want.mean()) <= 1e-4 * np.abs(want).max()


def command(*arguments):
    """A finished `score` of the command line."""
    return subprocess.run([sys.executable, "-m", "alignment_jax", "score", *map(str, arguments)], capture_output=True, text=True,
                          cwd=ROOT)  # fmt: skip


def test_the_command_line_reads_options_as_values(folder, tmp_path):
    given = [f"--weights={folder / 'clip'}", f"--images={folder / 'pngs'}", f"--prompts={folder / 'prompts.jsonl'}",
             f"--out={tmp_path / 's.json'}", "--option=scale=100", "--option=clip_at_zero=false"]  # fmt: skip
    done = command("--reward=clip_score", *given, "--option=mode=exact")
    assert done.returncode == 0, done.stderr[-2000:]
    want = 100 * tiny_clip.fixture("scores")["clip_score/exact"]
    got = [row["score"] for row in json.loads((tmp_path / "s.json").read_text())["scores"]]
    np.testing.assert_allclose(got, want, atol=1e-2)
    assert done.stdout.startswith(f"clip_score: mean {np.mean(got):.4f}")
    done = command("--reward=clip_score", *given, "--option=mode")
    assert done.returncode == 2 and "error: --option=mode must be NAME=VALUE" in done.stderr


def test_pictures_of_every_kind_and_of_several_sizes(folder, tmp_path):
    rng = np.random.default_rng(0)
    grey, rgb = rng.integers(0, 256, (30, 24), np.uint8), rng.integers(0, 256, (24, 40, 3), np.uint8)
    clear = np.dstack([rgb, np.zeros(rgb.shape[:2], np.uint8)])
    for name, image in {"a": Image.fromarray(grey), "b": Image.fromarray(clear), "c": Image.fromarray(grey).convert("RGB"),
                        "d": Image.new("RGB", (40, 24), "white"), "e": Image.fromarray(rgb).convert("P"),
                        "f": Image.fromarray(grey > 127), "g": Image.fromarray(grey).convert("LA")}.items():  # fmt: skip
        image.save(tmp_path / f"{name}.png")
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "h.jpg", quality=95)
    Image.fromarray(rgb).save(tmp_path / "i.jpg", quality=95)
    got = score(reward="clip_score", options=options("clip_score", folder), images=str(tmp_path), prompts="the dog",
                out=str(tmp_path / "s.json"))["scores"]  # fmt: skip
    values = {row["image"][0]: row["score"] for row in got}
    assert values["a"] == pytest.approx(values["c"], abs=1e-6) and values["b"] == pytest.approx(values["d"], abs=1e-6)
    assert values["g"] == pytest.approx(values["a"], abs=1e-6) and np.isfinite(list(values.values())).all()
    assert values["h"] == pytest.approx(values["i"], abs=0.1) and {row["prompt"] for row in got} == {"the dog"}


def test_jpeg_needs_no_prompts(folder, tmp_path):
    got = score(reward="jpeg_incompressibility", options={}, images=str(folder / "pngs"), prompts=None, out=str(tmp_path / "s.json"))
    assert got["mean"] > 0.5 and [row["image"] for row in got["scores"]] == ["0.png", "1.png"]


def test_mistakes_are_named(folder, tmp_path):
    def run(images=folder / "pngs", prompts="the dog", **more):
        given = {"reward": "clip_score", "options": options("clip_score", folder), **more}
        score(**given, images=str(images), prompts=prompts, out=str(tmp_path / "s.json"))

    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_bytes((folder / "pngs" / "0.png").read_bytes()[:300])
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep" / "0.png")
    np.save(tmp_path / "none.npy", np.zeros((0, 8, 8, 3), np.uint8))
    np.save(tmp_path / "flat.npy", np.zeros((8, 8, 3), np.uint8))
    np.save(tmp_path / "wide.npy", np.full((1, 8, 8, 3), 255.0))
    for call, message in (
        (lambda: run(prompts=str(tmp_path / "three.txt")), "holds 3 prompts for 2 pictures"),
        (lambda: run(prompts=None), "reads the prompt too; give --prompts"),
        (lambda: run(tmp_path / "empty"), "holds no pictures"),
        (lambda: run(tmp_path / "absent"), "no folder of pictures at"),
        (lambda: run(tmp_path / "broken"), "0.png, 300 bytes, is no picture that can be read"),
        (lambda: run(tmp_path / "deep"), "more than 8 bits a channel"),
        (lambda: run(tmp_path / "none.npy"), r"\[0, 8, 8, 3\]; wanted \[N,H,W,C\]"),
        (lambda: run(tmp_path / "flat.npy"), r"\[8, 8, 3\]; wanted \[N,H,W,C\]"),
        (lambda: run(tmp_path / "wide.npy"), r"must lie in \[0, 1\]"),
        (lambda: run(reward="clip_scor"), "Did you mean 'clip_score'"),
        (lambda: run(options={"weights": str(folder / "clip"), "mode": "fast"}), "mode 'fast'"),
        (lambda: run(options={"wights": "x"}), "Did you mean 'weights'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            call()
    assert not (tmp_path / "s.json").exists() and "torch" not in sys.modules
