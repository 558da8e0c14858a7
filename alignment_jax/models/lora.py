"""Low-rank adaptation as a transformation of a tree of parameters (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import re
from typing import Any

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
    """Parameters with W + scale a b in place of every adapted kernel W; scale 0 is the base, bitwise."""
    flat, low_rank = flatten_dict(params, sep="/"), flatten_dict(factors, sep="/")
    # sorted: a set of words has another order in every process, and a program in another order is compiled anew
    for path in sorted({k.rsplit("/", 1)[0] for k in low_rank}):
        kernel = flat[path]
        delta = (low_rank[f"{path}/a"] @ low_rank[f"{path}/b"]).reshape(kernel.shape)
        flat[path] = kernel + (scale * delta).astype(kernel.dtype)
    return unflatten_dict(flat, sep="/")


def _stable_hash(path: str) -> int:
    value = 2166136261
    for byte in path.encode():
        value = ((value ^ byte) * 16777619) & 0x7FFFFFFF
    return value
