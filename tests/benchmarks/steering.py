"""Steering beside plain torch: Feynman-Kac steering, DAS and ReNO on the UNet of 6.2 M. A process a side, one core, steps in turns.

  python tests/benchmarks/steering.py --torch_python=/path/to/an/environment/with/diffusers/bin/python
Options: --only=fk,das, --turns after the first, which compiles, --core. Both sides draw one sample with the same calls of the
same networks; their UNets' outputs are compared before anything is measured. Then what the bookkeeping of 50 steps takes:
weights, tempering and resampling of the particles, without networks and rewards. And what the gradient of a sample by its first
noise keeps (ReNO, DNO), by the number of steps, with and without rematerialisation: the compiled program's temporaries.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from peers import probe, write_folder  # noqa: E402
from process import Worker, in_turns, seconds, serve  # noqa: E402

COMMON = {"guidance": 5.0, "prompt": "a red house", "alpha": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "fk": {"job": "fk", "steps": 20, "particles": 4, "eta": 1.0, "settings": {"window": (0.0, 1.0), "every": 1, "tempering": "none"}},
    "das": {"job": "das", "steps": 20, "particles": 4, "eta": 1.0, "settings": {"tempering": "exp", "ess": 1.0, "resampler": "systematic"}},
    "reno": {"job": "reno", "steps": 4, "iterations": 5, "eta": 0.0, "settings": {"iterations": 5}},
}


def ours(folder: Path, job: dict[str, Any]) -> Any:
    """(step, what to say): one sample by `sample --method`'s own parts."""
    import jax
    import jax.numpy as jnp
    import own_reward
    from ml_collections import ConfigDict

    from alignment_jax.diffusion import guided
    from alignment_jax.training import build, steering

    bundle, params = build.model(ConfigDict({"model": str(folder), "weights": "shipped", "seed": 0}))
    sampling = {"scheduler": "ddim", "num_steps": job["steps"], "eta": job["eta"], "guidance_scale": job["guidance"]}
    sampler, guidance = build.sampler(ConfigDict({"sampling": sampling}), bundle)
    reward = own_reward.warmth()
    settings = job["settings"] | {k: job[k] for k in ("particles",) if k in job} | ({"alpha": job["alpha"]} if job["job"] != "reno" else {})
    method = steering.method(job["job"], settings, bundle, sampler, guidance, reward)
    tokens, null_tokens = bundle.tokenize([job["prompt"]]), bundle.tokenize([""])

    @jax.jit
    def draw(params: Any, keys: Any) -> Any:
        cond, null = (bundle.encode_text(params, jnp.asarray(t)) for t in (tokens, null_tokens))
        policy = guided(partial(bundle.denoise, params), null, guidance.scale)
        found = steering.networks(bundle, params, policy, null, guidance, reward, reward.params)
        x0, info = method.draw(keys, found, {"cond": cond, "condition": {}, "null": null})
        return bundle.decode(params, x0), info

    seen = probe(bundle, params)
    seed = iter(range(1000))

    def step() -> dict[str, float]:
        began = time.process_time()
        _, info = jax.block_until_ready(draw(params, jax.random.split(jax.random.key(next(seed)), 1)))
        return {"step": time.process_time() - began, "reward": float(info["reward"][0])}

    return step, {"probe": seen, "versions": [f"jax {jax.__version__}"]}


def bookkeeping(particles: int, steps: int) -> float:
    """Seconds of the weights, adaptive tempering and resampling of `steps` steps, on states as the UNet's."""
    import jax
    import jax.numpy as jnp

    from alignment_jax.test_time import resampling

    temper = resampling.tempering("adaptive", steps, steps)

    @jax.jit
    def run(keys: Any, x: Any, rewards: Any) -> Any:
        def step(state: Any, i: Any) -> Any:
            x, weights = state
            weights, _ = resampling.reweigh(weights, i, rewards[i] + 1e-3 * x.mean(), temper)
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
            log_w, (x, output, log_g) = resampling.resample(own, weights.log_w, (x, x + 1, weights.log_g.reshape(-1)),
                                                            resampling.systematic, 1.0)  # fmt: skip
            return (x + 1e-6 * output, weights._replace(log_w=log_w, log_g=log_g.reshape(1, -1))), None

        return jax.lax.scan(step, (x, resampling.equal(1, particles)), jnp.arange(steps))[0]

    keys, x = jax.random.split(jax.random.key(0), 1), jnp.ones((particles, 32, 32, 4))
    rewards = jax.random.normal(jax.random.key(1), (steps, 1, particles))
    return float(np.median(seconds(lambda: jax.block_until_ready(run(keys, x, rewards)), 5)))


