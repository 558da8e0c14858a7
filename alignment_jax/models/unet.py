"""The text-conditional UNet of Stable Diffusion 1, 2, XL and Turbo (diffusers' UNet2DConditionModel)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .blocks import ResnetBlock, Transformer2D, conv3x3, group_norm, read_config, upsample
from .layers import timestep_embedding

Array = jax.Array
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
# switches of diffusers' class that no Stable Diffusion uses: only these values are computed here
FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"), "addition_embed_type": (None, "text_time"), "attention_type": ("default",),
    "center_input_sample": (False,), "class_embed_type": (None,), "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,), "conv_out_kernel": (3,), "cross_attention_norm": (None,), "downsample_padding": (1,),
    "dual_cross_attention": (False,), "encoder_hid_dim": (None,), "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False), "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",), "num_class_embeds": (None,), "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,), "resnet_skip_time_act": (False,), "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,), "time_embedding_act_fn": (None,), "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",), "timestep_post_act": (None,),
}  # fmt: skip
IGNORED = ("sample_size", "dropout", "addition_embed_type_num_heads")


class UNet(nn.Module):
    """Residual blocks and transformers over text at falling, then rising resolution. Fields as in config.json.

    attention_head_dim is the number of heads, whatever it is called; num_attention_heads, where given, goes before it.
    time_cond_proj_dim: the width of a guidance embedding (LCM, arXiv 2310.04378). dtype: what is computed in (norms and
    softmax: float32). remat: blocks are computed again in the backward pass. attention: see `attention.attention`.
    """

    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    cross_attention_dim: int = 1280
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    transformer_layers_per_block: int | tuple[int, ...] = 1
    use_linear_projection: bool = False
    upcast_attention: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_cond_proj_dim: int | None = None
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    dtype: Any = jnp.float32
    remat: bool = False
    attention: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        t: Array,
        states: Array,
        *,
        pooled: Array | None = None,
        time_ids: Array | None = None,
        timestep_cond: Array | None = None,
    ) -> Array:
        """x [B,h,w,c], t [B], text states [B,L,D] -> output [B,h,w,out], float32.

        pooled [B,P] and time_ids [B,6] belong to addition_embed_type "text_time" (SDXL), timestep_cond [B,G] to
        time_cond_proj_dim (None: zeros). Raises ValueError when they are missing, not wanted or of another width.
        """
        self._check(x, states, pooled, time_ids, timestep_cond)
        levels = len(self.block_out_channels)
        layers = _per_block(self.layers_per_block, levels)
        depths = _per_block(self.transformer_layers_per_block, levels)
        heads = _per_block(self.num_attention_heads or self.attention_head_dim, levels)
        resnet_block = nn.remat(ResnetBlock) if self.remat else ResnetBlock
        e = self._embedding(t, pooled, time_ids, timestep_cond)
        states = states.astype(self.dtype)

        def resnet(name: str, level: int, x: Array) -> Array:
            features = self.block_out_channels[level]
            return resnet_block(features, self.norm_num_groups, self.norm_eps, self.dtype, name=name)(x, e)

        def transformer(name: str, level: int, x: Array) -> Array:
            block = Transformer2D(heads[level], depths[level], self.norm_num_groups, self.use_linear_projection,
                                  self.upcast_attention, self.attention, self.dtype, self.remat, name=name)  # fmt: skip
            return block(x, states)

        h = conv3x3("conv_in", self.block_out_channels[0], self.dtype)(x.astype(self.dtype))
        skips = [h]
        for i, kind in enumerate(self.down_block_types):
            for j in range(layers[i]):
                h = resnet(f"down_blocks.{i}.resnets.{j}", i, h)
                if kind == CROSS_DOWN:
                    h = transformer(f"down_blocks.{i}.attentions.{j}", i, h)
                skips.append(h)
            if i < levels - 1:
                name = f"down_blocks.{i}.downsamplers.0.conv"
                h = conv3x3(name, self.block_out_channels[i], self.dtype, stride=2)(h)
                skips.append(h)

        h = resnet("mid_block.resnets.0", -1, h)
        h = resnet("mid_block.resnets.1", -1, transformer("mid_block.attentions.0", -1, h))

        for i, kind in enumerate(self.up_block_types):
            level = levels - 1 - i
            for j in range(layers[level] + 1):
                h = resnet(f"up_blocks.{i}.resnets.{j}", level, jnp.concatenate([h, skips.pop()], -1))
                if kind == CROSS_UP:
                    h = transformer(f"up_blocks.{i}.attentions.{j}", level, h)
            if level:
                name = f"up_blocks.{i}.upsamplers.0.conv"
                h = conv3x3(name, self.block_out_channels[level], self.dtype)(upsample(h, skips[-1]))

        h = nn.silu(group_norm("conv_norm_out", self.norm_num_groups, self.norm_eps)(h)).astype(self.dtype)
        return conv3x3("conv_out", self.out_channels, self.dtype)(h).astype(jnp.float32)

    def _embedding(self, t: Array, pooled: Array | None, time_ids: Array | None, timestep_cond: Array | None) -> Array:
        width = self.block_out_channels[0]

        def mlp(name: str, h: Array) -> Array:
            h = nn.Dense(4 * width, dtype=self.dtype, name=f"{name}.linear_1")(h)
            return nn.Dense(4 * width, dtype=self.dtype, name=f"{name}.linear_2")(nn.silu(h))

        h = self._sinusoids(t, width).astype(self.dtype)
        if self.time_cond_proj_dim is not None:
            if timestep_cond is None:
                timestep_cond = jnp.zeros((t.shape[0], self.time_cond_proj_dim))
            h = h + nn.Dense(width, use_bias=False, dtype=self.dtype, name="time_embedding.cond_proj")(timestep_cond)
        e = mlp("time_embedding", h)
        if self.addition_embed_type == "text_time":
            assert pooled is not None and time_ids is not None and self.addition_time_embed_dim is not None
            ids = self._sinusoids(time_ids.reshape(-1), self.addition_time_embed_dim).reshape(t.shape[0], -1)
            e = e + mlp("add_embedding", jnp.concatenate([pooled.astype(jnp.float32), ids], -1).astype(self.dtype))
        return e

    def _sinusoids(self, t: Array, dim: int) -> Array:
        half = dim // 2
        # diffusers' freq_shift: exponents i / (half - shift) in place of i / half
        h = timestep_embedding(t, dim, 10_000.0 ** (half / (half - self.freq_shift)))
        return h if self.flip_sin_to_cos else jnp.roll(h, half, -1)

    def _check(
        self, x: Array, states: Array, pooled: Array | None, time_ids: Array | None, timestep_cond: Array | None
    ) -> None:
        if x.shape[-1] != self.in_channels:
            raise ValueError(f"x has shape {x.shape}; wanted [B,h,w,{self.in_channels}]: channels come last")
        if states.shape[-1] != self.cross_attention_dim:
            raise ValueError(f"states have shape {states.shape}; wanted [B,L,{self.cross_attention_dim}]. "
                             "Do they come from this model's own text encoders?")  # fmt: skip
        if self.addition_embed_type == "text_time":
            if pooled is None or time_ids is None:
                raise ValueError("this model has addition_embed_type 'text_time': give pooled [B,P] and time_ids [B,6] "
                                 "(original height, width, crop top, left, target height, width)")  # fmt: skip
            width = pooled.shape[-1] + time_ids.shape[-1] * (self.addition_time_embed_dim or 0)
            if width != self.projection_class_embeddings_input_dim:
                raise ValueError(f"pooled {pooled.shape} and time_ids {time_ids.shape}, of "
                                 f"{self.addition_time_embed_dim} sinusoids each, make {width} features; wanted "
                                 f"{self.projection_class_embeddings_input_dim}, the config's "
                                 "projection_class_embeddings_input_dim")  # fmt: skip
        elif pooled is not None or time_ids is not None:
            raise ValueError("pooled and time_ids are given, but this model has no addition_embed_type; leave them out")
        if timestep_cond is not None and self.time_cond_proj_dim is None:
            raise ValueError("timestep_cond is given, but this model has no time_cond_proj_dim; leave it out")


def unet(
    config: Mapping[str, Any], *, dtype: Any = jnp.float32, remat: bool = False, attention: str | None = None
) -> UNet:
    """The network of a diffusers unet/config.json. Raises ValueError for switches and values that are not supported."""
    found = read_config(config, "UNet2DConditionModel", UNet, FIXED, IGNORED)
    net = UNet(**found, dtype=dtype, remat=remat, attention=attention)
    levels = len(net.block_out_channels)
    blocks = {"down_block_types": (CROSS_DOWN, "DownBlock2D"), "up_block_types": (CROSS_UP, "UpBlock2D")}
    for key, allowed in blocks.items():
        if wrong := set(getattr(net, key)) - set(allowed):
            raise ValueError(f"UNet2DConditionModel: {key} has {sorted(wrong)}; supported: {' and '.join(allowed)}")
    for key in ("down_block_types", "up_block_types", "layers_per_block", "transformer_layers_per_block",
                "attention_head_dim", "num_attention_heads"):  # fmt: skip
        value = getattr(net, key)
        if isinstance(value, tuple) and len(value) != levels:
            raise ValueError(f"UNet2DConditionModel: {key} is {value!r}; supported: one entry for each of the "
                             f"{levels} block_out_channels {net.block_out_channels}")  # fmt: skip
        if isinstance(value, tuple) and not all(isinstance(v, int | str) for v in value):
            raise ValueError(f"UNet2DConditionModel: {key} is {value!r}; supported: one number for each block")
    for key in ("cross_attention_dim", "norm_num_groups"):
        if not isinstance(value := getattr(net, key), int):
            raise ValueError(f"UNet2DConditionModel: {key} is {value!r}; supported: one number")
    return net


def _per_block(value: int | tuple[int, ...], levels: int) -> tuple[int, ...]:
    return (value,) * levels if isinstance(value, int) else tuple(value)
