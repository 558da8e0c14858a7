"""PRDP: the policy's log-ratio to the reference should predict the differences of rewards (arXiv 2402.08714).

Departures: the squares of all pairs of a group are G times the squared distances from the group's mean, so that an item is
one sample with its group's mean held at the rollout's parameters: loss and gradient are those of all pairs there, and later
updates descend an upper bound; the paper's clipping acts on a sample, not on a pair. A gradient so regrouped is the policy
gradient of r / beta - log p_theta / p_ref with the group's mean as baseline.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ..diffusion import Sampler, fold_in, gaussian_noise, initial, log_ratio, recomputed, transition
from . import advantages
from .base import Algorithm, Info, Needs, Networks, Tree

Array = jax.Array


def prdp(sampler: Sampler, shape: tuple[int, ...], *, group: int = 8, beta: float = 0.1, clip_range: float = 1e-4) -> Algorithm:
    """L = mean over pairs of max(d^2, d_clipped^2), d = (R_a - R_b) - (r_a - r_b) / beta, R = sum_k log p_theta / p_ref (x_{k-1} | x_k).

    R is a sum over steps and entries, from means, in float32. A group shares x_T: only then is d = 0 at the optimum, the
    tilt p_ref exp(r / beta); with a start of its own for every sample the value of x_T remains, for a linear reward a rms of
    sqrt(2) d E[r | x_T] / d x_T / beta. beta: gain about Var(r) / beta, KL about Var(r) / (2 beta^2) nats; the paper's 10
    belongs to its scale of rewards and is not the default. clip_range: how far the log-ratio of a step may move from the
    rollout's, as a mean over entries, DDPO's convention. Raises ValueError for a sampler without noise, and for group < 2.
    """
    steps = np.flatnonzero(sampler.stochastic())
    if not len(steps):
        raise ValueError(f"PRDP needs a sampler with noise, and this one has none (eta={sampler.eta}); set sampling.eta=1")
    if group < 2:
        raise ValueError(f"PRDP compares the samples of a prompt: batch.group must be 2 or more; got {group}")
    if beta <= 0:
        raise ValueError(f"beta must be positive: rewards are divided by it; got {beta}")
    clip, noisy = clip_range * float(np.prod(shape)), sampler.stochastic()

    def rollout(keys: Array, extra: Tree, networks: Networks, data: Tree) -> Tree:
        shared = jax.vmap(jax.random.fold_in, (None, 0))(extra["key"], data["prompt_id"])
        x_T = initial(shared, sampler, (len(keys), *shape))

        def step(x: Array, i: Array) -> tuple[Array, tuple[Array, Array, Array]]:
            t = jnp.broadcast_to(jnp.asarray(sampler.grid.t)[i], x.shape[:1])
            now, ref = (transition(sampler, i, x, networks[name](x, t, data["cond"])) for name in ("policy", "reference"))
            x_prev = gaussian_noise(fold_in(fold_in(keys, 1), i), i, now)
            ratio = log_ratio(now.mean, ref.mean, now.std, x_prev, reduce="sum")
            return x_prev, (x, ref.mean, jnp.where(jnp.asarray(noisy)[i], ratio, 0.0))

        x0, path = jax.lax.scan(step, x_T, jnp.arange(sampler.num_steps))
        x, mean_ref, ratio = (jnp.moveaxis(p, 0, 1) for p in path)
        return {**data, "x0": x0, "x": jnp.concatenate([x, x0[:, None]], 1), "mean_ref": mean_ref, "ratio": ratio}

    def prepare(key: Array, extra: Tree, rollout: Tree, rewards: Array) -> tuple[Tree, Tree, Info]:
        r = advantages.finite(rewards) / beta
        total = rollout["ratio"].sum(1)
        baseline = jnp.nanmean((total - r).reshape(-1, group), 1)
        goal = r + jnp.repeat(baseline, group)
        scored = jnp.isfinite(goal) & jnp.repeat(jnp.isfinite(r).reshape(-1, group).sum(1) > 1, group)
        items = {"x": rollout["x"], "mean_ref": rollout["mean_ref"], "ratio": rollout["ratio"],
                 "goal": jnp.where(scored, goal, 0.0), "scored": scored, "row": jnp.arange(len(r))}  # fmt: skip
        info = {"implicit_accuracy": agreement(total.reshape(-1, group), r.reshape(-1, group)), "kl/path": total.mean()}
        return items, {"key": jax.random.fold_in(key, 1)}, info

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        def step(sums: tuple[Array, Array], inputs: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            i, x, x_prev, mean_ref, old = inputs
            t = jnp.broadcast_to(jnp.asarray(sampler.grid.t)[i], x.shape[:1])
            now = transition(sampler, i, x, networks["policy"](x, t, items["cond"]))
            ratio = log_ratio(now.mean, mean_ref, now.std, x_prev, reduce="sum")
            old = jnp.where(items["first"], jax.lax.stop_gradient(ratio), old)  # two programs may round differently
            near = old + jnp.clip(ratio - old, -clip, clip)
            return (sums[0] + ratio, sums[1] + near), jnp.abs(ratio - old)

        x, mean_ref, ratio = (jnp.moveaxis(items[name], 1, 0) for name in ("x", "mean_ref", "ratio"))
        zero = jnp.zeros(len(keys))
        walked = (jnp.asarray(steps), x[steps], x[steps + 1], mean_ref[steps], ratio[steps])
        sums, moved = jax.lax.scan(recomputed(step), (zero, zero), walked)
        plain, clipped = (jnp.square(s - items["goal"]) for s in sums)
        value = jnp.where(items["scored"], 2 * group / (group - 1) * jnp.maximum(plain, clipped), 0.0)
        return value, {"log_ratio/moved_max": moved.max(0), "ratio/clip_fraction": (moved > clip).mean(0)}

    needs = Needs("prompts", "value", {"reference": "frozen"})
    return Algorithm(needs, loss, lambda key: {"key": key}, rollout, prepare)


def agreement(a: Array, b: Array) -> Array:
    """Share of the pairs inside the groups [P, G] that a and b order alike; ties of either count half, NaN counts nowhere."""
    da, db = (v[:, :, None] - v[:, None] for v in (a, b))
    pairs = jnp.isfinite(da) & jnp.isfinite(db) & ~jnp.eye(a.shape[1], dtype=bool)
    alike = jnp.where(pairs, 0.5 + 0.5 * jnp.sign(da) * jnp.sign(db), 0.0)
    return jnp.where(pairs.any(), alike.sum() / jnp.maximum(pairs.sum(), 1), 0.5)
