"""Processes that do one step at a time, so that two of them can be measured in turns on one core. No library but Python's own."""

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def memory(field: str) -> float:
    """MB of a field of this process's status: VmRSS, what is resident now; VmHWM, the most that was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1000


def seconds(call: Callable[[], Any], times: int = 3) -> list[float]:
    """CPU-seconds of each of `times` calls, which must wait for their results, after one that compiles."""
    call()
    out = []
    for _ in range(times):
        began = time.process_time()
        call()
        out.append(time.process_time() - began)
    return out


def serve(build: Callable[[], tuple[Callable[[], Json], Json]]) -> None:
    """Builds (step, what to say), and does a step for every line of standard input; says its CPU-seconds and memory.

    peak is that since the step before: Linux lets a process forget its high-water mark, and what glibc has free, such as what a
    compiler leaves, is given back first.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print, and what is said is JSON
    step, more = build()
    print(json.dumps({**more, "start_mb": memory("VmRSS"), "start_cpu": time.process_time()}), file=out, flush=True)
    for _ in sys.stdin:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        took = step()
        print(json.dumps({**took, "peak_mb": memory("VmHWM")}), file=out, flush=True)


class Worker:
    """A process that serves; an error of its own once it has ended."""

    def __init__(self, command: list[Any], env: dict[str, str], log: Path) -> None:
        self.log = log
        self.process = subprocess.Popen([str(c) for c in command], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=log.open("w"), text=True)  # fmt: skip
        self.said = self._read()

    def _read(self) -> Json:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text().splitlines()[-15:])
            raise RuntimeError(f"a side ended with {self.process.wait()} (-9: killed, perhaps for its memory):\n{tail}")
        out: Json = json.loads(line)
        return out

    def step(self) -> Json:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def in_turns(name: str, sides: dict[str, Worker], turns: int) -> dict[str, list[Json]]:
    """What every side says of a first step and `turns` more, one side after the other; then they are closed.

    Each has said "probe", numbers that its UNet makes of one input. Raises AssertionError where two of them differ.
    """
    probes = [worker.said["probe"] for worker in sides.values()]
    for other in probes[1:]:
        difference = max(abs(a - b) for a, b in zip(probes[0], other, strict=True))
        assert difference < 1e-3, f"{name}: the two UNets disagree by {difference:.1e}"
    steps: dict[str, list[Json]] = {side: [] for side in sides}
    for _ in range(turns + 1):
        for side, worker in sides.items():
            steps[side].append(worker.step())
    for worker in sides.values():
        worker.close()
    return steps
