"""Guidance distillation: a network that does in one call what its guided teacher does in two."""

from __future__ import annotations

import jax

from ..diffusion import Sampler, predict
from .base import Algorithm, Info, Needs, Networks, Tree
from .losses import noised, quadratic

Array = jax.Array


def guidance_distillation(sampler: Sampler, *, teacher_scale: float = 3.0) -> Algorithm:
    """L = E |x0_theta(x_t, t, c) - x0_guided(x_t, t, c)|^2 with the frozen teacher guided by `teacher_scale`.

    The first stage of arXiv 2210.03142, for one fixed scale. Data: labelled pictures, re-noised.
    """

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        x_t, t, _ = noised(keys, items["x0"], sampler.schedule)
        alpha, sigma = sampler.schedule.alpha(t), sampler.schedule.sigma(t)
        clean = [predict(sampler.prediction, networks[name](x_t, t, items["cond"]), x_t, alpha, sigma)[0]
                 for name in ("policy", "teacher")]  # fmt: skip
        error = quadratic(*clean)
        return error, {"distillation_error": error}

    return Algorithm(Needs("labels", copies={"teacher": "frozen"}, guidance={"policy": 1.0, "teacher": teacher_scale}), loss)
