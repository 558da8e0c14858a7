"""Whose a workdir is: the config of its run, and whether that has been stopped for good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .checkpoint import plain, save_json


def folder(workdir: str | Path) -> Path:
    """The workdir as it was asked for, absolute. Raises ValueError for an address such as gs://..."""
    if "://" in str(workdir):
        raise ValueError(f"workdir {workdir} is an address, and a folder is needed; mount the bucket (gcsfuse) and name the folder")
    return Path(workdir).expanduser().absolute()


def whose(workdir: Path, config: Any) -> None:
    """Raises ValueError when the workdir holds a run of another config, saying what differs; where it runs may differ, and so may
    batch.microbatch, which has to divide over the devices."""
    path = workdir / "config.json"
    theirs, mine = json.loads(path.read_text()) if path.exists() else plain(config), plain(config)
    differs = differences(_unplaced(theirs), _unplaced(mine))
    if differs:
        raise ValueError(f"{workdir} holds a run of another config:\n  " + "\n  ".join(differs[:10])
                         + "\nChoose another --workdir, or delete that one.")  # fmt: skip


def _unplaced(config: dict[str, Any]) -> dict[str, Any]:
    batch = config.get("batch")
    return config | {"sharding": {}, "batch": batch | {"microbatch": 0} if isinstance(batch, dict) else batch}


def claim(workdir: Path, config: Any) -> None:
    """Makes the workdir and writes config.json; called once everything that the config names has been built."""
    workdir.mkdir(parents=True, exist_ok=True)
    save_json(workdir / "config.json", plain(config))


def differences(theirs: Any, mine: Any, where: str = "config") -> list[str]:
    """Leaves that differ between two JSON trees, one line each."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        return [line for k in sorted(theirs.keys() | mine.keys())
                for line in differences(theirs.get(k, "(absent)"), mine.get(k, "(absent)"), f"{where}.{k}")]  # fmt: skip
    return [] if theirs == mine else [f"{where}: there {theirs!r}, here {mine!r}"]


def stopped(workdir: Path) -> str:
    """Why a run was stopped early; empty when it was not."""
    path = workdir / "stopped.json"
    return json.loads(path.read_text())["reason"] if path.exists() else ""
