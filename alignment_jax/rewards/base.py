"""The contract of a reward: a function of what was generated and what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Reward(NamedTuple):
    """A reward.

    Args:
      name: what it is called in configs and reports.
      score: on the device, pure JAX: score(params, observation [B,H,W,C] in [0,1], condition) -> [B]. On the host:
        score(images uint8 [B,H,W,C], prompts, metadata) -> (scores [B], info), the contract of ddpo-pytorch.
      params: the scorer's parameters, an argument of every compiled function.
      encode: encode(prompts) -> condition, a tree of numpy arrays with leading axis B; None: no condition is needed.
      device, differentiable: where it runs and whether gradients pass.
      augment: augment(key, observation) -> observation, put before `score` where gradients are taken: an attack on the
        scorer must survive it.
      range: (low, high) of the scores. licence, summary: for `list rewards`.
    """

    name: str
    score: Callable[..., Any]
    params: Any = None
    encode: Callable[[Sequence[str]], Any] | None = None
    device: bool = True
    differentiable: bool = True
    augment: Callable[..., Any] | None = None
    range: tuple[float, float] = (float("-inf"), float("inf"))
    licence: str = "unknown"
    summary: str = ""
