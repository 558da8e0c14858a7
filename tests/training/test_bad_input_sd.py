"""What can be wrong with a model folder, a LoRA file or a setting is said in one clear message before anything compiles."""

import json
import logging
import os
import shutil

import jax
import numpy as np
import pytest
import tiny_sd
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from alignment_jax.models.stable_diffusion import stable_diffusion
from alignment_jax.training import generate
from alignment_jax.training.export import convert
from alignment_jax.weights import lora_files

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_sd.write("sd15", tmp_path_factory.mktemp("sd") / "sd15")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


@pytest.fixture(autouse=True)
def never_samples(monkeypatch):
    """Whoever gets this far would compile."""

    def pictures(*args, **kwargs):
        raise AssertionError("a bad input has reached the sampler")

    monkeypatch.setattr(generate, "pictures", pictures)


def draw(model, out, prompts="a red house", noise=None, settings=None, loras=(), **options):
    """What `sample` calls."""
    generate.generate(model=str(model), weights_file="shipped", run=None, scale=None, prompts=prompts, out=str(out), seed=0,
                      samples=1, noise=noise, save_arrays=False, settings=settings or {}, options=options, loras=loras)  # fmt: skip


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def sharded(folder, remove):
    """The UNet in two shards and an index, of which one is gone or cut off."""
    tensors = load_file(folder / UNET)
    names = sorted(tensors)
    (folder / UNET).unlink()
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for name, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, folder / "unet" / name)
    index = {"weight_map": {k: name for name, keys in parts.items() for k in keys}}
    (folder / f"{UNET}.index.json").write_text(json.dumps(index))
    remove(folder / "unet" / "b.safetensors")


def with_nan(folder):
    tensors = load_file(folder / UNET)
    tensors["conv_in.weight"][0, 0, 0, 0] = np.nan
    save_file(tensors, folder / UNET)


