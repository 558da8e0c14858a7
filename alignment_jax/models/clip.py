"""CLIP (arXiv 2103.00020): text and vision towers named and laid out as in transformers' checkpoints.

The text towers of Stable Diffusion 1, 2, XL and 3 and the towers of the CLIP family of rewards. Weights of open_clip are
brought to these names when they are read.
"""

from __future__ import annotations

import dataclasses
import html
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .attention import attention
from .convolution import Conv

Array = jax.Array
MAX_WARNINGS = 10  # long prompts that a tokenizer names, then it is silent
# "gelu" is the exact one; jax.nn.gelu's default is an approximation with tanh
ACTIVATIONS = {"quick_gelu": lambda x: x * nn.sigmoid(1.702 * x), "gelu": lambda x: nn.gelu(x, approximate=False)}
BUILT_IN: dict[str, dict[str, Any]] = {
    "vit_b32": {
        "projection_dim": 512, "text_config": {"eos_token_id": 2}, "vision_config": {},
    },
    "vit_l14": {
        "projection_dim": 768,
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "eos_token_id": 2},
        "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                          "num_attention_heads": 16, "patch_size": 14},
    },
    "vit_h14": {
        "projection_dim": 1024,
        "text_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
                        "num_hidden_layers": 24, "hidden_act": "gelu", "eos_token_id": 2},
        "vision_config": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                          "num_attention_heads": 16, "patch_size": 14, "hidden_act": "gelu"},
    },
}  # fmt: skip
BUILT_IN["vit_l14_336"] = {**BUILT_IN["vit_l14"], "vision_config": {**BUILT_IN["vit_l14"]["vision_config"], "image_size": 336}}


class Layer(nn.Module):
    """Self-attention and a two-layer perceptron, each with LayerNorm before it; residual in float32."""

    heads: int
    intermediate: int
    activation: str
    epsilon: float
    causal: bool
    dtype: Any
    attention: str | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,L,D] -> [B,L,D]."""
        b, length, width = x.shape
        dense = lambda name, features: nn.Dense(features, dtype=self.dtype, name=name)
        h = _norm("layer_norm1", self.epsilon)(x).astype(self.dtype)
        q, k, v = (dense(f"self_attn.{n}_proj", width)(h).reshape(b, length, self.heads, -1) for n in "qkv")
        h = attention(q, k, v, implementation=self.attention, causal=self.causal).reshape(b, length, width)
        x = x + dense("self_attn.out_proj", width)(h)
        h = _norm("layer_norm2", self.epsilon)(x).astype(self.dtype)
        h = ACTIVATIONS[self.activation](dense("mlp.fc1", self.intermediate)(h))
        return x + dense("mlp.fc2", width)(h)


class TextTower(nn.Module):
    """Tokens to states; fields as in config.json of a CLIPTextModel. remat: recompute layers in the backward pass."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    dtype: Any = jnp.float32
    remat: bool = False
    attention: str | None = None

    @nn.compact
    def __call__(self, ids: Array) -> dict[str, Array]:
        """ids [B,L] -> {"last_hidden_state" [B,L,D] after the final norm, "penultimate" [B,L,D] without it, "pooled" [B,D]}.

        "penultimate" is what enters the last layer, "pooled" the last state at the first end-of-text token. ValueError when
        the prompts are longer than the tower's positions.
        """
        length = ids.shape[1]
        if length > self.max_position_embeddings:
            raise ValueError(f"prompts of {length} tokens; this text tower has positions for {self.max_position_embeddings}. "
                             "Truncate them when they are tokenised.")  # fmt: skip
        embed = lambda name, size: nn.Embed(size, self.hidden_size, name=f"embeddings.{name}_embedding")
        positions = embed("position", self.max_position_embeddings)(jnp.arange(length))
        x = embed("token", self.vocab_size)(ids) + positions
        x, penultimate = _layers(self, x, causal=True)
        x = _norm("final_layer_norm", self.layer_norm_eps)(x)
        # old files say 2 and mean the largest id, which is the end of text
        ends = ids if self.eos_token_id == 2 else (ids == self.eos_token_id).astype(jnp.int32)
        pooled = jnp.take_along_axis(x, jnp.argmax(ends, 1)[:, None, None], 1)[:, 0]
        return {"last_hidden_state": x, "penultimate": penultimate, "pooled": pooled}


