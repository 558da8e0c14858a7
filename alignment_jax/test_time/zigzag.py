"""Zigzag sampling: every step is taken, undone with less guidance, and taken again."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..diffusion import Sampler, State, inverse, sample, transition
from .base import Info, Method, Needs, Networks, Tree, start

Array = jax.Array


def zigzag(sampler: Sampler, shape: tuple[int, ...], *, zigzags: int = 1, steps: int | None = None, inverse_scale: float = 0.0,
           guidance: float | None = None) -> Method:  # fmt: skip
    """The first `steps` steps (default: all but the last) are denoised, then inverted and denoised again `zigzags` times each.

    Denoising has the sampler's guidance g1, 5.5 in the paper (arXiv 2412.10891), the inversion g2 = inverse_scale: each zigzag
    puts the gap of guidance in once more. For an eps that does not depend on x it is guidance g1 + zigzags (g1 - g2) exactly, and
    g1 = g2 is no change: compare with plain sampling at a higher scale. No reward. Costs T + 2 zigzags steps network calls, each
    with and without the prompt. Raises ValueError for negative counts, for steps beyond the one before the last, for g2 > g1, and
    for a solver with a memory.
    """
    count = sampler.num_steps - 1 if steps is None else steps
    if zigzags < 0:
        raise ValueError(f"zigzags must be at least 0; got {zigzags}")
    if not 0 <= count < sampler.num_steps:
        raise ValueError(f"steps must lie before the last one, 0..{sampler.num_steps - 1} in a chain of {sampler.num_steps}; got {steps}")
    if guidance is not None and not inverse_scale <= guidance:
        raise ValueError(f"inverse_scale={inverse_scale} above guidance_scale={guidance} leads away from the prompt; set it below")
    if count and zigzags and sampler.solver == "dpmsolver++":
        raise ValueError("solver 'dpmsolver++' looks back to steps that are undone; choose scheduler ddim or euler")

    def draw(keys: Array, networks: Networks, data: Tree) -> tuple[Array, Info]:
        policy, lesser, times = networks["policy"], networks["guide"](inverse_scale), jnp.asarray(sampler.grid.t)

        def again(key: Array, i: Array, state: State) -> State:
            def turn(_: int, now: tuple[Array, Array]) -> tuple[Array, Array]:
                t = jnp.broadcast_to(times[i], now[0].shape[:1])
                back = inverse(sampler, i, now[0], lesser(now[0], t, state.cond))
                moved = transition(sampler, i, back, policy(back, t, state.cond))
                return moved.mean, moved.x0

            x, x0 = jax.lax.cond(i < count, lambda now: jax.lax.fori_loop(0, zigzags, turn, now), lambda now: now, (state.x, state.x0))
            return state._replace(x=x, x0=x0)

        x_T, keys = start(keys, sampler, shape)
        return sample(keys, policy, data["cond"], sampler, x_T, select=again if count and zigzags else None)[0], {}

    return Method(Needs(still=True, guidance=True), draw)
