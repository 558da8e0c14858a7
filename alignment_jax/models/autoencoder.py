"""Autoencoders of latent diffusion: diffusers' AutoencoderKL, and AutoencoderTiny, a small distilled one.

Pixels are [-1, 1]; latents are unscaled: scaling_factor and shift_factor of the config are the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .blocks import Attention, ResnetBlock, conv3x3, group_norm, read_config, upsample
from .convolution import Conv

Array = jax.Array
EPSILON = 1e-6


class Middle(nn.Module):
    """A residual block, attention of one head over positions, a residual block."""

    groups: int
    attend: bool = True
    attention: str | None = None
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,h,w,C] -> [B,h,w,C]."""
        b, h, w, c = x.shape
        resnet = nn.remat(ResnetBlock) if self.remat else ResnetBlock
        attend = nn.remat(Attention) if self.remat else Attention
        x = resnet(c, self.groups, EPSILON, self.dtype, name="resnets.0")(x)
        if self.attend:
            y = group_norm("attentions.0.group_norm", self.groups, EPSILON)(x).astype(self.dtype).reshape(b, h * w, c)
            # one head of all channels (512): too wide for cuDNN's kernels
            how = "xla" if self.attention == "cudnn" else self.attention
            y = attend(1, bias=True, implementation=how, dtype=self.dtype, name="attentions.0")(y)
            x = x + y.reshape(b, h, w, c)
        return resnet(c, self.groups, EPSILON, self.dtype, name="resnets.1")(x)


class Encoder(nn.Module):
    """Pixels [B,H,W,3] to moments [B,h,w,2c], a quarter of the positions at every level but the last."""

    features: int
    channels: tuple[int, ...]
    layers: int
    groups: int
    attend: bool
    attention: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,3] -> [B,h,w,features]."""
        h = conv3x3("conv_in", self.channels[0], self.dtype)(x.astype(self.dtype))
        for i, width in enumerate(self.channels):
            for j in range(self.layers):
                h = ResnetBlock(width, self.groups, EPSILON, self.dtype, name=f"down_blocks.{i}.resnets.{j}")(h)
            if i < len(self.channels) - 1:
                # padded below and to the right only, unlike the UNet's
                name, padding = f"down_blocks.{i}.downsamplers.0.conv", ((0, 1), (0, 1))
                h = conv3x3(name, width, self.dtype, stride=2, padding=padding)(h)
        h = Middle(self.groups, self.attend, self.attention, self.dtype, name="mid_block")(h)
        h = nn.silu(group_norm("conv_norm_out", self.groups, EPSILON)(h)).astype(self.dtype)
        return conv3x3("conv_out", self.features, self.dtype)(h)


class Decoder(nn.Module):
    """Latents [B,h,w,c] to pixels, twice the height and width at every level but the last."""

    features: int
    channels: tuple[int, ...]
    layers: int
    groups: int
    attend: bool
    attention: str | None
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """[B,h,w,c] -> [B,H,W,features]."""
        resnet = nn.remat(ResnetBlock) if self.remat else ResnetBlock
        h = conv3x3("conv_in", self.channels[-1], self.dtype)(z.astype(self.dtype))
        h = Middle(self.groups, self.attend, self.attention, self.dtype, self.remat, name="mid_block")(h)
        for i, width in enumerate(reversed(self.channels)):
            for j in range(self.layers + 1):
                h = resnet(width, self.groups, EPSILON, self.dtype, name=f"up_blocks.{i}.resnets.{j}")(h)
            if i < len(self.channels) - 1:
                h = conv3x3(f"up_blocks.{i}.upsamplers.0.conv", width, self.dtype)(upsample(h))
        h = nn.silu(group_norm("conv_norm_out", self.groups, EPSILON)(h)).astype(self.dtype)
        return conv3x3("conv_out", self.features, self.dtype)(h)


class Autoencoder(nn.Module):
    """Variational autoencoder (arXiv 2112.10752). Fields as in config.json, and dtype, remat, attention as in `UNet`.

    remat is for the decoder only: gradients of rewards pass through it.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    dtype: Any = jnp.float32
    remat: bool = False
    attention: str | None = None

    def setup(self) -> None:
        shared = (self.block_out_channels, self.layers_per_block, self.norm_num_groups, self.mid_block_add_attention,
                  self.attention, self.dtype)  # fmt: skip
        self.encoder = Encoder(2 * self.latent_channels, *shared)
        self.decoder = Decoder(self.out_channels, *shared, self.remat)
        if self.use_quant_conv:
            self.quant_conv = Conv(2 * self.latent_channels, (1, 1), dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = Conv(self.latent_channels, (1, 1), dtype=self.dtype)

    def __call__(self, pixels: Array) -> Array:
        """Pixels [B,H,W,3] to the mean latents and back."""
        return self.decode(self.encode(pixels)[0])

    def encode(self, pixels: Array) -> tuple[Array, Array]:
        """Pixels [B,H,W,3] in [-1, 1] -> mean and log-variance (in [-30, 20]) of the latents [B,h,w,c], float32."""
        moments = self.encoder(pixels)
        if self.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, -1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z: Array) -> Array:
        """Latents [B,h,w,c] -> pixels [B,H,W,3], not clipped, float32."""
        if self.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z).astype(jnp.float32)


