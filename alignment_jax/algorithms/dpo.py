"""Diffusion-DPO: the winner's denoising error should improve over the reference more than the loser's (arXiv 2311.12908)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..diffusion import Sampler, normal, target
from .base import Algorithm, Info, Needs, Networks, Tree, fold, mean_square, uniform
from .losses import LINKS, logistic

Array = jax.Array


def diffusion_dpo(sampler: Sampler, *, beta: float = 5000.0, link: str = "logistic", label_smoothing: float = 0.0) -> Algorithm:
    """L = link(u), u = -beta/2 [(m_w - m_l) - (m_w_ref - m_l_ref)], m = mean |output - target|^2 at a shared (t, eps).

    link: logistic (DPO; label_smoothing: cDPO), ipo (arXiv 2310.12036), hinge (arXiv 2305.10425). A pair's soft label p
    weighs link(u) and link(-u) by p and 1 - p; p = 1/2 is a tie. At theta = ref the logistic loss is log 2 and its
    gradient beta/4 grad(m_w - m_l). beta belongs to the mean over entries, as in the official code.
    The noise must be shared inside a pair: with independent noise the optimum of the 1-D toy is .50, not 1.30.
    """
    if link not in LINKS:
        raise ValueError(f"link {link!r} is not known; choose one of {', '.join(LINKS)}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is the share of wrong labels, in [0, 0.5); got {label_smoothing}")
    schedule = sampler.schedule

    def errors(name: str, keys: Array, networks: Networks, items: Tree) -> Array:
        u = uniform(fold(keys, 0))
        t = jnp.floor(u * (schedule.t_max + 1)) if schedule.discrete else schedule.t_min + u * (schedule.t_max - schedule.t_min)
        eps = normal(fold(keys, 1), items["winner"].shape)
        out = []
        for which in ("winner", "loser"):
            x_t = schedule.add_noise(items[which], eps, t)
            goal = target(sampler.prediction, items[which], eps, schedule.alpha(t), schedule.sigma(t))
            out.append(mean_square(networks[name](x_t, t, items["cond"]) - goal))
        return jnp.stack(out, 1)

    def anchor(keys: Array, networks: Networks, items: Tree) -> Tree:
        return {**items, "reference_error": errors("reference", keys, networks, items)}

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        drift = errors("policy", keys, networks, items) - items["reference_error"]
        u = -0.5 * beta * (drift[:, 0] - drift[:, 1])
        p = items.get("preference", jnp.ones(len(keys)))
        f = (lambda u: logistic(u, label_smoothing)) if link == "logistic" else LINKS[link]
        info = {"implicit_accuracy": jnp.where(u == 0, 0.5, (u > 0).astype(jnp.float32)), "margin": u,
                "winner_drift": drift[:, 0], "loser_drift": drift[:, 1]}  # fmt: skip
        return p * f(u) + (1 - p) * f(-u), info

    # errors are those of the networks themselves, as in pre-training; guidance is for sampling
    return Algorithm(Needs("pairs", copies={"reference": "frozen"}, guidance={"policy": 1.0, "reference": 1.0}), loss, anchor=anchor)
