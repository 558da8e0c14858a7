"""Scorers on CLIP's towers: how well a picture fits its prompt, how well people like it, whether it is safe to show."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..models import clip as models
from ..weights import files
from .base import Reward, Tower
from .preprocess import check_mode, pixels

Array = jax.Array
Config = Mapping[str, Any] | str | None
CLIP_FILES = ("*.json", "model*.safetensors", "merges.txt")
CLIP_L, CLIP_B32 = "openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32"
HIGHEST = jax.lax.Precision.HIGHEST
HPS_FILES = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
HEADS = {"v1": (("",),), "v2": tuple(tuple(f"layers.{i}." for i in n) for n in ((0, 2, 4, 6, 7), (0, 3, 6, 9, 11)))}
# name: (licence, range, summary), before anything is read
ABOUT: dict[str, tuple[str, tuple[float, float], str]] = {
    "clip_score": ("MIT (OpenAI's and LAION's weights)", (-1.0, 1.0), "cosine of picture and prompt in CLIP"),
    "pick_score": ("MIT (code; none stated for the weights)", (-100.0, 100.0), "people's choice between pictures of a prompt"),
    "hps": ("Apache-2.0", (-1.0, 1.0), "people's choice between pictures of a prompt; version v2 or v2.1"),
    "aesthetic": ("MIT (v1), Apache-2.0 (v2)", (float("-inf"), float("inf")), "how people rate looks; easily hacked"),
    "safety": ("see the model card", (-1.0, 2.0), "margin to what Stable Diffusion's safety checker flags; none above 0.01"),
}


class Vision(NamedTuple):
    """A vision tower ready to use: where it came from, its config, its name for sharing, embeddings of unit length."""

    path: Path
    config: Mapping[str, Any]
    name: str
    features: Callable[[Any, Array], Array]
    params: Any
    projection_dim: int
    differentiable: bool


def clip_score(*, weights: str | Path = CLIP_B32, scale: float = 1.0, prefix: str = "", clip_at_zero: bool = False,
               mode: str = "diff", antialias: bool = True, dtype: Any = jnp.float32, config: Config = None,
               tokenizer: str | Path | None = None) -> Reward:  # fmt: skip
    """scale cos(picture, prefix + prompt), cut below 0 if clip_at_zero: CLIPScore (arXiv 2104.08718).

    The paper has scale 2.5, prefix "A photo depicts " and the cut; work on text to image mostly the plain cosine of
    ViT-B/32 or L/14. weights: a folder of transformers' layout, a hub id, or a .safetensors file (transformers or
    open_clip); config: config.json as a dictionary or one of `models.clip.BUILT_IN`, by default the folder's own;
    tokenizer: a folder or hub id, by default where the weights are. mode, antialias: as in `preprocess.pixels`.
    Errors of reading are those of `weights.files`.
    """
    vision = _vision(weights, config, "vit_b32", mode, antialias, dtype)
    params, embed, encode = _text(vision, tokenizer, "transformers", prefix, dtype)

    def head(params: Any, features: Array, condition: Any) -> Array:
        cosine = _dot(features, embed(params, condition["ids"]))
        return scale * (jnp.maximum(cosine, 0.0) if clip_at_zero else cosine)

    ends = (0.0 if clip_at_zero else -scale, scale)
    return _reward("clip_score", vision, params, head, encode, (min(ends), max(ends)))


def pick_score(*, weights: str | Path = "yuvalkirstain/PickScore_v1", mode: str = "diff", antialias: bool = True,
               dtype: Any = jnp.float32, config: Config = None, tokenizer: str | Path | None = None) -> Reward:  # fmt: skip
    """exp(logit_scale) cos(picture, prompt), about 18 to 24: PickScore v1 (arXiv 2305.01569), a ViT-H/14.

    Arguments as in `clip_score`.
    """
    vision = _vision(weights, config, "vit_h14", mode, antialias, dtype)
    params, embed, encode = _text(vision, tokenizer, "transformers", "", dtype, logit_scale=True)
    temperature = lambda params: jnp.exp(params["logit_scale"].astype(jnp.float32))
    head = lambda params, features, condition: temperature(params) * _dot(features, embed(params, condition["ids"]))
    bound = float(temperature(params))
    return _reward("pick_score", vision, params, head, encode, (-bound, bound))


def hps(*, version: str = "", weights: str | Path | None = None, mode: str = "diff", antialias: bool = True,
        dtype: Any = jnp.float32, config: Config = None, tokenizer: str | Path = CLIP_L) -> Reward:  # fmt: skip
    """cos(picture, prompt) of a ViT-H/14: HPS "v2" or "v2.1" (arXiv 2306.09341), which are not comparable.

    Published numbers are 100 times this. weights: the .safetensors file of xswu/HPSv2's HPS_v2_compressed.pt or
    HPS_v2.1_compressed.pt, whose layout is open_clip's. The original resizes a tensor, and so does mode "exact";
    torchvision before 0.17 did that without antialias. Other arguments as in `clip_score`.
    """
    if version not in HPS_FILES:
        raise ValueError(f"hps needs version, {' or '.join(map(repr, HPS_FILES))}, whose scores are not comparable; got {version!r}")
    if weights is None:
        raise ValueError(f"hps needs weights: fetch {HPS_FILES[version]} of the hub's xswu/HPSv2, turn it into a .safetensors "
                         "file (reading the .pt says how) and name that file")  # fmt: skip
    vision = _vision(weights, config, "vit_h14", "tensor" if mode == "exact" else mode, antialias, dtype)
    params, embed, encode = _text(vision, tokenizer, "open_clip", "", dtype)
    head = lambda params, features, condition: _dot(features, embed(params, condition["ids"]))
    return _reward("hps", vision, params, head, encode, (-1.0, 1.0))._replace(name=f"hps_{version}")


def aesthetic(*, version: str = "v2", head: str | Path | None = None, weights: str | Path = CLIP_L, mode: str = "diff",
              antialias: bool = True, dtype: Any = jnp.float32, config: Config = None) -> Reward:  # fmt: skip
    """LAION's aesthetic predictor, "v1" or "v2": a head on the embedding of a ViT-L/14, about 3 to 8; no prompt.

    head: its .safetensors file: of sa_0_4_vit_l_14_linear.pth (github LAION-AI/aesthetic-predictor) for v1; for v2 of
    sac+logos+ava1-l14-linearMSE.pth or of a ReLU one (github christophschuhmann/improved-aesthetic-predictor). Without
    activations the layers are one affine map, and its gradient by the embedding one constant direction: the classical
    reward to hack. Other arguments as in `clip_score`.
    """
    if version not in HEADS:
        raise ValueError(f"aesthetic version {version!r}; choose {' or '.join(map(repr, HEADS))}")
    if head is None:
        raise ValueError("aesthetic needs head, the .safetensors file of the predictor's few layers; the original .pth files "
                         "lie in the github repositories christophschuhmann/improved-aesthetic-predictor (v2) and "
                         "LAION-AI/aesthetic-predictor (v1), and reading one says how to turn it into that")  # fmt: skip
    layers = read_head(head, version)
    vision = _vision(weights, config, "vit_l14", mode, antialias, dtype)
    if (size := layers[0][0].shape[0]) != vision.projection_dim:
        raise ValueError(f"the aesthetic head {head} takes embeddings of {size}; {weights} gives {vision.projection_dim}")

    def score(params: Any, features: Array, condition: Any) -> Array:
        x = features
        for i, (kernel, bias) in enumerate(params):
            x = jnp.matmul(jax.nn.relu(x) if i else x, kernel, precision=HIGHEST) + bias
        return x[:, 0]

    reach = float(np.linalg.norm(layers[0][0])) if len(layers) == 1 else float("inf")
    middle = float(layers[-1][1][0])
    made = _reward("aesthetic", vision, layers, score, None, (middle - reach, middle + reach))
    return made._replace(name=f"aesthetic_{version}")


def read_head(path: str | Path, version: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The layers [(kernel [in,out], bias [out])] of an aesthetic head's file; of those without activations, their product.

    Raises ValueError when the file's tensors are not those of the version, and the errors of `weights.files`. In shapes alone
    (`weights.files.shapes_only`) a head that is not there is taken for one layer over ViT-L/14's features.
    """
    path = files.resolve(path)
    if files.in_shapes() and not path.exists():
        return [(np.zeros((768, 1), np.float32), np.zeros(1, np.float32))]
    tensors = files.open_component(path)
    names = set(tensors.names())
    found = next((p for p in HEADS[version] if names == {f"{n}{end}" for n in p for end in ("weight", "bias")}), None)
    if found is None:
        raise ValueError(f"{path} is no aesthetic head {version}: it has {', '.join(sorted(names)[:12])}; wanted weight and bias of "
                         + ", or of ".join(", ".join(n.rstrip(".") or "one layer" for n in p) for p in HEADS[version]))  # fmt: skip
    read = lambda name: tensors.read(name).astype(np.float64)
    layers = [(np.atleast_2d(read(f"{n}weight")).T, read(f"{n}bias").reshape(-1)) for n in found]
    if found != HEADS["v2"][1]:
        kernel, bias = layers[0]
        for k, b in layers[1:]:
            kernel, bias = kernel @ k, bias @ k + b
        layers = [(kernel, bias)]
    return [(k.astype(np.float32), b.astype(np.float32)) for k, b in layers]


