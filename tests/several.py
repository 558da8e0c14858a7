"""Several processes that are one run, on this machine, as tests start them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
STARTED: list[subprocess.Popen] = []


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(commands, devices=1, only=None, **more):
    """One Python process for each command, a list of arguments, with so many CPU devices each; only: the numbers of those that come."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS),
           "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} | more  # fmt: skip
    if len(commands) > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(len(commands))}
    started = [subprocess.Popen([sys.executable, *commands[i]], env=env | ({"JAX_PROCESS_ID": str(i)} if len(commands) > 1 else {}),
                                cwd=TESTS.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
               for i in (range(len(commands)) if only is None else only)]  # fmt: skip
    STARTED.extend(started)
    return started


def ended(processes, timeout=240):
    """(exit codes, what they said)."""
    said = [p.communicate(timeout=timeout)[0] for p in processes]
    return [p.returncode for p in processes], said


def stop_all():
    """Ends those that are left: a test that fails leaves no process that trains on."""
    while STARTED:
        STARTED.pop().kill()
