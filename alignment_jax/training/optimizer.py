"""From a config's `optimizer` to optax."""

from __future__ import annotations

from typing import Any

import optax


def optimizer(*, steps: int, name: str = "adamw", learning_rate: float, schedule: str = "constant",
              warmup_steps: int = 0, b1: float = 0.9, b2: float = 0.999, weight_decay: float = 0.0,
              clip_norm: float = 1.0) -> tuple[optax.GradientTransformation, optax.Schedule]:  # fmt: skip
    """The gradient transformation and its learning-rate schedule. Raises ValueError for an unknown name or schedule."""
    schedules = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, max(steps - warmup_steps, 1)),
        "linear": lambda: optax.linear_schedule(learning_rate, 0.0, max(steps - warmup_steps, 1)),
    }
    factories: dict[str, Any] = {
        "adamw": lambda lr: optax.adamw(lr, b1, b2, weight_decay=weight_decay),
        "adam": lambda lr: optax.adam(lr, b1, b2),
        # the rate is the step's size, as in transformers' Adafactor(scale_parameter=False, relative_step=False)
        "adafactor": lambda lr: optax.adafactor(lr, multiply_by_parameter_scale=False),
        "sgd": lambda lr: optax.sgd(lr),
    }
    for kind, value, table in (("schedule", schedule, schedules), ("optimizer", name, factories)):
        if value not in table:
            raise ValueError(f"{kind} {value!r} is not known; choose one of {', '.join(table)}")
    rate = schedules[schedule]()
    if warmup_steps:
        rate = optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup_steps), rate], [warmup_steps])
    return optax.chain(optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(), factories[name](rate)), rate
