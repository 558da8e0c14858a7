"""What training costs: the step of DRaFT-20 in units of the UNet, the time to the first update, the peak memory.

  python tests/benchmarks/training.py
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from alignment_jax.diffusion import normal
from alignment_jax.models import critters
from alignment_jax.training import loop
from alignment_jax.training.selfcheck import tiny_config

ROOT = Path(__file__).parents[2]


def seconds(program, repeats: int = 5) -> float:
    """Median seconds of a call, after one that compiles."""
    jax.block_until_ready(program())
    out = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(program())
        out.append(time.perf_counter() - began)
    return float(np.median(out))


def draft_20(batch: int = 16) -> None:
    """All of a DRaFT-20 step (rollout, reward, gradient, optimiser) against 20 forward and backward passes of the UNet."""
    config = tiny_config(sampling={"num_steps": 20, "eta": 0.0}, batch={"prompts": batch}, lora={"rank": 16})
    config.method = ConfigDict({"name": "draft", "k": 20})
    session, state = loop.set_up(config)
    batches = [next(session.run.source) for _ in range(4)]
    holder = [state]

    def step():
        holder[0], metrics = loop.one_step(session, holder[0], batches[0])
        return metrics["loss"]

    whole = seconds(step)
    bundle = critters()
    params = session.run.params
    cond = bundle.encode_text(params, jnp.asarray(batches[0]["tokens"]))
    x = normal(jax.random.split(jax.random.key(0), batch), (batch, *bundle.sample_shape))
    t = jnp.full(batch, 0.5)
    grad = jax.jit(jax.grad(lambda unet: bundle.denoise({**params, "unet": unet}, x, t, cond).sum()))
    one = seconds(partial(grad, params["unet"]))
    ratio = whole / (20 * one)
    print(f"DRaFT-20 step          {whole:6.2f} s = {ratio:.2f} x 20 forward and backward passes of {one:.3f} s (batch {batch})")


def first_update() -> None:
    """Seconds from the command to the first logged update, with a cold and with a warm compilation cache."""
    with tempfile.TemporaryDirectory() as folder:
        import os

        env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        for state in ("cold", "warm"):
            workdir = Path(folder) / state
            command = [sys.executable, "-m", "alignment_jax", "train", "--config=configs/critters.py:default", f"--workdir={workdir}",
                       "--config.evaluate_every=0"]  # fmt: skip
            began = time.perf_counter()
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            log = workdir / "metrics.jsonl"
            while not (log.exists() and log.read_text().count("\n")):
                time.sleep(0.05)
            print(f"first update, {state}     {time.perf_counter() - began:6.1f} s")
            time.sleep(3)
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def peak_memory() -> None:
    """Peak resident memory of the whole default run, evaluation included."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "alignment_jax", "train", "--config=configs/critters.py:default", f"--workdir={folder}/run"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wall = json.loads(Path(folder, "run", "summary.json").read_text())["wall_seconds"]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    parts = f"training {wall['train']:.0f}, evaluation {wall['evaluate']:.0f}"
    print(f"default run            {wall['total']:6.0f} s ({parts}), peak memory {peak:.2f} GB")


if __name__ == "__main__":
    draft_20()
    first_update()
    peak_memory()
