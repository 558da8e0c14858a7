"""The contract of a reward: a function of what was generated and what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Tower(NamedTuple):
    """The costly part of a scorer, apart from its head, so that scorers in one sum can share it.

    Args:
      name: equal where weights, sizes and preprocessing are.
      features: features(params["tower"], observation [B,H,W,C]) -> features [B,E].
      head: head(params["head"], features, condition) -> [B].
    """

    name: str
    features: Callable[[Any, Any], Any]
    head: Callable[[Any, Any, Any], Any]

    def score(self, params: Any, observation: Any, condition: Any) -> Any:
        """The score of such a reward alone; params: {"tower", "head"}."""
        return self.head(params["head"], self.features(params["tower"], observation), condition)


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
      noisy: score reads a state of the chain: score(params, x_t [B,...], {"t" [B], "cond"}) -> [B], before any decoder.
      tower: the parts of `score`, where `weighted` may share one of them; then params are {"tower", "head"}.
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
    noisy: bool = False
    tower: Tower | None = None
