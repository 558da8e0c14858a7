"""Training beside peers: DDPO and AlignProp of TRL 0.23.1, Diffusion-DPO in torch. A process a side, one core, steps in turns.

  python tests/benchmarks/peers.py --torch_python=/path/to/an/environment/with/trl/bin/python
That environment: Python 3.11, pip install trl==0.23.1 torch diffusers==0.35.2 transformers==4.57.1 accelerate==1.10.1 peft.
Options: --only=ddpo,draft_1, --turns after the first step, which compiles, --core, --sides=ours,peer. Weights are random and the
same; the UNets' outputs and the number of trained parameters are compared before anything is measured.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from process import Worker, in_turns, serve  # noqa: E402

# Stable Diffusion 1's topology; latents of 32 x 32, pictures of 256 x 256
UNET = {"block_out_channels": [32, 64, 80, 96], "cross_attention_dim": 768, "attention_head_dim": 8, "norm_num_groups": 16,
        "sample_size": 32, "layers_per_block": 2, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}  # fmt: skip
VAE = {"block_out_channels": [8, 16, 16, 32], "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 256,
       "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}  # fmt: skip
TEXT = {"hidden_size": 768, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12, "projection_dim": 768}
GUIDED = {"guidance": 5.0, "prompt": "a red house", "lora": True, "channels_last": False}
DPO = {"job": "diffusion_dpo", "batch": 4, "beta": 5000.0, "guidance": 5.0, "prompt": "a red house", "lora": False, "steps": 50,
       "channels_last": False}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "ddpo": {"job": "ddpo", "steps": 10, "batch": 8, **GUIDED},
    "ddpo_full": {"job": "ddpo", "steps": 10, "batch": 8, **GUIDED, "lora": False},
    "draft_1": {"job": "draft", "steps": 50, "batch": 2, "k": 1, **GUIDED},
    "draft_10": {"job": "draft", "steps": 50, "batch": 2, "k": 10, **GUIDED},
    "draft_50": {"job": "draft", "steps": 50, "batch": 2, "k": 50, "remat": True, **GUIDED},
    "draft_1_full": {"job": "draft", "steps": 50, "batch": 2, "k": 1, **GUIDED, "lora": False},
    "draft_10_full": {"job": "draft", "steps": 50, "batch": 2, "k": 10, **GUIDED, "lora": False},
    "diffusion_dpo": DPO,
}


def write_folder(folder: Path) -> None:
    """A small Stable Diffusion of random weights, and pairs.npz beside it."""
    import jax
    from flax.traverse_util import flatten_dict
    from parity.common import random_weights
    from safetensors.numpy import save_file
    from tiny_sd import write

    from alignment_jax.models.stable_diffusion import COMPONENTS, stable_diffusion
    from alignment_jax.weights.torch_names import torch_name, torch_shape

    write("sd15", folder)
    for name, changes in (("unet", UNET), ("vae", VAE), ("text_encoder", TEXT)):
        file = folder / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    for name, tree in jax.eval_shape(stable_diffusion(folder).init, jax.random.key(0)).items():
        wanted = {torch_name(k): torch_shape(k, v.shape) for k, v in flatten_dict(tree, sep="/").items()}
        save_file(random_weights(wanted), folder / name / f"{COMPONENTS[name]}.safetensors", metadata={"format": "pt"})
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 16, 256, 256, 3)).astype(np.uint8)
    np.savez(folder / "pairs.npz", winner=pictures[0], loser=pictures[1], prompts=np.array(["a red house"] * 16))


def probe(bundle: Any, params: Any) -> list[float]:
    """What the UNet makes of one fixed input: both sides must agree."""
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    x, states = (rng.standard_normal(s).astype(np.float32) for s in ((1, 32, 32, 4), (1, 77, 768)))
    y = bundle.denoise(params, jnp.asarray(x), jnp.full(1, 500.0), {"states": jnp.asarray(states)})
    return np.ravel(y)[:16].tolist()


def ours(folder: Path, job: dict[str, Any]) -> Any:
    """(step, what to say) of the same job, through the training loop."""
    import jax
    from ml_collections import ConfigDict

    from alignment_jax.training import loop

    method: dict[str, Any] = {"name": job["job"]} | {k: job[k] for k in ("k", "remat", "beta") if k in job}
    prompts = folder / "prompts.txt"
    prompts.write_text(job["prompt"] + "\n")
    config = ConfigDict({
        "name": "peers", "seed": 0, "steps": 100, "model": str(folder), "weights": "shipped",
        "model_options": {"remat": False}, "method": method, "trainable": "^unet/",
        "optimizer": {"learning_rate": 3e-4 if job["lora"] else 1e-6, "weight_decay": 1e-4},
        "batch": {"prompts": job["batch"], "group": 1, "microbatch": job["batch"]},
        "sampling": {"scheduler": "ddim", "num_steps": job["steps"], "eta": 1.0, "guidance_scale": job["guidance"]},
        "lora": {"rank": 4, "targets": "ddpo-pytorch"} if job["lora"] else {},
        "data": {"pairs": job["pairs"]} if job["job"] == "diffusion_dpo" else {"prompts": str(prompts)},
        **({} if job["job"] == "diffusion_dpo" else {"reward": "own_reward:warmth"}),
    })  # fmt: skip
    session, state = loop.set_up(config)
    spent: list[float] = []

    def timed(program: Any) -> Any:
        def call(*arguments: Any) -> Any:
            began = time.process_time()
            out = jax.block_until_ready(program(*arguments))
            spent.append(time.process_time() - began)
            return out

        return call

    if job["job"] == "ddpo":
        old = session.programs
        session = session._replace(programs=old._replace(encode=timed(old.encode), rollout=timed(old.rollout), score=timed(old.score)))
    holder = [state]
    del state
    seen = probe(session.run.parts.bundle, session.run.params)

    def step() -> dict[str, float]:
        spent.clear()
        batch = next(session.run.source)
        began = time.process_time()
        holder[0], metrics = loop.one_step(session, holder[0], batch)
        loss = float(metrics["loss"])
        jax.block_until_ready(holder[0])
        whole = time.process_time() - began
        return {"sample": sum(spent), "train": whole - sum(spent)} if spent else {"step": whole, "loss": loss}

    trained = sum(v.size for v in jax.tree.leaves(holder[0].trained))
    return step, {"trained": trained, "probe": seen, "versions": [f"jax {jax.__version__}"]}


def measure(name: str, job: dict[str, Any], folder: Path, options: argparse.Namespace) -> None:
    """Prints a line a side, and what the better of both is better by."""
    if job["job"] == "diffusion_dpo":
        job = {**job, "pairs": str(folder / "pairs.npz")}
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    text = json.dumps(job)
    commands = {
        "ours": [sys.executable, HERE / "peers.py", "--side", folder, text, f"--core={options.core}"],
        "peer": [options.torch_python, HERE / "torch_peers.py", options.core, folder, text],
    }
    sides = {side: Worker(commands[side], env, folder / f"{side}.log") for side in options.sides.split(",")}
    said = [worker.said for worker in sides.values()]
    if len(said) == 2:
        assert said[0]["trained"] == said[1]["trained"], f"{name}: {said[0]['trained']} and {said[1]['trained']} parameters are trained"
    steps = in_turns(name, sides, options.turns)
    rates: dict[tuple[str, str], float] = {}
    for side, worker in sides.items():
        first, later = steps[side][0], steps[side][1:]
        parts = [k for k in first if k in ("sample", "train", "step")]
        shown = []
        for part in parts:
            seconds = [s[part] for s in later]
            rates[side, part] = job["batch"] / float(np.median(seconds))
            shown.append(f"{part} {np.median(seconds):.2f} s ({min(seconds):.2f}..{max(seconds):.2f}), {rates[side, part]:.3f} a second, "
                         f"the first {first[part]:.1f}")  # fmt: skip
        peak = max(s["peak_mb"] for s in later)
        rates[side, "memory"] = 1 / peak
        rates[side, "memory beyond start"] = 1 / max(peak - worker.said["start_mb"], 1.0)
        print(f"{name} {side}: {'; '.join(shown)}; MB: {worker.said['start_mb']:.0f} at the start, {peak:.0f} at most, "
              f"{first['peak_mb']:.0f} in the first step; start {worker.said['start_cpu']:.1f} s; "
              f"{worker.said['trained']} trained ({', '.join(worker.said['versions'])})", flush=True)  # fmt: skip
    if len(sides) == 2:
        ratios = {part: rates["ours", part] / rates["peer", part] for side, part in rates if side == "ours"}
        print(f"{name} ratios: " + ", ".join(f"{part} {ratio:.2f}" for part, ratio in ratios.items()), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--torch_python", default=os.environ.get("PEERS_PYTHON", ""))
    parser.add_argument("--only", default="", help="names of cases, with commas between them")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--sides", default="ours,peer")
    parser.add_argument("--change", default="{}", help="JSON that replaces settings of the cases, such as {'steps': 2}")
    parser.add_argument("--side", nargs=2, metavar=("FOLDER", "JOB"))
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.core})
    if options.side:
        serve(lambda: ours(Path(options.side[0]), json.loads(options.side[1])))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            write_folder(Path(temporary) / "model")
            for case in options.only.split(",") if options.only else CASES:
                measure(case, {**CASES[case], **json.loads(options.change)}, Path(temporary) / "model", options)