def autoencoder(
    config: Mapping[str, Any], *, dtype: Any = jnp.float32, remat: bool = False, attention: str | None = None
) -> Autoencoder:
    """The network of a diffusers vae/config.json. Raises ValueError for switches and values that are not supported."""
    fixed = {"act_fn": ("silu", "swish")}
    ignored = ("sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast",
               "down_block_types", "up_block_types")  # fmt: skip
    found = read_config(config, "AutoencoderKL", Autoencoder, fixed, ignored)
    net = Autoencoder(**found, dtype=dtype, remat=remat, attention=attention)
    levels = len(net.block_out_channels)
    for key, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if list(config.get(key, [block] * levels)) != [block] * levels:
            raise ValueError(f"AutoencoderKL: {key} is {config[key]!r}; supported: {block!r}, once for each of "
                             f"block_out_channels {net.block_out_channels}")  # fmt: skip
    return net


class TinyBlock(nn.Module):
    """Three 3x3 convolutions with ReLU between them, a residual, ReLU."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> [B,H,W,C]."""
        h = nn.relu(conv3x3("conv.0", x.shape[-1], self.dtype)(x))
        h = nn.relu(conv3x3("conv.2", x.shape[-1], self.dtype)(h))
        return nn.relu(x + conv3x3("conv.4", x.shape[-1], self.dtype)(h))


class TinyEncoder(nn.Module):
    """Pixels in [0, 1] to latents; layers are numbered as in one PyTorch sequence."""

    features: int
    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,3] -> [B,h,w,features]."""
        n = 0
        for i, (width, blocks) in enumerate(zip(self.channels, self.blocks)):
            x = Conv(width, (3, 3), strides=2 if i else 1, padding=1, use_bias=i == 0, dtype=self.dtype,
                        name=f"layers.{n}")(x)  # fmt: skip
            for j in range(blocks):
                x = TinyBlock(self.dtype, name=f"layers.{n + 1 + j}")(x)
            n += 1 + blocks
        return conv3x3(f"layers.{n}", self.features, self.dtype)(x)


class TinyDecoder(nn.Module):
    """Latents to pixels in [0, 1]; layers are numbered as in one PyTorch sequence, ReLU and upsampling counted."""

    features: int
    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """[B,h,w,c] -> [B,H,W,features]."""
        x, n = nn.relu(conv3x3("layers.0", self.channels[0], self.dtype)(z)), 2
        for i, (width, blocks) in enumerate(zip(self.channels, self.blocks)):
            for j in range(blocks):
                x = TinyBlock(self.dtype, name=f"layers.{n + j}")(x)
            n += blocks
            if i == len(self.channels) - 1:
                return conv3x3(f"layers.{n}", self.features, self.dtype)(x)
            x = Conv(width, (3, 3), padding=1, use_bias=False, dtype=self.dtype, name=f"layers.{n + 1}")(upsample(x))
            n += 2
        raise ValueError("decoder_block_out_channels is empty")


class TinyAutoencoder(nn.Module):
    """TAESD (github.com/madebyollin/taesd): a small distilled stand-in for `Autoencoder`; previews, cheap gradients.

    Fields as in config.json. Its latents are the *scaled* ones that the diffusion model sees; pixels are [-1, 1].
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    dtype: Any = jnp.float32

    def setup(self) -> None:
        down, up = self.encoder_block_out_channels, self.decoder_block_out_channels
        self.encoder = TinyEncoder(self.latent_channels, down, self.num_encoder_blocks, self.dtype)
        self.decoder = TinyDecoder(self.out_channels, up, self.num_decoder_blocks, self.dtype)

    def __call__(self, pixels: Array) -> Array:
        """Pixels [B,H,W,3] to latents and back."""
        return self.decode(self.encode(pixels))

    def encode(self, pixels: Array) -> Array:
        """Pixels [B,H,W,3] in [-1, 1] -> latents [B,h,w,c], float32."""
        return self.encoder(((pixels + 1) / 2).astype(self.dtype)).astype(jnp.float32)

    def decode(self, z: Array) -> Array:
        """Latents [B,h,w,c], drawn softly into [-3, 3] -> pixels [B,H,W,3], not clipped, float32."""
        z = 3 * jnp.tanh(z.astype(jnp.float32) / 3)
        return 2 * self.decoder(z.astype(self.dtype)).astype(jnp.float32) - 1


