"""What stops a run between two steps: SIGTERM, by which a machine is taken away, and Ctrl-C."""

from __future__ import annotations

import signal
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

PREEMPTED = 75  # EX_TEMPFAIL: nothing is wrong, try again


class Interrupt:
    """Turns SIGTERM and the first Ctrl-C into a wish to stop after the step; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = 0
        self._previous: dict[int, Any] = {}

    def agreed(self) -> int:
        """The signal that any process was sent, or 0; the same on all of them: they save together or not at all."""
        return self.asked if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.array(self.asked)).max())

    def __enter__(self) -> Interrupt:
        def handle(number: int, frame: Any) -> None:
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked = number
            print("\nstopping after this step, with a checkpoint", flush=True)

        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, handle)
        return self

    def __exit__(self, *args: Any) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
