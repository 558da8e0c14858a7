"""Metrics of a run: JSON lines, TensorBoard events, a progress bar."""

from __future__ import annotations

import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..evaluation.summary import plain


class MetricLog:
    """Writes dictionaries of scalars to workdir/metrics.jsonl and TensorBoard, of other processes than 0 to metrics_1.jsonl, ...

    rows: all of them since the run began. What is not finite is written as null, for JSON knows neither NaN nor infinity, and
    `read` gives NaN back. A resumed run drops the lines at and after the step it resumes from, so that the file is that of one run.
    """

    def __init__(self, workdir: str | Path, resume_step: int = 0):
        from tensorboardX import SummaryWriter

        index = jax.process_index()
        self.path = Path(workdir) / (f"metrics_{index}.jsonl" if index else "metrics.jsonl")
        self.start = time.time()
        self.rows = [m for m in read(self.path) if m["step"] <= resume_step] if resume_step else []
        if self.rows:
            self.start -= self.rows[-1]["time"]
        self.path.write_text("".join(_line(m) for m in self.rows))
        self._writer = None if index else SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=resume_step or None)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """One line; values are turned into floats."""
        values = {k: float(np.asarray(v)) for k, v in metrics.items()}
        self.rows.append({"step": step, "time": round(time.time() - self.start, 3), **values})
        with self.path.open("a") as f:
            f.write(_line(self.rows[-1]))
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes."""
        if self._writer:
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


def machine() -> str:
    """What measurements were taken on: processor, devices, version of jax."""
    kind = jax.devices()[0].device_kind
    return f"{platform.machine()}, {jax.device_count()} {kind} device{'s' if jax.device_count() > 1 else ''}, jax {jax.__version__}"
