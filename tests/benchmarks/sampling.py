"""Pictures a second of the critters model, beside the same UNet in torch eager; one pinned core each, in turns.

  python tests/benchmarks/sampling.py --torch_python=/path/to/an/environment/with/torch/bin/python
"""

import os

os.sched_setaffinity(0, {0})

import argparse  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402

from alignment_jax import weights  # noqa: E402
from alignment_jax.data.critters import prompts  # noqa: E402
from alignment_jax.diffusion import Sampler, normal, sample, sampling_grid  # noqa: E402
from alignment_jax.models import ASSETS, critters  # noqa: E402

BATCHES, STEPS, REPEATS, TURNS = (1, 8, 64), 8, 5, 3

parser = argparse.ArgumentParser()
parser.add_argument("--torch_python", required=True)
python = parser.parse_args().torch_python

bundle = critters()
params = weights.load(ASSETS / "base.safetensors", jax.eval_shape(bundle.init, jax.random.key(0)))
sampler = Sampler(bundle.schedule, sampling_grid(bundle.schedule, STEPS, "uniform"), bundle.prediction)
program = jax.jit(lambda params, keys, cond, x: sample(keys, partial(bundle.denoise, params), cond, sampler, x)[0])


def compare(batch: int, folder: Path) -> None:
    """Prints pictures a second of both, medians over the turns."""
    inputs, outputs = folder / "in.npz", folder / "out.npz"
    cond = bundle.encode_text(params, bundle.tokenize(prompts("held_out", batch, 0)))
    keys = jax.random.split(jax.random.key(0), batch)
    x_T = normal(keys, (batch, *bundle.sample_shape))
    x0 = np.asarray(program(params, keys, cond, x_T))
    np.savez(inputs, x=x_T, **cond, **{k: np.asarray(getattr(sampler.grid, k)) for k in ("t", "alpha", "sigma")})
    seconds: dict[str, list[float]] = {"alignment_jax": [], "torch contiguous": [], "torch channels_last": []}
    for _ in range(TURNS):
        for _ in range(REPEATS):
            began = time.perf_counter()
            program(params, keys, cond, x_T).block_until_ready()
            seconds["alignment_jax"].append(time.perf_counter() - began)
        for layout in ("contiguous", "channels_last"):
            script = Path(__file__).with_name("torch_unet.py")
            subprocess.run([python, script, ASSETS / "base.safetensors", inputs, outputs, layout], check=True)
            done = np.load(outputs)
            assert np.abs(done["x0"] - x0).max() < 2e-3, "the two networks disagree"
            seconds[f"torch {layout}"] += done["seconds"].tolist()
    rate = {name: batch / np.median(values) for name, values in seconds.items()}
    best = max(v for k, v in rate.items() if k.startswith("torch"))
    shown = ", ".join(f"{name} {value:.1f}" for name, value in rate.items())
    print(f"batch {batch:3}, {STEPS} steps, pictures/s: {shown}; ratio {rate['alignment_jax'] / best:.2f}  (jax {jax.__version__})")


with tempfile.TemporaryDirectory() as temporary:
    for size in BATCHES:
        compare(size, Path(temporary))
