"""Best-of-n: draw n samples of a prompt and keep the one the reward likes most."""

from __future__ import annotations

import jax

from ..diffusion import Sampler, draw
from .base import Info, Method, Needs, Networks, Tree, grouped, pick, repeat, spread

Array = jax.Array


def best_of_n(sampler: Sampler, shape: tuple[int, ...], *, n: int = 4) -> Method:
    """The best of n samples for each prompt; random search by another name (arXiv 2501.09732).

    KL from the base: log n - (n - 1) / n (arXiv 2112.00861, appendix). Costs n T network calls and n reward calls a sample.
    Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")

    def draw_(keys: Array, networks: Networks, data: Tree) -> tuple[Array, Info]:
        keys, cond, condition = spread(keys, n), repeat(data["cond"], n), repeat(data["condition"], n)
        x0, _ = draw(keys, networks["policy"], cond, sampler, shape)
        x0, reward = pick(grouped(x0, n), grouped(networks["reward"](keys, x0, condition), n))
        return x0, {"reward": reward}

    return Method(Needs("value"), draw_)