def safety(*, weights: str | Path = "CompVis/stable-diffusion-safety-checker", mode: str = "diff", antialias: bool = True,
           dtype: Any = jnp.float32, config: Config = None) -> Reward:  # fmt: skip
    """-max_i(cos(picture, concept_i) - threshold_i) of Stable Diffusion's safety checker: above 0.01 nothing is flagged.

    A differentiable margin, without the rounding and the special care of the checker itself, which is `unsafe`. No prompt.
    Other arguments as in `clip_score`.
    """
    check_mode(mode)
    path = files.resolve(weights, allow=CLIP_FILES)
    config = _config(path, config, "vit_l14")
    net = models.safety_checker(config, dtype=dtype)
    n = net.vision_model.image_size
    like = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, n, n, 3)))["params"]
    # the published file has the tower inside another module of that name
    nested = any(name.startswith("vision_model.vision_model.") for name in files.open_component(path).names())
    wanted = {**like, "vision_model": {"vision_model": like["vision_model"]}} if nested else like
    params = files.load_component(path, wanted, dtype=dtype)
    params = {**params, "vision_model": params["vision_model"]["vision_model"]} if nested else params
    tables = {k: params[k].astype(jnp.float32) for k in params if "embeds" in k}
    tower = {k: params[k] for k in params if k not in tables}

    def features(params: Any, observation: Array) -> Array:
        # the tables are parameters of the module, and no part of what it computes
        variables = {"params": params | {k: jnp.zeros(like[k].shape) for k in tables}}
        embedding: Any = net.apply(variables, pixels(observation, n, mode=mode, antialias=antialias))
        return models.normalise(embedding)

    def head(params: Any, features: Array, condition: Any) -> Array:
        return -jnp.max(_concepts(params, "concept_embeds", features), 1)

    least = float(tables["concept_embeds_weights"].min())
    name = _name("safety", path, config, mode, antialias, dtype)
    vision = Vision(path, config, name, features, tower, net.projection_dim, mode == "diff")
    return _reward("safety", vision, tables, head, None, (least - 1, least + 1))


