"""The critters model: a word tokenizer, a text tower and a pixel UNet that predicts the clean picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..diffusion import cosine, expand, rectified_flow
from .attention_maps import attention_maps
from .bundle import ModelBundle
from .pixel_unet import PixelUNet
from .text import TextTower, WordTokenizer

Array = jax.Array
ASSETS = Path(__file__).parent.parent / "assets" / "critters"
NOISIEST = 0.98  # the last u that the network was trained at


def critters(tokenizer: str | Path = ASSETS / "tokenizer.json", features: tuple[int, int] = (96, 192),
             dtype: Any = jnp.float32, flow: bool = False) -> ModelBundle:  # fmt: skip
    """Pictures of critters, 32x32, from captions such as "a green bell monster with horns, ..."; about 3.5 M parameters.

    x0-prediction on alpha = cos(pi u / 2), u in [0.02, 0.98]; the condition is at most 23 words.
    flow: the same network as a rectified flow, x_t = (1 - t) x0 + t eps: it reads x_t / sqrt((1 - t)^2 + t^2) at the u of equal
    sigma / alpha, u = (2 / pi) atan(t / (1 - t)).
    """
    tokenize = WordTokenizer(tokenizer, length=24)
    text = TextTower(tokenize.vocabulary, dtype=dtype)
    unet = PixelUNet((features[0], features[1]), dtype=dtype)

    def encode_text(params: Any, tokens: Array) -> dict[str, Array]:
        cond: Any = text.apply({"params": params["text"]}, tokens)
        return cond

    def given(params: Any, cond: dict[str, Array]) -> tuple[Array, ...]:
        cond = encode_text(params, cond["tokens"]) if "tokens" in cond else cond
        return cond["states"], cond["mask"], cond["pooled"]

    def own(x: Array, t: Array) -> tuple[Array, Array]:
        if not flow:
            return x, t
        return x / expand(jnp.hypot(1 - t, t), x), jnp.minimum(2 / jnp.pi * jnp.arctan2(t, 1 - t), NOISIEST)

    def denoise(params: Any, x: Array, t: Array, cond: dict[str, Array]) -> Array:
        output: Any = unet.apply({"params": params["unet"]}, *own(x, t), *given(params, cond))
        return output

    def maps(params: Any, x: Array, t: Array, cond: dict[str, Array]) -> Array:
        size = x.shape[1] // unet.patch, x.shape[2] // unet.patch
        return attention_maps(unet, params["unet"], size, *own(x, t), *given(params, cond))

    def init(key: Array) -> Any:
        key_text, key_unet = jax.random.split(key)
        tokens = jnp.ones((1, tokenize.length), jnp.int32)
        params = {"text": text.init(key_text, tokens)["params"]}
        cond = encode_text(params, tokens)
        x, t = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1,))
        return {**params, "unet": unet.init(key_unet, x, t, cond["states"], cond["mask"], cond["pooled"])["params"]}

    return ModelBundle(
        name="critters", init=init, denoise=denoise, encode_text=encode_text, decode=decode_pixels,
        encode=lambda params, observation: 2.0 * observation - 1.0, tokenize=tokenize,
        schedule=rectified_flow() if flow else cosine(t_min=0.0, t_max=NOISIEST), prediction="x0", sample_shape=(32, 32, 3),
        sampling={"num_steps": 8, "spacing": "uniform", "eta": 0.0, "guidance_scale": 1.0},
        attention=maps,
    )  # fmt: skip


def decode_pixels(params: Any, x0: Array) -> Array:
    """[-1, 1] -> [0, 1], clamped; the gradient passes the clamp (straight through), or white stays white for ever."""
    del params
    picture = 0.5 * x0 + 0.5
    return picture + jax.lax.stop_gradient(jnp.clip(picture, 0.0, 1.0) - picture)
