"""Before a run begins: whether the hosts are alike and well, and whether one sum over all their devices comes through."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .checkpoint import plain
from .distributed import PATIENCE, together, within


def fingerprints(config: Any) -> dict[str, str]:
    """Short hashes of a config and of this package's source."""
    source = b"\0".join(p.read_bytes() for p in sorted(Path(__file__).parents[1].rglob("*.py")))
    texts = {"config": json.dumps(plain(config), sort_keys=True).encode(), "code": source}
    return {name: hashlib.sha256(text).hexdigest()[:12] for name, text in texts.items()}


def facts(config: Any, workdir: Path) -> dict[str, Any]:
    """What must be alike on every host (config, code, versions, devices), and what must be well on each (disk, clock)."""
    import flax
    import optax

    return {"host": socket.gethostname(), **fingerprints(config), "clock": time.time(),
            "python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__,
            "devices": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}", **_health(workdir)}  # fmt: skip


def _health(workdir: Path, least: float = 1.0) -> dict[str, Any]:
    """GB free at workdir; and an entry "sick" where it cannot be written or has less than `least` of them."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe_{socket.gethostname()}_{os.getpid()}"
        probe.write_text("x")
        probe.unlink()
        free = shutil.disk_usage(workdir).free / 1e9
        sick = {} if free >= least else {"sick": f"{free:.2f} GB free at {workdir}, at least {least:g} are wanted"}
        return {"free": free} | sick
    except OSError as error:
        return {"free": 0.0, "sick": f"{workdir} cannot be written: {error}"}


def preflight(mine: Mapping[str, Any], skew: float = 30.0, patience: float = PATIENCE) -> list[dict[str, Any]]:
    """Compares the `facts` of all processes, and sums over all devices once; returns the facts.

    skew: seconds by which a clock may be off, besides those that processes wait for each other. Raises ValueError naming the hosts that
    differ or are sick, TimeoutError naming those whose devices do not answer.
    """
    everyone = [json.loads(word) for word in together("preflight", json.dumps(dict(mine)), patience)]
    wrong = [f"process {i} ({e['host']}): {e['sick']}" for i, e in enumerate(everyone) if "sick" in e]
    for name in ("config", "code", "python", "jax", "flax", "optax", "devices"):
        usual = max((e[name] for e in everyone), key=[e[name] for e in everyone].count)
        wrong += [f"process {i} ({e['host']}): {name} is {e[name]}, most have {usual}" for i, e in enumerate(everyone) if e[name] != usual]
    middle, allowed = sorted(e["clock"] for e in everyone)[len(everyone) // 2], skew + patience
    wrong += [f"process {i} ({e['host']}): its clock is {e['clock'] - middle:+.0f} s off, {allowed:g} are allowed; set it by NTP (chronyd)"
              for i, e in enumerate(everyone) if abs(e["clock"] - middle) > allowed]  # fmt: skip
    if wrong:
        raise ValueError("the hosts are not alike:\n  " + "\n  ".join(wrong))
    words = together("sum over all devices", within(patience, _sum), 2 * patience)
    stuck = [f"process {i} ({e['host']}): {word}" for i, (e, word) in enumerate(zip(everyone, words, strict=True)) if word != "well"]
    if stuck:
        raise TimeoutError("one sum over all devices did not come through; look at these hosts' devices and links:\n  "
                           + "\n  ".join(stuck))  # fmt: skip
    return everyone


def _sum() -> str:
    """ "well" if the sum of a one from each device is right."""
    total, count = _sum_of_ones(), jax.device_count()
    return "well" if total == count else f"the sum of {count} ones was {total:g}"


def _sum_of_ones() -> float:
    mesh = Mesh(np.asarray(jax.devices()), "all")
    ones = jax.make_array_from_callback((mesh.size,), NamedSharding(mesh, PartitionSpec("all")), lambda index: np.ones(1, np.float32))
    return float(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(ones))


def text(everyone: Sequence[Mapping[str, Any]]) -> str:
    """The hosts for people, a line each, after what they have in common."""
    one, latest = everyone[0], max(e["clock"] for e in everyone)
    common = ", ".join(f"{name} {one[name]}" for name in ("config", "code", "python", "jax", "flax", "optax"))
    lines = [f"process {i:<6} {e['host']}: {e['devices']}, {e['free']:.0f} GB free, clock {e['clock'] - latest:+.1f} s"
             for i, e in enumerate(everyone)]  # fmt: skip
    return "\n".join([f"all {len(everyone)} alike, one sum over all devices came through", f"common         {common}", *lines])