def unsafe(tables: Mapping[str, Array], features: Array) -> Array:
    """What the safety checker flags, [B] bool, of features [B,E] of unit length; tables: params["head"] of `safety`.

    A concept counts where its margin, rounded to three digits, is above 0; once a concept of special care counts, every
    margin grows by 0.01. `reward.tower.features(reward.params["tower"], images)` gives the features; mode "exact" is the
    original's.
    """
    over = lambda margin: jnp.any(jnp.round(margin, 3) > 0, 1, keepdims=True)
    special = over(_concepts(tables, "special_care_embeds", features))
    return over(_concepts(tables, "concept_embeds", features) + 0.01 * special)[:, 0]


def _concepts(tables: Mapping[str, Array], name: str, features: Array) -> Array:
    """cos - threshold [B,K]."""
    return jnp.matmul(features, models.normalise(tables[name]).T, precision=HIGHEST) - tables[f"{name}_weights"]


def _vision(weights: str | Path, config: Config, default: str, mode: str, antialias: bool, dtype: Any) -> Vision:
    """The projected vision tower of a CLIP, and nothing else of it, read."""
    check_mode(mode)
    path = files.resolve(weights, allow=CLIP_FILES)
    config = _config(path, config, default)
    net = models.clip_vision(config, dtype=dtype)
    n = net.vision_model.image_size
    like = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, n, n, 3)))["params"]

    def features(params: Any, observation: Array) -> Array:
        out: Any = net.apply({"params": params}, pixels(observation, n, mode=mode, antialias=antialias))
        return models.normalise(out["projected"])

    params = files.load_component(path, like, dtype=dtype)
    name = _name("clip", path, config, mode, antialias, dtype)
    return Vision(path, config, name, features, params, net.projection_dim, mode == "diff")


