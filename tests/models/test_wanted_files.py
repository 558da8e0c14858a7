"""Of a repository on the hub only what is read is fetched."""

import pytest
import tiny_sd
from huggingface_hub.utils import filter_repo_objects

from alignment_jax.models.stable_diffusion import COMPONENTS, stable_diffusion, wanted
from alignment_jax.weights.files import open_component

# what stands beside the files that are read in the repositories of Stable Diffusion 1.5, 2.1, XL and Turbo
OTHERS = (
    "README.md", "v1-5-pruned-emaonly.safetensors", "v1-5-pruned.ckpt", "safety_checker/config.json", "safety_checker/model.safetensors",
    "safety_checker/model.fp16.safetensors", "feature_extractor/preprocessor_config.json", "image_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_flax_model.msgpack",
    "unet/diffusion_pytorch_model.fp16.non_ema.safetensors", "unet/model.onnx", "vae/diffusion_pytorch_model.bin", "vae_1_0/config.json",
    "vae_1_0/diffusion_pytorch_model.safetensors", "vae_decoder/config.json", "text_encoder/pytorch_model.bin", "text_encoder/model.onnx",
    "text_encoder/flax_model.msgpack", "text_encoder/openvino_model.bin", "sd_xl_base_1.0_0.9vae.safetensors",
    "sd_xl_turbo_1.0.safetensors",
)  # fmt: skip


def fetched(names, variant):
    return sorted(filter_repo_objects(names, allow_patterns=list(wanted(variant))))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_repository_with_everything_twice_is_read_from_what_is_fetched(kind, tmp_path):
    """The trap: patterns whose * takes slashes and dots fetched every variant, 2 to 4 times the model."""
    source = tiny_sd.write(kind, tmp_path / "source")
    files = {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob("*") if p.is_file()}
    weights = {f"{name}/{stem}.safetensors" for name, stem in COMPONENTS.items() if f"{name}/{stem}.safetensors" in files}
    half = {w.replace(".safetensors", ".fp16.safetensors"): files[w] for w in weights}
    everything = {**files, **half, **dict.fromkeys(OTHERS, b"not read")}
    for variant, stored in (("", weights), (None, weights), ("fp16", half.keys())):
        names = fetched(everything, variant)
        assert {n for n in names if n.endswith((".safetensors", ".bin", ".msgpack", ".onnx"))} == set(stored)
        assert set(names) == (files.keys() - weights) | set(stored)
        copy = tmp_path / f"copy of {variant}"
        for name in names:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(everything[name])
        stable_diffusion(copy)
        for component in {w.partition("/")[0] for w in weights}:
            assert open_component(copy / component, stem=COMPONENTS[component], variant=variant).names()


def test_shards_of_one_variant_come_with_their_index():
    stem = "unet/diffusion_pytorch_model"
    plain = [f"{stem}-00001-of-00002.safetensors", f"{stem}-00002-of-00002.safetensors", f"{stem}.safetensors.index.json"]
    new = [f"{stem}.fp16-00001-of-00002.safetensors", f"{stem}.fp16-00002-of-00002.safetensors", f"{stem}.fp16.safetensors.index.json"]
    old = [f"{stem}-00001-of-00002.fp16.safetensors", f"{stem}-00002-of-00002.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"]
    assert fetched([*plain, *new, *old], "") == sorted(plain)
    assert fetched([*plain, *new], "fp16") == sorted(new)
    assert fetched([*plain, *old], "fp16") == sorted(old)
    assert fetched([*plain, *new, *old], "bf16") == []
