"""The compiled programs of a run, from the first parameters to the update."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from ..algorithms.base import Algorithm, Networks
from ..diffusion import Denoise, guided
from ..models import lora
from ..models.bundle import ModelBundle
from ..rewards.base import Reward
from .state import Partition, TrainState, follow

Array = jax.Array
Tree = Any


class Guidance(NamedTuple):
    """Classifier-free guidance of a run: see `diffusion.guided`; interval in the network's own times, None for all of them."""

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] | None = None


class Parts(NamedTuple):
    """The parts that a config names, built."""

    bundle: ModelBundle
    algorithm: Algorithm
    partition: Partition
    optimizer: optax.GradientTransformation
    reward: Reward | None = None
    guidance: Guidance = Guidance()
    ema_decay: float = 0.0
    trains_text: bool = False
    redraw: Callable[..., Tree] | None = None


class Programs(NamedTuple):
    """Jitted functions; `frozen` is {"params", "reward", "null"}, always an argument and never closed over."""

    init: Callable[..., TrainState]
    encode: Callable[..., Tree]
    to_samples: Callable[..., Array]
    to_pictures: Callable[..., Array]
    rollout: Callable[..., Tree]
    score: Callable[..., Array]
    prepare: Callable[..., Any]
    anchor: Callable[..., Tree]
    gradient: Callable[..., Any]
    accumulate: Callable[..., Any]
    apply: Callable[..., Any]


def bind(parts: Parts, learned: Tree, copies: Tree, frozen: Tree) -> Networks:
    """The networks an algorithm sees: policy and its copies, guided; policy unguided; its own ones; the reward.

    learned: (trained, {name: parameters of an own network}), what gradients are taken of.
    """
    trained, own = learned
    scales = {**dict.fromkeys(["policy", *copies], parts.guidance.scale), **parts.algorithm.needs.guidance}

    def network(name: str, tree: Tree) -> Denoise:
        denoise = partial(lora.adapted(parts.bundle.denoise), parts.partition.combine(tree, frozen["params"]))
        return guided(denoise, frozen["null"], scales[name], rescale=parts.guidance.rescale, interval=parts.guidance.interval)

    scales["unguided"] = 1.0
    networks: dict[str, Callable[..., Array]] = {"policy": network("policy", trained), "unguided": network("unguided", trained)}
    networks |= {name: network(name, jax.lax.stop_gradient(tree)) for name, tree in copies.items()}
    networks |= {name: partial(network.apply, own[name]) for name, network in parts.algorithm.needs.own.items()}
    if parts.algorithm.needs.reward == "gradient":
        networks["reward"] = partial(differentiable_reward, parts, frozen)
    if parts.algorithm.needs.reward in ("step", "state"):
        networks["reward"] = partial(step_value, parts, frozen)
    return networks


def step_value(parts: Parts, frozen: Tree, x: Array, x0: Array, t: Array, cond: Tree, condition: Tree) -> Array:
    """The reward [B] of a state x at time t with clean prediction x0: of x itself if the reward reads noisy latents, else of x0."""
    assert parts.reward is not None
    if parts.reward.noisy:
        return parts.reward.score(frozen["reward"], x, {"t": t, "cond": cond})
    return value(parts, frozen, x0, condition)


def value(parts: Parts, frozen: Tree, x0: Array, condition: Tree) -> Array:
    """r(decode(x0), c) [B]."""
    assert parts.reward is not None
    return parts.reward.score(frozen["reward"], parts.bundle.decode(frozen["params"], x0), condition)


def learned(state: TrainState) -> Tree:
    """What gradients are taken of: (trained, {name: parameters of an own network})."""
    return state.trained, {name: params for name, (params, _) in state.own.items()}


def differentiable_reward(parts: Parts, frozen: Tree, keys: Array, x0: Array, condition: Tree) -> Array:
    """r(augment(decode(x0)), c) [B] with a gradient; the augmentation of a microbatch comes from its first key."""
    assert parts.reward is not None
    observation = parts.bundle.decode(frozen["params"], x0)
    if parts.reward.augment is not None:
        observation = parts.reward.augment(keys[0], observation)
    return parts.reward.score(frozen["reward"], observation, condition)


