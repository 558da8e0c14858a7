"""InPO and SmPO: Diffusion-DPO at states that each picture's own inversion leads to (arXiv 2503.18454, 2506.02698)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..diffusion import Sampler, fold_in, invert, predict
from .base import Algorithm, Info, Needs, Networks, Tree
from .dpo import PLAIN, SIDES, pairwise
from .losses import noised

Array = jax.Array


def inpo(sampler: Sampler, *, beta: float = 5000.0, steps: int = 10, eta: float = 0.1, renoise: int = 0, gamma: float | None = None,
         link: str = "logistic", weight_space: str = "native", safeguard: float | None = None) -> Algorithm:  # fmt: skip
    """Diffusion-DPO's loss at x_t = the policy's own inversion of each picture (no gradient, no guidance), eps = what it
    adds: eps = (x_t - alpha_t x0) / sigma_t.

    beta: 5000 for SDXL, 2000 for SD1.5 in the papers. steps, eta: `invert`'s. The two pictures share t and have each their
    own noise by construction, which is not the independent noise that Diffusion-DPO must not have. gamma: SmPO's.
    Departures: the official code inverts on a coarse grid and takes alpha at another time, for batches of one; here the
    inversion ends exactly at t, for every t at once.
    """
    if steps < 1 or renoise < 0 or not 0 <= eta < 1:
        raise ValueError(f"an inversion has steps >= 1, renoise >= 0 and eta in [0, 1); got {steps}, {renoise}, {eta}")

    def states(keys: Array, items: Tree, side: str) -> tuple[Array, Array, Array]:
        x_t, t = items[f"{side}_t"], items["t"]
        return x_t, t, predict("x0", items[side], x_t, sampler.schedule.alpha(t), sampler.schedule.sigma(t))[1]

    reference, pair = pairwise(sampler, states, beta=beta, link=link, weight_space=weight_space, safeguard=safeguard, gamma=gamma)

    def anchor(keys: Array, networks: Networks, items: Tree) -> Tree:
        _, t, _ = noised(keys, items["winner"], sampler.schedule)
        inverted = {f"{side}_t": invert(networks["policy"], items[side], t, items["cond"], sampler, steps=steps,
                                        renoise=renoise, eta=eta, keys=fold_in(keys, 2)) for side in SIDES}  # fmt: skip
        return reference(keys, networks, {**items, **inverted, "t": t})

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        value, info = pair(keys, networks, items)
        noise = jnp.stack([states(keys, items, side)[2] for side in SIDES], 1)
        return value, {**info, "inverted_noise": jnp.square(noise).mean(tuple(range(1, noise.ndim)))}

    return Algorithm(Needs("pairs", copies={"reference": "frozen"}, guidance=PLAIN), loss, anchor=anchor)


def smpo(sampler: Sampler, *, beta: float = 2000.0, gamma: float = 10.0, steps: int = 5, eta: float = 0.1, renoise: int = 1,
         link: str = "logistic", weight_space: str = "native", safeguard: float | None = None) -> Algorithm:  # fmt: skip
    """L = link(gamma (2p - 1) u), u as InPO's with one step of ReNoise; p is the pair's soft label (arXiv 2506.02698).

    p = sigma((s_w - s_l) / .1666) of PickScore's cosines in the official code (.1154 to .2820, min-max, softmax). At p = 1/2
    the loss is log 2 and teaches nothing; p = 1 and gamma = 1 are InPO; at p < 1/2 the pair is swapped. gamma is inside the
    link, so beta is in effect beta gamma |2p - 1|. steps: 5 for SD1.5, 10 for SDXL in the code, 9 in the paper.
    """
    if not gamma > 0:
        raise ValueError(f"gamma scales the smoothed label and is above 0; got {gamma}")
    return inpo(sampler, beta=beta, steps=steps, eta=eta, renoise=renoise, gamma=gamma, link=link, weight_space=weight_space,
                safeguard=safeguard)  # fmt: skip
