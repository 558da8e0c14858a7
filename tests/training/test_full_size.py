"""Every argument of the Stable Diffusion configs fits together at full size: whole steps in shapes, from folders without weights."""

import importlib.util
import json
from functools import wraps
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sd
from parity.common import FIXTURES
from safetensors.numpy import save_file

from alignment_jax.models.stable_diffusion import stable_diffusion
from alignment_jax.rewards import clip
from alignment_jax.training import abstract, build

ROOT = Path(__file__).parents[2]
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
SIZES = {"sd15": (859_520_964, 123_060_480), "sd21": (865_910_724, 340_387_840), "sdxl": (2_567_463_684, 123_060_480)}


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


def module(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


CONFIGS = {name: module(name) for name in UNETS}
QUICK = {("sd15", "ddpo_compressibility"), ("sd21", "ddpo_aesthetic"), ("sdxl", "diffusion_dpo")}
CASES = [pytest.param(name, argument, marks=() if (name, argument) in QUICK else pytest.mark.slow)
         for name, loaded in CONFIGS.items() for argument in loaded.ARGUMENTS]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """sd15/, sd21/ and sdxl/ without weights, clip/ with a tokenizer alone, and an aesthetic head."""
    root = tmp_path_factory.mktemp("full")
    for kind in UNETS:
        write(kind, root / kind)
    (root / "clip").mkdir()
    for file in (root / "sd15" / "tokenizer").iterdir():
        (root / "clip" / file.name).write_bytes(file.read_bytes())
    widths = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    head = {f"layers.{i}.weight": np.zeros((b, a), np.float32) for i, (a, b) in widths.items()}
    save_file(head | {f"layers.{i}.bias": np.zeros(b, np.float32) for i, (_, b) in widths.items()}, root / "head.safetensors")
    return root


@pytest.fixture(scope="module")
def without_weights():
    """Parameters are the shapes that the networks ask for; a scalar that a scorer reads is 0. Networks are traced once."""
    once = {}

    def shapes(source, like, **_):
        return jax.tree.map(lambda x: x if x.shape else np.zeros((), x.dtype), like)

    def bundle(folder, **options):
        if (key := (str(folder), *options.items())) not in once:
            made = stable_diffusion(folder, **options)
            once[key] = made._replace(**{n: jax.jit(getattr(made, n)) for n in ("init", "denoise", "encode_text", "decode", "encode")})
        return once[key]

    def reward(config, build_reward=build.reward):
        if (key := str(config.reward)) not in once:
            made = build_reward(config)
            once[key] = made._replace(score=jax.jit(made.score)) if made.device else made
        return once[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip.files, "load_component", shapes)
        patch.setattr(build.stable_diffusion, "stable_diffusion", wraps(stable_diffusion)(bundle))
        patch.setattr(build, "reward", reward)
        yield


def small(config, world):
    """The config on the test's folders, with fewer samples and steps: what is traced is as large as ever."""
    for reward in (config.reward, config.evaluation.judge):
        if not isinstance(reward, str):
            reward.weights = str(world / "clip")
            if "head" in reward:
                reward.head = str(world / "head.safetensors")
    config.sampling.num_steps = 2
    if "k" in config.method and config.method.name == "drtune":
        config.method.k = 2
    config.model_options.remat = True
    config.batch.update(prompts=4, group=min(config.batch.group, 2), microbatch=4)
    return config


@pytest.mark.parametrize("name, argument", CASES)
def test_a_step_fits_together_in_shapes(name, argument, world, without_weights):
    config = CONFIGS[name].get_config(argument)
    config.model = str(world / name)
    programs = abstract.one_step(small(config, world))
    state = programs["init"].result
    frozen = programs["encode"].arguments[0]["params"]
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    unet = count(frozen.get("unet", {})) + (0 if config.lora else count(state.trained))
    assert (unet, count(frozen["text_encoder"])) == SIZES[name]
    assert jax.tree.structure(programs["apply"].result[0]) == jax.tree.structure(state)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.trained))
    (grads, _), sums = programs["gradient"].result
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, state.trained) and sums["loss"].shape == ()
    if config.lora:
        assert count(state.trained) < 0.06 * unet
