"""Blocks that the networks of Stable Diffusion share, named and laid out as in diffusers' checkpoints.

A module's name is the checkpoint's own, dots included, so that a path is a checkpoint's name (see weights/torch_names).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .attention import attention
from .convolution import Conv
from .layers import show, unfused

Array = jax.Array


class GroupNorm(nn.Module):
    """Group normalisation with float32 statistics and output.

    The variance is that of the differences from the mean, not E[x^2] - E[x]^2: where a group's mean is 10 (100) times
    its deviation, the latter is wrong by 1e-4 (1e-2). Sums are taken by channel first, then by group: on CPU several
    times faster than over positions and a group's channels at once.
    """

    groups: int
    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> [B,H,W,C], float32. Raises ValueError unless groups divides C."""
        b, h, w, c = x.shape
        if c % self.groups:
            raise ValueError(f"{c} channels do not divide into {self.groups} groups; see norm_num_groups")
        size = c // self.groups

        def mean(x: Array) -> Array:
            of_groups = x.sum((1, 2)).reshape(b, self.groups, size).sum(-1) / (h * w * size)
            return jnp.repeat(of_groups, size, -1)[:, None, None, :]

        scale = self.param("scale", nn.initializers.ones, (c,)).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,)).astype(jnp.float32)
        x = x.astype(jnp.float32)
        x = x - mean(x)
        return x * (jax.lax.rsqrt(mean(x * x) + self.epsilon) * scale) + bias


def group_norm(name: str, groups: int, epsilon: float) -> GroupNorm:
    """A `GroupNorm` by a checkpoint's name."""
    return GroupNorm(groups, epsilon, name=name)


def conv3x3(name: str, features: int, dtype: Any, *, stride: int = 1, padding: Any = 1) -> nn.Conv:
    """A 3x3 convolution, padded by one on every side; "SAME" would shift a strided one by a pixel."""
    return Conv(features, (3, 3), strides=stride, padding=padding, dtype=dtype, name=name)


def conv1x1(name: str, features: int, dtype: Any) -> nn.Conv:
    """A pointwise convolution: its kernel is [1,1,in,out] in the checkpoint."""
    return Conv(features, (1, 1), dtype=dtype, name=name)


def upsample(x: Array, like: Array | None = None) -> Array:
    """The nearest of twice the size [B,2H,2W,C], cut to the height and width of `like` where that is odd."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
    return x if like is None else x[:, : like.shape[1], : like.shape[2]]


def cross_attention(module: nn.Module, q: Array, k: Array, v: Array, *, implementation: str | None = None) -> Array:
    """Attention of positions q [B,N,H,D] over text k, v [B,L,H,D] -> [B,N,H,D].

    Every cross-attention of a UNet passes through here, with the module it belongs to (`module.path` names it): the one
    place to capture or edit maps (see attention_maps.py).
    """
    show(module, q, k)
    return attention(q, k, v, implementation=implementation)


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice; the embedding, where there is one, is added in between. Residual."""

    features: int
    groups: int
    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, embedding: Array | None = None) -> Array:
        """x [B,H,W,C], embedding [B,E] -> [B,H,W,features]."""
        h = nn.silu(group_norm("norm1", self.groups, self.epsilon)(x)).astype(self.dtype)
        h = conv3x3("conv1", self.features, self.dtype)(h)
        if embedding is not None:
            e = nn.Dense(self.features, dtype=self.dtype, name="time_emb_proj")(nn.silu(embedding))
            h = h + e[:, None, None, :]
        h = nn.silu(group_norm("norm2", self.groups, self.epsilon)(h)).astype(self.dtype)
        h = conv3x3("conv2", self.features, self.dtype)(h)
        if x.shape[-1] != self.features:
            x = conv1x1("conv_shortcut", self.features, self.dtype)(x)
        return x + h


