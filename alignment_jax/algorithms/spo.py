"""SPO and LPO: at every step candidates from one state, judged at that step; the best against the worst (arXiv 2406.04314, 2502.01051).

The two differ in who judges, which the reward says: a scorer of pictures sees the clean prediction of each candidate, a latent
scorer (`Reward.noisy`) the candidate itself, and then neither clean predictions nor a decoder are ever computed.
Departures: ratios as in `d3po`; pairs that are too close weigh nothing, where the official codes gather those that count across
devices; a candidate x_{k-1} is judged at its own time, where LPO's code tells the judge that of x_k.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..diffusion import Sampler, expand, fold_in, initial, normal, predict, sample, transition
from .base import Algorithm, Info, Needs, Networks, Tree, uniform
from .d3po import noisy_steps, step_pair
from .pairs import shares

Array = jax.Array


def spo(sampler: Sampler, shape: tuple[int, ...], *, k: int = 4, beta: float = 10.0, clip_range: float = 0.1, reduce: str = "mean",
        threshold: Any = 0.3, temperature: float = 1.0, start: float = 0.2) -> Algorithm:  # fmt: skip
    """L = E -log sigma(beta (log rho(w) - log rho(l))), rho = clip(p_theta(. | x_t) / p_ref(. | x_t), 1 - e, 1 + e).

    w, l: the best and the worst of k candidates drawn from the same p_theta(. | x_t); a random one goes on, so that the walk is
    the sampler's own. threshold: pairs count if p_w - p_l > it, p the softmax of the two scores / temperature; (low, high) grows
    with the step's std, from the least to the greatest. start: the share of the chain before the first pair (4 of 20 steps).
    Comparing across different x_t would credit the step with what came before it.
    """
    steps = noisy_steps(sampler, "SPO")
    first = round(start * sampler.num_steps)
    steps = steps[steps >= first]
    low, high = threshold if isinstance(threshold, tuple | list) else (threshold, threshold)
    if k < 2 or temperature <= 0 or not 0 <= low <= high < 1:
        raise ValueError("k must be 2 or more, temperature above 0, and threshold in [0, 1), one number or (low, high); "
                         f"got k={k}, temperature={temperature}, threshold={threshold}")  # fmt: skip
    if not 0 <= start < 1 or not len(steps):
        raise ValueError(f"start={start} leaves no step with noise; it is a share of the chain of {sampler.num_steps} steps")
    anchor, loss = step_pair(sampler, beta=beta, clip_range=clip_range, reduce=reduce)
    zero = jnp.zeros((1, 1))
    std = np.array([float(transition(sampler, int(i), zero, zero).std) for i in steps])
    least = low + (high - low) * (std - std.min()) / max(float(np.ptp(std)), 1e-12)

    def rollout(keys: Array, extra: Tree, networks: Networks, data: Tree) -> Tree:
        t, alpha, sigma = (jnp.asarray(a) for a in sampler.grid)
        cond, policy = data["cond"], networks["policy"]
        at = lambda i: jnp.broadcast_to(t[i], keys.shape)  # noqa: E731

        def step(x: Array, i: Array) -> tuple[Array, Tree]:
            step_ = transition(sampler, i, x, policy(x, at(i), cond))
            own = fold_in(fold_in(keys, 2), i)

            def candidate(j: Array) -> tuple[Array, Array]:
                y = step_.mean + expand(step_.std, x) * normal(fold_in(own, j), x.shape)
                clean = predict(sampler.prediction, policy(y, at(i + 1), cond), y, alpha[i + 1], sigma[i + 1])[0]
                clean = jnp.where(i + 1 == sampler.num_steps, y, clean)  # the end of the chain is the picture itself
                return y, networks["reward"](y, clean, at(i + 1), cond, data["condition"])

            y, score = jax.lax.map(candidate, jnp.arange(k))  # one after the other: k at once would be k microbatches
            known = jnp.isfinite(score)
            best = jnp.argmax(jnp.where(known, score, -jnp.inf), 0)
            worst = jnp.argmin(jnp.where(known, score, jnp.inf), 0)
            pick = lambda z, j: jax.vmap(lambda z, j: z[j], (1, 0))(z, j)  # noqa: E731
            goes_on = jnp.floor(uniform(fold_in(own, k)) * k).astype(jnp.int32)
            pair = {"x": x[:, None], "x_prev": jnp.stack([pick(y, best), pick(y, worst)], 1),
                    "gap": jnp.where(known.sum(0) > 1, pick(score, best) - pick(score, worst), 0.0)}  # fmt: skip
            return pick(y, goes_on), pair

        x = initial(fold_in(keys, 0), sampler, (len(keys), *shape))
        if steps[0]:
            x, _ = sample(fold_in(keys, 1), policy, cond, sampler, x, stop=int(steps[0]))
        _, out = jax.lax.scan(step, x, jnp.asarray(steps))
        return {"cond": cond, **jax.tree.map(lambda z: z.swapaxes(0, 1), out)}

    def prepare(key: Array, extra: Tree, rollout: Tree, rewards: Any) -> tuple[Tree, Tree, Info]:
        b, s = rollout["gap"].shape
        counts = (jnp.tanh(rollout["gap"] / temperature / 2) > jnp.asarray(least)).astype(jnp.float32).reshape(-1)
        flat = {name: rollout[name].reshape(b * s, *rollout[name].shape[2:]) for name in ("x", "x_prev")}
        items = {**flat, "i": jnp.tile(jnp.asarray(steps), b), "weight": shares(counts), "row": jnp.repeat(jnp.arange(b), s)}
        return items, extra, {"pairs/counted": counts.mean(), "pairs/gap": rollout["gap"].mean()}

    return Algorithm(Needs("prompts", "step", {"reference": "frozen"}), loss, rollout=rollout, prepare=prepare, anchor=anchor)


def lpo(sampler: Sampler, shape: tuple[int, ...], *, k: int = 4, beta: float = 500.0, clip_range: float = 0.1, reduce: str = "mean",
        threshold: Any = (0.35, 0.5), temperature: float = 1.0, start: float = 0.0) -> Algorithm:  # fmt: skip
    """SPO with LPO's settings, meant for a latent scorer: all steps, a threshold that grows with the step's std, beta 500.

    With clip_range .1 the logit reaches beta 0.2 = 100: a hinge, whose gradient vanishes for pairs that are won.
    """
    made = spo(sampler, shape, k=k, beta=beta, clip_range=clip_range, reduce=reduce, threshold=threshold, temperature=temperature,
               start=start)  # fmt: skip
    return made._replace(needs=made.needs._replace(reward="state"))
