"""The critters' UNet in torch eager with the shipped weights: a peer to measure against. Speaks through .npz files.

  python torch_unet.py WEIGHTS.safetensors INPUTS.npz OUTPUTS.npz {contiguous,channels_last}
INPUTS: x [B,H,W,C], states [B,L,D], mask [B,L], pooled [B,D], t, alpha, sigma [T + 1]. OUTPUTS: x0 [B,H,W,C], seconds [R].
"""

import os
import sys
import time

import numpy as np

os.sched_setaffinity(0, {0})
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

HEADS, PATCH, REPEATS = 4, 4, 5


def space_to_depth(x, n):
    """[B,C,H,W] -> [B,n n C,H/n,W/n], channels fastest."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // n, n, w // n, n).permute(0, 3, 5, 1, 2, 4).reshape(b, n * n * c, h // n, w // n)


def depth_to_space(x, n):
    """The inverse."""
    b, c, h, w = x.shape
    return x.reshape(b, n, n, c // (n * n), h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, c // (n * n), h * n, w * n)


class UNet:
    """PixelUNet of alignment_jax.models on a flat dictionary of weights, NCHW."""

    def __init__(self, weights, memory_format):
        self.w = {}
        for name, value in weights.items():
            name, tensor = name.replace(".", "/"), torch.from_numpy(value.astype(np.float32))
            if name.endswith("kernel"):
                tensor = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
            tensor = tensor.contiguous()
            self.w[name.removeprefix("unet/")] = tensor.to(memory_format=memory_format) if tensor.ndim == 4 else tensor

    def dense(self, x, name):
        return F.linear(x, self.w[f"{name}/kernel"], self.w[f"{name}/bias"])

    def pointwise(self, x, name):
        return F.conv2d(x, self.w[f"{name}/kernel"][:, :, None, None], self.w[f"{name}/bias"])

    def conv(self, x, name):
        return F.conv2d(x, self.w[f"{name}/kernel"], self.w[f"{name}/bias"], padding=1)

    def norm(self, x, name):
        return F.group_norm(x, 8, self.w[f"{name}/scale"], self.w[f"{name}/bias"], 1e-6)

    def block(self, name, x, e):
        h = self.conv(F.silu(self.norm(x, f"{name}/norm_in")), f"{name}/conv_in")
        scale, shift = self.dense(F.silu(e), f"{name}/film")[:, :, None, None].chunk(2, 1)
        h = self.conv(F.silu(self.norm(h, f"{name}/norm_out") * (1 + scale) + shift), f"{name}/conv_out")
        return (self.pointwise(x, f"{name}/skip") if f"{name}/skip/kernel" in self.w else x) + h

    def attend(self, name, x, text, mask):
        b, c, height, width = x.shape
        h = self.norm(x, f"{name}/norm").flatten(2).transpose(1, 2)
        heads = lambda y, n: y.reshape(b, y.shape[1], HEADS, -1).transpose(1, 2).chunk(n, -1)  # noqa: E731
        q, k, v = heads(self.dense(h, f"{name}/to_qkv"), 3)
        text_k, text_v = heads(self.dense(text, f"{name}/to_text_kv"), 2)
        keep = torch.cat([torch.ones(b, height * width, dtype=torch.bool), mask], 1)[:, None, None]
        out = F.scaled_dot_product_attention(q, torch.cat([k, text_k], 2), torch.cat([v, text_v], 2), attn_mask=keep)
        out = self.dense(out.transpose(1, 2).reshape(b, height * width, c), f"{name}/to_out")
        return x + out.transpose(1, 2).reshape(b, c, height, width)

    def __call__(self, x, t, text, mask, pooled):
        frequencies = torch.exp(-np.log(10_000.0) * torch.arange(64) / 64)
        angles = 1000.0 * t[:, None] * frequencies
        e = self.dense(F.silu(self.dense(torch.cat([angles.cos(), angles.sin()], 1), "time_in")), "time_out")
        e = e + self.dense(pooled, "pooled")
        h = self.conv(space_to_depth(x, PATCH), "conv_in") + self.w["position"].permute(2, 0, 1)
        h = skip = self.attend("down_attention", self.block("down_block", h, e), text, mask)
        h = self.pointwise(space_to_depth(h, 2), "down")
        for i in range(2):
            h = self.attend(f"middle_attention_{i}", self.block(f"middle_block_{i}", h, e), text, mask)
        h = depth_to_space(self.pointwise(self.block("middle_block_2", h, e), "up"), 2)
        h = self.attend("up_attention", self.block("up_block_0", torch.cat([h, skip], 1), e), text, mask)
        h = F.silu(self.norm(self.block("up_block_1", h, e), "norm_out"))
        return depth_to_space(self.conv(h, "conv_out"), PATCH)


@torch.inference_mode()
def sample(unet, x, text, mask, pooled, t, alpha, sigma):
    """Deterministic DDIM of the x0-prediction."""
    for i in range(len(t) - 1):
        x0 = unet(x, torch.full((len(x),), float(t[i])), text, mask, pooled)
        x = alpha[i + 1] * x0 + sigma[i + 1] * (x - alpha[i] * x0) / sigma[i]
    return x


if __name__ == "__main__":
    weights, inputs, outputs, layout = sys.argv[1:]
    torch.set_num_threads(1)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    unet, data = UNet(load_file(weights), memory_format), np.load(inputs)
    x = torch.from_numpy(data["x"]).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
    text, mask, pooled = (torch.from_numpy(data[k]) for k in ("states", "mask", "pooled"))
    times = [[float(v) for v in data[k]] for k in ("t", "alpha", "sigma")]
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        x0 = sample(unet, x, text, mask, pooled, *times)
        seconds.append(time.perf_counter() - began)
    np.savez(outputs, x0=x0.permute(0, 2, 3, 1).numpy(), seconds=seconds[1:])
