"""What diffusers makes of our LoRA files, folders and files in other layouts: references/lora.py OUT_DIR FILES_DIR [SAVED_DIR].

FILES_DIR is what `python tests/parity/test_lora.py FILES_DIR` writes, in an environment with jax.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import random_weights

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
UNETS = {
    "sd": dict(block_out_channels=[8, 16], down_block_types=[CROSS_DOWN, "DownBlock2D"], norm_num_groups=4,
               up_block_types=["UpBlock2D", CROSS_UP], layers_per_block=1, attention_head_dim=2, cross_attention_dim=12),
    "xl": dict(block_out_channels=[8, 16], down_block_types=["DownBlock2D", CROSS_DOWN], norm_num_groups=4,
               up_block_types=[CROSS_UP, "UpBlock2D"], layers_per_block=1, attention_head_dim=[1, 2],
               transformer_layers_per_block=[1, 2], cross_attention_dim=12, use_linear_projection=True,
               addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32),
}  # fmt: skip
TEXT = dict(vocab_size=11, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=7, projection_dim=10, hidden_act="gelu")  # fmt: skip
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
              projection_dim=10, hidden_act="gelu")  # fmt: skip
# what is read in the other direction: an adapter of diffusers' own, of which alpha is not the rank
THEIRS = dict(r=3, lora_alpha=6, target_modules=["to_q", "to_out.0", "conv1", "proj_in"])
# full-size models by name alone, their tensors cut to one value each
LDM = {"sd15_unet": "ldm", "sdxl_unet": "ldm_xl", "sd_vae_4ch": "ldm", "clip_l_text": "ldm", "openclip_bigg_text_proj": "ldm_xl"}


def digest(value) -> str:
    """Of anything that is JSON: what was checked here is what a test checks again."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def contents(files: Path) -> dict:
    """{file: {name: shape}} of the LoRA files."""
    from safetensors import safe_open

    out = {}
    for path in (files / f"{name}_{kind}.safetensors" for name in UNETS for kind in ("peft", "kohya")):
        with safe_open(path, "np") as file:
            out[path.name] = {k: list(file.get_slice(k).get_shape()) for k in file.keys()}
    return out


def shapes(module) -> dict:
    return {k: tuple(v.shape) for k, v in module.state_dict().items() if not k.endswith("position_ids")}


def fill(module, seed: int = 0):
    import torch

    weights = {k: torch.tensor(v) for k, v in random_weights(shapes(module), seed).items()}
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert not unexpected and all(m.endswith("position_ids") for m in missing)
    return module.eval()


