"""Several processes as one run: how they find each other, wait for each other, and say which of them is missing or differs."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .checkpoint import plain

# seconds that a process waits for another one that has nothing long to do
PATIENCE = float(os.environ.get("ALIGNMENT_JAX_PATIENCE", "60"))


def start(patience: float = PATIENCE) -> None:
    """Joins the processes of this run; comes before anything asks for a device, and does nothing where there is one process.

    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say who is who; or
    ALIGNMENT_JAX_DISTRIBUTED=1: jax finds out by itself, on Cloud TPU and Slurm. Raises ValueError where one of the three is
    missing, ConnectionError where process 0 cannot be reached within `patience` seconds.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if not given and os.environ.get("ALIGNMENT_JAX_DISTRIBUTED") != "1":
        return
    if given and len(given) < len(names):
        raise ValueError(f"{', '.join(sorted(given))} is set and {', '.join(sorted(set(names) - set(given)))} is not; set all three, or "
                         "none and ALIGNMENT_JAX_DISTRIBUTED=1 on Cloud TPU or Slurm")  # fmt: skip
    if not given:
        jax.distributed.initialize(initialization_timeout=int(patience), heartbeat_timeout_seconds=int(patience))
        return
    address, index = given["JAX_COORDINATOR_ADDRESS"], int(given["JAX_PROCESS_ID"])
    host, _, port = address.rpartition(":")
    if index > 0:  # jax would end the process where nobody answers
        _reach(host, int(port), patience)
    jax.distributed.initialize(address, int(given["JAX_NUM_PROCESSES"]), index, initialization_timeout=int(patience),
                               heartbeat_timeout_seconds=int(patience))  # fmt: skip


def _reach(host: str, port: int, patience: float) -> None:
    until = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise ConnectionError(f"process 0 does not answer at {host}:{port} ({error}) after {patience:g} s; is it running, and is "
                                      "the port open between the hosts?") from error  # fmt: skip
            time.sleep(1)


def together(name: str, word: str = "", patience: float = PATIENCE) -> list[str]:
    """Waits until every process has said its word under `name`; returns all of them. Raises TimeoutError naming who is missing."""
    if jax.process_count() == 1:
        return [word]
    from jax._src import distributed  # what orbax uses too: there is no public way to these values

    client = distributed.global_state.client
    assert client is not None
    client.key_value_set(f"alignment_jax/{name}/{jax.process_index()}", word or "-")
    words, missing, until = [], [], time.monotonic() + patience
    for i in range(jax.process_count()):
        try:
            words.append(client.blocking_key_value_get(f"alignment_jax/{name}/{i}", max(1, int(1000 * (until - time.monotonic())))))
        except Exception:  # whatever the client raises, the word did not come in time
            missing.append(i)
    if missing:
        raise TimeoutError(f"{name}: process {', '.join(map(str, missing))} of {jax.process_count()} did not come within {patience:g} s; "
                           "see its log and its host")  # fmt: skip
    return words


def fingerprints(config: Any) -> dict[str, str]:
    """Short hashes of a config and of this package's source."""
    source = b"\0".join(p.read_bytes() for p in sorted(Path(__file__).parents[1].rglob("*.py")))
    texts = {"config": json.dumps(plain(config), sort_keys=True).encode(), "code": source}
    return {name: hashlib.sha256(text).hexdigest()[:12] for name, text in texts.items()}


def broken(said: str) -> bool:
    """Whether an error of several processes is that of a collective; as what kind of error it comes depends on where it was met."""
    return jax.process_count() > 1 and any(word in said for word in ("Gloo", "NCCL", "UNAVAILABLE", "heartbeat", "peer"))


