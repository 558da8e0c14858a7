"""D3PO: the preference between two whole trajectories of a prompt, as DPO on the likelihood of each of their steps
(arXiv 2311.13231).

Departures: ratios are formed from the difference of means, 1 at the reference to 1e-6; all steps are items of one update, where
the official code takes one update a step; ties leave the mean, where there they add the constant log 2.
"""  # fmt: skip

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ..diffusion import Sampler, fold_in, initial, log_ratio, sample, transition
from .base import Algorithm, Info, Needs, Networks, Tree
from .dpo import accuracy
from .losses import logistic
from .pairs import check, choose, shares

Array = jax.Array


def step_pair(sampler: Sampler, *, beta: float, clip_range: float, reduce: str) -> tuple[
        Callable[[Array, Networks, Tree], Tree], Callable[[Array, Networks, Tree], tuple[Array, Info]]]:  # fmt: skip
    """(anchor, loss) of pairs of steps: -log sigma(beta (log rho_w - log rho_l)), rho = clip(p_theta / p_ref, 1 - e, 1 + e).

    Items: x_prev [N,2,...], the winner's and the loser's next state; x [N,2,...] where they come from, or [N,1,...] if it is one
    state; i [N]; weight [N]. Outside the clip the gradient is 0, without PPO's pessimistic side: a trust region.
    """
    if beta <= 0 or not 0 < clip_range < 1:
        raise ValueError(f"beta must be above 0 and clip_range in (0, 1); got beta={beta}, clip_range={clip_range}")
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce must be 'mean' or 'sum'; got {reduce!r}")

    def means(name: str, networks: Networks, items: Tree) -> tuple[Array, Array]:
        t = jnp.asarray(sampler.grid.t)[items["i"]]
        steps = [transition(sampler, items["i"], x, networks[name](x, t, items["cond"])) for x in jnp.unstack(items["x"], axis=1)]
        return jnp.stack([s.mean for s in steps], 1), steps[0].std

    def anchor(keys: Array, networks: Networks, items: Tree) -> Tree:
        return {**items, "mean_ref": means("reference", networks, items)[0]}

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        mu, std = means("policy", networks, items)
        ratio = jnp.stack([log_ratio(mu[:, min(j, mu.shape[1] - 1)], items["mean_ref"][:, min(j, mu.shape[1] - 1)], std,
                                     items["x_prev"][:, j], reduce=reduce) for j in (0, 1)], 1)  # fmt: skip
        clipped = jnp.clip(ratio, np.log(1 - clip_range), np.log(1 + clip_range))
        u = beta * (clipped[:, 0] - clipped[:, 1])
        deviation, weight = jnp.abs(jnp.exp(ratio) - 1).max(1), items["weight"]
        info = {"implicit_accuracy": accuracy(u), "margin": u,
                "log_ratio/winner": ratio[:, 0], "log_ratio/loser": ratio[:, 1],
                "ratio/clip_fraction": (clipped != ratio).mean(1)}  # fmt: skip
        return weight * logistic(u), {k: weight * v for k, v in info.items()} | {"ratio/deviation_max": deviation}

    return anchor, loss


def noisy_steps(sampler: Sampler, method: str) -> np.ndarray:
    """The steps that have a likelihood; ValueError where there is none."""
    steps = np.flatnonzero(sampler.stochastic())
    if not len(steps):
        raise ValueError(f"{method} needs a sampler with noise, and this one has none (eta={sampler.eta}); set sampling.eta=1")
    return steps


def d3po(sampler: Sampler, shape: tuple[int, ...], *, group: int = 2, beta: float = 0.1, clip_range: float = 0.1, reduce: str = "mean",
         pairs: str = "best_worst", tie: float = 0.0, shared_start: bool = True) -> Algorithm:  # fmt: skip
    """L = E_k -log sigma(beta (log rho_k(w) - log rho_k(l))), rho_k = clip(p_theta(x_{k-1} | x_k) / p_ref, 1 - e, 1 + e).

    Two trajectories of a prompt: best against worst of the group, all pairs or a random one; rewards equal to within `tie` teach
    nothing. shared_start: one x_T a prompt, as in the official script for reward models. beta and clip_range belong to the
    log-ratio's `reduce`, a mean over entries there. At theta = ref the gradient is -beta/2 grad(log p(w) - log p(l)).
    """
    check(pairs, group, 1.0, 0.5, tie)
    steps = noisy_steps(sampler, "D3PO")
    anchor, loss = step_pair(sampler, beta=beta, clip_range=clip_range, reduce=reduce)

    def init(key: Array) -> Tree:
        return {"key": jax.random.key_data(key), "round": jnp.zeros((), jnp.int32)}

    def rollout(keys: Array, extra: Tree, networks: Networks, data: Tree) -> Tree:
        start = fold_in(keys, 0)
        if shared_start:
            of_round = jax.random.fold_in(jax.random.wrap_key_data(extra["key"]), extra["round"])
            start = jax.vmap(jax.random.fold_in, (None, 0))(of_round, data["prompt_id"])
        x_T = initial(start, sampler, (len(keys), *shape))
        x0, trajectory = sample(fold_in(keys, 1), networks["policy"], data["cond"], sampler, x_T, keep=True)
        return {**data, "x0": x0, "x": trajectory.x.swapaxes(0, 1)}

    def prepare(key: Array, extra: Tree, rollout: Tree, rewards: Array) -> tuple[Tree, Tree, Info]:
        chosen = choose(key, rewards, group, kind=pairs, tie=tie)
        counts = chosen.counts * (chosen.preference != 0.5)
        m = len(counts)
        pair, i = jnp.repeat(jnp.arange(m), len(steps)), jnp.tile(jnp.asarray(steps), m)
        both = jnp.stack([chosen.winner, chosen.loser], 1)[pair]
        items = {"x": rollout["x"][both, i[:, None]], "x_prev": rollout["x"][both, i[:, None] + 1], "i": i,
                 "weight": shares(counts)[pair], "row": both[:, 0]}  # fmt: skip
        return items, {**extra, "round": extra["round"] + 1}, {"pairs/counted": counts.mean()}

    return Algorithm(Needs("prompts", "value", {"reference": "frozen"}), loss, init, rollout, prepare, anchor)
