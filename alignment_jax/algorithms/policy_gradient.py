"""The policy gradient through a chain of Gaussian steps: what DDPO, DPOK and the GRPO family share.

A step x_{k-1} ~ N(mu_theta(x_k, t_k, c), s_k^2) is a decision, and every decision of a sample gets the sample's advantage.
The ratio is formed from the difference of means, so that it is exactly 1 before the first update; steps whose std is at its
floor have no likelihood and are left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..diffusion import Sampler, Transition, expand, fold_in, initial, log_ratio, reduce_entries, sample, transition
from .advantages import Memory, Rule
from .base import Algorithm, Info, Needs, Networks, Own, Tree
from .kl import check, compared, penalty
from .losses import ppo

Array = jax.Array
ESTIMATORS = ("is", "sf", "ratio_norm")


class Window(NamedTuple):
    """The only steps with noise and gradient: `size` of the noisy ones, `stride` later after `every` rounds, then from the start."""

    size: int
    stride: int = 1
    every: int = 1


def policy_gradient(sampler: Sampler, shape: tuple[int, ...], *, method: str, advantage: tuple[Rule, Memory], clip_range: float,
                    adv_clip: float, estimator: str = "is", kl: str = "exact", kl_weight: float = 0.0,
                    timestep_fraction: float = 1.0, reduce: str = "mean", shared_start: bool = False,
                    window: Window | None = None, critic: Own | None = None) -> Algorithm:  # fmt: skip
    """L = E_k l_k + kl_weight KL_k, with a log-ratio u_k of the step to that of the policy which drew it, and an advantage A.

    estimator "is": l = max(-A rho, -A clip(rho, 1 - e, 1 + e)), rho = exp(u), u = log p_theta - log p_old (PPO);
    "sf": l = -A u, the score function's gradient, for one update a rollout; "ratio_norm": PPO with
    s (u + |mu - mu_old|^2 / 2 s^2) = <mu - mu_old, x_{k-1} - mu_old> / s for u, whose mean is 0 and whose std is that of
    |mu - mu_old| at every s (GRPO-Guard, arXiv 2510.22319, without its weights of steps).
    clip_range belongs to u's `reduce`, "mean" or "sum" over entries. shared_start: one x_T a prompt. timestep_fraction: a
    random subset of a sample's steps. critic: A = R - V(x_k, k, c) with R what `advantage` gives; V regresses on R.
    Raises ValueError for options out of range and for a sampler without noise.
    """
    rule, memory = advantage
    steps = np.flatnonzero(sampler.stochastic())
    if not len(steps):
        raise ValueError(f"{method} needs a sampler with noise, and this one has none (eta={sampler.eta}); set sampling.eta=1"
                         + (" or sampling.flow_sde=('sqrt', 0.7)" if sampler.schedule.flow else ""))  # fmt: skip
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}; got {estimator!r}")
    if clip_range <= 0 or adv_clip <= 0 or kl_weight < 0 or not 0 < timestep_fraction <= 1:
        raise ValueError("clip_range and adv_clip must be above 0, kl_weight 0 or more and timestep_fraction in (0, 1]; got "
                         f"{clip_range:g}, {adv_clip:g}, {kl_weight:g} and {timestep_fraction:g}")  # fmt: skip
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce must be 'mean' or 'sum'; got {reduce!r}")
    check(kl, sampler)
    kept = max(1, round(timestep_fraction * len(steps)))
    if window is not None:
        if not 1 <= window.size <= len(steps) or window.stride < 1 or window.every < 1:
            raise ValueError(f"{method}'s window must have 1 to {len(steps)} steps, as many as have noise, and a stride and a number "
                             f"of rounds of 1 or more; got {window.size}, {window.stride} and {window.every}")  # fmt: skip
        kept = window.size

    def first_step(extra: Tree) -> Array:
        """Where the window stands among the noisy steps."""
        assert window is not None
        last = len(steps) - window.size
        places = -(-last // window.stride) + 1
        return jnp.minimum(extra["round"] // window.every % places * window.stride, last)

    def init(key: Array) -> Tree:
        extra = {"memory": memory()} | ({"key": key} if shared_start else {})
        return extra | ({"round": jnp.zeros((), jnp.int32)} if window else {})

    def rollout(keys: Array, extra: Tree, networks: Networks, data: Tree) -> Tree:
        start, scale = fold_in(keys, 0), None
        if shared_start:
            start = jax.vmap(jax.random.fold_in, (None, 0))(extra["key"], data["prompt_id"])
        if window is not None:
            place = np.arange(len(steps)) - first_step(extra)
            scale = jnp.zeros(sampler.num_steps).at[steps].set((place >= 0) & (place < window.size))
        x_T = initial(start, sampler, (len(keys), *shape))
        x0, trajectory = sample(fold_in(keys, 1), networks["policy"], data["cond"], sampler, x_T, keep=True, noise_scale=scale)
        return {**data, "x0": x0, "x": trajectory.x.swapaxes(0, 1)}

    def prepare(key: Array, extra: Tree, rollout: Tree, rewards: Array) -> tuple[Tree, Tree, Info]:
        a, seen = rule(rewards, rollout.get("prompt_id"), extra.get("memory"))
        b, info = len(a), {"advantage/std": a.std()}
        key_order, key_start = jax.random.split(key)
        order = jnp.broadcast_to(jnp.asarray(steps), (b, len(steps)))
        if window is not None:
            info["window"] = jnp.asarray(steps)[first_step(extra)]
            order = jax.lax.dynamic_slice_in_dim(order, first_step(extra), window.size, 1)
        elif kept < len(steps):
            order = jax.vmap(lambda k: jax.random.permutation(k, jnp.asarray(steps))[:kept])(jax.random.split(key_order, b))
        row, i = jnp.repeat(jnp.arange(b), kept), order.reshape(-1)
        items = {"x": rollout["x"][row, i], "x_prev": rollout["x"][row, i + 1], "i": i,
                 "advantage": jnp.clip(a, -adv_clip, adv_clip)[row], "row": row}  # fmt: skip
        if critic is not None:
            items["scored"] = jnp.isfinite(rewards).reshape(b, -1).all(1)[row]
        moved = {"memory": seen} | ({"key": key_start} if shared_start else {}) | ({"round": extra["round"] + 1} if window else {})
        return items, moved, info

    def at(network: str, networks: Networks, items: Tree) -> Transition:
        t = jnp.asarray(sampler.grid.t)[items["i"]]
        return transition(sampler, items["i"], items["x"], networks[network](items["x"], t, items["cond"]))

    def anchor(keys: Array, networks: Networks, items: Tree) -> Tree:
        items = {**items, "mean_old": at("policy", networks, items).mean}
        return {**items, "reference": compared(kl, at("reference", networks, items))} if kl_weight else items

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        step, a, info = at("policy", networks, items), items["advantage"], dict[str, Array]()
        # two compiled programs may round bfloat16 differently; before the first update the old mean is this very mean
        old = jnp.where(expand(items["first"], step.mean), jax.lax.stop_gradient(step.mean), items["mean_old"])
        if critic is not None:
            v = networks["critic"](items["x"], items["i"], items["cond"])
            critic_error = info["critic/error"] = jnp.where(items["scored"], jnp.square(v - a), 0.0)
            a = jnp.where(items["scored"], a - jax.lax.stop_gradient(v), 0.0)
        u = log_ratio(step.mean, old, step.std, items["x_prev"], reduce=reduce)
        if estimator == "ratio_norm":
            u = step.std * (u + reduce_entries(jnp.square((step.mean - old) / expand(step.std, old)) / 2, reduce))
        deviation = jnp.abs(jnp.exp(u) - 1)
        info |= {"ratio/deviation_max": deviation, "ratio/clip_fraction": (deviation > clip_range).astype(jnp.float32)}
        value = -a * u if estimator == "sf" else ppo(u, a, clip_range)
        if critic is not None:
            value = value + critic_error
        if kl_weight:
            info["kl/step"] = penalty(kl, sampler, items["i"], step, items["reference"], reduce=reduce)
            value = value + kl_weight * info["kl/step"]
        return value, info

    copies: dict[str, Any] = {"reference": "frozen"} if kl_weight else {}
    needs = Needs("prompts", "value", copies, own={"critic": critic} if critic is not None else {})
    return Algorithm(needs, loss, init, rollout, prepare, anchor)
