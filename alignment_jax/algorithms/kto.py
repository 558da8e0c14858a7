"""Diffusion-KTO: pictures that are good or bad, each on its own, by the utility of prospect theory (arXiv 2404.04465)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..diffusion import Sampler
from .base import Algorithm, Info, Needs, Networks, Tree, mean_square
from .dpo import PLAIN, SIDES, accuracy, check, residual
from .losses import noised

Array = jax.Array
# -U up to a constant: U = sigma(h), the concave log sigma(h), the convex -log sigma(-h)
UTILITIES = {"kto": lambda h: 1 - jax.nn.sigmoid(h), "loss_averse": lambda h: jax.nn.softplus(-h),
             "risk_seeking": lambda h: -jax.nn.softplus(h)}  # fmt: skip


def diffusion_kto(sampler: Sampler, *, data: str = "pairs", beta: float = 1000.0, utility: str = "kto",
                  desirable_weight: float = 1.0, undesirable_weight: float = 1.0, weight_space: str = "native") -> Algorithm:  # fmt: skip
    """L = d w_D v(h) + (1 - d) w_U v(-h), h = beta (g - z), g = m_ref - m_theta, z = sg(max(mean g, 0)), v = 1 - sigma.

    data: "pairs", whose sides become two items, the winner desirable with the pair's soft label p, the loser with 1 - p; or
    "desirable": pictures with a label d in [0, 1]. beta belongs to the mean over entries and has no 1/2. z is the mean over
    the whole batch, at the step's first parameters and the very (t, eps) of the loss, whatever the microbatch; the two sides
    of a pair share (t, eps). At theta = ref z = 0, the loss is (w_D d + w_U (1 - d)) / 2 and, for pairs, its gradient half of
    DPO's for the same factor of the margin. With one side only, training chases its own mean: give both.
    Departures: the official code draws 0.8 desirable pictures; here the data's share stays, and the weights are for that.
    """
    check(beta, weight_space)
    if data not in ("pairs", "desirable"):
        raise ValueError(f"data {data!r} is not known; choose pairs, or desirable for single pictures with a label")
    if utility not in UTILITIES:
        raise ValueError(f"utility {utility!r} is not known; choose one of {', '.join(UTILITIES)}")
    if min(desirable_weight, undesirable_weight) < 0:
        raise ValueError(f"weights must not be negative; got {desirable_weight} and {undesirable_weight}")
    v, sides = UTILITIES[utility], SIDES if data == "pairs" else ("x0",)

    def error(name: str, keys: Array, networks: Networks, x0: Array, cond: Tree) -> Array:
        return mean_square(residual(networks[name], *noised(keys, x0, sampler.schedule), x0, cond, sampler, weight_space))

    def rollout(keys: Array, extra: Tree, networks: Networks, data: Tree) -> Tree:
        errors = {name: jnp.stack([error(name, keys, networks, data[side], data["cond"]) for side in sides], 1)
                  for name in ("policy", "reference")}  # fmt: skip
        return {**data, "draw": keys, "errors": errors}

    def prepare(key: Array, extra: Tree, rollout: Tree, rewards: None) -> tuple[Tree, Tree, Info]:
        n = len(rollout["draw"])
        policy, reference = (rollout["errors"][name].T.reshape(-1) for name in ("policy", "reference"))
        p = rollout.get("preference", jnp.ones(n))
        d = jnp.concatenate([p, 1 - p]) if len(sides) == 2 else rollout["desirable"].astype(jnp.float32)
        z = jnp.maximum((reference - policy).mean(), 0.0)
        items = {"x0": jnp.concatenate([rollout[side] for side in sides]), "row": jnp.concatenate([jnp.arange(n)] * len(sides)),
                 "draw": jnp.concatenate([rollout["draw"]] * len(sides)), "reference_error": reference, "desirable": d,
                 "offset": jnp.full(len(d), z), "share": jnp.full(len(d), d.mean())}  # fmt: skip
        return items, extra, {"offset": beta * z}

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        drift = error("policy", items["draw"], networks, items["x0"], items["cond"]) - items["reference_error"]
        h, d = beta * (-drift - items["offset"]), items["desirable"]
        value = desirable_weight * d * v(h) + undesirable_weight * (1 - d) * v(-h)
        share = jnp.clip(items["share"], 1e-6, 1 - 1e-6)
        # rollout and update are two programs and round differently: a gain of that size is a tie
        gain = jnp.where(jnp.abs(drift + items["offset"]) > 1e-6 * items["reference_error"], h, 0.0)
        return value, {"implicit_accuracy": accuracy((2 * d - 1) * gain), "margin": (2 * d - 1) * h,
                       "winner_drift": d / share * drift, "loser_drift": (1 - d) / (1 - share) * drift}  # fmt: skip

    return Algorithm(Needs(data, copies={"reference": "frozen"}, guidance=PLAIN), loss, rollout=rollout, prepare=prepare)
