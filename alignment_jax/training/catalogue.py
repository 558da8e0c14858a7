"""What `list` shows: objects with name, family, paper and summary."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from ..algorithms import ALGORITHMS
from ..evaluation.metrics import METRICS
from ..models import MODELS
from ..rewards import REWARDS
from ..test_time import PROMPT_METHODS, TEST_TIME

Rows = list[dict[str, Any]]


def algorithms() -> Rows:
    """Every method."""
    return [_row(name, e.family, e.paper, e.summary) for name, e in ALGORITHMS.items()]


def test_time() -> Rows:
    """Every test-time method, with what it asks of a reward and the setting that a budget of network calls goes into."""
    return [_row(name, e.family, e.paper, e.summary) | {"reward": e.reward, "budget": e.budget}
            for name, e in (TEST_TIME | PROMPT_METHODS).items()]  # fmt: skip


def rewards() -> Rows:
    """Every reward, with its licence and range."""
    return [_row(name, e.family, "", e.summary)
            | {"licence": e.licence, "range": list(e.range), "differentiable": e.differentiable}
            for name, e in REWARDS.items()]  # fmt: skip


def models() -> Rows:
    """Every model by name, and the families that are read from folders."""
    folders = _row("FOLDER or owner/name", "latent UNet", "arXiv 2112.10752, 2307.01952",
                   "Stable Diffusion 1.x, 2.x, XL, Turbo and LCM, as diffusers lays them out")  # fmt: skip
    return [*(_row(name, e.family, e.paper, e.summary) for name, e in MODELS.items()), folders]


def metrics() -> Rows:
    """Every metric that a run can log."""
    return [_row(name, name.split("/")[0] if "/" in name else "run", "", meaning) for name, meaning in METRICS.items()]


def configs(folder: str | Path = "configs") -> Rows:
    """Every config file of the working folder, once for each of the ARGUMENTS that it declares."""
    rows = []
    for path in sorted(Path(folder).glob("*.py")):
        module = runpy.run_path(str(path))
        summary = (module["__doc__"] or "").split("\n")[0]
        for argument in module.get("ARGUMENTS", ("",)):
            rows.append(_row(f"{path}:{argument}" if argument else str(path), path.stem, "", summary))
    if not rows:
        raise FileNotFoundError(f"no configs in {Path(folder).absolute()}; run this in a checkout of the project")
    return rows


def _row(name: str, family: str, paper: str, summary: str) -> dict[str, Any]:
    return {"name": name, "family": family, "paper": paper, "summary": summary}
