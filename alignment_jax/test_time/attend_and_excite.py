"""Attend-and-Excite: the state of a chain is moved until every subject of the prompt is looked at somewhere."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..diffusion import Sampler, draw, sample
from ..diffusion.sample import State
from .base import Info, Method, Needs, Networks, Tree, ascent, start

Array = jax.Array
# a_s that is asked for from a place in the chain on; steps 0, 10 and 20 of 50 in the paper
THRESHOLDS = {0.0: 0.05, 0.2: 0.5, 0.4: 0.8}


class Loop(NamedTuple):
    """A state while it is refined: refinements so far, x [B, ...], min_s a_s [B], its gradient [B, ...], those of each sample [B]."""

    k: Array
    x: Array
    a: Array
    gradient: Array
    counts: Array


def attend_and_excite(sampler: Sampler, shape: tuple[int, ...], *, strength: float = 20.0, share: float = 0.5,
                      refinements: int = 20, sharpness: float = 100.0,
                      thresholds: Mapping[float, float] | None = None) -> Method:  # fmt: skip
    """x_t <- x_t + alpha_t grad min_s a_s before the steps of the first `share` of the chain (arXiv 2301.13826, algorithm 1).

    a_s, see `attended`, is how much the best position looks at subject s; alpha_t = strength sqrt(linspace(1, 1/2)_t).
    thresholds {place in the chain, 0 to 1: a}: at that step x_t is moved again until min_s a_s >= a, at most `refinements`
    times. Maps are those of the conditional branch. A prompt without subjects is drawn by the plain chain. Costs, in each of
    these steps, one pass and its backward through the network up to the last layer with maps, and as many for a refinement.
    Departure: a word of several tokens counts as one subject, by the sum of their maps. Raises ValueError for settings
    outside their ranges.
    """
    of_chain = dict(THRESHOLDS if thresholds is None else {float(k): v for k, v in thresholds.items()})
    if strength < 0 or sharpness <= 0 or refinements < 0:
        raise ValueError("strength and refinements must not be negative and sharpness must be positive; got "
                         f"strength={strength}, refinements={refinements}, sharpness={sharpness}")  # fmt: skip
    if not 0 <= share <= 1 or not all(0 <= k < 1 and 0 <= v <= 1 for k, v in of_chain.items()):
        raise ValueError(f"share and thresholds {{place in the chain: attention}} must lie in [0, 1]; got share={share}, "
                         f"thresholds={of_chain}")  # fmt: skip
    length = sampler.num_steps
    steps = round(share * length)
    alphas = jnp.asarray(strength * np.sqrt(np.linspace(1.0, 0.5, length)), jnp.float32)
    wanted = np.zeros(length, np.float32)
    for place, a in of_chain.items() if refinements else ():
        wanted[round(place * length) % length] = max(a, wanted[round(place * length) % length])

    def draw_(keys: Array, networks: Networks, data: Tree) -> tuple[Array, Info]:
        x_T, keys_of_steps = start(keys, sampler, shape)
        cond, subjects = data["cond"], data["subjects"]

        def looked_at(i: Array, x: Array) -> tuple[Array, Array]:
            t = jnp.broadcast_to(jnp.asarray(sampler.grid.t)[i], x.shape[:1])
            a, gradient, _ = ascent(lambda x: (attended(networks["attention"](x, t, cond), subjects, sharpness), None), x)
            return a, gradient

        def move(i: Array, x: Array, gradient: Array, where: Array) -> Array:
            return x + jnp.where(where.reshape(-1, *[1] * (x.ndim - 1)), alphas[i] * gradient, 0.0)

        def refine(i: Array, loop: Loop) -> Loop:
            def again(loop: Loop) -> Loop:
                x = move(i, loop.x, loop.gradient, short(loop))
                return Loop(loop.k + 1, x, *looked_at(i, x), loop.counts + short(loop))

            short = lambda loop: loop.a < jnp.asarray(wanted)[i]  # noqa: E731
            return jax.lax.while_loop(lambda loop: (loop.k < refinements) & short(loop).any(), again, loop)

        def excite(i: Array, x: Array, info: Info) -> tuple[Array, Info]:
            loop = Loop(jnp.int32(0), x, *looked_at(i, x), info["refinements"])
            loop = jax.lax.cond(jnp.asarray(wanted)[i] > 0, partial(refine, i), lambda loop: loop, loop)
            x = move(i, loop.x, loop.gradient, jnp.ones(len(x), bool))
            return x, {"attention": loop.a, "refinements": loop.counts}

        def select(key: Array, i: Array, state: State) -> State:
            x, carry = jax.lax.cond(i + 1 < steps, lambda x, c: excite(i + 1, x, c), lambda x, c: (x, c), state.x, state.carry)
            return state._replace(x=x, carry=carry)

        if steps == 0 or strength == 0:
            return draw(keys, networks["policy"], cond, sampler, shape)[0], {}
        x_T, info = excite(jnp.int32(0), x_T, {"refinements": jnp.zeros(len(keys), jnp.int32)})
        out: tuple[Array, Any] = sample(keys_of_steps, networks["policy"], cond, sampler, x_T, select=select, carry=info)
        return out

    return Method(Needs(attention=True), draw_)


def attended(maps: Array, subjects: Array, sharpness: float = 100.0) -> Array:
    """min_s a_s [B] of maps [B,h,w,L] and subjects [B,L], numbered from 1, 0 for none; 1 where there is none.

    a_s = max over positions of smooth(softmax(sharpness A))_s, where A are the maps without the start token, the first, and
    the softmax runs over tokens; a subject's map is the sum of its tokens'.
    """
    kept = (jnp.arange(maps.shape[-1]) > 0) | (subjects > 0)
    shares = jax.nn.softmax(jnp.where(kept[:, None, None, :], sharpness * maps, -jnp.inf), -1)
    belongs = subjects[:, :, None] == jnp.arange(1, maps.shape[-1] + 1)  # [B, L, subject]
    peaks = smooth(jnp.einsum("bhwl,bls->bhws", shares, belongs.astype(shares.dtype))).max((1, 2))
    return jnp.where(belongs.any(1), peaks, 1.0).min(1)


def smooth(maps: Array) -> Array:
    """Maps [B,h,w,...] under a 3 x 3 Gaussian of deviation 1/2, reflected at the border."""
    beside = float(np.exp(-2.0))
    for axis in (1, 2):
        size = maps.shape[axis]
        padded = jnp.pad(maps, [(1, 1) if i == axis else (0, 0) for i in range(maps.ndim)], mode="reflect")
        before, middle, after = (jax.lax.slice_in_dim(padded, k, k + size, axis=axis) for k in range(3))
        maps = (middle + beside * (before + after)) / (1 + 2 * beside)
    return maps
