"""Pictures from a model or a run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from .. import weights
from ..data import prompts as prompt_files
from ..diffusion import Denoise, fold_in, guided, guided_away, initial
from ..diffusion import sample as sample_chain
from ..evaluation.attention import overlays
from ..models import lora
from ..models.bundle import ModelBundle
from ..models.subjects import words
from ..rewards.base import Reward
from ..rewards.check import to_uint8
from ..test_time import PROMPT_METHODS
from ..weights.lora_files import read_lora
from . import build, prompt_search, steering
from .names import call
from .programs import Guidance
from .state import Partition, full_partition, lora_partition

Tree = Any
Info = dict[str, np.ndarray]
BATCH = 64


class Loaded(NamedTuple):
    """A run read back: its model, the base's parameters, what was trained, its config, and how much of the change is kept."""

    bundle: ModelBundle
    base: Tree
    trained: Tree
    config: Any
    keep: float


def read_run(workdir: str | Path, scale: float | None = None, options: dict[str, Any] | None = None) -> Loaded:
    """A run as it was saved. Raises FileNotFoundError when there is none.

    scale: how much of the change from the base is kept; None: what the run's report judged. options: over model_options.
    """
    folder = Path(workdir).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no run at {folder}: it has no config.json")
    if not (folder / "trained.safetensors").is_file():
        raise FileNotFoundError(f"{folder} holds no trained.safetensors yet: the run has not saved its first checkpoint")
    config = ml_collections.ConfigDict(json.loads((folder / "config.json").read_text()))
    if options:
        config.model_options = ml_collections.ConfigDict({**dict(config.get("model_options") or {}), **options})
    bundle, params = build.model(config)
    partition = partition_of(config)
    like = jax.eval_shape(lambda p: partition.init(jax.random.key(0), p)[0], params)
    trained = weights.load(folder / "trained.safetensors", like)
    keep = float((config.get("evaluation") or {}).get("scale", 1.0)) if scale is None else scale
    return Loaded(bundle, params, trained, config, keep)


def load_run(workdir: str | Path, scale: float | None = None,
             options: dict[str, Any] | None = None) -> tuple[ModelBundle, Tree, Any]:  # fmt: skip
    """(bundle, tuned parameters, config) of a run; see `read_run`."""
    run = read_run(workdir, scale, options)
    return run.bundle, tuned(run), run.config


def tuned(run: Loaded) -> Tree:
    """The whole model's parameters of a run, with as much of the change as is kept."""
    partition = partition_of(run.config)
    _, frozen = partition.init(jax.random.key(0), run.base)
    merged = partition.merge(run.trained, frozen)
    return jax.tree.map(lambda b, p: b + run.keep * (p - b), run.base, merged)


def partition_of(config: Any) -> Partition:
    """What a config trains."""
    settings = dict(config.get("lora") or {})
    settings.pop("file", None)  # a run holds all of its factors itself
    return call(lora_partition, settings, "lora") if settings else full_partition(config.get("trainable", "unet"))