def build(parts: Parts, kept: Callable[[Tree], Tree] = lambda tree: tree, cut: Callable[[Tree], Tree] = lambda tree: tree,
          layer: Callable[[nn.Module, Array], Array] = lambda module, x: x, options: dict[str, Any] | None = None) -> Programs:  # fmt: skip
    """Compiles nothing yet: each program compiles at its first call, and only then.

    kept(tree), cut(tree), layer(module, x): inside a program, say where on the devices a state and gradients lie, a batch, and what
    a layer of a network gives; options: of the compiler, for the programs that run networks (see `sharding`).
    """
    algorithm, bundle = parts.algorithm, parts.bundle

    own = {name: optax.adam(network.learning_rate) for name, network in algorithm.needs.own.items()}

    def init(key: Array, trained: Tree, cond: Tree) -> TrainState:
        # built inside jit, so that no buffer is shared with the caller's parameters: donation deletes them
        key_extra, key_run, key_own = jax.random.split(key, 3)
        copies = {name: trained for name in algorithm.needs.copies}
        fresh = {name: network.init(jax.random.fold_in(key_own, i), cond)
                 for i, (name, network) in enumerate(algorithm.needs.own.items())}  # fmt: skip
        ema = trained if parts.ema_decay else None
        return kept(TrainState(jnp.zeros((), jnp.int32), trained, parts.optimizer.init(trained), copies,
                               {name: (params, own[name].init(params)) for name, params in fresh.items()}, ema,
                               algorithm.init(key_extra), key_run))  # fmt: skip

    def encode(frozen: Tree, tokens: Array) -> Tree:
        return {"tokens": tokens} if parts.trains_text else bundle.encode_text(frozen["params"], tokens)

    def to_samples(frozen: Tree, pictures: Array) -> Array:
        return bundle.encode(frozen["params"], pictures.astype(jnp.float32) / 255.0)

    def to_pictures(frozen: Tree, x0: Array) -> Array:
        return bundle.decode(frozen["params"], x0)

    def rollout(state: TrainState, frozen: Tree, keys: Array, data: Tree) -> Tree:
        rolled = algorithm.rollout(keys, state.extra, bind(parts, learned(state), state.copies, frozen), data)
        if parts.redraw is None:
            return rolled
        return parts.redraw(parts.partition.combine(state.trained, frozen["params"]), frozen, keys, data, rolled)

    def score(frozen: Tree, x0: Array, condition: Tree) -> Array:
        return value(parts, frozen, x0, condition)

    def prepare(key: Array, extra: Tree, rolled: Tree, rewards: Array | None) -> Any:
        items, extra, info = algorithm.prepare(key, extra, rolled, rewards)
        return cut(items), extra, info

    def anchor(state: TrainState, frozen: Tree, keys: Array, items: Tree) -> Tree:
        return algorithm.anchor(keys, bind(parts, learned(state), state.copies, frozen), items)

    def gradient(learned: Tree, copies: Tree, frozen: Tree, keys: Array, items: Tree, share: Array) -> Any:
        """(gradients, sums): share [m] is each item's share of the whole batch, 0 for padding."""

        def total(learned: Tree) -> tuple[Array, dict[str, Array]]:
            losses, info = algorithm.loss(keys, bind(parts, learned, copies, frozen), items)
            values = {"loss": losses, **jax.lax.stop_gradient(info)}
            kept = share > 0
            sums = {k: jnp.where(kept, v, -jnp.inf).max() if k.endswith("_max") else jnp.where(kept, share * v, 0.0).sum()
                    for k, v in values.items()}  # fmt: skip
            return sums["loss"], sums

        grads, sums = jax.grad(total, has_aux=True)(learned)
        return kept(grads), sums

    def accumulate(a: Any, b: Any) -> Any:
        (grads_a, sums_a), (grads_b, sums_b) = a, b
        sums = {k: jnp.maximum(v, sums_b[k]) if k.endswith("_max") else v + sums_b[k] for k, v in sums_a.items()}
        return jax.tree.map(jnp.add, grads_a, grads_b), sums

    def apply(state: TrainState, gradients: Any) -> tuple[TrainState, dict[str, Array]]:
        (grads, own_grads), sums = gradients
        updates, opt_state = parts.optimizer.update(grads, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        step = state.step + 1
        others = {}
        for name, (params, memory) in state.own.items():
            change, memory = own[name].update(own_grads[name], memory, params)
            others[name] = (optax.apply_updates(params, change), memory)
        rules = algorithm.needs.copies
        copies = {name: follow(rules[name], copy, trained, step) for name, copy in state.copies.items()}
        ema = follow(("ema", parts.ema_decay), state.ema, trained, step) if parts.ema_decay else None
        info = {**sums, "grad_norm": optax.tree.norm(grads)}
        return kept(state._replace(step=step, trained=trained, opt_state=opt_state, copies=copies, own=others, ema=ema)), info

    def on_batch(program: Callable[..., Tree], same: int) -> Callable[..., Tree]:
        """The jitted program, whose arguments after the first `same` are batches."""

        def placed(call: Callable[..., Tree], inputs: Any, options: Any, context: Any) -> Tree:
            return jax.tree.map(partial(layer, context.module), call(*inputs, **options))

        @wraps(program)
        def called(*arguments: Tree) -> Tree:
            with nn.intercept_methods(placed):
                return program(*arguments[:same], *cut(arguments[same:]))

        return jax.jit(called, compiler_options=options)

    return Programs(
        init=jax.jit(init), encode=on_batch(encode, 1), to_samples=on_batch(to_samples, 1), to_pictures=on_batch(to_pictures, 1),
        rollout=on_batch(rollout, 2), score=on_batch(score, 1), prepare=jax.jit(prepare),
        anchor=on_batch(anchor, 2), gradient=on_batch(gradient, 3),
        accumulate=jax.jit(accumulate, donate_argnums=0), apply=jax.jit(apply, donate_argnums=0),
    )  # fmt: skip
