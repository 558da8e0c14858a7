"""Layers that every network here is made of. Statistics of norms and softmax in float32 whatever the compute type."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..platform import platform
from .attention import attention
from .convolution import Conv

Array = jax.Array


def show(module: nn.Module, q: Array, k: Array, mask: Array | None = None) -> None:
    """Leaves queries q [B,N,H,D] and keys k [B,L,H,D] of an attention over text where `attention_maps` finds them.

    Without a mutable collection "intermediates", that is unless maps are asked for, this is nothing.
    """
    module.sow("intermediates", "text", {"q": q, "k": k} if mask is None else {"q": q, "k": k, "mask": mask})


def unfused(x: Array) -> Array:
    """x, which XLA on CPU does not merge into what follows: a LayerNorm merged into the product behind it slows both."""
    return jax.lax.optimization_barrier(x) if platform() == "cpu" else x


def timestep_embedding(t: Array, dim: int, max_period: float = 10_000.0) -> Array:
    """Sinusoids [B, dim] of times t [B] (arXiv 2006.11239), cosine half first as in diffusers' flip_sin_to_cos."""
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def space_to_depth(x: Array, n: int) -> Array:
    """[B,H,W,C] -> [B,H/n,W/n,n n C]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // n, n, w // n, n, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // n, w // n, n * n * c)


def depth_to_space(x: Array, n: int) -> Array:
    """The inverse of `space_to_depth`."""
    b, h, w, c = x.shape
    return x.reshape(b, h, w, n, n, c // (n * n)).transpose(0, 1, 3, 2, 4, 5).reshape(b, h * n, w * n, c // (n * n))


class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, with a scale and shift by the embedding (FiLM) in between; residual."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, embedding: Array) -> Array:
        """x [B,H,W,C], embedding [B,E] -> [B,H,W,features]."""
        norm = lambda name: nn.GroupNorm(8, dtype=jnp.float32, name=name)  # noqa: E731
        conv = lambda name, init: Conv(  # noqa: E731
            self.features, (3, 3), dtype=self.dtype, kernel_init=init, name=name
        )
        h = conv("conv_in", nn.initializers.lecun_normal())(nn.silu(norm("norm_in")(x)).astype(self.dtype))
        film = nn.Dense(2 * self.features, dtype=self.dtype, name="film")(nn.silu(embedding))[:, None, None, :]
        scale, shift = jnp.split(film, 2, -1)
        h = nn.silu(norm("norm_out")(h) * (1 + scale) + shift).astype(self.dtype)
        h = conv("conv_out", nn.initializers.zeros_init())(h)
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, dtype=self.dtype, name="skip")(x)
        return x + h


class JointAttention(nn.Module):
    """Positions attend over positions and text tokens together; residual."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, text: Array, mask: Array) -> Array:
        """x [B,H,W,C], text [B,L,D], mask [B,L] -> [B,H,W,C]."""
        b, height, width, c = x.shape
        positions = height * width
        h = nn.GroupNorm(8, dtype=jnp.float32, name="norm")(x).astype(self.dtype).reshape(b, positions, c)
        qkv = nn.Dense(3 * c, dtype=self.dtype, name="to_qkv")(h)
        q, k, v = jnp.split(qkv.reshape(b, positions, self.heads, -1), 3, -1)
        text_kv = nn.Dense(2 * c, dtype=self.dtype, name="to_text_kv")(text.astype(self.dtype))
        text_k, text_v = jnp.split(text_kv.reshape(b, text.shape[1], self.heads, -1), 2, -1)
        show(self, q, text_k, mask)
        keys, values = jnp.concatenate([k, text_k], 1), jnp.concatenate([v, text_v], 1)
        all_mask = jnp.concatenate([jnp.ones((b, positions), bool), mask], 1)
        out = attention(q, keys, values, all_mask).reshape(b, height, width, c)
        return x + nn.Dense(c, dtype=self.dtype, kernel_init=nn.initializers.zeros_init(), name="to_out")(out)
