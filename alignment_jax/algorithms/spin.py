"""SPIN-Diffusion: self-play in which given pictures win against the previous iterate's own samples (arXiv 2402.10210)."""

from __future__ import annotations

import jax

from ..diffusion import Sampler, draw
from .base import Algorithm, Networks, Tree
from .dpo import diffusion_dpo

Array = jax.Array


def spin(sampler: Sampler, shape: tuple[int, ...], *, beta: float = 2000.0, every: int = 500, link: str = "logistic",
         weight_space: str = "native", safeguard: float | None = None) -> Algorithm:  # fmt: skip
    """Diffusion-DPO's loss with winner = data and loser ~ p_{theta_k}(. | c), reference = theta_k, drawn anew each step.

    every: steps of an iteration, after which theta_k is the policy of that moment. Where p_{theta_k} is the data's law, the
    expected gradient at theta_k is 0 and the loss log 2. The practical form of the paper: one random t with forward noise
    for both, not the sum over a trajectory.
    theta_k draws with the sampler's guidance ("previous") and is held against without ("reference"). Departure: the paper
    draws a whole set before each iteration; here every batch is fresh.
    """
    if every < 1:
        raise ValueError(f"every is the number of steps of one iteration, at least 1; got {every}")
    pair = diffusion_dpo(sampler, beta=beta, link=link, weight_space=weight_space, safeguard=safeguard)

    def rollout(keys: Array, extra: Tree, networks: Networks, data: Tree) -> Tree:
        x0, _ = draw(keys, networks["previous"], data["cond"], sampler, shape)
        return {**{k: v for k, v in data.items() if k != "x0"}, "winner": data["x0"], "loser": x0}

    copies = {name: ("every", every) for name in ("previous", "reference")}
    return pair._replace(needs=pair.needs._replace(data="labels", copies=copies), rollout=rollout)
