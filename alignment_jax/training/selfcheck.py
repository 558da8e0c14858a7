"""A tiny run on this machine: devices, the ratio before the first update, gradients, resuming."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np


def tiny_config(**changes: Any) -> ml_collections.ConfigDict:
    """A DDPO run of two steps on the shipped model: 8 pictures of 3 sampling steps."""
    devices = jax.device_count()
    config = ml_collections.ConfigDict({
        "name": "selfcheck", "seed": 0, "steps": 2, "checkpoint_every": 1, "evaluate_every": 0, "model": "critters",
        "weights": "shipped", "reward": "critters_proxy",
        "method": {"name": "ddpo", "clip_range": 0.1}, "optimizer": {"learning_rate": 1e-4},
        "batch": {"prompts": 8 * devices, "group": 1}, "sampling": {"num_steps": 3, "eta": 1.0},
        "lora": {"rank": 2, "targets": "unet"}, "data": {"prompts": "critters:train:64"},
    })  # fmt: skip
    config.update(changes)
    return config


def run(say: Callable[[str], None] = print) -> list[tuple[str, bool, str]]:
    """[(check, passed, what was seen)], each also said as one line."""
    from . import loop
    from .checkpoint import Checkpointer

    results: list[tuple[str, bool, str]] = []

    def report(name: str, good: bool, seen: str) -> None:
        results.append((name, bool(good), seen))
        say(f"{'pass' if good else 'FAIL'}  {name:34} {seen}")

    devices = jax.devices()
    total = float(jax.jit(jnp.sum)(jnp.ones(len(devices) * 4)))
    report("devices", total == 4 * len(devices), f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}")

    session, start = loop.set_up(tiny_config())
    before = jax.tree.map(np.array, start.trained)
    with tempfile.TemporaryDirectory() as folder:
        state, info = loop.one_step(session, start, next(session.run.source))
        deviation = float(info["ratio/deviation_max"])
        report("ratio before the first update is 1", deviation == 0.0, f"largest deviation {deviation:g}")
        checkpoints = Checkpointer(folder)
        checkpoints.save(state, session.run.source.get_state())
        state, _ = loop.one_step(session, state, next(session.run.source))
        moved = jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), state.trained, before))
        report("gradient reaches every parameter", all(moved), f"{sum(moved)} of {len(moved)} arrays moved in two steps")
        fresh, blank = loop.set_up(tiny_config())
        restored, position = checkpoints.restore(blank)
        checkpoints.close()
        fresh.run.source.set_state(position)
        again, _ = loop.one_step(session, restored, next(fresh.run.source))
        pairs = zip(jax.tree.leaves(again.trained), jax.tree.leaves(state.trained), strict=True)
        report("resumed equals uninterrupted", all(np.array_equal(a, b) for a, b in pairs), "bit for bit")
    return results
