"""Low-rank adaptation as a transformation of a tree of parameters (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

Array = jax.Array
ATTENTION = r"attn[12][./](to_q|to_k|to_v|to_out\.0)/kernel$"
# what is tuned, by name: regular expressions over paths
TARGETS = {
    # ddpo-pytorch: LoRA in the attention processors of the UNet, rank 4
    "ddpo-pytorch": ATTENTION,
    # DRaFT (arXiv 2309.17400), rank 8 to 32; without official code, so the choice of layers is ours: all of a transformer block
    "draft": rf"({ATTENTION})|(ff\.net\.(0\.proj|2)/kernel$)",
    # diffusers' examples train_text_to_image_lora*: target_modules to_k, to_q, to_v, to_out.0 of the UNet
    "diffusers": ATTENTION,
    # PEFT's "all-linear": every matrix of the UNet, its convolutions left out (what `init` sees to)
    "all-linear": r"^(unet/|down_blocks|mid_block|up_blocks|time_embedding|add_embedding)",
    # everything in the UNet, convolutions too
    "unet": "unet",
    # diffusers' examples with --train_text_encoder: the attention of CLIP's text encoder
    "text_encoder": r"(^|/)text.*self_attn[./](q_proj|k_proj|v_proj|out_proj)/kernel$|"
                    r"^(text_model\.)?encoder.*self_attn[./](q_proj|k_proj|v_proj|out_proj)/kernel$",
}  # fmt: skip


def init(key: Array, params: Any, *, rank: int, targets: str = ".*") -> Any:
    """Factors {"a" [in, r], "b" [r, out]} for every kernel that `targets`, a name in TARGETS or a regular expression, matches.

    Kernels are dense [in, out] or convolutions [h, w, in, out], flattened to [h w in, out]. a ~ N(0, 1/in), b = 0, so
    that the tuned network starts as the base. Raises ValueError when nothing matches, with the nearest paths.
    """
    flat = flatten_dict(params, sep="/")
    kernels = {k: v for k, v in flat.items() if k.endswith("kernel") and jnp.ndim(v) >= 2}
    pattern, any_rank = TARGETS.get(targets, targets), targets != "all-linear"
    chosen = {k: v for k, v in kernels.items() if re.search(pattern, k) and (any_rank or jnp.ndim(v) == 2)}
    if not chosen:
        raise ValueError(f"lora targets {targets!r} match no kernel; paths are like {', '.join(sorted(kernels)[:5])}. Names for "
                         f"choices of targets: {', '.join(TARGETS)}; anything else is a regular expression")  # fmt: skip
    factors = {}
    for path, kernel in chosen.items():
        fan_out = kernel.shape[-1]
        fan_in = kernel.size // fan_out
        r = min(rank, fan_in, fan_out)
        # the key follows from the path: adding a target leaves the others' factors as they were
        a = jax.random.normal(jax.random.fold_in(key, _stable_hash(path)), (fan_in, r)) * fan_in**-0.5
        factors[path] = {"a": a, "b": jnp.zeros((r, fan_out))}
    return unflatten_dict({f"{k}/{name}": v for k, ab in factors.items() for name, v in ab.items()}, sep="/")


def merge(params: Any, factors: Any, scale: Array | float = 1.0) -> Any:
    """Parameters with W + scale a b in place of every adapted kernel W, to ship; scale 0 is the base, bitwise."""
    flat, low_rank = flatten_dict(params, sep="/"), flatten_dict(factors, sep="/")
    # sorted: a set of words has another order in every process, and a program in another order is compiled anew
    for path in sorted({k.rsplit("/", 1)[0] for k in low_rank}):
        kernel = flat[path]
        delta = (low_rank[f"{path}/a"] @ low_rank[f"{path}/b"]).reshape(kernel.shape)
        flat[path] = kernel + (scale * delta).astype(kernel.dtype)
    return unflatten_dict(flat, sep="/")


def attach(params: Any, factors: Any, scale: Array | float = 1.0) -> Any:
    """Parameters with the factors "lora_a", "lora_b" = scale b beside every adapted kernel, for a network made by `adapted`.

    W x + scale b a x without forming W + scale b a: kept in 16 bits, W would swallow a change below half its spacing (at
    learning rate 1e-4 that of the first tens of steps), and the gradient needs no product of the kernel's own size.
    """
    flat, low_rank = flatten_dict(params, sep="/"), flatten_dict(factors, sep="/")
    for path, value in low_rank.items():
        kernel, name = path.rsplit("/", 1)
        flat[f"{kernel.removesuffix('kernel')}lora_{name}"] = scale * value if name == "b" else value
    return unflatten_dict(flat, sep="/")


def adapted(apply: Callable[..., Array], used: set[tuple[str, ...]] | None = None) -> Callable[..., Array]:
    """apply(params, ...) whose flax Dense and Conv layers add what `attach` has put beside their kernels.

    used: gets the path of every layer that did.
    """

    def add(inner: Callable[..., Array], inputs: Any, more: Any, context: Any) -> Array:
        y, module = inner(*inputs, **more), context.module
        if context.method_name != "__call__" or not isinstance(module, nn.Dense | nn.Conv) or not module.has_variable("params", "lora_a"):
            return y
        if used is not None:
            used.add(module.path)
        kernel, a, b = (jnp.asarray(module.get_variable("params", name)) for name in ("kernel", "lora_a", "lora_b"))
        down = module.clone(parent=None, name=None, features=a.shape[-1], use_bias=False)
        h: Any = down.apply({"params": {"kernel": a.reshape(*kernel.shape[:-1], -1)}}, *inputs)
        return y + h @ b.astype(h.dtype)

    def call(params: Any, *args: Any) -> Array:
        with nn.intercept_methods(add):
            return apply(params, *args)

    return call


def unreached(apply: Callable[..., Array], params: Any, *args: Any) -> list[str]:
    """Kernels of attached parameters (shapes suffice) whose factors no flax Dense or Conv layer of `apply` would add."""
    used: set[tuple[str, ...]] = set()
    jax.eval_shape(adapted(apply, used), params, *args)
    there = [k.removesuffix("/lora_a") for k in flatten_dict(params, sep="/") if k.endswith("/lora_a")]
    return sorted(k for k in there if not any(k.endswith("/".join(path)) for path in used if path))


def _stable_hash(path: str) -> int:
    value = 2166136261
    for byte in path.encode():
        value = ((value ^ byte) * 16777619) & 0x7FFFFFFF
    return value
