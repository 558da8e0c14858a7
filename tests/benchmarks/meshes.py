"""What a step of full-size Stable Diffusion 1.5 sends between eight devices, by mesh: compiled, on eight CPU devices that one host fakes.

  python tests/benchmarks/meshes.py [WORD ...]     only the rows in whose names every word occurs

Bytes are those of the whole arrays that collectives work on, counted in the HLO of XLA's least optimisation, which compiles in minutes
and merges no collectives; no time follows from fake devices.
"""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["JAX_PLATFORMS"], os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "cpu", "1"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
MESHES = {"data 8": {"data": 8}, "data 2, fsdp 4": {"data": 2, "fsdp": 4}, "fsdp 8": {"data": 1, "fsdp": 8},
          "fsdp 4, tensor 2": {"data": 1, "fsdp": 4, "tensor": 2}, "tensor 8": {"data": 1, "tensor": 8}}  # fmt: skip
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def main(words: list[str]) -> None:
    import full_size

    from alignment_jax.training import plan

    plans = runpy.run_path(str(ROOT / "launch" / "plans.py"))
    root = full_size.FOLDER
    full_size.write_all(root)
    print("| trained | mesh | parameters and optimiser GiB | temporaries GiB | " + " | ".join(f"{kind} GB" for kind in KINDS) + " |")
    print("| --- " * (4 + len(KINDS)) + "|", flush=True)
    for what in ("lora", "full"):
        for mesh, sizes in MESHES.items():
            if not all(word in f"{what} {mesh}" for word in words):
                continue
            config = plans["config"](f"sd15-dpo-{what}-512-v5e:2x4", root)
            config.sharding.update({"data": 1, "fsdp": 1, "tensor": 1} | sizes)
            config.batch.microbatch = sizes.get("data", 1) * sizes.get("fsdp", 1)
            found = plan.plan(config, kept=root / f"meshes-{what}-{mesh.replace(', ', '-').replace(' ', '')}.json")
            hbm, sent = found["hbm_per_chip_bytes"], {one["kind"]: one["bytes"] for one in found["collectives"]}
            stays = sum(hbm[k] for k in ("parameters", "optimizer", "ema", "copies"))
            print(f"| {what} | {mesh} | {stays / 2**30:.2f} | {hbm['temporaries'] / 2**30:.2f} | "
                  + " | ".join(f"{sent.get(kind, 0) / 1e9:.2f}" for kind in KINDS) + " |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