class VisionTower(nn.Module):
    """Normalised pixels to states; fields as in config.json of a CLIPVisionModel. remat: as in `TextTower`."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    dtype: Any = jnp.float32
    remat: bool = False
    attention: str | None = None

    @nn.compact
    def __call__(self, pixels: Array) -> dict[str, Array]:
        """pixels [B,n,n,3] -> {"last_hidden_state" [B,1+P,D], "penultimate" [B,1+P,D], "pooled" [B,D]}.

        No state is normed but "pooled", the class token's. ValueError for pictures of another size.
        """
        b, n, width = pixels.shape[0], self.image_size, self.hidden_size
        if pixels.shape[1:] != (n, n, 3):
            raise ValueError(f"pixels {list(pixels.shape)}; this vision tower takes [B,{n},{n},3] (channels come last): resize "
                             "them first, as rewards/preprocess.py does")  # fmt: skip
        p = self.patch_size
        x = Conv(width, (p, p), strides=p, padding="VALID", use_bias=False, dtype=self.dtype,
                    name="embeddings.patch_embedding")(pixels)  # fmt: skip
        x = x.reshape(b, -1, width)
        first = _Vector(width, name="embeddings")()
        x = jnp.concatenate([jnp.broadcast_to(first, (b, 1, width)).astype(x.dtype), x], 1)
        x = x + nn.Embed(x.shape[1], width, name="embeddings.position_embedding")(jnp.arange(x.shape[1]))
        x = _norm("pre_layrnorm", self.layer_norm_eps)(x)
        x, penultimate = _layers(self, x, causal=False)
        pooled = _norm("post_layernorm", self.layer_norm_eps)(x[:, 0])
        return {"last_hidden_state": x, "penultimate": penultimate, "pooled": pooled}


class _Vector(nn.Module):
    """The class token, a bare parameter."""

    width: int

    @nn.compact
    def __call__(self) -> Array:
        return self.param("class_embedding", nn.initializers.normal(0.02), (self.width,))


class CLIPText(nn.Module):
    """A text tower with a projection of its pooled state, where projection_dim is not 0 (CLIPTextModelWithProjection)."""

    text_model: TextTower
    projection_dim: int = 0

    @nn.compact
    def __call__(self, ids: Array) -> dict[str, Array]:
        """ids [B,L] -> what `TextTower` gives, and "projected" [B,E], float32."""
        out = self.text_model(ids)
        return out | _projected("text_projection", self.projection_dim, out["pooled"])


class CLIPVision(nn.Module):
    """A vision tower with a projection of its pooled state, where projection_dim is not 0 (CLIPVisionModelWithProjection)."""

    vision_model: VisionTower
    projection_dim: int = 0

    @nn.compact
    def __call__(self, pixels: Array) -> dict[str, Array]:
        """pixels [B,n,n,3] -> what `VisionTower` gives, and "projected" [B,E], float32."""
        out = self.vision_model(pixels)
        return out | _projected("visual_projection", self.projection_dim, out["pooled"])


class CLIP(nn.Module):
    """Both towers, their projections and the temperature; its parameters are those of `CLIPText` and `CLIPVision` together."""

    text_model: TextTower
    vision_model: VisionTower
    projection_dim: int = 512

    @nn.compact
    def __call__(self, ids: Array, pixels: Array) -> dict[str, Array]:
        """ids [T,L], pixels [B,n,n,3] -> {"text" [T,E], "image" [B,E] of length 1, "logits" [B,T] = exp(logit_scale) cos}."""
        text = _projected("text_projection", self.projection_dim, self.text_model(ids)["pooled"])["projected"]
        image = _projected("visual_projection", self.projection_dim, self.vision_model(pixels)["pooled"])["projected"]
        logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())
        text, image = normalise(text), normalise(image)
        cosine = jnp.einsum("be,te->bt", image, text, precision=jax.lax.Precision.HIGHEST)
        return {"text": text, "image": image, "logits": jnp.exp(logit_scale) * cosine}


class SafetyChecker(nn.Module):
    """The projected vision tower and concept tables of Stable Diffusion's safety checker."""

    vision_model: VisionTower
    projection_dim: int = 768

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        """pixels [B,n,n,3] -> embeddings [B,E]; the tables are only declared: they are the reward's to use."""
        for name, size in (("concept_embeds", 17), ("special_care_embeds", 3)):
            self.param(name, nn.initializers.ones, (size, self.projection_dim))
            self.param(f"{name}_weights", nn.initializers.ones, (size,))
        return _projected("visual_projection", self.projection_dim, self.vision_model(pixels)["pooled"])["projected"]


