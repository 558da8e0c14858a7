"""One step of a config in shapes: what every compiled program takes and gives, with no parameter read and no array made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..rewards import Reward, columns
from . import build
from .programs import build as compile_programs
from .programs import learned

Tree = Any
Shape = jax.ShapeDtypeStruct


class Program(NamedTuple):
    """A jitted function of `programs.build`, the shapes of its arguments and of its result, and its calls in one step."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    result: Any
    calls: int


def one_step(config: Any, reward: Reward | None = None) -> dict[str, Program]:
    """The programs of one step by name, in the order in which `loop.one_step` calls them.

    Batches are those of config.batch; config.data is not opened. reward: one in place of config.reward, whose params may be
    shapes, so that no scorer is read. Raises what `build.build_run` raises for what does not fit together.
    """
    bundle, params, _ = build.described(config)
    reward = build.reward(config) if reward is None else reward
    parts = build.planned(config, bundle, params, reward).parts
    programs, needs = compile_programs(parts), parts.algorithm.needs
    prompts, group, size = build.batch_sizes(config)
    n = prompts * group
    out: dict[str, Program] = {}

    def call(name: str, rows: int, *arguments: Any) -> Any:
        function = getattr(programs, name)
        result = jax.eval_shape(function, *arguments)
        out[name] = Program(function, arguments, result, -(-rows // min(size, rows)))
        return result

    key = jax.random.key(0)
    trained, frozen_params = jax.eval_shape(parts.partition.init, key, params)
    tokens = jnp.asarray(bundle.tokenize([""]))
    frozen = {"params": frozen_params, "reward": shapes(reward.params) if reward else None}
    frozen["null"] = jax.eval_shape(programs.encode, {"params": params}, tokens)
    state = call("init", 1, key, trained, frozen["null"])
    condition = reward.encode([""]) if reward and reward.encode and needs.data == "prompts" else {}
    data = {"cond": call("encode", 1, frozen, rows(tokens, n)), "condition": rows(condition, n), "prompt_id": Shape((n,), jnp.int32)}
    samples = {"labels": ("x0",), "desirable": ("x0",), "pairs": ("winner", "loser"), "lists": ("list",)}.get(needs.data, ())
    length = int(dict(config.get("data") or {}).get("length", 4)) if needs.data == "lists" else 1
    if samples:
        x = Shape((min(size, n * length), *bundle.sample_shape), jnp.float32)
        pictures = jax.eval_shape(programs.to_pictures, frozen, x)
        call("to_samples", n * length * len(samples), frozen, Shape(pictures.shape, jnp.uint8))
        data |= {name: rows(x, n) for name in samples}
    if needs.data == "desirable":
        data["desirable"] = Shape((n,), jnp.float32)
    if needs.data == "lists":
        data |= {"list": Shape((n, length, *bundle.sample_shape), jnp.float32), "score": Shape((n, length), jnp.float32)}
    if needs.data == "pairs":
        data |= {name: Shape((n,), jnp.float32) for name in ("preference", "weight")}
    rolled = rows(call("rollout", n, state, frozen, keys(min(size, n)), rows(data, min(size, n))), n)
    rewards = None
    if needs.reward == "value":
        assert reward is not None
        part = rows({"x0": rolled["x0"], "condition": rolled.get("condition", {})}, min(size, n))
        if reward.device:
            call("score", n, frozen, part["x0"], part["condition"])
        else:
            call("to_pictures", n, frozen, part["x0"])
        rewards = Shape((n, len(columns(reward))) if columns(reward) else (n,), jnp.float32)
    items, _, _ = call("prepare", 1, key, state.extra, rolled, rewards)
    count = len(jax.tree.leaves(items)[0])
    m = min(size, count)
    part = rows(items, m) | ({"cond": rows(rolled["cond"], m)} if "row" in items else {})
    items = call("anchor", count, state, frozen, keys(m), part)
    updates = int(config.batch.get("updates", 1))
    items = {**items, "first": Shape((m,), jnp.bool_)}
    share = Shape((m,), jnp.float32)
    gradients = call("gradient", count, learned(state), state.copies, frozen, keys(m), items, share)
    if count // updates > m:
        call("accumulate", count - m * updates, gradients, gradients)
    call("apply", 1, state, gradients)
    out["apply"] = out["apply"]._replace(calls=updates)
    return out


def rows(tree: Tree, n: int) -> Tree:
    """The tree's shapes with leading axis n."""
    return jax.tree.map(lambda x: Shape((n, *x.shape[1:]), x.dtype), tree)


def shapes(tree: Tree) -> Tree:
    """The tree's shapes."""
    return jax.tree.map(lambda x: Shape(jnp.shape(x), jnp.result_type(x)), tree)


def keys(n: int) -> Shape:
    """The shape of n keys."""
    result: Shape = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), n))
    return result
