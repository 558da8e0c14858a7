"""What a run exports makes the same pictures in diffusers as here, as LoRA files, folders and single files, and comes back.

python tests/parity/test_export.py DIR writes what references/export.py reads.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_sd
from parity.common import (
    EXPORT_CASES,
    EXPORT_FORMATS,
    FIXTURES,
    PIPELINE_CASES,
    SINGLE_FILES,
    pipeline_latents,
    random_weights,
)

from alignment_jax import weights
from alignment_jax.models.stable_diffusion import stable_diffusion
from alignment_jax.training.export import LORA_FILE, convert, export, write_folder
from alignment_jax.training.generate import generate, partition_of

REFERENCE = Path(__file__).parent / "references" / "export.py"
LORA = {"rank": 3, "alpha": 1.5}


def make_run(folders, workdir, case):
    """The folder of a run whose LoRA has factors that follow from their names."""
    config = {"model": str(folders / case["kind"]), "weights": "shipped", "lora": {**LORA, "targets": case["targets"]},
              "sampling": {"num_steps": case["num_steps"], "guidance_scale": case["guidance_scale"]}}  # fmt: skip
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config))
    init = stable_diffusion(folders / case["kind"]).init
    partition = partition_of(ml_collections.ConfigDict(config))
    shapes = jax.eval_shape(lambda key: partition.init(key, init(key))[0], jax.random.key(0))
    flat = {name: tuple(x.shape) for name, x in flatten_dict(shapes, sep="/").items()}
    weights.save(workdir / "trained.safetensors", unflatten_dict(random_weights(flat), sep="/"))
    return workdir


def make_folders(root):
    """root/folders."""
    for kind in tiny_sd.KINDS:
        tiny_sd.write(kind, root / "folders" / kind)
    return root


def make_exports(root, name):
    """root/runs/name and what it exports, root/exports/name."""
    if not (root / "runs" / name).exists():
        run = make_run(root / "folders", root / "runs" / name, EXPORT_CASES[name])
        for form in EXPORT_FORMATS:
            export(run, root / "exports" / name / form, form)


def make(root):
    """root/folders, root/runs and root/exports, all of them."""
    make_folders(root)
    for name in EXPORT_CASES:
        make_exports(root, name)
    for kind in SINGLE_FILES:
        convert(root / "folders" / kind, root / "exports" / f"{kind}.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("export"))


def draw(case, out, **source):
    """Pictures of a case by what `sample` calls."""
    np.save(out / "latents.npy", pipeline_latents(case))
    (out / "prompts.txt").write_text("\n".join(case["prompts"]))
    given = {"model": "", "weights_file": "shipped", "run": None, "scale": None, **source}
    settings = {k: case[k] for k in ("num_steps", "guidance_scale")}
    generate(**given, prompts=str(out / "prompts.txt"), out=str(out), seed=0, samples=1, noise=str(out / "latents.npy"),
             save_arrays=True, settings=settings, options={k: case[k] for k in ("height", "width")})  # fmt: skip
    return np.load(out / "images.npy")


CASES = [pytest.param(name, marks=() if name in ("sd15_text", "sdxl") else pytest.mark.slow) for name in EXPORT_CASES]


@pytest.mark.parametrize("name", CASES)
def test_a_run_draws_here_what_its_exports_draw_in_diffusers(name, root, tmp_path):
    make_exports(root, name)
    stored, case = np.load(FIXTURES / "export.npz"), EXPORT_CASES[name]
    got = draw(case, tmp_path, run=str(root / "runs" / name))
    other = stored[f"{case['kind'] if name.endswith('_text') else name + '_text'}_peft"]
    assert np.abs(stored[f"{name}_peft"] - other).max() > 0.05  # other layers, other pictures
    for form in EXPORT_FORMATS:
        assert np.abs(got - stored[f"{name}_{form}"]).max() <= 1e-3, form


@pytest.mark.parametrize("name", CASES)
def test_exported_files_are_read_back(name, root, tmp_path):
    """As `sample --lora` and `sample --model` read them: in every format the same parameters as the run's own."""
    from alignment_jax.training.build import model
    from alignment_jax.training.generate import load_run, with_lora

    make_exports(root, name)
    run = flatten_dict(load_run(root / "runs" / name)[1], sep="/")
    kind = EXPORT_CASES[name]["kind"]
    base = model(ml_collections.ConfigDict({"model": str(root / "folders" / kind)}))[1]
    for form in ("peft", "kohya"):
        got = flatten_dict(with_lora(base, root / "exports" / name / form / LORA_FILE), sep="/")
        assert all(np.abs(got[k] - run[k]).max() <= 1e-5 for k in run), form
    half = flatten_dict(with_lora(base, root / "exports" / name / "peft" / LORA_FILE, 0.5), sep="/")
    old = flatten_dict(base, sep="/")
    assert all(np.abs(half[k] - (old[k] + run[k]) / 2).max() <= 1e-5 for k in run)
    folder = flatten_dict(model(ml_collections.ConfigDict({"model": str(root / "exports" / name / "diffusers")}))[1], sep="/")
    assert all(np.array_equal(folder[k], run[k]) for k in run)


def files_of(folder):
    """{file: contents} of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", SINGLE_FILES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_folder_becomes_a_single_file_and_the_same_folder_again(kind, dtype, root, tmp_path):
    from alignment_jax.training.build import model

    source = root / "folders" / kind
    if dtype == "float16":
        params = model(ml_collections.ConfigDict({"model": str(source)}))[1]
        source = write_folder(source, params, tmp_path / "half", np.float16)
    convert(source, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "again", like=source)
    a, b = files_of(source), files_of(tmp_path / "again")
    assert a.keys() == b.keys() and all(a[name] == b[name] for name in a), [n for n in a if a[n] != b.get(n)]


@pytest.mark.parametrize("kind", SINGLE_FILES)
def test_single_files_draw_the_same_in_diffusers(kind, root, tmp_path):
    want = np.load(FIXTURES / "export.npz")[f"{kind}_single"]
    got = draw(PIPELINE_CASES[kind], tmp_path, model=str(root / "folders" / kind))
    assert np.abs(got - want).max() <= 1e-3


@pytest.mark.parity
def test_the_fixture_is_what_diffusers_gives(parity_python, root, tmp_path):
    make(root)
    subprocess.run([parity_python, REFERENCE, tmp_path, root / "folders", root / "exports"], check=True)
    fresh, stored = np.load(tmp_path / "export.npz"), np.load(FIXTURES / "export.npz")
    assert set(fresh.files) == set(stored.files)
    for name in set(stored.files) - {"versions"}:
        np.testing.assert_allclose(fresh[name], stored[name], atol=1e-4, err_msg=name)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
