"""Writes docs/plans.md: what one step of full-size Stable Diffusion needs on TPUs, compiled ahead of time without one.

  PYTHONPATH=FOLDER_OF_LIBTPU python launch/plans.py [WORD ...]     only the plans in whose names every word occurs; none: all
  python launch/plans.py --table                                    only the table, of the plans that are there

Each plan is kept as docs/plans/NAME.json: stopped, the same command goes on, program by program. A plan takes minutes to hours.
"""

import json
import os
import runpy
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLANS = ROOT / "docs" / "plans"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu only compiles here
TOPOLOGIES = ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5p:2x2x1", "v6e:2x2")
METHODS = ("ddpo", "draft1", "draft10", "dpo")
SIZES = {"sd15": (512,), "sdxl": (512, 1024)}
LORA = {"rank": 8, "targets": "diffusers", "file": ""}


def names() -> list[str]:
    """MODEL-METHOD-WHAT-SIDE-TOPOLOGY of every plan."""
    return [f"{model}-{method}-{what}-{side}-{topology}" for model, sides in SIZES.items() for side in sides
            for method in METHODS for what in ("lora", "full") for topology in TOPOLOGIES]  # fmt: skip


def config(name: str, root: Path):
    """The config of a plan: that of configs/ for the method, one sample a chip at a time, fsdp over all chips where all is trained."""
    import full_size

    from alignment_jax.training import plan

    model, method, what, side, topology = name.split("-")
    argument = {"ddpo": "ddpo_aesthetic", "dpo": "diffusion_dpo"}.get(method, "draft_aesthetic" if model == "sd15" else "draft_pickscore")
    c = runpy.run_path(str(ROOT / "configs" / f"{model}.py"))["get_config"](argument)
    full_size.point(c, root).model = str(root / model)
    c.model_options.update(height=int(side), width=int(side), remat=True, param_dtype="bfloat16" if what == "lora" else "float32")
    c.lora = LORA if what == "lora" else {}
    if method == "draft10":
        c.method.k = 10
    chips = plan.chips(topology)
    c.batch.update(prompts=64 if method == "ddpo" else max(chips, 16), group=1, microbatch=chips)
    if what == "full":
        c.sharding.update(data=1, fsdp=chips)
    return c


def table() -> str:
    """docs/plans.md of the plans that are there."""
    rows = [__doc__.splitlines()[0].replace("Writes docs/plans.md: w", "# W"), "",
            "Made by `launch/plans.py`; `python -m alignment_jax plan` makes one of your own config. Where all of the UNet is trained, "
            "parameters are in float32 and cut over all chips (fsdp), else in bfloat16 and whole on every chip. Networks compute in "
            "bfloat16 with `remat`, one sample a chip at a time. GiB are those of one chip, as are FLOP and bytes. What stays: parameters, "
            "reward models, optimiser, averages, code; held: what of the step waits meanwhile. The roofline is what a "
            "step takes at least by the chips' published figures (docs.cloud.google.com/tpu/docs); nothing here was run on a TPU. Empty: "
            "a program does not compile because it does not fit.", "",
            "| model | method | trained | side | topology | fits | total GiB | of | stays | temporaries | held | TFLOP a step | TB | "
            "collectives GB | roofline s | samples | compiled in s |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    shown = lambda value, scale=1.0: "" if value is None else f"{value / scale:.3g}"
    for name in names():
        path = PLANS / f"{name.replace(':', '_')}.json"
        if not path.exists():
            continue
        p = json.loads(path.read_text())
        hbm, (model, method, what, side, topology) = p["hbm_per_chip_bytes"], name.split("-")
        stay = sum(hbm[k] for k in ("parameters", "reward", "optimizer", "ema", "copies", "other", "code"))
        rows.append("| " + " | ".join([
            model, method, what, side, topology, "yes" if p["fits"] else "no", shown(hbm["total"], 2**30), shown(hbm["limit"], 2**30),
            shown(stay, 2**30), shown(hbm["temporaries"], 2**30), shown(hbm["held"], 2**30), shown(p["flops_per_chip"], 1e12),
            shown(p["bytes_accessed_per_chip"], 1e12), shown(sum(one["bytes"] for one in p["collectives"]), 1e9),
            shown(p["roofline_seconds"]), str(p["effective_batch"]["samples"]),
            f"{sum(one['seconds'] for one in p['programs'].values()):.0f}"]) + " |")  # fmt: skip
    return "\n".join(rows) + "\n"


def main(words: list[str]) -> None:
    from alignment_jax.training import plan

    PLANS.mkdir(parents=True, exist_ok=True)
    if "--table" not in words:
        import full_size

        root = full_size.FOLDER
        full_size.write_all(root)
        for name in names():
            path = PLANS / f"{name.replace(':', '_')}.json"
            if path.exists() or not all(word in name for word in words):
                continue
            began = time.time()
            print(name, flush=True)
            found = plan.plan(config(name, root), name.split("-")[-1], kept=root / path.name,
                              say=lambda line: print(f"  {line}", flush=True))  # fmt: skip
            found["model"] = name.split("-")[0]  # not where its folder lay
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{plan.text(found)}\n{name}: {time.time() - began:.0f} s", flush=True)
    (ROOT / "docs" / "plans.md").write_text(table())


if __name__ == "__main__":
    main(sys.argv[1:])
