"""Embeddings that climb the reward: the prompt's, the negative prompt's (ReNeg), or the prompt's on the way (DATE)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ..diffusion import Denoise, Sampler, State, fold_in, sample
from .base import Info, Method, Needs, Networks, Tree, ascent, clean, climb, start, walk

Array = jax.Array
Embedding = list[Array]
Seen = Callable[[Networks, Tree, Tree], tuple[Denoise, Tree]]


def prompt_embedding(sampler: Sampler, shape: tuple[int, ...], *, iterations: int = 10, learning_rate: float = 5e-3,
                     late: int | None = None) -> Method:  # fmt: skip
    """Gradient ascent (Adam) on the prompt's embedding c, for each sample its own: r(x0_hat(x_i, c)) at a late step i.

    An iteration walks the chain without gradients to a random one of the last `late` steps (None: a third of them) and takes
    the reward's gradient through the clean prediction there: T + 1 network calls, one of them with its backward. late = 0: through
    the whole chain, T calls with their backward. Of the condition, float arrays move and sizes (time_ids) do not. The walk's
    noises are the same at every iteration; its best end by reward is returned. info: reward, gain, iteration, moved (|c - c_0|).
    As ReNeg's (arXiv 2412.19637) but on the prompt's side; TextCraftor (arXiv 2403.18978) trains the text encoder for it.
    """

    def seen(networks: Networks, data: Tree, cond: Tree) -> tuple[Denoise, Tree]:
        return networks["policy"], cond

    return Method(Needs("gradient"), _climbing("cond", seen, sampler, shape, iterations, learning_rate, late))


def reneg(sampler: Sampler, shape: tuple[int, ...], *, guidance: float, iterations: int = 10, learning_rate: float = 5e-3,
          late: int | None = None) -> Method:  # fmt: skip
    """Gradient ascent on the negative prompt's embedding, for each sample its own (ReNeg, arXiv 2412.19637).

    out = out_n + guidance (out_c - out_n), and the reward's gradient goes to n alone, from the empty or negative prompt on; all
    else as in `prompt_embedding`. Guidance 1 has no negative: refused. The paper: 30 DDIM steps, one of the last 10, rate 5e-3, at
    most 10 iterations a sample, HPSv2.1. Departures: Adam without decay, which would pull n to zero; the best iterate is kept.
    """

    def seen(networks: Networks, data: Tree, null: Tree) -> tuple[Denoise, Tree]:
        return networks["guide"](guidance, null=null), data["cond"]

    return Method(Needs("gradient", guidance=True), _climbing("null", seen, sampler, shape, iterations, learning_rate, late))


def date(sampler: Sampler, shape: tuple[int, ...], *, every: int = 10, rho: float = 0.5, updates: int = 1,
         accumulate: bool = True) -> Method:  # fmt: skip
    """Before every `every`-th step but the last, c <- c + rho g / |g|, g = grad_c r(x0_hat(x_i, c)) (DATE, arXiv 2510.23974).

    `updates` times each; |g| over all that moves of a sample's condition (see `prompt_embedding`), and g = 0 moves nothing. The step
    itself sees the new c. Only the prompt's side of guidance moves. accumulate: from the last c on, else from the prompt's own.
    Costs T network calls and, for each update, one with its backward. The paper: SD1.5, 50 DDIM steps, guidance 8, every 10, rho 0.5.
    Its optional pull towards the first c is left out. info: reward, moved (|c - c_0|).
    """
    steps = sampler.num_steps
    if every < 1 or updates < 0 or rho < 0:
        raise ValueError(f"date needs every >= 1, updates >= 0 and rho >= 0; got {every}, {updates} and {rho}")

    def draw(keys: Array, networks: Networks, data: Tree) -> tuple[Array, Info]:
        x_T, step_keys = start(keys, sampler, shape)
        first, rebuild = movable(data["cond"], len(keys))

        def update(i: Array | int, x: Array, cond: Tree) -> Tree:
            c = movable(cond, len(keys))[0] if accumulate else first

            def climb_once(n: Array, c: Embedding) -> Embedding:
                def value(c: Embedding) -> tuple[Array, None]:
                    x0, _ = clean(sampler, i, networks["policy"], x, rebuild(c))
                    return networks["augmented"](fold_in(fold_in(keys, 2 + n), i), x0, data["condition"]), None

                _, gradient, _ = ascent(value, c)
                norm = distance(gradient, None)
                scale = rho * jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1.0), 0.0)
                return [a + (scale.reshape(-1, *[1] * (a.ndim - 1)) * g).astype(a.dtype) for a, g in zip(c, gradient)]

            return rebuild(jax.lax.fori_loop(0, updates, climb_once, c))

        def select(key: Array, i: Array, state: State) -> State:
            chosen = ((i + 1) % every == 0) & (i + 1 < steps - 1)
            return state._replace(cond=jax.lax.cond(chosen, lambda s: update(i + 1, s.x, s.cond), lambda s: s.cond, state))

        on = rho > 0 and updates > 0 and steps > 1
        cond = update(0, x_T, rebuild(first)) if on else data["cond"]
        again = on and every < steps - 1
        keep = lambda key, i, state: (select(key, i, state) if again else state)._replace(carry=state.cond)  # noqa: E731
        x0, cond = sample(step_keys, networks["policy"], cond, sampler, x_T, select=keep if on else None, carry=cond)
        moved = distance(movable(cond, len(keys))[0], first)
        return x0, {"reward": networks["reward"](keys, x0, data["condition"]), "moved": moved}

    return Method(Needs("gradient"), draw)


def movable(cond: Tree, batch: int) -> tuple[Embedding, Callable[[Embedding], Tree]]:
    """(the arrays [B, ...] of a condition that are an embedding: floats, but no sizes; what puts such into the condition)."""
    paths, structure = jax.tree_util.tree_flatten_with_path(cond)
    whole = [jnp.broadcast_to(x, (batch, *x.shape[1:])) for _, x in paths]
    free = [bool(jnp.issubdtype(x.dtype, jnp.floating)) and "time_ids" not in jax.tree_util.keystr(path) for path, x in paths]

    def rebuild(c: Embedding) -> Tree:
        rest = iter(c)
        return jax.tree.unflatten(structure, [next(rest) if moves else x for x, moves in zip(whole, free)])

    return [x for x, moves in zip(whole, free) if moves], rebuild


def distance(a: Embedding, b: Embedding | None) -> Array:
    """Euclidean distance [B] of embeddings over all their arrays; b None: of a from zero."""
    gaps = a if b is None else [x - y for x, y in zip(a, b)]
    return jnp.sqrt(sum(jnp.square(gap.astype(jnp.float32)).reshape(len(gap), -1).sum(1) for gap in gaps))


def _climbing(side: str, seen: Seen, sampler: Sampler, shape: tuple[int, ...], iterations: int, learning_rate: float,
              late: int | None) -> Callable[..., tuple[Array, Info]]:  # fmt: skip
    """draw of a method that climbs on data[side]; seen(networks, data, that side) -> (denoiser, its condition)."""
    steps = sampler.num_steps
    last = max(1, steps // 3) if late is None else late
    if iterations < 0 or learning_rate < 0 or not 0 <= last <= steps:
        raise ValueError(f"iterations and learning_rate must be at least 0, and late lie in 0..{steps}, the chain's steps; got "
                         f"{iterations}, {learning_rate} and {late}")  # fmt: skip

    def draw(keys: Array, networks: Networks, data: Tree) -> tuple[Array, Info]:
        first, rebuild = movable(data[side], len(keys))
        x_T, step_keys = start(keys, sampler, shape)
        of_reward, of_stop = fold_in(keys, 2), fold_in(keys, 3)

        def value(i: Array | int, c: Embedding) -> tuple[Array, tuple[Array, Info]]:
            denoise, cond = seen(networks, data, rebuild(c))
            if last:
                stop = steps - 1 - jax.vmap(lambda key: jax.random.randint(key, (), 0, last))(fold_in(of_stop, i))
                fixed, fixed_cond = seen(networks, data, rebuild(jax.lax.stop_gradient(c)))

                def remember(key: Array, j: Array, state: State) -> State:
                    now = (j + 1 == stop).reshape(-1, *[1] * len(shape))
                    return state._replace(carry=jnp.where(now, state.x, state.carry))

                end, x = sample(step_keys, fixed, fixed_cond, sampler, x_T, select=remember, carry=x_T)
                x0, _ = clean(sampler, stop, denoise, jnp.asarray(x), cond)
            else:
                x0 = end = walk(step_keys, denoise, cond, sampler, x_T)
            promise = networks["augmented"](fold_in(of_reward, i), x0, data["condition"])
            reward = networks["reward"](keys, jax.lax.stop_gradient(end), data["condition"])
            return promise, (end, {"reward": reward, "moved": distance(jax.lax.stop_gradient(c), first)})

        return climb(value, first, optax.adam(learning_rate), iterations)

    return draw