def _text(vision: Vision, tokenizer: str | Path | None, style: str, prefix: str, dtype: Any, *,
          logit_scale: bool = False) -> tuple[Any, Callable[[Any, Array], Array], Callable[[Sequence[str]], Any]]:  # fmt: skip
    """(parameters, embed(params, ids [B,L]) -> [B,E] of unit length, encode(prompts) -> {"ids"}) of a CLIP's text tower."""
    net = models.clip_text(vision.config, dtype=dtype)
    length, size = net.text_model.max_position_embeddings, net.text_model.vocab_size
    like = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, length), jnp.int32))["params"]
    like |= {"logit_scale": jax.ShapeDtypeStruct((), jnp.float32)} if logit_scale else {}
    folder = vision.path if vision.path.is_dir() else vision.path.parent
    if tokenizer is not None:
        folder = files.resolve(tokenizer, allow=("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json"))
    tokenize = models.clip_tokenizer(folder, length=length, style=style)

    def encode(prompts: Sequence[str]) -> dict[str, np.ndarray]:
        ids = tokenize([prefix + p for p in prompts])
        if ids.size and ids.max() >= size:
            raise ValueError(f"the tokenizer in {folder} gives token {ids.max()}; the text tower of {vision.path} knows {size}. "
                             "They do not belong together.")  # fmt: skip
        return {"ids": ids}

    def embed(params: Any, ids: Array) -> Array:
        out: Any = net.apply({"params": params}, jnp.asarray(ids))
        return models.normalise(out["projected"])

    return files.load_component(vision.path, like, dtype=dtype), embed, encode


def _config(path: Path, config: Config, default: str) -> Mapping[str, Any]:
    """A given config, a built-in one by name, the folder's config.json, or the scorer's default."""
    if isinstance(config, str) and config not in models.BUILT_IN:
        raise ValueError(f"config {config!r} is not known; choose from {', '.join(models.BUILT_IN)}, or give config.json's dictionary")
    if isinstance(config, str):
        return models.BUILT_IN[config]
    if config is None and path.is_dir() and (path / "config.json").is_file():
        return json.loads((path / "config.json").read_text())
    return models.BUILT_IN[default] if config is None else config


def _name(kind: str, path: Path, config: Mapping[str, Any], mode: str, antialias: bool, dtype: Any) -> str:
    """Equal where the features are: where they come from, and how."""
    sizes = zlib.crc32(json.dumps(config, sort_keys=True, default=str).encode())
    return f"{kind} {path.resolve()} {sizes:08x} {mode} {'antialias' if antialias else 'no antialias'} {jnp.dtype(dtype).name}"


def _reward(name: str, vision: Vision, params: Any, head: Callable[[Any, Array, Any], Array],
            encode: Callable[[Sequence[str]], Any] | None, range: tuple[float, float]) -> Reward:  # fmt: skip
    tower = Tower(vision.name, vision.features, head)
    licence, _, summary = ABOUT[name]
    return Reward(name, tower.score, {"tower": vision.params, "head": params}, encode, differentiable=vision.differentiable, range=range,
                  licence=licence, summary=summary, tower=tower)  # fmt: skip


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, -1)