def pictures(bundle: ModelBundle, params: Tree, texts: list[str], keys: jax.Array, settings: dict[str, Any],
             x_T: jax.Array | None = None, negative: str = "", batch: int = BATCH, away: Tree = None,
             method: Mapping[str, Any] | None = None, reward: Reward | None = None,
             autoguidance: bool = False, meter: dict[str, float] | None = None,
             attention: bool = False) -> tuple[np.ndarray, Info]:  # fmt: skip
    """(samples of the prompts, decoded, [N,H,W,C] in [0, 1], what the method tells of each {name: [N]}).

    settings override the model's own for sampling. away: parameters of the network that guidance leads away from, in place
    of the model itself (`diffusion.guided_away`); autoguidance: it sees the prompt, not the negative one. method: {"name": of a
    test-time method, **its settings}. meter: gets "seconds" a picture, "compile_seconds" and "temporary_bytes" of a batch.
    attention: also "maps" [N,h,w,L], see `steering.seen`.
    """
    from tqdm import tqdm

    sampler, guidance = build.sampler(ml_collections.ConfigDict({"sampling": settings}), bundle)
    steered = steering.method(bundle=bundle, sampler=sampler, guidance=guidance, reward=reward, **split(method)) if method else None
    if steered and x_T is not None:
        raise ValueError("--noise fixes the start of the plain chain, and a test-time method draws its own; leave one out")
    tokens, null_tokens, n = bundle.tokenize(texts), bundle.tokenize([negative]), len(texts)
    data = {"condition": steering.condition(reward, texts), **steering.subjects(steered, method, bundle, texts)}
    x_T = initial(fold_in(keys, 0), sampler, (n, *bundle.sample_shape)) if x_T is None else sampler.initial_scale * x_T

    @jax.jit
    def chunk(params: Tree, away: Tree, reward_params: Tree, keys: jax.Array, tokens: jax.Array, data: Tree, x_T: jax.Array) -> Any:
        cond = bundle.encode_text(params, tokens)
        denoise, null = led(bundle, params, away, null_tokens, guidance, autoguidance)
        x0: jax.Array
        info: dict[str, jax.Array]
        if steered is None:
            x0, info = sample_chain(fold_in(keys, 1), denoise, cond, sampler, x_T)[0], {}
        else:
            found = steering.networks(bundle, params, denoise, null, guidance, reward, reward_params, texts)
            x0, info = steered.draw(keys, found, {"cond": cond, "null": null, **data})
        if attention:
            info = {**info, "maps": steering.seen(bundle, params, keys, sampler, x0, cond)}
        return bundle.decode(params, x0), info

    size, seconds = min(batch, n), 0.0
    program: Any = chunk
    out: list[tuple[np.ndarray, Info]] = []
    for i in tqdm(range(0, n, size), desc="sample", unit="batch", disable=n <= size):
        rows = np.minimum(np.arange(i, i + size), n - 1)
        of_rows = jax.tree.map(lambda x, rows=rows: x[rows], data)
        given = (params, away, reward.params if reward else None, keys[rows], tokens[rows], of_rows, x_T[rows])
        began = time.perf_counter()
        if meter is not None and not out:
            program = chunk.lower(*given).compile()
            meter |= {"temporary_bytes": program.memory_analysis().temp_size_in_bytes, "compile_seconds": time.perf_counter() - began}
            began = time.perf_counter()
        out.append(jax.tree.map(np.asarray, program(*given)))
        seconds += time.perf_counter() - began
    if meter is not None:
        meter["seconds"] = seconds / (len(out) * size)
    array, info = jax.tree.map(lambda *x: np.concatenate(x)[:n], *out)
    return array, info


def led(bundle: ModelBundle, params: Tree, away: Tree, null_tokens: np.ndarray, guidance: Guidance,
        autoguidance: bool) -> tuple[Denoise, Tree]:  # fmt: skip
    """(the guided denoiser, the condition of the empty or negative prompt); away and autoguidance as in `pictures`."""
    null = bundle.encode_text(params if away is None else away, jnp.asarray(null_tokens))
    own = partial(bundle.denoise, params)
    more: dict[str, Any] = {"rescale": guidance.rescale, "interval": guidance.interval}
    if away is not None and guidance.scale == 1.0:
        raise ValueError("a negative network acts through guidance, and guidance_scale=1 has none; set --guidance_scale above 1")
    if away is None:
        return guided(own, null, guidance.scale, **more), null
    return guided_away(own, partial(bundle.denoise, away), None if autoguidance else null, guidance.scale, **more), null


def split(method: Mapping[str, Any]) -> dict[str, Any]:
    """{"name", **settings} as {"name", "settings"}."""
    return {"name": method["name"], "settings": {k: v for k, v in method.items() if k != "name"}}


