"""Metrics of a run: JSON lines, TensorBoard events, a progress bar."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..evaluation.summary import plain


class MetricLog:
    """Writes dictionaries of scalars to workdir/metrics.jsonl and TensorBoard; only process 0 writes.

    What is not finite is written as null, for JSON knows neither NaN nor infinity, and `read` gives NaN back. A resumed run
    drops the lines at and after the step it resumes from, so that the file is that of one run.
    """

    def __init__(self, workdir: str | Path, resume_step: int = 0):
        from tensorboardX import SummaryWriter

        self.active = jax.process_index() == 0
        self.path = Path(workdir) / "metrics.jsonl"
        self.start = time.time()
        if not self.active:
            return
        kept = [m for m in read(self.path) if m["step"] <= resume_step] if resume_step else []
        if kept:
            self.start -= kept[-1]["time"]
        self.path.write_text("".join(_line(m) for m in kept))
        self._writer = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=resume_step or None)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """One line; values are turned into floats."""
        if not self.active:
            return
        values = {k: float(np.asarray(v)) for k, v in metrics.items()}
        with self.path.open("a") as f:
            f.write(_line({"step": step, "time": round(time.time() - self.start, 3), **values}))
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes."""
        if self.active:
            self._writer.close()


def _line(metrics: dict[str, Any]) -> str:
    return json.dumps(plain(metrics), allow_nan=False) + "\n"


def read(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, null as NaN; a half-written last line is left out. An absent file is an empty list."""
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        rows.append({k: math.nan if v is None else v for k, v in row.items()})
    return rows
