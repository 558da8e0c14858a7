"""MaPO: fine-tuning on winners plus a margin between the odds of both errors, without a reference (arXiv 2406.06424)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..diffusion import Sampler
from .base import Algorithm, Info, Needs, Networks, Tree, mean_square
from .dpo import SIDES, accuracy, check, residual
from .losses import logistic, noised

Array = jax.Array


def odds(m: Array, s: float) -> Array:
    """phi(m) = s m / (exp(s m) - 1): 1 at m = 0, falling with slope -s/2 there."""
    z = s * m
    small = jnp.abs(z) < 1e-3  # 0 / 0 at z = 0
    return jnp.where(small, 1 - z / 2 + z**2 / 12, z / jnp.expm1(jnp.where(small, 1.0, z)))


def mapo(sampler: Sampler, *, beta: float = 0.1, margin_scale: float = 1000.0, snr_value: float = 0.5) -> Algorithm:
    """L = m_w - beta log sigma(u), u = T (phi(m_w) - phi(m_l)), m = mean |output - target|^2 at a shared (t, eps).

    margin_scale: T; snr_value: phi's s; both the official code's. Nothing holds the policy near its start, and what is easy
    to denoise wins: for few steps on styles and taste, half the memory of DPO. A pair's soft label p weighs (w, l) and (l, w)
    by p and 1 - p.
    """
    check(beta)
    if not (margin_scale > 0 and snr_value > 0):
        raise ValueError(f"margin_scale and snr_value are above 0; got {margin_scale} and {snr_value}")

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        m_w, m_l = (mean_square(residual(networks["policy"], *noised(keys, items[side], sampler.schedule), items[side],
                                         items["cond"], sampler)) for side in SIDES)  # fmt: skip
        p = items.get("preference", jnp.ones(len(keys)))
        u = margin_scale * (odds(m_w, snr_value) - odds(m_l, snr_value))
        fit = p * m_w + (1 - p) * m_l
        return fit + beta * logistic(u, 1 - p), {"implicit_accuracy": accuracy(u), "margin": u, "denoising_error": fit}

    return Algorithm(Needs("pairs", guidance={"policy": 1.0}), loss)
