"""What loading costs: peak host memory and seconds for a folder of Stable Diffusion 1.5's size, half precision on disk.

  python tests/benchmarks/loading.py            writes about 2 GB into a temporary folder and removes it
"""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
SIZES = {  # what a toy folder becomes Stable Diffusion 1.5 by
    "unet": {"sample_size": 64, "layers_per_block": 2, "block_out_channels": [320, 640, 1280, 1280], "norm_num_groups": 32,
             "cross_attention_dim": 768, "attention_head_dim": 8,
             "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
             "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3},
    "vae": {"sample_size": 512, "layers_per_block": 2, "block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32,
            "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
    "text_encoder": {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                     "num_attention_heads": 12},
}  # fmt: skip
KEPT = ("float16", "bfloat16", "float32")


def write(folder: Path) -> int:
    """A folder of random weights in float16; the bytes of its weights."""
    import jax
    import tiny_sd
    from flax.traverse_util import flatten_dict
    from safetensors.numpy import save_file

    from alignment_jax.models.stable_diffusion import COMPONENTS, stable_diffusion
    from alignment_jax.weights.torch_names import torch_name, torch_shape

    for name, value in tiny_sd.configs("sd15").items():
        value = value | SIZES.get(name.split("/")[0], {}) if name.endswith("/config.json") else value
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *tiny_sd.fixture("scores")["merges"].tolist()]))
    rng, size = np.random.default_rng(0), 0
    for name, tree in jax.eval_shape(stable_diffusion(folder).init, jax.random.key(0)).items():
        tensors = {torch_name(k): rng.standard_normal(torch_shape(k, v.shape), np.float32).astype(np.float16)
                   for k, v in flatten_dict(tree, sep="/").items()}  # fmt: skip
        save_file(tensors, folder / name / f"{COMPONENTS[name]}.safetensors", metadata={"format": "pt"})
        size += sum(v.nbytes for v in tensors.values())
    return size


def anonymous() -> int:
    """Bytes of this process that are no pages of files."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def load(folder: str, dtype: str) -> None:
    """Loads and prints JSON: peak bytes beyond those before it, bytes of the result, seconds."""
    import jax
    import ml_collections

    from alignment_jax.training import build

    config = ml_collections.ConfigDict({"model": folder, "weights": "shipped", "seed": 0, "model_options": {"param_dtype": dtype}})
    jax.block_until_ready(jax.numpy.zeros(1))
    before, seen, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    _, params = build.model(config)
    jax.block_until_ready(params)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    done.set()
    watcher.join()
    leaves = jax.tree.leaves(params)
    assert {str(v.dtype) for v in leaves} == {dtype}
    print(json.dumps({"peak": max(seen) - before, "after": anonymous() - before, "result": sum(v.nbytes for v in leaves),
                      "wall": wall, "cpu": cpu, "maxrss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))  # fmt: skip


def main() -> None:
    """Prints a line for each type that parameters are kept in."""
    import jax

    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    machine = f"{names[0] if names else platform.processor()} x{os.cpu_count()}, jax {jax.__version__}"
    with tempfile.TemporaryDirectory() as temporary:
        size = write(Path(temporary))
        for dtype in KEPT:
            command = [sys.executable, __file__, temporary, dtype]
            out = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
            gb = {k: v / 1e9 for k, v in out.items()}
            print(f"float16 file of {size / 1e9:.2f} GB kept in {dtype}: result {gb['result']:.2f} GB, peak anonymous memory "
                  f"{gb['peak']:.2f} GB = {out['peak'] / out['result']:.2f} x the result = {out['peak'] / size:.2f} x the file; "
                  f"peak resident, the file's pages among it, {gb['maxrss']:.2f} GB; {out['wall']:.1f} s, {out['cpu']:.1f} "
                  f"CPU-seconds  ({machine})", flush=True)  # fmt: skip


if __name__ == "__main__":
    load(*sys.argv[1:]) if len(sys.argv) == 3 else main()
