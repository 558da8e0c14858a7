"""What changes while a run goes on, and how trained and frozen parameters become one tree inside the gradient."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ..models import lora as lora_lib
from ..weights import lora_files

Array = jax.Array
Tree = Any


class TrainState(NamedTuple):
    """Everything that changes; one tree, checkpointed whole and donated to the update.

    step: optimiser steps taken. trained: LoRA factors, or the parameters that are trained. copies: earlier versions of
    `trained` by name (reference, old policy). own: the algorithm's other networks by name, (params, optimiser's state).
    ema: the averaged `trained`, what is evaluated. extra: the algorithm's memory. key: the run's key, of which every step
    folds in its number.
    """

    step: Array
    trained: Tree
    opt_state: Tree
    copies: Mapping[str, Tree]
    own: Mapping[str, tuple[Tree, Tree]]
    ema: Tree
    extra: Tree
    key: Array


class Partition(NamedTuple):
    """How parameters split: init(key, params) -> (trained, frozen).

    combine(trained, frozen) -> params for the networks while they are trained (see `models.lora.attach`);
    merge(trained, frozen) -> the whole model's parameters, to sample and to ship.
    """

    init: Callable[[Array, Tree], tuple[Tree, Tree]]
    combine: Callable[[Tree, Tree], Tree]
    merge: Callable[[Tree, Tree], Tree]


def lora_partition(*, rank: int, targets: str = "unet", scale: float = 1.0, alpha: float | None = None, file: str = "") -> Partition:
    """Trains low-rank factors over frozen parameters: W + scale a b, scale = alpha / rank where alpha is given.

    targets: a name in models.lora.TARGETS, or a regular expression over paths. file: a LoRA file of diffusers, PEFT or
    kohya's tools to start from. Raises ValueError for scale beside alpha, and for a file that does not fit.
    """
    if alpha is not None:
        if scale != 1.0:
            raise ValueError(f"lora has scale {scale} and alpha {alpha}; scale is alpha / rank, so give one of the two")
        scale = alpha / rank

    def init(key: Array, params: Tree) -> tuple[Tree, Tree]:
        fresh = lora_lib.init(key, params, rank=rank, targets=targets)
        return (lora_files.factors(Path(file).expanduser(), params, fresh, scale=scale)[0] if file else fresh), params

    return Partition(init, lambda trained, frozen: lora_lib.attach(frozen, trained, scale),
                     lambda trained, frozen: lora_lib.merge(frozen, trained, scale))  # fmt: skip


def full_partition(targets: str = "unet") -> Partition:
    """Trains the parameters whose path matches the regular expression; the others stay frozen."""

    def init(key: Array, params: Tree) -> tuple[Tree, Tree]:
        flat = flatten_dict(params, sep="/")
        trained = {k: v for k, v in flat.items() if re.search(targets, k)}
        if not trained:
            raise ValueError(f"trainable {targets!r} matches no parameter; paths are like {sorted(flat)[:5]}")
        frozen = {k: v for k, v in flat.items() if k not in trained}
        return unflatten_dict(trained, sep="/"), unflatten_dict(frozen, sep="/")

    def combine(trained: Tree, frozen: Tree) -> Tree:
        return unflatten_dict({**flatten_dict(frozen, sep="/"), **flatten_dict(trained, sep="/")}, sep="/")

    return Partition(init, combine, combine)


def follow(rule: Any, copy: Tree, trained: Tree, step: Array) -> Tree:
    """The copy after step `step` (counted from 1): "frozen", ("ema", decay) or ("every", n)."""
    if rule == "frozen":
        return copy
    kind, value = rule
    if kind == "ema":
        # slow at first: a copy that starts equal to the policy should not lag it by 1 / (1 - decay) steps at once
        decay = jnp.minimum(value, (1.0 + step) / (10.0 + step))
        return jax.tree.map(lambda c, p: decay * c + (1 - decay) * p, copy, trained)
    if kind == "every":
        return jax.tree.map(lambda c, p: jnp.where(step % value == 0, p, c), copy, trained)
    raise ValueError(f"a copy follows by 'frozen', ('ema', decay) or ('every', n); got {rule!r}")
