"""Stable Diffusion's networks beside the same in torch eager, by CPU-seconds on one pinned core each, in turns.

  python tests/benchmarks/stable_diffusion.py --torch_python=/path/to/an/environment/with/diffusers/bin/python
Options: --steps of guided DDIM, --only=unet_6m,vae_small, --turns, --core; weights are random, outputs are compared.
"""

import argparse
import os

parser = argparse.ArgumentParser()
parser.add_argument("--torch_python", required=True)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--only", default="", help="names of cases, with commas between them")
parser.add_argument("--turns", type=int, default=3)
parser.add_argument("--core", type=int, default=0)
options = parser.parse_args()
os.sched_setaffinity(0, {options.core})

import json  # noqa: E402
import platform  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
from parity.common import random_weights  # noqa: E402

from alignment_jax.diffusion import guided, sample, scaled_linear, scheduler  # noqa: E402
from alignment_jax.models.autoencoder import autoencoder  # noqa: E402
from alignment_jax.models.clip import CLIPVision, VisionTower  # noqa: E402
from alignment_jax.models.unet import unet  # noqa: E402
from alignment_jax.weights import torch_names  # noqa: E402

BATCH, SCALE = 8, 7.5


def unet_config(*channels: int) -> dict:
    """Stable Diffusion 1's topology, narrower."""
    return {"block_out_channels": channels, "cross_attention_dim": 768, "attention_head_dim": 8, "norm_num_groups": 32}


def vae_config(*channels: int) -> dict:
    levels = len(channels)
    return {"block_out_channels": channels, "layers_per_block": 2, "norm_num_groups": 32, "latent_channels": 4,
            "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}  # fmt: skip


CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
        "patch_size": 32, "hidden_act": "quick_gelu"}  # fmt: skip
CASES = {  # name: (what, config, side of the latents or pictures)
    "unet_6m": ("unet", {**unet_config(32, 64, 80, 96), "norm_num_groups": 16}, 32),
    "unet_60m": ("unet", unet_config(96, 160, 320, 320), 32),
    "vae_small": ("vae", vae_config(32, 64, 128, 128), 32),
    "vae_full": ("vae", vae_config(128, 256, 512, 512), 32),
    "clip_b32": ("clip", {**CLIP, "projection_dim": 512}, 224),
}


def peer(what: str, config: dict, side: int) -> tuple:
    """(inputs for both, the network's shapes, program(params, inputs) -> y)."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    if what == "unet":
        net = unet(config)
        inputs = {"x": normal(BATCH, side, side, 4), "states": normal(BATCH, 77, 768), "null": normal(BATCH, 77, 768),
                  "steps": options.steps, "scale": SCALE}  # fmt: skip
        sampler = scheduler("ddim", scaled_linear(), options.steps, steps_offset=1, set_alpha_to_one=False)

        def program(params, inputs):
            denoise = guided(partial(_apply, net, params), inputs["null"], SCALE)
            return sample(jax.random.key(0), denoise, inputs["states"], sampler, inputs["x"])[0]

        shapes = jax.eval_shape(net.init, jax.random.key(0), inputs["x"], jnp.zeros(BATCH), inputs["states"])
    elif what == "vae":
        net, inputs = autoencoder(config), {"z": normal(BATCH, side, side, 4)}
        program = lambda params, inputs: net.apply({"params": params}, inputs["z"], method="decode")
        shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8 * side, 8 * side, 3)))
    else:
        tower = {k: v for k, v in config.items() if k != "projection_dim"}
        net, inputs = CLIPVision(VisionTower(**tower), config["projection_dim"]), {"pixels": normal(2 * BATCH, side, side, 3)}
        program = lambda params, inputs: net.apply({"params": params}, inputs["pixels"])["projected"]
        shapes = jax.eval_shape(net.init, jax.random.key(0), inputs["pixels"])
    return inputs, shapes["params"], jax.jit(program)


def _apply(net, params, x, t, states):
    return net.apply({"params": params}, x, t, states)


def compare(name: str, folder: Path) -> None:
    """Prints CPU-seconds of both, medians over the turns."""
    what, config, side = CASES[name]
    inputs, shapes, program = peer(what, config, side)
    flat = {n: (p, v.shape) for (n, p), v in zip(torch_names.names(shapes).items(), jax.tree.leaves(shapes), strict=True)}
    values = random_weights({n: torch_names.torch_shape(p, shape) for n, (p, shape) in flat.items()})
    params = jax.device_put(torch_names.import_torch(values, shapes))
    size = sum(v.size for v in values.values())
    np.savez(folder / "in.npz", what=what, config=json.dumps(config), **inputs)
    inputs = {k: jnp.asarray(v) for k, v in inputs.items() if not isinstance(v, int | float)}
    y = np.asarray(program(params, inputs))
    seconds: dict[str, list[float]] = {"alignment_jax": [], "torch contiguous": [], "torch channels_last": []}
    for _ in range(options.turns):
        began = time.process_time()
        program(params, inputs).block_until_ready()
        seconds["alignment_jax"].append(time.process_time() - began)
        for layout in ("contiguous", "channels_last"):
            script = Path(__file__).with_name("torch_stable_diffusion.py")
            command = [options.torch_python, script, str(options.core), folder / "in.npz", folder / "out.npz", layout, "1"]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            done = np.load(folder / "out.npz")
            error = np.abs(done["y"] - y).max() / np.abs(y).max()
            assert error < 1e-3, f"{name}: the two networks disagree by {error:.1e} of the largest value"
            seconds[f"torch {layout}"] += done["seconds"].tolist()
    median = {side: float(np.median(v)) for side, v in seconds.items()}
    best = min(v for k, v in median.items() if k.startswith("torch"))
    shown = ", ".join(f"{side} {value:.2f}" for side, value in median.items())
    steps = f", {options.steps} steps" if what == "unet" else ""
    ratio = [min(a, b) / c for a, b, c in zip(seconds["torch contiguous"], seconds["torch channels_last"], seconds["alignment_jax"])]
    print(f"{name} ({size / 1e6:.1f} M{steps}), CPU-seconds: {shown}; ratio {best / median['alignment_jax']:.2f} "
          f"({min(ratio):.2f}..{max(ratio):.2f}), error {error:.0e}  ({machine()}, jax {jax.__version__}, "
          f"{', '.join(done['versions'])})", flush=True)  # fmt: skip


def machine() -> str:
    """The processor's name."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} x{os.cpu_count()}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for case in options.only.split(",") if options.only else CASES:
            compare(case, Path(temporary))
