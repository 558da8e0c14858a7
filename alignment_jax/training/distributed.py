"""Several processes as one run: how they find each other, wait for each other, and say which of them is missing."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# seconds that a process waits for another one that has nothing long to do
PATIENCE = float(os.environ.get("ALIGNMENT_JAX_PATIENCE", "60"))
NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class Place(NamedTuple):
    """Which of how many processes this one is, and where process 0 listens."""

    host: str
    port: int
    processes: int
    number: int


def place(patience: float = PATIENCE) -> Place | None:
    """This process among those of its run, by the environment; None where that speaks of no others.

    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say who is who; or
    ALIGNMENT_JAX_DISTRIBUTED=1: jax finds out by itself, on Cloud TPU and Slurm. Raises ValueError where one of the three is missing,
    and where jax finds nothing.
    """
    given = {name: os.environ[name] for name in NAMES if name in os.environ}
    if not given and os.environ.get("ALIGNMENT_JAX_DISTRIBUTED") != "1":
        return None
    if given and len(given) < len(NAMES):
        raise ValueError(f"{', '.join(sorted(given))} is set and {', '.join(sorted(set(NAMES) - set(given)))} is not; set all three, or "
                         "none and ALIGNMENT_JAX_DISTRIBUTED=1 on Cloud TPU or Slurm")  # fmt: skip
    address, count, index = [given[name] for name in NAMES] if given else _detected(patience)
    if address is None or count is None or index is None:
        raise ValueError(f"ALIGNMENT_JAX_DISTRIBUTED is 1, and jax finds neither Cloud TPU nor Slurm here; set {', '.join(NAMES)}, or "
                         "nothing where there is one process")  # fmt: skip
    host, _, port = address.rpartition(":")
    return Place(host, int(port), int(count), int(index))


def _detected(patience: float) -> tuple[Any, ...]:
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks; no public way says it before

    return tuple(ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(patience))[:3])


def start(patience: float = PATIENCE) -> None:
    """Joins the processes of this run, see `place`; comes before anything asks for a device, and does nothing where there is one process.

    Raises ConnectionError where process 0 cannot be reached within `patience` seconds, TimeoutError naming the processes that do not
    come, or that get no devices.
    """
    me = place(patience)
    if me is None or me.processes == 1:
        return
    (_call if me.number == 0 else _answer)(me, patience)
    jax.distributed.initialize(f"{me.host}:{me.port}", me.processes, me.number, initialization_timeout=int(patience),
                               heartbeat_timeout_seconds=int(patience))  # fmt: skip
    word = within(patience, lambda: str(jax.local_device_count()))
    words = together("devices", word if word.isdigit() else f"no devices: {word}", 2 * patience)
    without = [f"process {i}: {word}" for i, word in enumerate(words) if not word.isdigit()]
    if without:
        raise TimeoutError("these processes have no devices, since each waits for those of all; does another program use a host's?\n  "
                           + "\n  ".join(without))  # fmt: skip


def _call(me: Place, patience: float) -> None:
    """Process 0 waits for a line from each other one, at the port that is jax's afterwards, and tells all whether the run begins.

    jax itself would end every process that waits in vain, with a trace that names nobody.
    """
    here, until = dict[int, socket.socket](), time.monotonic() + patience
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_server(me.port))
        while len(here) < me.processes - 1 and (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):  # nobody came, or somebody who is none of us
                peer = stack.enter_context(server.accept()[0])
                peer.settimeout(min(5.0, patience))
                number = int(peer.makefile().readline())
                here |= {number: peer} if 0 < number < me.processes else {}
        missing = sorted(set(range(1, me.processes)) - here.keys())
        said = missing and (f"process {', '.join(map(str, missing))} of {me.processes} did not come to {me.host}:{me.port} within "
                            f"{patience:g} s; is it running there, and is the port open between the hosts?")  # fmt: skip
        for peer in here.values():
            with contextlib.suppress(OSError):
                peer.sendall(f"{said or 'go'}\n".encode())
    if said:
        raise TimeoutError(said)


def _server(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
    except OSError as error:
        raise ConnectionError(f"process 0 cannot listen on port {port} ({error}); is an earlier run still there? Else take another port in "
                              "JAX_COORDINATOR_ADDRESS") from error  # fmt: skip


def _answer(me: Place, patience: float) -> None:
    until = time.monotonic() + patience
    while True:
        try:
            with socket.create_connection((me.host, me.port), timeout=5) as call:
                call.sendall(f"{me.number}\n".encode())
                call.settimeout(2 * patience)  # process 0 may have come later, and waits for others
                said = call.makefile().readline().strip()
            break
        except OSError as error:
            if time.monotonic() > until:
                raise ConnectionError(f"process 0 does not answer at {me.host}:{me.port} ({error}) after {patience:g} s; is it running, "
                                      "and is the port open between the hosts?") from error  # fmt: skip
            time.sleep(1)
    if said != "go":
        raise TimeoutError(said or f"process 0 at {me.host}:{me.port} ended before all had come; its log may say why")


def within(patience: float, ask: Callable[[], str]) -> str:
    """What `ask` says, an error of its own too; or that it said nothing in time: what asks for devices hears no signal where it hangs."""
    found: list[str] = []

    def asked() -> None:
        try:
            found.append(ask())
        except Exception as error:  # of whatever kind: the other hosts are to hear of it
            found.append(f"{type(error).__name__}: {error}".splitlines()[0])

    thread = threading.Thread(target=asked, name=within.__name__, daemon=True)
    thread.start()
    thread.join(patience)
    return found[0] if found else f"nothing within {patience:g} s"


def leave_stuck(code: int) -> None:
    """Ends this process with `code` if what `within` asked still hangs in the runtime, which would abort at the interpreter's end."""
    if any(thread.name == within.__name__ for thread in threading.enumerate()):
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()  # waits for the others, who have yet to hear what process 0 keeps
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def together(name: str, word: str = "", patience: float = PATIENCE) -> list[str]:
    """Waits until every process has said its word under `name`; returns all of them. Raises TimeoutError naming who is missing."""
    from jax._src import distributed  # what orbax uses too: there is no public way to these values

    client, count = distributed.global_state.client, distributed.global_state.num_processes  # asks for no device
    if client is None:
        return [word]
    client.key_value_set(f"alignment_jax/{name}/{distributed.global_state.process_id}", word or "-")
    words, missing, until = [], [], time.monotonic() + patience
    for i in range(count):
        try:
            words.append(client.blocking_key_value_get(f"alignment_jax/{name}/{i}", max(1, int(1000 * (until - time.monotonic())))))
        except Exception:  # whatever the client raises, the word did not come in time
            missing.append(i)
    if missing:
        raise TimeoutError(f"{name}: process {', '.join(map(str, missing))} of {count} did not come within {patience:g} s; "
                           "see its log and its host")  # fmt: skip
    return words


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
