"""Functions that count the samples which go through them, at run time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

Tree = Any


def counted(function: Callable[..., Tree], counter: Counter[str], name: str) -> Callable[..., Tree]:
    """function(params, x [B, ...], ...) that adds B to counter[name] at every run, and to counter[name + " backward"] in gradients."""

    def add(name: str, n: int) -> None:
        def now() -> None:
            counter[name] += n

        jax.debug.callback(now)

    @jax.custom_vjp
    def call(*args: Any) -> Tree:
        add(name, len(args[1]))
        return function(*args)

    def forward(*args: Any) -> Any:
        add(name, len(args[1]))
        out, pull = jax.vjp(function, *args)
        return out, (pull, args)

    def backward(saved: Any, cotangent: Tree) -> Any:
        pull, args = saved
        add(f"{name} backward", len(args[1]))
        return pull(cotangent)

    call.defvjp(forward, backward)
    return call


def network_calls(counts: dict[str, int]) -> int:
    """Network calls of a step, a backward pass counted as two."""
    return counts.get("network", 0) + 2 * counts.get("network backward", 0)
