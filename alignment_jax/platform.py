"""The kind of device that programs are traced for, and whether they may recompute: as it is here, unless something else is assumed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_ASSUMED: ContextVar[tuple[str, bool] | None] = ContextVar("assumed platform", default=None)


def platform() -> str:
    """ "cpu", "gpu" or "tpu": by it attention, convolutions and what is recomputed are chosen, while a program is traced."""
    return (_ASSUMED.get() or (jax.default_backend(),))[0]


def recomputes() -> bool:
    """Whether a chain's backward pass may make its steps again, to keep less."""
    return (_ASSUMED.get() or ("", True))[1]


@contextmanager
def assumed(name: str, recomputes: bool = True) -> Iterator[None]:
    """Within it programs are traced for this kind of device, which need not be there."""
    token = _ASSUMED.set((name, recomputes))
    try:
        yield
    finally:
        _ASSUMED.reset(token)