class Attention(nn.Module):
    """Heads of attention over the sequence itself, or over `states`; `upcast`: all of it in float32.

    "cudnn" takes 16-bit types only and forms scores in float32 by itself: nothing is cast for it.
    """

    heads: int
    bias: bool = False
    upcast: bool = False
    implementation: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, states: Array | None = None) -> Array:
        """x [B,N,C], states [B,L,D] -> [B,N,C]."""
        b, n, c = x.shape
        source = x if states is None else states

        def heads(name: str, x: Array) -> Array:
            x = nn.Dense(c, use_bias=self.bias, dtype=self.dtype, name=name)(x)
            x = x.reshape(b, -1, self.heads, c // self.heads)
            return x.astype(jnp.float32) if self.upcast and self.implementation != "cudnn" else x

        q, k, v = heads("to_q", x), heads("to_k", source), heads("to_v", source)
        if states is None:
            h = attention(q, k, v, implementation=self.implementation)
        else:
            h = cross_attention(self, q, k, v, implementation=self.implementation)
        return nn.Dense(c, dtype=self.dtype, name="to_out.0")(h.reshape(b, n, c))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention over text, and a feed-forward gated by the exact (erf) GELU; each residual."""

    heads: int
    upcast: bool = False
    implementation: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, states: Array) -> Array:
        """x [B,N,C], states [B,L,D] -> [B,N,C]."""
        c = x.shape[-1]

        def norm(name: str, x: Array) -> Array:
            layer_norm = nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, name=name)
            return unfused(layer_norm(x).astype(self.dtype))

        def attend(name: str) -> Attention:
            return Attention(self.heads, False, self.upcast, self.implementation, self.dtype, name=name)

        x = x + attend("attn1")(norm("norm1", x))
        x = x + attend("attn2")(norm("norm2", x), states)
        h, gate = jnp.split(nn.Dense(8 * c, dtype=self.dtype, name="ff.net.0.proj")(norm("norm3", x)), 2, -1)
        return x + nn.Dense(c, dtype=self.dtype, name="ff.net.2")(h * nn.gelu(gate, approximate=False))


class Transformer2D(nn.Module):
    """Positions of a picture through transformer blocks, between two projections (convolutions or linear). Residual."""

    heads: int
    depth: int
    groups: int
    linear: bool = False
    upcast: bool = False
    implementation: str | None = None
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, states: Array) -> Array:
        """x [B,H,W,C], states [B,L,D] -> [B,H,W,C]."""
        b, height, width, c = x.shape
        block = nn.remat(TransformerBlock) if self.remat else TransformerBlock
        h = group_norm("norm", self.groups, 1e-6)(x).astype(self.dtype)
        # the same numbers either way; what differs is the rank of the kernel in the checkpoint
        project = nn.Dense if self.linear else lambda c, dtype, name: conv1x1(name, c, dtype)
        h = project(c, dtype=self.dtype, name="proj_in")(h).reshape(b, height * width, c)
        for i in range(self.depth):
            name = f"transformer_blocks.{i}"
            h = block(self.heads, self.upcast, self.implementation, self.dtype, name=name)(h, states)
        return x + project(c, dtype=self.dtype, name="proj_out")(h.reshape(b, height, width, c))


def read_config(
    config: Mapping[str, Any],
    class_name: str,
    module: type[nn.Module],
    fixed: Mapping[str, tuple[Any, ...]],
    ignored: Collection[str],
) -> dict[str, Any]:
    """The entries of a diffusers config.json that are fields of a module, lists as tuples.

    fixed: {switch: the values that are supported}. ignored: keys without meaning here. Raises ValueError for another
    _class_name, for a value of a fixed switch that is not supported and for a key that is none of these.
    """
    if (found := config.get("_class_name", class_name)) != class_name:
        raise ValueError(f"_class_name is {found!r}; wanted {class_name!r}. Is this the right folder's config.json?")
    own = {"parent", "name", "dtype", "remat", "attention"}
    fields = {f.name for f in dataclasses.fields(module)} - own
    out = {}
    for key, value in config.items():
        value = _tuples(value)
        if key in fixed and value not in fixed[key]:
            allowed = " or ".join(repr(v) for v in fixed[key])
            raise ValueError(f"{class_name}: {key} is {value!r}; supported: {allowed}")
        if key in fields:
            out[key] = value
        elif not (key in fixed or key.startswith("_") or key in ignored):
            near = difflib.get_close_matches(key, [*fields, *fixed], 1)
            hint = f" (nearest: {near[0]})" if near else ""
            raise ValueError(f"{class_name}: unknown key {key!r} with value {value!r}{hint}; supported: "
                             f"{', '.join(sorted([*fields, *fixed]))}")  # fmt: skip
    return out


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value
