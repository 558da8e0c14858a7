"""Supervised fine-tuning: the denoising loss on given pictures; also how the base model itself is trained."""

from __future__ import annotations

import jax

from ..diffusion import Sampler
from .base import Algorithm, Info, Needs, Networks, Tree
from .losses import denoise_error, noised

Array = jax.Array


def sft(sampler: Sampler, *, snr_gamma: float | None = 5.0) -> Algorithm:
    """Denoising regression on labelled data: L = E w(t) |x0 - x0_theta(x_t, t, c)|^2 (arXiv 2006.11239, 2303.09556)."""

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        x_t, t, eps = noised(keys, items["x0"], sampler.schedule)
        output = networks["unguided"](x_t, t, items["cond"])
        error = denoise_error(output, x_t, t, items["x0"], eps, schedule=sampler.schedule,
                              prediction=sampler.prediction, snr_gamma=snr_gamma)  # fmt: skip
        return error, {"denoising_error": error}

    return Algorithm(Needs(data="labels"), loss)
