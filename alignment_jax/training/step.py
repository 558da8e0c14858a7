"""One step of any algorithm: rollout, rewards, items, anchor, update; cut into equal microbatches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .programs import Programs, learned
from .state import TrainState

Array = jax.Array
Tree = Any


class Cut(NamedTuple):
    """How N items are cut: `parts` microbatches of `size`; copies of the first item fill what is left over."""

    n: int
    size: int
    parts: int


def cut(n: int, size: int) -> Cut:
    """Microbatches of at most `size` for n items, all of one shape."""
    size = min(size, n)
    return Cut(n, size, -(-n // size))


def microbatches(tree: Tree, c: Cut) -> Iterator[Tree]:
    """The microbatches, cut across the leading axis: item j of microbatch i is j * parts + i.

    Across, not along: along, a batch sharded over devices would have to be gathered for every microbatch.
    """
    for i in range(c.parts):
        yield tree if c.parts == 1 else _taken(tree, i, c)


@partial(jax.jit, static_argnames="c")
def _taken(tree: Tree, i: int, c: Cut) -> Tree:
    more = c.size * c.parts - c.n

    def one(x: Array) -> Array:
        if more:
            x = jnp.concatenate([x, jnp.broadcast_to(x[:1], (more, *x.shape[1:]))])
        # not by row numbers: rows taken by these lie whole on every device, and each would do all the work
        return x.reshape(c.size, c.parts, *x.shape[1:])[:, i]

    return jax.tree.map(one, tree)


def join(parts: list[Tree], c: Cut) -> Tree:
    """The inverse of `microbatches`: puts results back in order and drops the padding."""
    return parts[0] if c.parts == 1 else _joined(parts, c)


@partial(jax.jit, static_argnames="c")
def _joined(parts: list[Tree], c: Cut) -> Tree:
    return jax.tree.map(lambda *xs: jnp.stack(xs, 1).reshape(-1, *xs[0].shape[1:])[: c.n], *parts)


def mapped(program: Any, n: int, size: int, keys: Array, tree: Tree) -> Tree:
    """program(keys, tree) over microbatches, joined."""
    c = cut(n, size)
    return join([program(k, t) for k, t in microbatches((keys, tree), c)], c)


def rows(tree: Tree, numbers: Array) -> Tree:
    """The rows of arrays [N, ...] with these numbers, cut over the devices as the arrays are: left alone, all would lie on each."""
    leaves, form = jax.tree.flatten(tree)
    return jax.tree.unflatten(form, _rows(leaves, numbers, tuple(x.sharding for x in leaves)))


@partial(jax.jit, static_argnames="where")
def _rows(leaves: list[Array], numbers: Array, where: tuple[Any, ...]) -> list[Array]:
    return [jax.lax.with_sharding_constraint(x[numbers], w) for x, w in zip(leaves, where, strict=True)]


def with_cond(items: Tree, cond: Tree) -> Tree:
    """Items with the "cond" of the samples that they belong to by "row", where they have one."""
    return {**items, "cond": _gathered(cond, items["row"])} if "row" in items else items


@jax.jit
def _gathered(tree: Tree, rows: Array) -> Tree:
    return jax.tree.map(lambda x: x[rows], tree)


def anchored(programs: Programs, state: TrainState, frozen: Tree, keys: Array, items: Tree, cond: Tree, size: int) -> Tree:
    """Items [N] with what their anchor adds, and still without the "cond" that they find by "row"."""

    def program(keys: Array, part: Tree) -> Tree:
        out = programs.anchor(state, frozen, keys, with_cond(part, cond))
        return {k: v for k, v in out.items() if k != "cond" or "row" not in part}

    return mapped(program, leading(items), size, keys, items)


def leading(tree: Tree) -> int:
    """The length of the leading axis."""
    return jax.tree.leaves(tree)[0].shape[0]


def update(programs: Programs, state: TrainState, frozen: Tree, keys: Array, items: Tree, cond: Tree, size: int,
           first: bool = True) -> tuple[TrainState, dict[str, Array]]:  # fmt: skip
    """One optimiser step on all items [N]; gradients are accumulated over microbatches of `size`.

    cond: that of the rollout's samples. first: the parameters are still those of the anchor; the loss finds it in
    items["first"] [N].
    """
    n = leading(items)
    c = cut(n, size)
    items = {**items, "first": jnp.full((n,), first)}
    share = np.where(np.arange(c.size * c.parts) < n, np.float32(1 / n), np.float32(0))  # what fills up weighs nothing
    total = None
    for i, (k, t) in enumerate(microbatches((keys, items), c)):
        part = programs.gradient(learned(state), state.copies, frozen, k, with_cond(t, cond), share[i :: c.parts])
        total = part if total is None else programs.accumulate(total, part)
        del k, t, part  # else they lie there while the next ones are made, and while the update is
    return programs.apply(state, total)
