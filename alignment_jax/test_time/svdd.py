"""SVDD: of several next states the one that promises most, drawn by a softmax of the clean predictions' rewards."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..diffusion import Sampler, fold_in, gaussian_noise, transition
from ..diffusion import draw as plain
from .base import Info, Method, Needs, Networks, Tree, clean, grouped, repeat, spread, start, take
from .resampling import possible

Array = jax.Array


def svdd(sampler: Sampler, shape: tuple[int, ...], *, children: int = 4, alpha: float = 0.1) -> Method:
    """Soft value-based decoding in diffusion models (SVDD-PM, arXiv 2408.08252, algorithm 1), without gradients.

    At every step `children` states are drawn from p(x_{k-1} | x_k), and one goes on with the odds of
    softmax_j(r(x0_hat(x_{k-1}^j)) / alpha); at the last step, where there is noise, of the true reward. alpha = 0 keeps the best, which
    is what the authors' code does: greedy, far from any p exp(r / alpha). Biased for any number of children, because the reward
    of a prediction is not the soft value. Departures: the chosen child's network output serves the next step too, so that a sample
    costs 1 + M (T - 1) network calls in place of T (1 + M), and M reward calls a step. Raises ValueError for children < 1, alpha < 0.
    """
    if children < 1:
        raise ValueError(f"children, the next states to choose among, must be at least 1; got {children}")
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha, the temperature in units of the reward, must be finite, and 0 (greedy) or above; got {alpha}")
    steps, m = sampler.num_steps, children
    noisy_end = bool(sampler.stochastic()[-1])

    def draw(keys: Array, networks: Networks, data: Tree) -> tuple[Array, Info]:
        policy, cond, condition = networks["policy"], data["cond"], data["condition"]
        if m == 1:
            x, _ = plain(keys, policy, cond, sampler, shape)
            return x, {"reward": networks["reward"](fold_in(keys, 2), x, condition)}
        x, keys = start(keys, sampler, shape)
        x0, output = clean(sampler, 0, policy, x, cond)

        def pick(i: Array, x0: Array, tree: Tree) -> Tree:
            """Of each [B M, ...] the child [B, ...] that goes on."""
            score = networks["reward"](spread(fold_in(keys, 2 * i + 1), m), x0, repeat(condition, m))
            odds = grouped(possible(score, alpha or 1.0), m)
            index = jax.vmap(jax.random.categorical)(fold_in(keys, 2 * i + 1), odds) if alpha else jnp.argmax(odds, 1)
            return take(jax.tree.map(lambda x: grouped(x, m), tree), index)

        def move(i: Array, state: Tree, n: int) -> tuple[Array, Array]:
            """n next states of each x [B, ...]: (x_prev [B n, ...], x0 [B, ...])."""
            x, previous, output = state
            step = transition(sampler, i, x, output, previous=previous)
            return gaussian_noise(spread(fold_in(keys, 2 * i), n), i, step._replace(mean=repeat(step.mean, n))), step.x0

        def step(state: Tree, i: Array) -> tuple[Tree, None]:
            x, previous = move(i, state, m)
            x0, output = clean(sampler, i + 1, policy, x, repeat(cond, m))
            x, output = pick(i, x0, (x, output))
            return (x, previous, output), None

        state, _ = jax.lax.scan(step, (x, x, output), jnp.arange(steps - 1))
        end = jnp.asarray(steps - 1)
        x, _ = move(end, state, m if noisy_end else 1)
        x = pick(end, x, x) if noisy_end else x
        return x, {"reward": networks["reward"](fold_in(keys, 2 * steps + 1), x, condition)}

    return Method(Needs("value", noise=True), draw)
