"""Stable Diffusion 1, 2, XL and Turbo as bundles, from a folder as diffusers writes it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..diffusion import NoiseSchedule, linear, scaled_linear, zero_terminal_snr
from .attention_maps import attention_maps
from .autoencoder import autoencoder
from .bundle import ModelBundle
from .clip import clip_text, clip_tokenizer
from .unet import CROSS_DOWN, unet

Array = jax.Array
# the components that hold parameters, and the stems of their files
COMPONENTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
              "text_encoder_2": "model"}  # fmt: skip
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline")
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCHEDULERS = {
    "DDIMScheduler": "ddim", "DDPMScheduler": "ddpm", "EulerDiscreteScheduler": "euler", "LCMScheduler": "lcm",
    "EulerAncestralDiscreteScheduler": "euler_ancestral", "DPMSolverMultistepScheduler": "dpmsolver++",
}  # fmt: skip


def wanted(variant: str | None = None) -> tuple[str, ...]:
    """Patterns of what is read of a repository on the hub; of the weights only those of `variant` ("": the plain ones).

    Their `*` takes slashes too, and repositories hold a component's weights several times (fp16, non_ema, ema_only) beside
    those of components that nobody reads (safety_checker): names are therefore written out as far as they are known.
    """
    files = ["model_index.json", "scheduler/scheduler_config.json"]
    for place in ("tokenizer", "tokenizer_2"):
        files += [f"{place}/{name}" for name in ("vocab.json", "merges.txt", "tokenizer.json", "*_config.json", "special_tokens_map.json")]
    digits = "-?????-of-?????"
    for component, stem in COMPONENTS.items():
        plain = f"{component}/{stem}"
        files.append(f"{component}/config.json")
        if variant:  # both places of the variant in the names of shards and of their index are in use
            files += [f"{plain}.{variant}{shard}.safetensors" for shard in ("", digits)]
            files += [f"{plain}{digits}.{variant}.safetensors", f"{plain}.{variant}.safetensors.index.json",
                      f"{plain}.safetensors.index.{variant}.json"]  # fmt: skip
        else:
            files += [f"{plain}.safetensors", f"{plain}{digits}.safetensors", f"{plain}.safetensors.index.json"]
    return tuple(files)


def stable_diffusion(folder: str | Path, *, height: int = 0, width: int = 0, dtype: Any = jnp.float32,
                     remat: bool = False, attention: str | None = None) -> ModelBundle:  # fmt: skip
    """The bundle of a folder: {"unet", "vae", "text_encoder"(, "text_encoder_2")} are its parameters' branches.

    height, width: of the pictures, multiples of 8 (0: what the UNet was trained on). dtype: what networks compute in; the
    autoencoder of SDXL stays in float32, as its config asks. encode gives the mean latent. Raises FileNotFoundError for a
    missing component, ValueError for a folder of another kind and for switches that are not supported.
    """
    folder = Path(folder)
    dtype = jnp.dtype(dtype)
    index = _json(folder / "model_index.json")
    if index.get("_class_name") not in PIPELINES:
        raise ValueError(f"{folder} holds a {index.get('_class_name')}; supported: {', '.join(PIPELINES)}")
    two = "text_encoder_2" in index and index["text_encoder_2"][0] is not None
    encoders = ("text_encoder", "text_encoder_2") if two else ("text_encoder",)
    configs = {name: _json(folder / name / "config.json") for name in ("unet", "vae", *encoders)}
    build = lambda name, factory, **more: _built(folder / name / "config.json", factory, configs[name], remat=remat, **more)
    net: Any = build("unet", unet, dtype=dtype, attention=attention)
    upcast = bool(configs["vae"].get("force_upcast", False)) and two
    vae: Any = build("vae", autoencoder, dtype=jnp.float32 if upcast else dtype, attention=attention)
    towers: dict[str, Any] = {name: build(name, clip_text, dtype=dtype) for name in encoders}
    lengths = [int(configs[name].get("max_position_embeddings", 77)) for name in encoders]
    tokenizers = [clip_tokenizer(folder / place, length=length)
                  for place, length in zip(("tokenizer", "tokenizer_2"), lengths)]  # fmt: skip
    factor = 2 ** (len(vae.block_out_channels) - 1)
    size = _size(height, width, int(configs["unet"].get("sample_size") or 64) * factor, factor)
    scaling = float(configs["vae"].get("scaling_factor", 0.18215))
    schedule, prediction, sampling = _scheduler(_json(folder / "scheduler" / "scheduler_config.json"))
    zeros = two and bool(index.get("force_zeros_for_empty_prompt", True))

    def tokenize(prompts: Sequence[str]) -> np.ndarray:
        tokens = np.stack([t(prompts) for t in tokenizers], 1)
        return tokens if two else tokens[:, 0]

    empty = tokenize([""])

    def encode_text(params: Any, tokens: Array) -> dict[str, Array]:
        if not two:
            out: Any = towers["text_encoder"].apply({"params": params["text_encoder"]}, tokens)
            return {"states": out["last_hidden_state"]}
        first, second = (towers[n].apply({"params": params[n]}, tokens[:, i]) for i, n in enumerate(encoders))
        states: Array = jnp.concatenate([first["penultimate"], second["penultimate"]], -1)
        pooled: Array = second["projected"]
        if zeros:  # SDXL was trained on zeros where there is no prompt
            blank = jnp.all(tokens == empty, (1, 2))
            states, pooled = (jnp.where(blank.reshape(-1, *[1] * (v.ndim - 1)), 0.0, v) for v in (states, pooled))
        ids = jnp.array([size[0], size[1], 0, 0, size[0], size[1]], jnp.float32)  # original size, crop, target size
        return {"states": states, "pooled": pooled, "time_ids": jnp.broadcast_to(ids, (len(tokens), 6))}

    def given(params: Any, cond: dict[str, Array]) -> tuple[Array, Any]:
        cond = encode_text(params, cond["tokens"]) if "tokens" in cond else cond
        return cond["states"], {k: cond[k] for k in ("pooled", "time_ids") if k in cond}

    def denoise(params: Any, x: Array, t: Array, cond: dict[str, Array]) -> Array:
        states, more = given(params, cond)
        output: Array = net.apply({"params": params["unet"]}, x, t, states, **more)
        return output

    # a quarter of the latents' side: 16 x 16 of SD1 at 512 pixels, 32 x 32 of SDXL at 1024; or the nearest finer one
    level = max((i for i, kind in enumerate(net.down_block_types[:3]) if kind == CROSS_DOWN), default=None)

    def maps(params: Any, x: Array, t: Array, cond: dict[str, Array]) -> Array:
        assert level is not None
        states, more = given(params, cond)
        size = -(-x.shape[1] // 2**level), -(-x.shape[2] // 2**level)
        return attention_maps(net, params["unet"], size, x, t, states, **more)

    def init(key: Array) -> Any:
        keys = dict(zip(COMPONENTS, jax.random.split(key, len(COMPONENTS))))
        tokens = jnp.asarray(empty)
        text = {n: towers[n].init(keys[n], tokens[:, i] if two else tokens)["params"] for i, n in enumerate(encoders)}
        pixels, x = jnp.zeros((1, 8 * factor, 8 * factor, 3)), jnp.zeros((1, 8, 8, net.in_channels))
        cond = encode_text(text, tokens)
        more: Any = {k: cond[k] for k in ("pooled", "time_ids") if k in cond}
        return {"unet": net.init(keys["unet"], x, jnp.zeros(1), cond["states"], **more)["params"],
                "vae": vae.init(keys["vae"], pixels)["params"], **text}  # fmt: skip

    def decode(params: Any, z: Array) -> Array:
        picture: Any = vae.apply({"params": params["vae"]}, z / scaling, method="decode")
        picture = 0.5 * picture + 0.5
        return picture + jax.lax.stop_gradient(jnp.clip(picture, 0.0, 1.0) - picture)

    def encode(params: Any, observation: Array) -> Array:
        mean, _ = vae.apply({"params": params["vae"]}, 2.0 * observation - 1.0, method="encode")
        return scaling * mean

    return ModelBundle(
        name=folder.name, init=init, denoise=denoise, encode_text=encode_text, decode=decode, encode=encode,
        tokenize=tokenize, schedule=schedule, prediction=prediction,
        sample_shape=(size[0] // factor, size[1] // factor, net.in_channels),
        sampling={**sampling, "num_steps": 50, "guidance_scale": 5.0 if two else 7.5},
        attention=None if level is None else maps,
    )  # fmt: skip


def _scheduler(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str, dict[str, Any]]:
    """(schedule, prediction, settings of `diffusion.scheduler`) of a scheduler_config.json."""
    kind = str(config.get("_class_name"))
    betas: dict[str, Any] = {"num_train_steps": int(config.get("num_train_timesteps", 1000)),
                             "beta_start": float(config.get("beta_start", 1e-4)),
                             "beta_end": float(config.get("beta_end", 0.02))}  # fmt: skip
    schedules = {"scaled_linear": scaled_linear, "linear": linear}
    name = str(config.get("beta_schedule", "linear"))
    prediction = str(config.get("prediction_type", "epsilon"))
    for key, value, known in (("beta_schedule", name, schedules), ("prediction_type", prediction, PREDICTIONS)):
        if value not in known:
            raise ValueError(f"scheduler_config.json: {key} is {value!r}; supported: {', '.join(known)}")
    for key in ("thresholding", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        if config.get(key):
            raise ValueError(f"scheduler_config.json: {key} is set; only schedulers without it are supported")
    schedule = schedules[name](**betas)
    if config.get("rescale_betas_zero_snr"):
        if name != "scaled_linear":
            raise ValueError(f"scheduler_config.json: rescale_betas_zero_snr with beta_schedule {name!r}; supported: scaled_linear")
        schedule = zero_terminal_snr(**betas)
    if kind not in SCHEDULERS:
        logging.getLogger(__name__).info("sampling with ddim in place of %s", kind)
    settings = {"scheduler": SCHEDULERS.get(kind, "ddim"), "spacing": config.get("timestep_spacing", "leading"),
                "steps_offset": int(config.get("steps_offset", 0)),
                "set_alpha_to_one": bool(config.get("set_alpha_to_one", True))}  # fmt: skip
    return schedule, PREDICTIONS[prediction], settings


def _size(height: int, width: int, trained: int, factor: int) -> tuple[int, int]:
    size = height or trained, width or trained
    if any(s % factor or s < factor for s in size):
        near = [max(factor, round(s / factor) * factor) for s in size]
        raise ValueError(f"pictures must be multiples of {factor} high and wide; got {size[0]} x {size[1]}, "
                         f"the nearest is {near[0]} x {near[1]}")  # fmt: skip
    return size


def _built(path: Path, factory: Callable[..., Any], config: Mapping[str, Any], **more: Any) -> Any:
    """factory(config, **more), whose errors then name the file."""
    try:
        return factory(config, **more)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        there = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        raise FileNotFoundError(f"no {path.name} in {path.parent}" + (f"; it has {', '.join(there)}" if there else ": the folder is absent")
                                + ". A model folder is laid out as diffusers' save_pretrained writes it.")  # fmt: skip
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error
    return value


