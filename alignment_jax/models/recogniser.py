"""Recognisers of what a critters picture shows: one head an attribute, each with one more class, "unclear"."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from .convolution import Conv
from .layers import space_to_depth

Array = jax.Array


class StridedCNN(nn.Module):
    """The proxy's network: strided convolutions; .85 M parameters."""

    heads: Mapping[str, int]

    @nn.compact
    def __call__(self, images: Array) -> tuple[dict[str, Array], Array]:
        """images [B,32,32,3] in [0, 1] -> ({head: logits [B, n + 1]}, features [B, 192])."""
        x = 2.0 * images - 1.0
        for i, (width, stride) in enumerate(((48, 2), (96, 1), (96, 2), (160, 1), (160, 2), (192, 1))):
            x = Conv(width, (3, 3), (stride, stride), name=f"conv_{i}")(x)
            x = nn.silu(nn.LayerNorm(name=f"norm_{i}")(x))
        x = nn.silu(nn.Dense(192, name="features")(jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], -1)))
        return {name: nn.Dense(n + 1, name=f"head_{name}")(x) for name, n in self.heads.items()}, x


class PatchResNet(nn.Module):
    """The gold judge's network: 2x2 patches, GroupNorm residual blocks; .58 M parameters with the judge's heads."""

    heads: Mapping[str, int]

    @nn.compact
    def __call__(self, images: Array) -> tuple[dict[str, Array], Array]:
        """images [B,32,32,3] in [0, 1] -> ({head: logits [B, n + 1]}, features [B, 256])."""
        x = Conv(32, (3, 3), name="stem")(space_to_depth(2.0 * images - 1.0, 2))
        for i, (width, down) in enumerate(((32, False), (64, True), (64, False), (96, True), (96, False))):
            if down:
                x = nn.Dense(width, name=f"down_{i}")(space_to_depth(x, 2))
            h = Conv(width, (3, 3), name=f"conv_a_{i}")(nn.relu(nn.GroupNorm(8, name=f"norm_a_{i}")(x)))
            h = Conv(width, (3, 3), name=f"conv_b_{i}")(nn.relu(nn.GroupNorm(8, name=f"norm_b_{i}")(h)))
            x = x + h
        x = nn.relu(nn.GroupNorm(8, name="norm_out")(x))
        # positions count: a mouth on the forehead is no mouth
        x = nn.Dense(8, name="squeeze")(x).reshape(len(x), -1)
        x = nn.relu(nn.Dense(256, name="features")(x))
        return {name: nn.Dense(n + 1, name=f"head_{name}")(x) for name, n in self.heads.items()}, x