def memory(folder: Path) -> None:
    """Prints MB of temporaries of the gradient through 5 to 40 unguided steps on one latent."""
    import jax
    import jax.numpy as jnp
    from ml_collections import ConfigDict

    from alignment_jax.test_time.base import walk
    from alignment_jax.training import build

    bundle, params = build.model(ConfigDict({"model": str(folder), "weights": "shipped", "seed": 0}))
    cond = bundle.encode_text(params, jnp.asarray(bundle.tokenize(["a red house"])))
    keys, x = jax.random.split(jax.random.key(0), 1), jnp.ones((1, 32, 32, 4))
    for remat in (False, True):
        found = []
        for steps in (5, 10, 20, 40):
            sampler, _ = build.sampler(ConfigDict({"sampling": {"scheduler": "ddim", "num_steps": steps}}), bundle)
            end = lambda x, p, s=sampler, r=remat: walk(keys, partial(bundle.denoise, p), cond, s, x, remat=r).sum()  # noqa: E731
            found.append(jax.jit(jax.grad(end)).lower(x, params).compile().memory_analysis().temp_size_in_bytes / 1e6)
        print(f"gradient through 5, 10, 20, 40 steps, {'rematerialised' if remat else 'kept'}: "
              f"{', '.join(f'{mb:.0f}' for mb in found)} MB", flush=True)  # fmt: skip


def measure(name: str, job: dict[str, Any], folder: Path, options: argparse.Namespace) -> float:
    """Prints a line a side and their ratio; returns our seconds a sample."""
    env, text = {**os.environ, "OMP_NUM_THREADS": "1"}, json.dumps(job)
    commands = {"ours": [sys.executable, HERE / "steering.py", "--side", folder, text, f"--core={options.core}"],
                "torch": [options.torch_python, HERE / "torch_steering.py", options.core, folder, text]}  # fmt: skip
    sides = {side: Worker(command, env, folder / f"{side}.log") for side, command in commands.items()}
    steps = in_turns(name, sides, options.turns)
    median = {}
    for side, worker in sides.items():
        first, later = steps[side][0], [s["step"] for s in steps[side][1:]]
        rewards = ", ".join(f"{s['reward']:.3f}" for s in steps[side])
        median[side] = float(np.median(later))
        peak = max(s["peak_mb"] for s in steps[side][1:])
        print(f"{name} {side}: {median[side]:.2f} s a sample ({min(later):.2f}..{max(later):.2f}), the first {first['step']:.1f}; "
              f"MB {worker.said['start_mb']:.0f} at the start, {peak:.0f} at most; rewards {rewards} "
              f"({', '.join(worker.said['versions'])})", flush=True)  # fmt: skip
    print(f"{name} ratio {median['torch'] / median['ours']:.2f}", flush=True)
    return median["ours"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--torch_python", default=os.environ.get("PEERS_PYTHON", ""))
    parser.add_argument("--only", default="", help="names of cases, with commas between them")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--side", nargs=2, metavar=("FOLDER", "JOB"))
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.core})
    if options.side:
        serve(lambda: ours(Path(options.side[0]), json.loads(options.side[1])))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            write_folder(Path(temporary) / "model")
            taken = {case: measure(case, {**COMMON, **CASES[case]}, Path(temporary) / "model", options)
                     for case in (options.only.split(",") if options.only else CASES)}  # fmt: skip
            memory(Path(temporary) / "model")
        if "fk" in taken:
            whole, own = taken["fk"] * 50 / CASES["fk"]["steps"], bookkeeping(CASES["fk"]["particles"], 50)
            print(f"bookkeeping of 50 steps: {1000 * own:.1f} ms, {100 * own / whole:.2f} % of about {whole:.1f} s")
