"""One step of a config in shapes: what every compiled program takes and gives, with no parameter read and no array made."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ..data import prompts as prompt_files
from ..rewards import Reward, columns
from . import build, sharding, stream
from .programs import build as compile_programs
from .programs import learned

Tree = Any
Shape = jax.ShapeDtypeStruct


class Program(NamedTuple):
    """A jitted function of `programs.build`, the shapes of its arguments and of its result, and its calls in one step.

    held: what of the step waits on the devices meanwhile, besides the arguments, the state and what is frozen.
    """

    function: Any
    arguments: tuple[Any, ...]
    result: Any
    calls: int
    held: Any = ()


def one_step(config: Any, reward: Reward | None = None, on: sharding.Layout | None = None) -> dict[str, Program]:
    """The programs of one step by name, in the order in which `loop.one_step` calls them.

    Batches are those of config.batch; of config.data nothing but prompts is opened. reward: one in place of config.reward, whose
    params may be shapes, so that no scorer is read. on: where all lies, on devices that need not be there; arguments then carry
    shardings: frozen and state those of `sharding.shardings`, batches that of `sharding.BATCH`, keys lie whole on every device.
    Raises what `build.build_run` raises for what does not fit together.
    """
    bundle, params, _ = build.described(config)
    reward = build.reward(config) if reward is None else reward
    shards = None if on is None else sharding.shards(on.mesh)
    parts = build.planned(config, bundle, params, reward, shards).parts
    programs = compile_programs(parts) if on is None else sharding.programs(on, parts)
    needs = parts.algorithm.needs
    prompts, group, size = stream.batch_sizes(config, shards)
    n = prompts * group
    rows, fixed, keys = partial(_rows, on), partial(_fixed, on), lambda n: _fixed(on, _keys(n))
    out: dict[str, Program] = {}

    def call(name: str, rows: int, *arguments: Any, held: Any = ()) -> Any:
        function = getattr(programs, name)
        result = jax.eval_shape(function, *arguments)
        out[name] = Program(function, arguments, result, -(-rows // min(size, rows)), held)
        return result

    key = fixed(jax.eval_shape(lambda: jax.random.key(0)))
    trained, frozen_params = jax.eval_shape(parts.partition.init, key, params)
    tokens = jnp.asarray(bundle.tokenize([""]))
    apart = on is not None and on.scorers is not None
    frozen = {"params": frozen_params, "reward": shapes(reward.params) if reward and not apart else None}
    frozen["null"] = jax.eval_shape(programs.encode, {"params": params}, tokens)
    frozen = fixed(frozen)
    state = fixed(call("init", 1, key, fixed(trained), frozen["null"]))
    prompts_of = lambda: prompt_files.load(dict(config.get("data") or {}).get("prompts", "critters:train"))[:1]
    condition = reward.encode(prompts_of()) if reward and reward.encode and needs.data == "prompts" else {}
    cond = rows(call("encode", 1, frozen, rows(tokens, n)), n)
    data = {"cond": cond, "condition": rows(condition, n), "prompt_id": rows(jnp.zeros(1, jnp.int32), n)}
    samples = {"labels": ("x0",), "desirable": ("x0",), "pairs": ("winner", "loser"), "lists": ("list",)}.get(needs.data, ())
    length = int(dict(config.get("data") or {}).get("length", 4)) if needs.data == "lists" else 1
    if samples:
        x = Shape((min(size, n * length), *bundle.sample_shape), jnp.float32)
        pictures = jax.eval_shape(programs.to_pictures, frozen, x)
        call("to_samples", n * length * len(samples), frozen, rows(Shape(pictures.shape, jnp.uint8), len(x)), held=data)
        data |= {name: rows(x, n) for name in samples}
    if needs.data == "desirable":
        data["desirable"] = rows(Shape((1,), jnp.float32), n)
    if needs.data == "lists":
        data |= {"list": rows(Shape((1, length, *bundle.sample_shape), jnp.float32), n), "score": rows(Shape((1, length), jnp.float32), n)}
    if needs.data == "pairs":
        data |= {name: rows(Shape((1,), jnp.float32), n) for name in ("preference", "weight")}
    waiting = lambda count, *trees: trees if count > size else ()  # one microbatch is the whole, and no copy of it
    rolled = jax.eval_shape(programs.rollout, state, frozen, keys(min(size, n)), rows(data, min(size, n)))
    before, rolled = rows(rolled, (-(-n // size) - 1) * size), rows(rolled, n)
    call("rollout", n, state, frozen, keys(min(size, n)), rows(data, min(size, n)), held=waiting(n, data, before))
    rewards = None
    if needs.reward == "value":
        assert reward is not None
        part = rows({"x0": rolled["x0"], "condition": rolled.get("condition", {})}, min(size, n))
        if reward.device and not apart:
            call("score", n, frozen, part["x0"], part["condition"], held=(data, rolled))
        else:
            shown = call("to_pictures", n, frozen, part["x0"], held=(data, rolled))
            # those of the microbatch before are scored meanwhile; of all, where the last one is filled up or other devices score
            shown = waiting(n, rows(shown, len(jax.tree.leaves(before)[0]) if apart or n % size else size))
            out |= {name: out[name]._replace(held=(out[name].held, shown)) for name in ("rollout", "to_pictures")}
        rewards = rows(Shape((1, len(columns(reward))) if columns(reward) else (1,), jnp.float32), n)
    items, _, _ = call("prepare", 1, key, state.extra, rolled, rewards, held=waiting(n, data))
    count, updates = len(jax.tree.leaves(items)[0]), int(config.batch.get("updates", 1))
    m, cond = min(size, count), (data, rolled["cond"]) if n > size else data
    part = rows(items, m) | ({"cond": rows(rolled["cond"], m)} if "row" in items else {})
    items = rows(items, count)
    anchored = call("anchor", count, state, frozen, keys(m), part, held=(cond, *waiting(count, items)))
    without = {k: v for k, v in anchored.items() if k != "cond" or "row" not in items}
    out["anchor"] = out["anchor"]._replace(held=(out["anchor"].held, *waiting(count, rows(without, count - m))))  # the results before
    kept = rows(without, count)
    kept = (cond, kept, rows(kept, count // updates)) if updates > 1 else (cond, *waiting(count, kept))
    anchored = rows({**anchored, "first": Shape((m,), jnp.bool_)}, m)
    share = rows(Shape((1,), jnp.float32), m)
    gradients = jax.eval_shape(programs.gradient, learned(state), state.copies, frozen, keys(m), anchored, share)
    gradients, several = fixed(gradients), count // updates > m
    call("gradient", count, learned(state), state.copies, frozen, keys(m), anchored, share, held=(kept, gradients) if several else kept)
    if several:
        call("accumulate", count - m * updates, gradients, gradients, held=(kept, rows(without, m)))
    call("apply", 1, state, gradients, held=kept)
    out["apply"] = out["apply"]._replace(calls=updates)
    return out


def shapes(tree: Tree) -> Tree:
    """The tree's shapes."""
    return jax.tree.map(lambda x: Shape(jnp.shape(x), jnp.result_type(x)), tree)


def _rows(on: sharding.Layout | None, tree: Tree, n: int) -> Tree:
    """The tree's shapes with leading axis n, which is cut over the devices where it divides."""
    cut = n and on is not None and n % sharding.shards(on.mesh) == 0
    where = None if on is None else NamedSharding(on.mesh, sharding.BATCH if cut else PartitionSpec())
    return jax.tree.map(lambda x: Shape((n, *x.shape[1:]), x.dtype, sharding=where), tree)


def _fixed(on: sharding.Layout | None, tree: Tree) -> Tree:
    """The tree's shapes, where its paths say that they lie."""
    if on is None:
        return shapes(tree)
    return jax.tree.map(lambda x, where: Shape(x.shape, x.dtype, sharding=where), tree, sharding.shardings(on, tree))


def _keys(n: int) -> Shape:
    """The shape of n keys."""
    result: Shape = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), n))
    return result
