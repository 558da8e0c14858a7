"""Diffusion latent beam search: several beams, several children each, the best kept by where they seem to lead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ..diffusion import Sampler, SamplingGrid, fold_in, gaussian_noise, sample, transition
from .base import Info, Method, Needs, Networks, Tree, fan, grouped, pick, repeat, spread, start, take, top

Array = jax.Array


def beam(sampler: Sampler, shape: tuple[int, ...], *, beams: int = 4, children: int = 2, lookahead: int = 6) -> Method:
    """At every step K children of each of B beams; the best B of all B K by reward go on (arXiv 2501.19252).

    The reward is taken of the end of `lookahead` deterministic steps from the child to the sample, spread evenly over what is
    left of the grid (near the end some stay in place): 1 is the clean prediction, 6 with B = 4 and K = 2 the paper's for video.
    One beam is greedy search, which argmax SVDD is too; one child is best-of-n. At a tie the lower slot is kept, a first child
    before any second: a reward that says nothing leaves B different beams. Costs about T B (1 + K lookahead) network calls and
    T B K reward calls, each with a decode. Raises ValueError for counts below 1.
    """
    if min(beams, children, lookahead) < 1:
        raise ValueError(f"beam needs beams, children and lookahead of at least 1; got {beams}, {children} and {lookahead}")
    size, n_steps = beams * children, sampler.num_steps

    def draw(keys: Array, networks: Networks, data: Tree) -> tuple[Array, Info]:
        slots, times = spread(keys, size), jnp.asarray(sampler.grid.t)
        narrow, cond, condition = repeat(data["cond"], beams), repeat(data["cond"], size), repeat(data["condition"], size)
        steps = fold_in(slots, 1)

        def ahead(x: Array, i: Array) -> Array:
            places = i + (jnp.arange(lookahead + 1) * (n_steps - i)) // lookahead
            grid: list[Any] = [jnp.asarray(a)[places] for a in sampler.grid]
            ode = replace(sampler, grid=SamplingGrid(*grid), eta=0.0, flow_sde=None, solver="ddim")
            return sample(slots, networks["policy"], cond, ode, x)[0]

        def step(state: tuple[Array, Array, Array], i: Array) -> tuple[tuple[Array, Array, Array], None]:
            x, previous, _ = state
            output = networks["policy"](x, jnp.broadcast_to(times[i], x.shape[:1]), narrow)
            moved = transition(sampler, i, x, output, previous=previous)
            moved = moved._replace(mean=fan(moved.mean, beams, children), x0=fan(moved.x0, beams, children))
            x = moved.mean if sampler.deterministic else gaussian_noise(fold_in(steps, 2 * i), i, moved)
            seen = jax.lax.cond(i + 1 < n_steps, ahead, lambda x, _: x, x, i + 1)
            scores = grouped(networks["reward"](fold_in(steps, 2 * i + 1), seen, condition), size)
            best = top(scores, beams)
            x, x0 = (take(grouped(v, size), best).reshape(-1, *shape) for v in (x, moved.x0))
            return (x, x0, take(scores, best)), None

        x, _ = start(spread(keys, beams), sampler, shape)
        (x, _, scores), _ = jax.lax.scan(step, (x, x, jnp.zeros((len(keys), beams))), jnp.arange(n_steps))
        x0, reward = pick(grouped(x, beams), scores)
        return x0, {"reward": reward}

    return Method(Needs("value", noise=children > 1), draw)