def generate(*, model: str, weights_file: str, run: str | None, scale: float | None, prompts: str, out: str, seed: int,
             samples: int, noise: str | None, save_arrays: bool, settings: dict[str, Any], negative: str = "",
             options: dict[str, Any] | None = None, batch: int = BATCH, loras: Sequence[tuple[str, float]] = (),
             negative_run: str = "", negative_merge: float = 0.0, autoguidance: bool = False,
             method: Mapping[str, Any] | None = None, reward: str = "", attention: bool = False) -> list[Path]:  # fmt: skip
    """Writes 0000.png, ... and prompts.txt into `out`; returns the pictures' paths. See `sample --help`.

    options: the model's, such as height, width and dtype. loras: (file, scale) of what is merged into the model. negative_run:
    a workdir, or "base", the model without the change of run and loras. With a method also info.json: the method, and what it
    tells of each picture, its reward first. A search over prompts (`prompt_search.run`) writes history.json too.
    attention: also 0000_attention.png, where each word of the prompt is looked at.
    """
    from PIL import Image

    if autoguidance and not negative_run:
        raise ValueError("--autoguidance needs a weaker network to lead away from: --negative_run=WORKDIR, or --negative_run=base")
    if run:
        loaded = read_run(run, scale, options)
        bundle, settings = loaded.bundle, {**dict(loaded.config.get("sampling", {})), **settings}
    else:
        bundle, _, read = build.described(ml_collections.ConfigDict({"model": model, "weights": weights_file, "seed": 0,
                                                                     "model_options": options or {}}))  # fmt: skip
    is_file = Path(prompts).suffix in (".txt", ".jsonl", ".csv") or Path(prompts).is_file() or prompts.startswith("critters:")
    texts = [p for p in (prompt_files.load(prompts) if is_file else [prompts]) for _ in range(samples)]
    keys = jax.random.split(jax.random.key(seed), len(texts))
    x_T = _noise(noise, (len(texts), *bundle.sample_shape)) if noise else None
    # what is wrong is said before weights are read
    sampler, guidance = build.sampler(ml_collections.ConfigDict({"sampling": settings}), bundle)
    judge = build.reward(ml_collections.ConfigDict({"reward": reward}))
    plan = prompt_search.planned(method, bundle, judge, texts, x_T) if method and method["name"] in PROMPT_METHODS else None
    if method and not plan:
        steered = steering.method(bundle=bundle, sampler=sampler, guidance=guidance, reward=judge, **split(method))
        steering.subjects(steered, method, bundle, texts)
    if attention and plan:
        raise ValueError(f"--save_attention is not there for {plan.method['name']}; draw the prompt that it finds without the method")
    if attention and bundle.attention is None:
        raise ValueError(f"--save_attention draws cross-attention maps, and model {bundle.name} gives none")
    base = loaded.base if run else read()
    params = tuned(loaded) if run else base
    for path, share in loras:
        params = with_lora(params, path, share)
    away = negative_network(negative_run, negative_merge, bundle, params, base, options) if negative_run else None
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if plan:
        null_tokens = bundle.tokenize([negative])
        lead = lambda params, away: led(bundle, params, away, null_tokens, guidance, autoguidance)[0]
        paint = prompt_search.painter(bundle, params, away, lead, sampler, batch)
        array, info = prompt_search.run(plan, paint, texts, keys, seed, folder)
    else:
        array, info = pictures(bundle, params, texts, keys, settings, x_T, negative, batch, away, method, judge, autoguidance,
                               attention=attention)  # fmt: skip
    files = [folder / f"{i:04d}.png" for i in range(len(texts))]
    for file, picture in zip(files, to_uint8(jnp.asarray(array)), strict=True):
        Image.fromarray(picture).save(file)
    (folder / "prompts.txt").write_text("\n".join(texts) + "\n")
    if attention:
        for file, picture, maps, text in zip(files, array, info.pop("maps"), texts, strict=True):
            of_words = [(word, maps[..., first:end].sum(-1)) for word, first, end in words(bundle.tokenize, text)]
            file.with_name(f"{file.stem}_attention.png").write_bytes(overlays(picture, of_words))
    if method:
        (folder / "info.json").write_text(json.dumps({"method": dict(method), **{k: v.tolist() for k, v in info.items()}}, indent=1) + "\n")
    if save_arrays:
        np.save(folder / "images.npy", array.astype(np.float32))
    return files


def negative_network(run: str, share: float, bundle: ModelBundle, params: Tree, base: Tree,
                     options: dict[str, Any] | None = None) -> Tree:  # fmt: skip
    """Parameters of the run that guidance leads away from: its change on top of (1 - share) base + share params.

    run "base": no change, and so `base` itself for a share of 0. Diffusion-NPO's mixture (arXiv 2505.11245): the nearer the two
    networks, the less a high guidance scale exaggerates.
    """
    if run == "base":
        return jax.tree.map(lambda b, p: b + share * (p - b), base, params)
    other = read_run(run, None, options)
    if other.bundle.name != bundle.name:
        raise ValueError(f"--negative_run={run} is a run of {other.bundle.name}; the pictures are drawn by {bundle.name}")
    return jax.tree.map(lambda n, b, p: n + share * (p - b), tuned(other), other.base, params)


def with_lora(params: Tree, path: str | Path, scale: float = 1.0) -> Tree:
    """Parameters W + scale W' of a LoRA file by diffusers, PEFT or kohya's tools. Errors are those of `read_lora`."""
    factors, own = read_lora(Path(path).expanduser(), params, prefix={name: name for name in params if name != "vae"})
    return lora.merge(params, factors, scale * own)


def _noise(path: str, shape: tuple[int, ...]) -> jax.Array:
    array = np.load(path)
    n, height, width, channels = shape
    if array.shape == (n, channels, height, width) and array.shape != shape:  # what diffusers calls latents
        array = array.transpose(0, 2, 3, 1)
    if array.shape != shape:
        raise ValueError(f"--noise holds an array {array.shape}; {shape} or {(n, channels, height, width)} is needed, one noise "
                         "for each picture")  # fmt: skip
    if not np.isfinite(array).all():
        raise ValueError(f"--noise={path} holds numbers that are not finite")
    return jnp.asarray(array, jnp.float32)