def lost(said: str, patience: float = PATIENCE / 3) -> str:
    """What a process says whose step an error ended that may be another's: which of them do not answer any more, and what to do.

    patience: shorter than the heartbeat's, at whose end jax ends this process too.
    """
    try:
        together("after the error", patience=patience)
        who = "all processes still answer; the logs of the others may say more"
    except TimeoutError as error:
        who = str(error)
    return (f"a step was not finished: {said.splitlines()[0]}\n{who}\nStart all processes with the same command: the run goes on from its "
            "last checkpoint.")  # fmt: skip


def facts(config: Any, workdir: Path) -> dict[str, Any]:
    """What must be alike on every host (config, code, versions, devices), and what must be well on each (disk, clock)."""
    import flax
    import optax

    return {"host": socket.gethostname(), **fingerprints(config), "clock": time.time(),
            "python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__,
            "devices": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}", **_health(workdir)}  # fmt: skip


def _health(workdir: Path, least: float = 1.0) -> dict[str, str]:
    """An entry "sick" for a workdir that cannot be written or has less than `least` GB left."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe_{socket.gethostname()}_{os.getpid()}"
        probe.write_text("x")
        probe.unlink()
        free = shutil.disk_usage(workdir).free / 1e9
        return {} if free >= least else {"sick": f"{free:.2f} GB free at {workdir}, at least {least:g} are wanted"}
    except OSError as error:
        return {"sick": f"{workdir} cannot be written: {error}"}


def preflight(mine: Mapping[str, Any], skew: float = 30.0, patience: float = PATIENCE) -> list[dict[str, Any]]:
    """Compares the `facts` of all processes, and sums over all devices once; returns the facts.

    Raises ValueError naming the hosts that differ or are sick, TimeoutError naming those whose devices do not answer.
    """
    everyone = [json.loads(word) for word in together("preflight", json.dumps(dict(mine)), patience)]
    wrong = [f"process {i} ({e['host']}): {e['sick']}" for i, e in enumerate(everyone) if "sick" in e]
    for name in ("config", "code", "python", "jax", "flax", "optax", "devices"):
        usual = max((e[name] for e in everyone), key=[e[name] for e in everyone].count)
        wrong += [f"process {i} ({e['host']}): {name} is {e[name]}, most have {usual}" for i, e in enumerate(everyone) if e[name] != usual]
    clocks = sorted(e["clock"] for e in everyone)
    wrong += [f"process {i} ({e['host']}): its clock is {e['clock'] - clocks[len(clocks) // 2]:+.0f} s off"
              for i, e in enumerate(everyone) if abs(e["clock"] - clocks[len(clocks) // 2]) > skew + patience]  # fmt: skip
    if wrong:
        raise ValueError("the hosts are not alike:\n  " + "\n  ".join(wrong))
    words = together("sum over all devices", _summed_within(patience), 2 * patience)
    stuck = [f"process {i} ({e['host']}): {word}" for i, (e, word) in enumerate(zip(everyone, words, strict=True)) if word != "well"]
    if stuck:
        raise TimeoutError("one sum over all devices did not come through; look at these hosts' devices and links:\n  "
                           + "\n  ".join(stuck))  # fmt: skip
    return everyone


def _summed_within(patience: float) -> str:
    """ "well" if the sum of a one from each device came in time and is right, else what was seen."""
    found: list[str] = []

    def reduce() -> None:
        try:
            total, count = _sum_of_ones(), jax.device_count()
            found.append("well" if total == count else f"the sum of {count} ones was {total:g}")
        except Exception as error:  # of whatever kind: the other hosts are to hear of it
            found.append(f"{type(error).__name__}: {error}".splitlines()[0])

    thread = threading.Thread(target=reduce, daemon=True)  # a collective that hangs hears no signal
    thread.start()
    thread.join(patience)
    return found[0] if found else f"no sum within {patience:g} s"


def _sum_of_ones() -> float:
    mesh = Mesh(np.asarray(jax.devices()), "all")
    ones = jax.make_array_from_callback((mesh.size,), NamedSharding(mesh, PartitionSpec("all")), lambda index: np.ones(1, np.float32))
    return float(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(ones))
