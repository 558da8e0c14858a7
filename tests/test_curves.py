"""What each config of the critters does to the gold judge, against the base, over time: measured, committed, checked.

The slow tier measures anew and writes tests/curves/NAME.json:
  python -m pytest tests/test_curves.py -m slow -k diffusion_nft
Configs without a file there are not measured yet.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from alignment_jax.evaluation.statistics import unflatten
from alignment_jax.training import count
from alignment_jax.training.calls import network_calls
from alignment_jax.training.checkpoint import plain
from alignment_jax.training.logging import machine, read

ROOT = Path(__file__).parents[1]
CURVES = ROOT / "tests" / "curves"
CONFIGS = runpy.run_path(str(ROOT / "configs" / "critters.py"))
NAMES = CONFIGS["ARGUMENTS"]
LABEL = "label --guidance_scale=2"
MADE = {  # what configs read: how it is made, of what
    "data_cache/critters_pairs.npz": (f"{LABEL} --pairs=4096 --out=data_cache/critters_pairs.npz", ""),
    "data_cache/critters_soft.npz": (f"{LABEL} --pairs=4096 --annotator=critters_proxy --temperature=0.1 --soft "
                                     "--out=data_cache/critters_soft.npz", ""),
    "data_cache/critters_lists.npz": (f"{LABEL} --pairs=2048 --annotator=critters_proxy --list=4 --out=data_cache/critters_lists.npz", ""),
    "runs/reward": ("train-reward --config=configs/critters_reward.py:picture --workdir=runs/reward", "data_cache/critters_pairs.npz"),
    "runs/states": ("train-reward --config=configs/critters_reward.py:noisy --workdir=runs/states", "runs/reward"),
}  # fmt: skip
SERIES = ("gold/all", "proxy", "diversity/pixel_right")


def make(path):
    """The file or run, after what it is made of, where it is not there."""
    if path and not (ROOT / path).exists():
        arguments, of = MADE[path]
        make(of)
        subprocess.run([sys.executable, "-m", "alignment_jax", *arguments.split()], check=True, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_measure(name, tmp_path):
    """Trains the config as it stands, after what it reads, and writes what was measured."""
    for path in MADE:
        if path in str(CONFIGS["get_config"](name)):
            make(path)
    workdir = tmp_path / name
    command = ["train", f"--config=configs/critters.py:{name}", f"--workdir={workdir}"]
    process = subprocess.Popen([sys.executable, "-m", "alignment_jax", *command], cwd=ROOT)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0
    summary = json.loads((workdir / "summary.json").read_text())
    rows = [row for row in read(workdir / "metrics.jsonl") if "gold/all" in row]
    calls = count.one_step(CONFIGS["get_config"](name))
    over_time = {key: unflatten(rows, key) for key in SERIES}
    curve = {
        "name": name, "method": summary["method"], "seed": summary["seed"], "config": plain(CONFIGS["get_config"](name)),
        "machine": machine(),
        "wall_seconds": summary["wall_seconds"], "cpu_seconds": used.ru_utime + used.ru_stime, "peak_bytes": 1024 * used.ru_maxrss,
        "calls_a_step": calls, "network_calls": network_calls(calls) * rows[-1]["step"],
        "trained_parameters": summary["trained_parameters"], "kl": summary["kl"],
        "alarm": summary["alarm"], **{m: {k: summary[m][k] for k in ("gold", "proxy", "diversity")} for m in ("base", "aligned")},
        "over_time": [{"step": row["step"], "seconds": row["time"], "kl": row["kl/path"], **{k: over_time[k][i] for k in SERIES}}
                      for i, row in enumerate(rows)],
    }  # fmt: skip
    CURVES.mkdir(exist_ok=True)
    (CURVES / f"{name}.json").write_text(json.dumps(curve, indent=1) + "\n")


@pytest.mark.parametrize("name", sorted(p.stem for p in CURVES.glob("*.json")))
def test_the_committed_curve_belongs_to_the_present_config(name):
    curve = json.loads((CURVES / f"{name}.json").read_text())
    there, here = ({k: v for k, v in c.items() if v != "" and k != "sharding"}  # where it runs changes nothing
                   for c in (curve["config"], plain(CONFIGS["get_config"](name))))  # fmt: skip
    assert there == here, "measure anew: see the head of this file"
    assert curve["over_time"][0]["step"] == 0 and curve["over_time"][-1]["step"] == curve["config"]["steps"]
    assert curve["wall_seconds"]["total"] > 0 and {"low", "high", "mean"} <= set(curve["aligned"]["gold"])