def normalise(x: Array) -> Array:
    """x / |x| over the last axis, in float32; a zero vector stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


def clip_tokenizer(folder: str | Path, *, length: int = 77, style: str = "transformers") -> Callable[[Sequence[str]], np.ndarray]:
    """tokenize(prompts) -> int32 [B, length]: begin, the prompt, end of text, padding; by CLIP's byte pairs in the folder.

    The files (tokenizer.json, or vocab.json and merges.txt) lie in `folder` or in its subfolder tokenizer. A prompt that is
    too long loses its end, and a warning says what was cut, once a prompt and for the first ten. style: "transformers"
    pads as the folder says; "open_clip" pads with 0, reads HTML entities, and mends broken characters where ftfy is
    installed. FileNotFoundError when there is no tokenizer, ValueError for another style.
    """
    if style not in ("transformers", "open_clip"):
        raise ValueError(f"tokenizer style {style!r}; choose 'transformers' or 'open_clip'")
    folder = Path(folder)
    places = [p for p in (folder / "tokenizer", folder) if (p / "tokenizer.json").is_file() or (p / "vocab.json").is_file()]
    if not places:
        raise FileNotFoundError(f"no tokenizer in {folder}; wanted tokenizer.json, or vocab.json and merges.txt, there or in "
                                "its subfolder tokenizer. Those of openai/clip-vit-large-patch14 fit every CLIP.")  # fmt: skip
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(places[0]))
    padding = 0 if style == "open_clip" else tokenizer.pad_token_id
    end, warned = tokenizer.eos_token_id, set[str]()

    def tokenize(prompts: Sequence[str]) -> np.ndarray:
        texts = [_clean(p) for p in prompts] if style == "open_clip" else list(prompts)
        out = np.full((len(texts), length), padding, np.int32)
        for row, prompt, ids in zip(out, prompts, tokenizer(texts, verbose=False)["input_ids"]):
            if len(ids) > length:
                if prompt not in warned and len(warned) < MAX_WARNINGS:
                    warned.add(prompt)
                    cut, more = tokenizer.decode(ids[length - 1 : -1]), ". Others are not named" * (len(warned) == MAX_WARNINGS)
                    logging.getLogger(__name__).warning("a prompt has %d tokens and CLIP reads %d; cut from %r: %r%s", len(ids),
                                                        length, prompt, cut, more)  # fmt: skip
                ids = [*ids[: length - 1], end]
            row[: len(ids)] = ids
        return out

    return tokenize


def _clean(text: str) -> str:
    """As open_clip: characters mended, HTML entities read (twice, as found in the wild), and no token but text."""
    if importlib.util.find_spec("ftfy"):
        import ftfy

        text = ftfy.fix_text(text)
    text = " ".join(html.unescape(html.unescape(text)).split())
    for token in ("startoftext", "endoftext"):
        text = text.replace(f"<|{token}|>", f"<| {token} |>")
    return text


def clip_text(config: Mapping[str, Any], *, dtype: Any = jnp.float32, remat: bool = False) -> CLIPText:
    """The network of a config.json of CLIPTextModel or CLIPTextModelWithProjection, or of the text part of a CLIPModel.

    There is a projection for a CLIPModel and where `architectures` says so. Raises ValueError for what is not supported.
    """
    whole = config.get("model_type") == "clip" or "text_config" in config
    projects = whole or "CLIPTextModelWithProjection" in (config.get("architectures") or ())
    return CLIPText(_tower(TextTower, config, "text", dtype, remat), int(config.get("projection_dim", 512)) if projects else 0)


def clip_vision(config: Mapping[str, Any], *, dtype: Any = jnp.float32, remat: bool = False) -> CLIPVision:
    """The network of a config.json of CLIPVisionModel or CLIPVisionModelWithProjection, or of the vision part of a CLIPModel.

    Projection and errors as in `clip_text`.
    """
    whole = config.get("model_type") == "clip" or "vision_config" in config
    projects = whole or "CLIPVisionModelWithProjection" in (config.get("architectures") or ())
    return CLIPVision(_tower(VisionTower, config, "vision", dtype, remat),
                      int(config.get("projection_dim", 512)) if projects else 0)  # fmt: skip


def clip(config: Mapping[str, Any], *, dtype: Any = jnp.float32, remat: bool = False) -> CLIP:
    """The network of a CLIPModel's config.json (or of one in BUILT_IN). Raises ValueError for what is not supported."""
    return CLIP(_tower(TextTower, config, "text", dtype, remat), _tower(VisionTower, config, "vision", dtype, remat),
                int(config.get("projection_dim", 512)))  # fmt: skip