def pipeline(name: str):
    """(diffusers' pipeline of one of UNETS with its text encoders, {component: module})."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    unet = fill(diffusers.UNet2DConditionModel(**UNETS[name]))
    text = fill(CLIPTextModel(CLIPTextConfig(**TEXT)))
    scheduler = diffusers.DDIMScheduler()
    if name == "sd":
        pipe = diffusers.StableDiffusionPipeline(
            vae=None, text_encoder=text, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False)  # fmt: skip
        return pipe, {"unet": unet, "text_encoder": text}
    text_2 = fill(CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)), 1)
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=None, text_encoder=text, text_encoder_2=text_2, tokenizer=None, tokenizer_2=None, unet=unet,
        scheduler=scheduler, add_watermarker=False)  # fmt: skip
    return pipe, {"unet": unet, "text_encoder": text, "text_encoder_2": text_2}


def merged(name: str, file: Path) -> dict:
    """{component|name: weights} after the file is loaded and fused."""
    pipe, modules = pipeline(name)
    before = {c: {k: v.clone() for k, v in m.state_dict().items()} for c, m in modules.items()}
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    pipe.fuse_lora(components=list(modules))
    pipe.unload_lora_weights()
    out = {}
    for component, module in modules.items():
        for key, value in module.state_dict().items():
            if not (value == before[component][key]).all():
                out[f"{component}|{key}"] = value.numpy()
    return out


def theirs() -> dict:
    """The tensors and the header of a file that diffusers wrote, and the weights that it stands for."""
    import torch
    from peft import LoraConfig
    from safetensors import safe_open

    pipe, modules = pipeline("sd")
    unet = modules["unet"]
    unet.add_adapter(LoraConfig(**THEIRS))
    for key, value in unet.named_parameters():
        if "lora_" in key:
            value.data = torch.from_numpy(random_weights({key: tuple(value.shape)})[key])
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        unet.save_lora_adapter(folder)
        with safe_open(next(Path(folder).glob("*.safetensors")), "np") as file:
            out |= {f"file|{k}": file.get_tensor(k) for k in file.keys()}
            out["header"] = np.array(json.dumps(file.metadata()))
    unet.fuse_lora()
    unet.unload_lora()
    start = random_weights(shapes(unet))
    out |= {f"unet|{k}": v.numpy() for k, v in unet.state_dict().items() if not np.array_equal(v.numpy(), start[k])}
    return out


def ldm(files: Path) -> dict:
    """[number of tensors, largest error] of diffusers' converters over our files in Stability's layout."""
    import torch
    from diffusers.loaders import single_file_utils as s
    from safetensors.torch import load_file

    out = {}
    for name, layout in LDM.items():
        tensors = load_file(files / f"{layout}_{name}.safetensors")
        if name.endswith("unet"):
            got = s.convert_ldm_unet_checkpoint(
                tensors, {"layers_per_block": 2, "addition_embed_type": "text_time" if "xl" in name else None})
        elif "vae" in name:
            got = s.convert_ldm_vae_checkpoint(tensors, {"down_block_types": [0] * 4, "up_block_types": [0] * 4})
        elif name == "clip_l_text":
            got = {k.removeprefix("text_model."): v for k, v in s.convert_ldm_clip_checkpoint(tensors).items()}
        else:
            text = torch.nn.Module()
            got = s.convert_open_clip_checkpoint(text, tensors, prefix="conditioner.embedders.1.model.")
        want = random_weights({k: tuple(v.shape) for k, v in got.items()})
        out[name] = np.array([len(got), max(float(np.abs(want[k] - v.numpy()).max()) for k, v in got.items())])
    return out


def open_clip(files: Path) -> dict:
    """[text, picture] largest difference of open_clip's features, from our file, and of transformers' on the same weights."""
    # the networks need none of its operators, the package imports it all the same
    for part in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".models"):
        sys.modules[f"torchvision{part}"] = MagicMock()
    import torch
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    from safetensors.torch import load_file
    from transformers import CLIPConfig, CLIPModel

    ours = fill(CLIPModel(CLIPConfig(text_config={**TEXT, "eos_token_id": 10}, vision_config=VISION, projection_dim=10)))
    vision = CLIPVisionCfg(layers=2, width=16, head_width=8, mlp_ratio=1.5, patch_size=4, image_size=8)
    text = CLIPTextCfg(context_length=7, vocab_size=11, width=12, heads=2, layers=2, mlp_ratio=20 / 12)
    other = CLIP(10, vision, text).eval()
    other.load_state_dict(load_file(files / "open_clip.safetensors"), strict=True)
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(np.concatenate([rng.integers(0, 9, (3, 5)), np.full((3, 1), 10), np.zeros((3, 1))], 1)).long()
    pixels = torch.from_numpy(rng.standard_normal((2, 3, 8, 8)).astype(np.float32))
    with torch.no_grad():
        texts = ours.text_projection(ours.text_model(tokens).pooler_output), other.encode_text(tokens)
        pictures = ours.visual_projection(ours.vision_model(pixels).pooler_output), other.encode_image(pixels)
    return {"errors": np.array([float((a - b).abs().max() / b.abs().max()) for a, b in (texts, pictures)])}


def folders(out: Path, files: Path) -> dict:
    """[largest error] of diffusers and transformers reading the folders that we saved; and theirs, saved for us to read."""
    import diffusers
    from transformers import CLIPTextModel

    errors = {}
    for name, cls in (("unet", diffusers.UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        module, info = cls.from_pretrained(files / name, output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        want = random_weights(shapes(module))
        errors[name] = np.array(max(float(np.abs(want[k] - v.numpy()).max()) for k, v in module.state_dict().items()
                                    if k in want))  # fmt: skip
        module.save_pretrained(out / f"saved_{name}", max_shard_size="40KB")
        if name == "unet":
            module.half().save_pretrained(out / f"saved_{name}", max_shard_size="40KB", variant="fp16")
    return errors


def main(out: Path, files: Path) -> None:
    # not needed here, and where it was built for another torch, importing diffusers would fail on it
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    import diffusers
    import peft
    import torch
    import transformers

    torch.set_num_threads(1)
    results = {}
    for name in UNETS:
        peft_file, kohya_file = (merged(name, files / f"{name}_{kind}.safetensors") for kind in ("peft", "kohya"))
        results[f"{name}_peft"] = peft_file
        # the same weights again would double the size: of these only how far they are from those
        assert kohya_file.keys() == peft_file.keys()
        results[f"{name}_kohya"] = {k: np.abs(v - peft_file[k]).max() for k, v in kohya_file.items()}
    results["names"] = {"files": np.array(digest(contents(files))),
                        "places": np.array(digest(json.loads((files / "places.json").read_text())))}  # fmt: skip
    results |= {"theirs": theirs(), "ldm": ldm(files), "open_clip": open_clip(files)}
    with tempfile.TemporaryDirectory() as folder:
        keep = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(folder)
        results["folders"] = folders(keep, files)
    versions = np.array([f"{m.__name__} {m.__version__}" for m in (torch, diffusers, transformers, peft)])
    out.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        np.savez_compressed(out / f"lora_{name}.npz", versions=versions, **result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
