"""Adjoint Matching: samples the tilt p_ref(x_0) exp(lam r(x_0)) by regressing the control on the lean adjoint (arXiv 2409.08861).

Departures: written in the chain's own discrete time, where step k takes the adjoint of the state that it makes, a_{k-1}:
then the optimum is exact, and the first gradient is -2 times DRaFT-T's. The paper's and its code's adjoint of the state
that the step starts from, a_k (adjoint_index="same"), differs by the size of a step. Guided samplers give guided states,
as in the official code; adjoint and control are those of the unguided networks, for guided adjoints blow up.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ..diffusion import Denoise, Sampler, draw, expand, fold_in, transition
from .base import Algorithm, Info, Needs, Networks, Tree, reward_gradient

Array = jax.Array


def adjoint_matching(sampler: Sampler, shape: tuple[int, ...], *, lam: float = 100.0, timestep_fraction: float = 0.5,
                     adjoint_index: str = "next", loss_clip: float | None = None) -> Algorithm:  # fmt: skip
    """L = |(mu_theta - mu_ref)(x_k) / s_k + s_k a|^2, summed over entries, at the states x_k of the policy's own chains.

    a_0 = -lam grad r(x_0), a_k = (d mu_ref / d x_k)^T a_{k-1}: swept with the reference's vjp, in float32, from the
    noiseless end mu_ref(x_1). lam 100 is the code's for ImageReward (12 500 the paper's best); for a linear reward the
    gain is lam Var(r), the KL lam^2 Var(r) / 2. timestep_fraction 0.5: as in the paper half of the steps of a chain, the
    last quarter always (half of the kept steps come from there, where fewer are kept). loss_clip: min(L, loss_clip lam^2 / T),
    the paper's LCT with 1.6, in our reading of its units; it counts on gradients of r of norm about 1.
    Raises ValueError for a sampler that is not memoryless: without that the tilt is reached in part only.
    """
    if not memoryless(sampler):
        raise ValueError("Adjoint Matching needs a memoryless sampler, whose end does not depend on its start; got "
                         f"solver={sampler.solver!r}, eta={sampler.eta}, flow_sde={sampler.flow_sde}; set sampling.eta=1, or "
                         "sampling.flow_sde=('sqrt', 1.4142) for flow models")  # fmt: skip
    if adjoint_index not in ("next", "same"):
        raise ValueError(f"adjoint_index must be 'next' (exact) or 'same' (the paper's); got {adjoint_index!r}")
    if not 0 < timestep_fraction <= 1:
        raise ValueError(f"timestep_fraction is the share of the steps that are trained, in (0, 1]; got {timestep_fraction}")
    if loss_clip is not None and loss_clip <= 0:
        raise ValueError(f"loss_clip is a positive bound in units of lam^2 / T, or None; got {loss_clip}")
    noisy = np.flatnonzero(sampler.stochastic())
    early, late = noisy[noisy < 0.75 * sampler.num_steps], noisy[noisy >= 0.75 * sampler.num_steps]
    kept = max(1, round(timestep_fraction * len(noisy)))
    kept_late = min(len(late), max(kept // 2, kept - len(early)))

    def mean(network: Denoise, i: Array | int, x: Array, cond: Tree) -> tuple[Array, Array]:
        t = jnp.broadcast_to(jnp.asarray(sampler.grid.t)[i], x.shape[:1])
        step = transition(sampler, i, x, network(x, t, cond))
        return step.mean, step.std

    def rollout(keys: Array, extra: Tree, networks: Networks, data: Tree) -> Tree:
        _, trajectory = draw(keys, networks["policy"], data["cond"], sampler, shape, keep=True)
        states = trajectory.x[:-1]
        end, _ = mean(networks["reference"], sampler.num_steps - 1, states[-1], data["cond"])
        reward, gradient = reward_gradient(networks, fold_in(keys, 2), end, data["condition"])
        adjoints = lean_adjoints(networks["reference"], data["cond"], sampler, states, -lam * gradient)
        return {**data, "x": states.swapaxes(0, 1), "adjoint": adjoints.swapaxes(0, 1), "reward": reward}

    def prepare(key: Array, extra: Tree, rollout: Tree, rewards: Array | None) -> tuple[Tree, Tree, Info]:
        b = len(rollout["reward"])

        def choose(key: Array) -> Array:
            a, z = (jax.random.permutation(k, jnp.asarray(s)) for k, s in zip(jax.random.split(key), (early, late), strict=True))
            return jnp.concatenate([a[: kept - kept_late], z[:kept_late]])

        row, i = jnp.repeat(jnp.arange(b), kept), jax.vmap(choose)(jax.random.split(key, b)).reshape(-1)
        adjoint = rollout["adjoint"][row, i + 1 if adjoint_index == "next" else i]
        scored = jnp.isfinite(rollout["reward"])[row] & jnp.isfinite(adjoint).all(tuple(range(1, adjoint.ndim)))
        items = {"x": rollout["x"][row, i], "i": i, "adjoint": adjoint, "scored": scored, "reward": rollout["reward"][row], "row": row}
        return items, extra, {}

    def anchor(keys: Array, networks: Networks, items: Tree) -> Tree:
        return {**items, "mean_ref": mean(networks["reference"], items["i"], items["x"], items["cond"])[0]}

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        mu, std = mean(networks["unguided"], items["i"], items["x"], items["cond"])
        control = (mu - items["mean_ref"]) / expand(std, mu)
        adjoint = jnp.where(expand(items["scored"], mu), items["adjoint"], 0.0)
        entries = tuple(range(1, mu.ndim))
        value = jnp.where(items["scored"], jnp.square(control + expand(std, mu) * adjoint).sum(entries), 0.0)
        info = {"reward": items["reward"], "kl/step": 0.5 * jnp.square(control).sum(entries)}
        if loss_clip is not None:
            bound = loss_clip * lam**2 / sampler.num_steps
            value, info = jnp.minimum(value, bound), {**info, "loss_clipped": (value > bound).astype(jnp.float32)}
        return value, info

    needs = Needs("prompts", "gradient", {"reference": "frozen"}, guidance={"reference": 1.0})
    return Algorithm(needs, loss, rollout=rollout, prepare=prepare, anchor=anchor)


def lean_adjoints(reference: Denoise, cond: Tree, sampler: Sampler, states: Array, end_adjoint: Array) -> Array:
    """[T + 1, B, ...]: the adjoint of every state of the chain, swept backwards from that of its end with the reference's vjp.

    states [T, B, ...]: where each step starts.
    """
    times = jnp.asarray(sampler.grid.t)

    def back(adjoint: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        i, x = inputs
        t = jnp.broadcast_to(times[i], x.shape[:1])
        _, pull = jax.vjp(lambda x: transition(sampler, i, x, reference(x, t, cond)).mean, x)
        return pull(adjoint)[0], adjoint

    first, later = jax.lax.scan(back, end_adjoint, (jnp.arange(len(states)), states), reverse=True)
    return jnp.concatenate([first[None], later])


def memoryless(sampler: Sampler) -> bool:
    """x_0 is independent of x_T up to the grid: DDIM with eta = 1, or the flow SDE with sigma_t = sqrt(2 t / (1 - t))."""
    flow = sampler.flow_sde is not None and sampler.flow_sde[0] == "sqrt" and abs(sampler.flow_sde[1] - 2**0.5) < 0.02
    return sampler.solver == "ddim" and (sampler.eta == 1 or flow)
