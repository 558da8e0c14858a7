"""What one step of a config costs in calls: of the network, its gradient, the decoder, the reward. Counted, not estimated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from . import loop, sharding
from .calls import counted


def one_step(config: Any) -> dict[str, int]:
    """Samples that go through "network", "network backward", "decode", "reward" (and their backward) in one training step."""
    counter: Counter[str] = Counter()
    session, state = loop.set_up(config)
    parts = session.run.parts
    bundle = parts.bundle._replace(denoise=counted(parts.bundle.denoise, counter, "network"),
                                   decode=counted(parts.bundle.decode, counter, "decode"))  # fmt: skip
    reward = parts.reward
    if reward is not None:
        score = counted(reward.score, counter, "reward") if reward.device else _host(reward.score, counter)
        reward = reward._replace(score=score, tower=None)
    parts = parts._replace(bundle=bundle, reward=reward)
    run = session.run._replace(parts=parts)
    session = session._replace(run=run, programs=sharding.programs(session.layout, parts))
    counter.clear()
    loop.one_step(session, state, next(run.source), int(config.batch.get("updates", 1)))
    jax.effects_barrier()
    return dict(counter)


def _host(score: Callable[..., Any], counter: Counter[str]) -> Callable[..., Any]:
    def call(images: Any, *more: Any) -> Any:
        counter["reward"] += len(images)
        return score(images, *more)

    return call
