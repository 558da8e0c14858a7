"""Several rewards, or several people's, under any method: rewards [B, M] become the one that the method climbs.

r = sum_j c_j (r_j - m_j), and what differs is how the coefficients c follow the rewards. "advantages" alone is no such sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..diffusion import Sampler, fold_in, initial, sample
from .advantages import finite, group
from .base import Algorithm, Info, Networks, Tree

Array = jax.Array
HOW = ("weighted", "normalised", "advantages", "constrained", "maxmin")
PerReward = Sequence[float | None] | Mapping[str, float | None]


class Memory(NamedTuple):
    """What is remembered of the rewards, each [M]: running mean and variance, the std of the first batch, what c follows.

    batches: how many were seen. state: dual variables, or logarithms of the weights of groups.
    """

    batches: Array
    mean: Array
    variance: Array
    scale: Array
    state: Array


def aggregated(algorithm: Algorithm, sampler: Sampler, shape: tuple[int, ...], *, names: Sequence[str], how: str = "weighted",
               weights: PerReward = (), bounds: PerReward = (), step: float = 0.05, decay: float = 0.9,
               size: int = 1) -> Algorithm:  # fmt: skip
    """The same method on rewards of several columns; `names` tells them apart.

    weighted: c = w.
    normalised: c = w / std, m and std running over the batches, so that a reward's unit does not matter.
    advantages: sum_j w_j A_j, A_j standardised within the `size` samples of a prompt, before the method's own (DanceGRPO,
      arXiv 2505.07818); rewards that hardly differ count as much as those that do.
    constrained: max sum_j w_j r_j over the columns without a bound, subject to E r_j >= b_j for the others: c_j = mu_j / s_j,
      mu_j <- [mu_j + step (b_j - E r_j) / s_j]_+ (arXiv 2508.19104, without its PI controller); s_j: the std of the first
      batch, without which one step suits no two rewards. With no other column and the method's KL to its base of weight 1, the
      optimum is p ~ p_base exp(mu r). A method that standardises rewards keeps only the ratios of the coefficients.
    maxmin: max min_j E r_j over groups of people: c in the simplex, c_j ~ exp(-step sum of E r_j) (arXiv 2402.08925, which takes
      the worst group alone: a large step). The groups' rewards must share a unit; a KL is the same for all and drops out.

    E r is a running mean of weight `decay` on the past. A NaN reward makes that sample's sum NaN where its column counts. A
    method that asks for gradients, or judges steps, gets the same sum, and if c follows the rewards a chain more is drawn a batch
    to see them. weights, bounds: by name or in order; no weights are ones. Raises ValueError for whatever does not fit.
    """
    m = len(names)
    if how not in HOW:
        raise ValueError(f"aggregation {how!r} is not known; choose one of {', '.join(HOW)}")
    w, b = (_by_name(given, names, what, empty) for given, what, empty in ((weights, "weights", 1.0), (bounds, "bounds", np.nan)))
    bound = np.isfinite(b)
    if bound.any() != (how == "constrained"):
        raise ValueError("bounds {name: least mean reward} belong to how='constrained', which needs at least one; got "
                         f"how={how!r} and {bound.sum()} bounds")  # fmt: skip
    if how == "advantages" and (size < 2 or algorithm.needs.reward != "value"):
        raise ValueError("how='advantages' compares the samples of a prompt by their rewards: it needs batch.group of 2 or more, got "
                         f"{size}, and a method that asks for values; this one asks for {algorithm.needs.reward or 'none'}")  # fmt: skip
    if not algorithm.needs.reward:
        raise ValueError("this method asks for no reward: there is nothing to aggregate")
    if step <= 0 or not 0 <= decay < 1:
        raise ValueError(f"step must be above 0 and decay in [0, 1); got {step:g} and {decay:g}")
    direct = algorithm.needs.reward == "value"
    drawn = not direct and how != "weighted"

    def start() -> Memory:
        zero = jnp.zeros(m)
        return Memory(jnp.zeros(()), zero, zero, jnp.ones(m), zero)

    def coefficients(memory: Memory) -> Array:
        if how == "normalised":
            return jnp.asarray(w) / _std(memory)
        if how == "constrained":
            return jnp.where(jnp.asarray(bound), memory.state / memory.scale, jnp.asarray(w))
        return jax.nn.softmax(memory.state) if how == "maxmin" else jnp.asarray(w)

    def learn(memory: Memory, rewards: Array) -> Memory:
        memory = _remember(memory, rewards, decay)
        state = memory.state
        if how == "constrained":
            short = (jnp.asarray(np.nan_to_num(b)) - memory.mean) / memory.scale
            state = jnp.where(jnp.asarray(bound), jnp.maximum(state + step * short, 0.0), 0.0)
        if how == "maxmin":
            state = jax.nn.log_softmax(state - step * memory.mean)
        return memory._replace(state=state)

    def one(rewards: Array, memory: Memory) -> Array:
        """The sum [B] of rewards [B, M]."""
        r = finite(rewards)
        if how == "advantages":
            c, failed = jnp.asarray(w), jnp.isnan(r)
            r = jnp.where(failed, jnp.nan, jnp.stack([group(r[:, j], size) for j in range(m)], 1))
        else:
            c = coefficients(memory)
            r = r - memory.mean if how == "normalised" else r
        return jnp.where(c == 0, 0.0, c * r).sum(-1)

    def summed(networks: Networks, c: Array) -> Networks:
        if direct:
            return networks
        several = networks["reward"]
        return {**networks, "reward": lambda *args: jnp.where(c == 0, 0.0, c * several(*args)).sum(-1)}

    def init(key: Array) -> Tree:
        return {"inner": algorithm.init(key), "rewards": start()}

    def rollout(keys: Array, extra: Tree, networks: Networks, data: Tree) -> Tree:
        out = algorithm.rollout(keys, extra["inner"], summed(networks, coefficients(extra["rewards"])), data)
        if not drawn:
            return out
        x = initial(fold_in(keys, 7000), sampler, (len(keys), *shape))
        x0 = sample(fold_in(keys, 7001), networks["policy"], data["cond"], sampler, x)[0]
        if algorithm.needs.reward in ("step", "state"):
            end = jnp.broadcast_to(jnp.asarray(sampler.grid.t)[-1], keys.shape)
            return {**out, "rewards": networks["reward"](x0, x0, end, data["cond"], data["condition"])}
        return {**out, "rewards": networks["reward"](fold_in(keys, 7002), x0, data["condition"])}

    def prepare(key: Array, extra: Tree, rollout: Tree, rewards: Any) -> tuple[Tree, Tree, Info]:
        memory, inner_rollout = extra["rewards"], {k: v for k, v in rollout.items() if k != "rewards" or not drawn}
        seen = rollout["rewards"] if drawn else rewards
        if seen is not None and jnp.ndim(seen) != 2:
            raise ValueError(f"aggregation wants rewards [B, {m}]; got shape {jnp.shape(seen)}")
        if seen is not None:
            memory = learn(memory, seen)
        reward = one(rewards, memory) if direct else None
        items, inner, info = algorithm.prepare(key, extra["inner"], inner_rollout, reward)
        c = coefficients(memory)
        if not direct:
            n = len(jax.tree.leaves(items)[0])
            items = {**items, "coefficients": jnp.broadcast_to(c, (n, m))}
        if seen is not None:
            info = {**info, **{f"rewards/{name}": jnp.nanmean(finite(seen)[:, j]) for j, name in enumerate(names)}}
            info["rewards/worst"] = jnp.nanmin(jnp.nanmean(finite(seen), 0))
            info |= {f"coefficient/{name}": c[j] for j, name in enumerate(names)} if how not in ("weighted", "advantages") else {}
        return items, {"inner": inner, "rewards": memory}, info

    def with_items(call: Callable[..., Any]) -> Callable[..., Any]:
        """A function of (keys, networks, items) whose networks["reward"] is the sum."""

        def run(keys: Array, networks: Networks, items: Tree) -> Any:
            c = items["coefficients"][0]  # the same in every row: a method may ask for any number of rewards
            return call(keys, summed(networks, c), {k: v for k, v in items.items() if k != "coefficients"})

        return call if direct else run

    def anchor(keys: Array, networks: Networks, items: Tree) -> Tree:
        out = with_items(algorithm.anchor)(keys, networks, items)
        return out if direct else {**out, "coefficients": items["coefficients"]}

    return Algorithm(algorithm.needs, with_items(algorithm.loss), init, rollout, prepare, anchor)


def _by_name(given: PerReward, names: Sequence[str], what: str, empty: float) -> np.ndarray:
    """Numbers [M] of the names; None, and what is not given by name, is `empty`."""
    if isinstance(given, Mapping):
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(f"{what} name {unknown[0]!r}, which is no reward of this run; there are {', '.join(names)}")
        given = [given.get(name) for name in names]
    if len(given) and len(given) != len(names):
        raise ValueError(f"{len(given)} {what} for {len(names)} rewards ({', '.join(names)}); give one for each, or name them")
    return np.array([empty if x is None else float(x) for x in given] or [empty] * len(names), np.float32)


def _remember(memory: Memory, rewards: Array, decay: float) -> Memory:
    """Running means with the start's bias taken out; a batch without any known reward of a column leaves that one as it is."""
    r = finite(rewards)
    known = jnp.isfinite(r).any(0)
    fill = lambda new, old: jnp.where(known, new, old)  # noqa: E731
    count = memory.batches + 1
    share = (1 - decay) / (1 - decay**count)
    mean = memory.mean + share * (fill(jnp.nanmean(r, 0), memory.mean) - memory.mean)
    variance = memory.variance + share * (fill(jnp.nanvar(r, 0), memory.variance) - memory.variance)
    spread = jnp.nanstd(r, 0)
    scale = jnp.where((memory.batches == 0) & (spread > 0), spread, memory.scale)
    return Memory(count, mean, variance, scale, memory.state)


def _std(memory: Memory) -> Array:
    std = jnp.sqrt(memory.variance)
    return jnp.where(std > 1e-6 * jnp.maximum(jnp.abs(memory.mean), 1e-6), std, 1.0)
