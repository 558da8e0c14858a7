"""Folders of full-size models and scorers without their weights: what plans and tests of shapes need."""

import json
import tempfile
from pathlib import Path

import numpy as np
import tiny_sd
from parity.common import FIXTURES
from safetensors.numpy import save_file

FOLDER = Path(tempfile.gettempdir()) / "alignment_jax_full_size"  # always the same: what was stopped is found again
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
UNET = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
        "down_block_types": [CROSS_DOWN] * 3 + ["DownBlock2D"], "up_block_types": ["UpBlock2D"] + [CROSS_UP] * 3,
        "block_out_channels": [320, 640, 1280, 1280]}  # fmt: skip
UNETS = {
    "sd15": UNET | {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
    "sd21": UNET | {"sample_size": 96, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024,
                    "use_linear_projection": True, "upcast_attention": True},
    "sdxl": UNET | {"sample_size": 128, "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "use_linear_projection": True,
                    "block_out_channels": [320, 640, 1280], "down_block_types": ["DownBlock2D", CROSS_DOWN, CROSS_DOWN],
                    "up_block_types": [CROSS_UP, CROSS_UP, "UpBlock2D"], "transformer_layers_per_block": [1, 2, 10],
                    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                    "projection_class_embeddings_input_dim": 2816},
}  # fmt: skip
CLIP_L = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
          "hidden_act": "quick_gelu", "eos_token_id": 2, "projection_dim": 768}  # fmt: skip
TEXTS = {
    "sd15": CLIP_L,
    "sd21": CLIP_L | {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23,
                      "hidden_act": "gelu"},
    "sdxl": CLIP_L,
}  # fmt: skip
BIG_G = CLIP_L | {"architectures": ["CLIPTextModelWithProjection"], "hidden_size": 1280, "intermediate_size": 5120,
                  "num_attention_heads": 20, "num_hidden_layers": 32, "hidden_act": "gelu", "projection_dim": 1280}  # fmt: skip
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32, "force_upcast": True,
       "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}  # fmt: skip


def write(kind, folder):
    """The folder of a full-size model without its weights; the tokenizer is the tests' own."""
    files = tiny_sd.configs(kind)
    files["unet/config.json"] = UNETS[kind]
    files["vae/config.json"] |= VAE
    files["text_encoder/config.json"] |= TEXTS[kind]
    if kind == "sdxl":
        files["text_encoder_2/config.json"] |= BIG_G
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    merges = np.load(FIXTURES / "clip_scores.npz")["merges"].tolist()
    for place in {name.split("/")[0] for name in files if name.startswith("tokenizer")}:
        (folder / place / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return folder


def write_all(root):
    """sd15/, sd21/ and sdxl/ without weights, clip/ with a tokenizer alone, and head.safetensors, an aesthetic head of zeros."""
    for kind in UNETS:
        write(kind, root / kind)
    (root / "clip").mkdir(parents=True, exist_ok=True)
    for file in (root / "sd15" / "tokenizer").iterdir():
        (root / "clip" / file.name).write_bytes(file.read_bytes())
    widths = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    head = {f"layers.{i}.weight": np.zeros((b, a), np.float32) for i, (a, b) in widths.items()}
    save_file(head | {f"layers.{i}.bias": np.zeros(b, np.float32) for i, (_, b) in widths.items()}, root / "head.safetensors")
    return root


def point(config, root):
    """The config with its scorers' files taken from a folder that `write_all` has filled."""
    for reward in (config.reward, config.evaluation.judge):
        if not isinstance(reward, str):
            reward.weights = str(root / "clip")
            if "head" in reward:
                reward.head = str(root / "head.safetensors")
    return config
