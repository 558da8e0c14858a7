"""How far one step of the policy's chain is from the reference's: the penalties that methods call KL."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..diffusion import Sampler, Transition, expand, reduce_entries

Array = jax.Array
KINDS = ("exact", "no_dt", "eps", "x0", "v")


def check(kind: str, sampler: Sampler) -> None:
    """Raises ValueError for a penalty that is not known or does not fit the sampler."""
    if kind not in KINDS:
        raise ValueError(f"kl must be one of {', '.join(KINDS)}; got {kind!r}")
    if kind == "no_dt" and sampler.flow_sde is None:
        raise ValueError("kl='no_dt' leaves the |dt| of a flow SDE out, and this sampler has no flow_sde; choose kl='exact'")


def compared(kind: str, step: Transition) -> Array:
    """What of the reference's step [N, ...] a penalty needs."""
    return step.mean if kind in ("exact", "no_dt") else step.x0


def penalty(kind: str, sampler: Sampler, i: Array, step: Transition, reference: Array, *, reduce: str) -> Array:
    """The distance [N] of steps i [N] from the reference's, given what `compared` took of it [N, ...].

    exact: |mu - mu_ref|^2 / (2 s^2), the KL of the step, the same in both directions because both steps have the noise s;
      summed over steps and entries it is that of the paths, an upper bound of that of the samples.
    no_dt: |mu - mu_ref|^2 / (2 sigma_t^2) with s^2 = sigma_t^2 |dt|, as in Flow-GRPO's code: |dt| times the exact one.
    eps, x0, v: |eps - eps_ref|^2 (DPOK's code), |x0 - x0_ref|^2, |v - v_ref|^2 (for a flow, its velocity). With
      mean = ... + c eps the exact one is c^2 / (2 s^2) times that of eps: .07 to .13 for most steps of Stable Diffusion's 50,
      5.4 and 0.5 for the last two.
    """
    if kind in ("exact", "no_dt"):
        value = reduce_entries(jnp.square((step.mean - reference) / expand(step.std, step.mean)) / 2, reduce)
        return value if kind == "exact" else value * jnp.abs(jnp.diff(jnp.asarray(sampler.grid.sigma)))[i]
    alpha, sigma = (jnp.asarray(a)[i] for a in sampler.grid[1:])
    # alpha^2 + sigma^2 = 1: v = (alpha x - x0) / sigma; flow: v = (x - x0) / sigma; always: eps = (x - alpha x0) / sigma
    weight = {"eps": alpha / sigma, "x0": jnp.ones_like(alpha), "v": 1 / sigma}[kind]
    return jnp.square(weight) * reduce_entries(jnp.square(step.x0 - reference), reduce)
