"""Stable Diffusion folders of random weights and toy size, as diffusers lays them out: sd15, sd21 and sdxl.

  python tests/tiny_sd.py KIND FOLDER        writes one
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from flax.traverse_util import flatten_dict
from parity.common import random_weights
from safetensors.numpy import save_file
from tiny_clip import fixture

from alignment_jax.models.stable_diffusion import COMPONENTS, stable_diffusion
from alignment_jax.weights.torch_names import torch_name, torch_shape

KINDS = ("sd15", "sd21", "sdxl")
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SHALLOW = {"block_out_channels": [16], "down_block_types": [CROSS_DOWN], "up_block_types": [CROSS_UP]}  # sd15's UNet, of one level


def _text(vocabulary: int, end: int, **more) -> dict:
    return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": vocabulary, "hidden_size": 16,
            "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 77,
            "hidden_act": "quick_gelu", "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end,
            "projection_dim": 16} | more  # fmt: skip


def configs(kind: str) -> dict:
    """{file: JSON} of everything but the weights."""
    data = fixture("scores")
    vocabulary = data["vocabulary"].tolist()
    end = vocabulary.index("<|endoftext|>")
    text = _text(len(vocabulary), end, **({} if kind != "sd21" else {"hidden_act": "gelu"}))
    unet = {"_class_name": "UNet2DConditionModel", "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
            "block_out_channels": [16, 32], "norm_num_groups": 8, "cross_attention_dim": 16}  # fmt: skip
    blocks = {"down_block_types": [CROSS_DOWN, "DownBlock2D"], "up_block_types": ["UpBlock2D", CROSS_UP]}
    more = {
        "sd15": {**blocks, "attention_head_dim": 2},
        "sd21": {**blocks, "attention_head_dim": [2, 4], "use_linear_projection": True, "upcast_attention": True},
        "sdxl": {"down_block_types": ["DownBlock2D", CROSS_DOWN], "up_block_types": [CROSS_UP, "UpBlock2D"],
                 "attention_head_dim": [2, 4], "use_linear_projection": True, "transformer_layers_per_block": [1, 2],
                 "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                 "projection_class_embeddings_input_dim": 24 + 6 * 8, "cross_attention_dim": 40},
    }[kind]  # fmt: skip
    vae = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 1,
           "block_out_channels": [8, 16], "norm_num_groups": 4, "sample_size": 16, "act_fn": "silu",
           "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
           "scaling_factor": 0.13025 if kind == "sdxl" else 0.18215}  # fmt: skip
    scheduler = {"_class_name": "EulerDiscreteScheduler" if kind == "sdxl" else "DDIMScheduler", "beta_start": 0.00085,
                 "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "steps_offset": 1,
                 "timestep_spacing": "leading", "prediction_type": "v_prediction" if kind == "sd21" else "epsilon"}  # fmt: skip
    if kind != "sdxl":
        scheduler |= {"clip_sample": False, "set_alpha_to_one": False}
    index = {"_class_name": "StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline",
             "scheduler": ["diffusers", scheduler["_class_name"]], "unet": ["diffusers", "UNet2DConditionModel"],
             "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
             "tokenizer": ["transformers", "CLIPTokenizer"]}  # fmt: skip
    files = {"unet/config.json": unet | more, "vae/config.json": vae, "text_encoder/config.json": text,
             "scheduler/scheduler_config.json": scheduler, "model_index.json": index}  # fmt: skip
    places = ["tokenizer"]
    if kind == "sdxl":
        index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
                  "force_zeros_for_empty_prompt": True}  # fmt: skip
        files["text_encoder_2/config.json"] = text | {"architectures": ["CLIPTextModelWithProjection"], "hidden_size": 24,
                                                      "projection_dim": 24, "hidden_act": "gelu"}  # fmt: skip
        places.append("tokenizer_2")
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    for place in places:
        files[f"{place}/vocab.json"] = {token: i for i, token in enumerate(vocabulary)}
        files[f"{place}/tokenizer_config.json"] = {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}  # fmt: skip
    return files


def write(kind: str, folder: Path, **unet) -> Path:
    """Fills a folder; the weights follow from their names alone. unet: other values in the UNet's config."""
    folder, files = Path(folder), configs(kind)
    files["unet/config.json"] |= unet
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=1))
    for place in ("tokenizer", "tokenizer_2") if kind == "sdxl" else ("tokenizer",):
        (folder / place / "merges.txt").write_text("\n".join(["#version: 0.2", *fixture("scores")["merges"].tolist()]))
    shapes = jax.eval_shape(stable_diffusion(folder).init, jax.random.key(0))
    for name, tree in shapes.items():
        wanted = {torch_name(k): torch_shape(k, v.shape) for k, v in flatten_dict(tree, sep="/").items()}
        tensors = {k: np.asarray(v) for k, v in random_weights(wanted, seed=len(name)).items()}
        save_file(tensors, folder / name / f"{COMPONENTS[name]}.safetensors", metadata={"format": "pt"})
    return folder


if __name__ == "__main__":
    print(write(sys.argv[1], Path(sys.argv[2])))