@pytest.mark.parametrize("damage, error, message", [
    (lambda f: shutil.rmtree(f / "vae"), FileNotFoundError, r"no config.json in .*vae: the folder is absent.*save_pretrained"),
    (lambda f: shutil.rmtree(f / "tokenizer"), FileNotFoundError, "no tokenizer"),
    (lambda f: (f / "model_index.json").unlink(), FileNotFoundError, "no model_index.json in .*; it has scheduler, text_encoder"),
    (lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"), ValueError, "holds a FluxPipeline; supported: StableDiffusionP"),
    (lambda f: edit(f / "unet/config.json", _class_name="UNet3D"), ValueError, r"unet/config.json: _class_name is 'UNet3D'; wanted"),
    (lambda f: edit(f / "vae/config.json", _class_name="VQModel"), ValueError, r"vae/config.json: .*'VQModel'"),
    (lambda f: edit(f / "text_encoder/config.json", model_type="t5"), ValueError, r"text_encoder/config.json: model_type is 't5'"),
    (lambda f: edit(f / "unet/config.json", class_embed_type="timestep"), ValueError, r"unet/config.json: .*class_embed_type is"),
    (lambda f: edit(f / "scheduler/scheduler_config.json", beta_schedule="sigmoid"), ValueError, "beta_schedule is 'sigmoid'; supported"),
    (lambda f: (f / "vae/config.json").write_text("{"), ValueError, r"vae/config.json is not JSON .*fetch it again"),
    (lambda f: cut(f / UNET), ValueError, "is not a whole safetensors file .*Was a download cut off"),
    (lambda f: sharded(f, cut), ValueError, "b.safetensors, .*is not a whole safetensors file"),
    (lambda f: sharded(f, lambda p: p.unlink()), FileNotFoundError, "lists 2 files, and 1 of them are not there: b.safetensors"),
    (with_nan, ValueError, "conv_in.weight has 1 of .*NaN or infinite"),
    (lambda f: (f / UNET).rename(f / "unet/diffusion_pytorch_model.bin"), ValueError, "only a pickle"),
    (lambda f: (f / UNET).unlink(), FileNotFoundError, "no diffusion_pytorch_model.safetensors and no .*index.json"),
    (lambda f: shutil.copy(f / "vae/diffusion_pytorch_model.safetensors", f / UNET), ValueError, "does not fit the model"),
])  # fmt: skip
def test_a_damaged_folder_is_described(damage, error, message, folder, tmp_path):
    damage(folder)
    with pytest.raises(error, match=message):
        draw(folder, tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("given, message", [
    ({"height": 17}, "multiples of 2 high and wide; got 17 x 16, the nearest is 16 x 16"),
    ({"settings": {"scheduler": "pndm"}}, "scheduler 'pndm' is not known; choose one of ddim"),
    ({"settings": {"scheduler": "lcm", "num_steps": 51}}, "lcm takes its steps from the 50 of its distillation; got num_steps=51"),
    ({"settings": {"num_steps": 1001}}, r"num_steps must lie in 1\.\.1000; got 1001"),
    ({"settings": {"spacing": "even"}}, "spacing 'even' is not known; choose one of leading"),
    ({"settings": {"scheduler": "euler", "eta": 1.0}}, "eta=1.0 is a setting of the scheduler ddim"),
    ({"noise": (2, 4, 8, 8)}, r"--noise holds an array \(2, 4, 8, 8\); \(1, 8, 8, 4\) or \(1, 4, 8, 8\) is needed"),
    ({"noise": "nan"}, "not finite"),
    ({"widht": 16}, "model_options has no field 'widht'. Did you mean 'width'"),
    ({"prompts": "nowhere.txt"}, "no prompts at nowhere.txt"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused_before_weights_are_read(given, message, folder, tmp_path):
    (folder / UNET).unlink()  # so that reading would say something else
    if "noise" in given:
        noise = np.full((1, 4, 8, 8), np.nan) if given["noise"] == "nan" else np.zeros(given["noise"])
        np.save(tmp_path / "noise.npy", noise)
        given = {"noise": str(tmp_path / "noise.npy")}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        draw(folder, tmp_path / "o", **given)


def lora_of(folder, path, change=lambda tensors: tensors):
    """A file with factors of one module of the UNet of a folder."""
    shapes = jax.eval_shape(stable_diffusion(folder).init, jax.random.key(0))
    kernel = next(k for k in flatten_dict(shapes["unet"], sep="/") if k.endswith("to_q/kernel"))
    factors = {f"unet/{kernel}/a": np.ones((16, 4), np.float32), f"unet/{kernel}/b": np.ones((4, 16), np.float32)}
    tree = unflatten_dict(factors, sep="/")
    lora_files.write_peft(path, tree, shapes, rank=4, prefix={"unet": "unet"})
    save_file(change(load_file(path)), path)
    return path


def other_rank(tensors):
    return {k: v[:2] if k.endswith("lora_A.weight") else v for k, v in tensors.items()}


def other_width(tensors):
    return {k: np.ones((4, 320), np.float32) if k.endswith("lora_A.weight") else v for k, v in tensors.items()}


@pytest.mark.parametrize("change, message", [
    (other_rank, "ranks 2 and 4 differ"),
    (other_width, "do not make a kernel .*is this LoRA of another model"),
    (lambda t: {k.replace("unet.", "transformer."): v for k, v in t.items()}, "2 of 2 keys are unknown"),
    (lambda t: {k: v for k, v in t.items() if "lora_A" in k}, "has no up half"),
    (lambda t: {**t, "unet.mid_block.attentions.0.hada_w1_a": np.ones(3)}, "another kind of adapter, which is not LoRA"),
    (lambda t: {k: v * np.nan for k, v in t.items()}, "hold NaN or infinity"),
])  # fmt: skip
def test_a_lora_that_does_not_fit_is_described(change, message, whole, tmp_path):
    with pytest.raises(ValueError, match=message):
        draw(whole, tmp_path / "o", loras=[(lora_of(whole, tmp_path / "l.safetensors", change), 1.0)])


def test_a_lora_of_sdxl_is_refused_by_sd15(whole, tmp_path):
    other = tiny_sd.write("sdxl", tmp_path / "sdxl")
    path = tmp_path / "l.safetensors"
    shapes = jax.eval_shape(stable_diffusion(other).init, jax.random.key(0))
    tree = {"unet": {"add_embedding.linear_1": {"kernel": {"a": np.ones((72, 2), np.float32), "b": np.ones((2, 64), np.float32)}}}}
    lora_files.write_kohya(path, tree, shapes, rank=2, prefix={"unet": "unet"})
    with pytest.raises(ValueError, match="does not fit the model: 3 of 3 keys are unknown. A LoRA of another model"):
        draw(whole, tmp_path / "o", loras=[(path, 1.0)])
    with pytest.raises(FileNotFoundError, match="no LoRA file at"):
        draw(whole, tmp_path / "o", loras=[(tmp_path / "absent.safetensors", 1.0)])


def test_prompts_of_more_than_77_tokens_are_cut_and_what_was_cut_is_named(whole, caplog):
    with caplog.at_level(logging.WARNING):
        tokens = stable_diffusion(whole).tokenize(["the cat " * 80 + "and a zebra", "the cat"])
    assert tokens.shape == (2, 77) and len(caplog.records) == 1
    assert "CLIP reads 77" in caplog.text and "zebra" in caplog.text.replace(" ", "")


def test_a_hub_id_without_network_says_how_to_fetch_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="hub id nobody/no-such-model could not be downloaded.*hf download nobody/no-such-model"):
        draw("nobody/no-such-model", tmp_path / "o")
    with pytest.raises(ValueError, match="model 'sd15' is not known.* Or: a folder"):
        draw("sd15", tmp_path / "o")


def test_converting_says_what_is_missing(whole, tmp_path):
    with pytest.raises(ValueError, match="--out must end in .safetensors"):
        convert(whole, tmp_path / "model")
    with pytest.raises(ValueError, match="name a folder of the same family with --like"):
        convert(whole / UNET, tmp_path / "out")
    with pytest.raises(ValueError, match="does not fit the model"):
        convert(whole / UNET, tmp_path / "out", like=whole)
    assert not (tmp_path / "out").exists()
