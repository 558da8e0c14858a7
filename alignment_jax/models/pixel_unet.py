"""A small text-conditional UNet on pixels: 32x32 pictures as 8x8 and 4x4 grids of patches."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .convolution import Conv
from .layers import JointAttention, ResBlock, depth_to_space, space_to_depth, timestep_embedding

Array = jax.Array


class PixelUNet(nn.Module):
    """Two resolutions, residual blocks with FiLM, attention over positions and text at both."""

    features: tuple[int, int] = (96, 192)
    patch: int = 4
    channels: int = 3
    heads: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, t: Array, text: Array, mask: Array, pooled: Array) -> Array:
        """x [B,H,W,C], t [B] in [0, 1], text [B,L,D], mask [B,L], pooled [B,D] -> [B,H,W,C] float32."""
        outer, inner = self.features
        dense = lambda n, name: nn.Dense(n, dtype=self.dtype, name=name)  # noqa: E731
        e = nn.silu(dense(inner, "time_in")(timestep_embedding(1000.0 * t, 128)))
        e = dense(inner, "time_out")(e) + dense(inner, "pooled")(pooled)
        block = lambda n, name, x: ResBlock(n, self.dtype, name=name)(x, e)  # noqa: E731
        attend = lambda name, x: JointAttention(self.heads, self.dtype, name=name)(x, text, mask)  # noqa: E731

        h = Conv(outer, (3, 3), dtype=self.dtype, name="conv_in")(space_to_depth(x.astype(self.dtype), self.patch))
        h = h + self.param("position", nn.initializers.normal(0.02), (h.shape[1], h.shape[2], outer)).astype(h.dtype)
        h = skip = attend("down_attention", block(outer, "down_block", h))
        h = dense(inner, "down")(space_to_depth(h, 2))
        h = attend("middle_attention_0", block(inner, "middle_block_0", h))
        h = attend("middle_attention_1", block(inner, "middle_block_1", h))
        h = block(inner, "middle_block_2", h)
        h = depth_to_space(dense(4 * outer, "up")(h), 2)
        h = block(outer, "up_block_0", jnp.concatenate([h, skip], -1))
        h = block(outer, "up_block_1", attend("up_attention", h))
        h = nn.silu(nn.GroupNorm(8, dtype=jnp.float32, name="norm_out")(h)).astype(self.dtype)
        out = Conv(self.channels * self.patch**2, (3, 3), dtype=self.dtype, kernel_init=nn.initializers.zeros_init(),
                      name="conv_out")(h)  # fmt: skip
        return depth_to_space(out, self.patch).astype(jnp.float32)
