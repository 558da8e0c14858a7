"""Search over paths: the best states on the way, noised a little and denoised again in several ways."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..diffusion import Sampler, fold_in, gaussian_noise, renoise, sample, transition
from .base import Info, Method, Needs, Networks, Tree, clean, fan, grouped, pick, repeat, spread, start, take, top
from .best_of_n import best_of_n

Array = jax.Array


def path_search(sampler: Sampler, shape: tuple[int, ...], *, rounds: int = 3, n: int = 4, children: int = 2, forward: int = 2,
                back: int = 4) -> Method:  # fmt: skip
    """n paths, each round noised in `children` ways and denoised again, the best n of all kept (arXiv 2501.09732).

    A round: every path at grid index k is noised afresh to index k - forward, takes `back` > forward steps of the chain, and is
    judged by the clean prediction there; the last round ends at the sample, the first begins at index T - rounds (back - forward).
    Begin late: while sigma is above about .9 a clean prediction tells little. rounds = 0, or no noise (forward = 0) and one child,
    is best-of-n. Costs n (T - rounds (back - forward)) + rounds n children (back + 1) network calls, at most.
    Departures: distances are steps of the grid, where the paper has differences of sigma; at a tie the lower slot is kept, a first
    child before any second, so a reward that says nothing leaves n different paths.
    Raises ValueError for counts below 1, for back <= forward, and for a search that would begin before the chain.
    """
    first, size, n_steps = sampler.num_steps - rounds * (back - forward), n * children, sampler.num_steps
    if rounds < 0 or n < 1 or children < 1:
        raise ValueError(f"path_search needs rounds >= 0, n >= 1 and children >= 1; got {rounds}, {n} and {children}")
    if not 0 <= forward < back:
        raise ValueError(f"a round noises `forward` steps and takes more `back`: 0 <= forward < back; got {forward} and {back}")
    if rounds and first < forward:
        raise ValueError(f"{rounds} rounds of {back} - {forward} steps, noised {forward} steps from where they begin, do not lie in a "
                         f"chain of {n_steps} steps; lower rounds, or back with forward, or give the chain more steps")  # fmt: skip
    if rounds and children > 1 and forward == 0 and sampler.deterministic:
        raise ValueError(f"{children} children without noise are one; set forward >= 1, children=1, or a sampler with noise (eta=1)")
    if rounds and sampler.solver == "dpmsolver++":
        raise ValueError("solver 'dpmsolver++' looks back to steps that the new noise undoes; choose scheduler ddim, ddpm or euler")
    if rounds == 0:
        return best_of_n(sampler, shape, n=n)

    def draw(keys: Array, networks: Networks, data: Tree) -> tuple[Array, Info]:
        slots, times = spread(keys, size), jnp.asarray(sampler.grid.t)
        cond, condition, steps = repeat(data["cond"], size), repeat(data["condition"], size), fold_in(slots, 1)

        def round_(paths: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
            at, until = first + number * (back - forward), first + (number + 1) * (back - forward)
            x = fan(paths[0], n, children)
            fresh = steps
            if forward:  # steps that are walked again have noise of their own
                fresh = fold_in(slots, (1 << 20) + number)
                x = renoise(fold_in(fresh, 2 * n_steps), sampler, x, at, at - forward)

            def step(x: Array, i: Array) -> tuple[Array, None]:
                moved = transition(sampler, i, x, networks["policy"](x, jnp.broadcast_to(times[i], x.shape[:1]), cond))
                return moved.mean if sampler.deterministic else gaussian_noise(fold_in(fresh, 2 * i), i, moved), None

            x, _ = jax.lax.scan(step, x, until - back + jnp.arange(back))
            seen = jax.lax.cond(until < n_steps, lambda x: clean(sampler, until, networks["policy"], x, cond)[0], lambda x: x, x)
            scores = grouped(networks["reward"](fold_in(slots, (1 << 21) + number), seen, condition), size)
            best = top(scores, n)
            return (take(grouped(x, size), best).reshape(-1, *shape), take(scores, best)), None

        x, start_steps = start(spread(keys, n), sampler, shape)
        if first:
            x, _ = sample(start_steps, networks["policy"], repeat(data["cond"], n), sampler, x, stop=first)
        (x, scores), _ = jax.lax.scan(round_, (x, jnp.zeros((len(keys), n))), jnp.arange(rounds))
        x0, reward = pick(grouped(x, n), scores)
        return x0, {"reward": reward}

    return Method(Needs("value"), draw)
