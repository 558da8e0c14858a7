"""How far a policy has gone from its reference, in nats."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from ..diffusion.guidance import Denoise
from ..diffusion.sample import sample
from ..diffusion.transition import STD_FLOOR, Sampler, transition

Array = jax.Array


def best_of_n_kl(n: float) -> float:
    """KL of the best of n samples from the policy that drew them: log n - (n - 1) / n nats (n >= 1).

    Exact where the reward has no ties, an upper bound otherwise (arXiv 2401.01879).
    """
    if n < 1:
        raise ValueError(f"best of n needs n >= 1; got {n}")
    return math.log(n) - (n - 1) / n


def path_kl(mean_policy: Array, mean_reference: Array, std: Array, mask: Array | None = None) -> Array:
    """KL of two Gaussian chains with the same noise, K1 = sum_k |mu - mu_ref|^2 / (2 s_k^2) -> [B], in nats.

    mean_policy, mean_reference [T, B, ...] at the same states, drawn from the policy; std [T] or [T, B]; mask [B, ...]
    the entries that exist. The mean over samples estimates KL of the paths, an upper bound of the KL of the final
    samples (data processing). Steps whose std is at its floor have no density and are left out: a deterministic
    chain (eta = 0) has K1 = 0 here and must be measured with its stochastic twin (`policy_kl`).
    """
    mean_policy, mean_reference = jnp.asarray(mean_policy, jnp.float32), jnp.asarray(mean_reference, jnp.float32)
    if mean_policy.shape != mean_reference.shape or mean_policy.ndim < 2:
        raise ValueError(f"means must be [T, B, ...] of one shape; got {list(mean_policy.shape)} and "
                         f"{list(mean_reference.shape)}")  # fmt: skip
    std = jnp.asarray(std, jnp.float32)
    std = std.reshape(std.shape + (1,) * (mean_policy.ndim - std.ndim))
    noisy = std > STD_FLOOR
    difference = (mean_policy - mean_reference) / jnp.where(noisy, std, 1.0)
    terms = jnp.where(noisy, 0.5 * jnp.square(difference), 0.0)
    if mask is not None:
        terms = jnp.where(jnp.asarray(mask, bool), terms, 0.0)
    return terms.sum((0, *range(2, terms.ndim)))


def policy_kl(key: Array, policy: Denoise, reference: Denoise, cond: Any, sampler: Sampler, x_T: Array,
              mask: Array | None = None) -> Array:  # fmt: skip
    """path_kl [B] along fresh samples of the policy: the chain is walked once, then both networks see its states.

    The sampler must be stochastic: for a model sampled with eta = 0 or an ODE take its stochastic twin (eta = 1,
    flow_sde). Raises ValueError when no step has noise.
    """
    with jax.ensure_compile_time_eval():
        noisy = bool(sampler.stochastic().any())
    if not noisy:
        raise ValueError("KL needs a chain with noise, and this sampler has none: take eta=1 or flow_sde=('sqrt', 0.7)")
    _, trajectory = sample(key, policy, cond, sampler, x_T, keep=True)
    times = jnp.asarray(sampler.grid.t)

    def step(total: Array, i: Array) -> tuple[Array, None]:
        x = trajectory.x[i]
        t = jnp.broadcast_to(times[i], x.shape[:1])
        here, there = (transition(sampler, i, x, network(x, t, cond)) for network in (policy, reference))
        return total + path_kl(here.mean[None], there.mean[None], here.std[None], mask), None

    total, _ = jax.lax.scan(step, jnp.zeros(trajectory.x.shape[1]), jnp.arange(sampler.num_steps))
    return total