def tiny_autoencoder(config: Mapping[str, Any], *, dtype: Any = jnp.float32) -> TinyAutoencoder:
    """The network of an AutoencoderTiny's config.json. Raises ValueError for values that are not supported."""
    fixed = {"act_fn": ("relu",), "upsample_fn": ("nearest",), "upsampling_scaling_factor": (2,)}
    ignored = ("latent_magnitude", "latent_shift", "scaling_factor", "shift_factor", "force_upcast",
               "block_out_channels")  # fmt: skip
    found = read_config(config, "AutoencoderTiny", TinyAutoencoder, fixed, ignored)
    net = TinyAutoencoder(**found, dtype=dtype)
    for side in ("encoder", "decoder"):
        widths, blocks = getattr(net, f"{side}_block_out_channels"), getattr(net, f"num_{side}_blocks")
        if len(set(widths)) != 1 or len(widths) != len(blocks):
            raise ValueError(f"AutoencoderTiny: {side}_block_out_channels is {widths!r}; supported: one width, "
                             f"repeated once for each of num_{side}_blocks {blocks!r}")  # fmt: skip
    return net


def tiled_decode(decode: Callable[[Array], Array], z: Array, *, tile: int = 64, overlap: int = 16) -> Array:
    """decode(z [B,h,w,c]) in tiles of at most `tile` latents a side, one after the other, blended where they overlap.

    Tiles are spread evenly, overlap by `overlap` latents at least and fade linearly towards their borders. Memory is
    that of one tile, in the backward pass too. Normalisation and attention see one tile only: the picture is near to
    the whole one, not equal to it; where one tile suffices this is decode(z). Raises ValueError unless
    0 <= overlap < tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap {overlap} with tile {tile}; wanted 0 <= overlap < tile")
    b, h, w, c = z.shape
    if h <= tile and w <= tile:
        return decode(z)
    sides = min(tile, h), min(tile, w)
    out = jax.eval_shape(decode, jax.ShapeDtypeStruct((b, *sides, c), z.dtype))
    scale = out.shape[1] // sides[0]
    starts = jnp.asarray([(y, x) for y in _starts(h, sides[0], overlap) for x in _starts(w, sides[1], overlap)])
    window = jnp.asarray(_fade(sides[0] * scale, overlap * scale)[:, None] * _fade(sides[1] * scale, overlap * scale))

    @jax.checkpoint
    def add(sums: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
        y, x = start
        picture = decode(jax.lax.dynamic_slice(z, (0, y, x, 0), (b, *sides, c))) * window[..., None]
        corner = (0, y * scale, x * scale, 0)

        def put(total: Array, part: Array) -> Array:
            before = jax.lax.dynamic_slice(total, corner, part.shape)
            return jax.lax.dynamic_update_slice(total, before + part, corner)

        return (put(sums[0], picture), put(sums[1], window[None, :, :, None])), None

    size = h * scale, w * scale
    empty = jnp.zeros((b, *size, out.shape[-1]), out.dtype), jnp.zeros((1, *size, 1), jnp.float32)
    (total, weight), _ = jax.lax.scan(add, empty, starts)
    return total / weight


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side, evenly spread from 0 to size - tile."""
    count = 1 if size <= tile else 1 + math.ceil((size - tile) / (tile - overlap))
    return np.round(np.linspace(0, size - tile, count)).astype(int).tolist()


def _fade(size: int, width: int) -> np.ndarray:
    """1 in the middle, falling linearly over `width` entries at both ends, never to 0."""
    distance = np.arange(size) + 1
    return np.clip(np.minimum(distance, distance[::-1]) / (width + 1), 0, 1).astype(np.float32)