def safety_checker(config: Mapping[str, Any], *, dtype: Any = jnp.float32, remat: bool = False) -> SafetyChecker:
    """The network of a StableDiffusionSafetyChecker's config.json. Raises ValueError for what is not supported."""
    return SafetyChecker(_tower(VisionTower, config, "vision", dtype, remat), int(config.get("projection_dim", 512)))


def _tower(module: Any, config: Mapping[str, Any], side: str, dtype: Any, remat: bool) -> Any:
    """One tower of a whole CLIP's config or of its own.

    transformers writes dozens of keys that mean nothing here, so unknown ones pass; those that change what is computed
    are checked. `*_config_dict`, where old files have it, goes first as there.
    """
    if (kind := config.get("model_type", "clip")) not in ("clip", f"clip_{side}_model"):
        raise ValueError(f"model_type is {kind!r}; this builds 'clip' and 'clip_{side}_model'. Is this the right folder's config.json?")
    inner = config
    if config.get("model_type") == "clip" or f"{side}_config" in config:
        inner = {**(config.get(f"{side}_config") or {}), **(config.get(f"{side}_config_dict") or {})}
    names = {f.name for f in dataclasses.fields(module)} - {"parent", "name", "dtype", "remat", "attention"}
    fields = {k: v for k, v in inner.items() if k in names}
    if fields.get("hidden_act", "gelu") not in ACTIVATIONS:
        raise ValueError(f"CLIP {side} tower: hidden_act is {fields['hidden_act']!r}; supported: {' or '.join(map(repr, ACTIVATIONS))}")
    if inner.get("num_channels", 3) != 3:
        raise ValueError(f"CLIP {side} tower: num_channels is {inner['num_channels']!r}; supported: 3")
    for key in names - {"hidden_act", "layer_norm_eps"}:
        if not isinstance(fields.get(key, 1), int):
            raise ValueError(f"CLIP {side} tower: {key} is {fields[key]!r}; supported: one whole number")
    tower = module(**fields, dtype=dtype, remat=remat)
    if tower.hidden_size % tower.num_attention_heads:
        raise ValueError(f"CLIP {side} tower: hidden_size {tower.hidden_size} does not divide into "
                         f"{tower.num_attention_heads} heads")  # fmt: skip
    return tower


def _layers(tower: Any, x: Array, *, causal: bool) -> tuple[Array, Array]:
    """(state after the last layer, state before it), both [B,L,D] float32."""
    layer = nn.remat(Layer) if tower.remat else Layer
    x = before = x.astype(jnp.float32)
    for i in range(tower.num_hidden_layers):
        before = x
        x = layer(tower.num_attention_heads, tower.intermediate_size, tower.hidden_act, tower.layer_norm_eps, causal,
                  tower.dtype, tower.attention, name=f"encoder.layers.{i}")(x)  # fmt: skip
    return x, before


def _projected(name: str, features: int, pooled: Array) -> dict[str, Array]:
    """{"projected" [B,E]} of pooled states [B,D], nothing for 0 features; in float32: a cosine of it is read to 1e-4."""
    dense = nn.Dense(features, use_bias=False, dtype=jnp.float32, precision=jax.lax.Precision.HIGHEST, name=name)
    return {"projected": dense(pooled)} if features else {}


def _norm(name: str, epsilon: float) -> nn.LayerNorm:
    """Layer normalisation with float32 statistics and output."""
    return nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, name=name)
