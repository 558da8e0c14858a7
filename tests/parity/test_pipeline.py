"""Whole pipelines against diffusers: the same folder, prompts and latents give the same pictures."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_sd
from parity.common import FIXTURES, PIPELINE_CASES, pipeline_latents

from alignment_jax.training.generate import generate

REFERENCE = Path(__file__).parent / "references" / "pipeline.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sd")
    for kind in tiny_sd.KINDS:
        tiny_sd.write(kind, root / kind)
    return root


def ours(folders, case, out):
    """Pictures of a case through what `sample` calls."""
    np.save(out / "latents.npy", pipeline_latents(case))
    (out / "prompts.txt").write_text("\n".join(case["prompts"]))
    settings = {k: case[k] for k in ("num_steps", "guidance_scale", "guidance_rescale")}
    if case["scheduler"] == "ddim_trailing":
        settings |= {"scheduler": "ddim", "spacing": "trailing", "steps_offset": 0}
    elif case["scheduler"]:
        settings |= {"scheduler": case["scheduler"]}
    generate(model=str(folders / case["kind"]), weights_file="shipped", run=None, scale=None, prompts=str(out / "prompts.txt"),
             out=str(out), seed=0, samples=1, noise=str(out / "latents.npy"), save_arrays=True, settings=settings,
             negative=case["negative"] or "", options={"height": case["height"], "width": case["width"]})  # fmt: skip
    return np.load(out / "images.npy")


@pytest.mark.parametrize("name", PIPELINE_CASES)
def test_pictures_are_those_of_diffusers(name, folders, tmp_path):
    want = np.load(FIXTURES / "pipeline.npz")[name]
    got = ours(folders, PIPELINE_CASES[name], tmp_path)
    assert got.shape == want.shape and np.abs(got - want).max() <= 1e-3


@pytest.mark.parity
def test_the_fixture_is_what_diffusers_gives(parity_python, folders, tmp_path):
    subprocess.run([parity_python, REFERENCE, tmp_path, folders], check=True)
    fresh, stored = np.load(tmp_path / "pipeline.npz"), np.load(FIXTURES / "pipeline.npz")
    for name in PIPELINE_CASES:
        np.testing.assert_allclose(fresh[name], stored[name], atol=1e-4)
