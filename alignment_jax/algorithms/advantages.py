"""From rewards to advantages. NaN rewards are samples that could not be scored: they count nowhere and get 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class History(NamedTuple):
    """The last rewards of every prompt: values [prompts, size], NaN where there is none yet; next [prompts]."""

    values: Array
    next: Array


def history(num_prompts: int, size: int) -> History:
    """An empty memory of `size` rewards a prompt."""
    return History(jnp.full((num_prompts, size), jnp.nan), jnp.zeros((num_prompts,), jnp.int32))


def standardised(rewards: Array, mean: Array, std: Array, eps: float) -> Array:
    """(r - mean) / (std + eps), 0 where r is NaN or where the spread is below float32's resolution of the rewards.

    Without that floor a group of equal rewards gets noise divided by eps: it must get exactly 0.
    """
    spread = std > 1e-6 * jnp.maximum(jnp.abs(mean), 1e-6)
    value = (rewards - mean) / jnp.where(spread, std + eps, 1.0)
    return jnp.where(jnp.isfinite(rewards) & spread, value, 0.0)


def batch(rewards: Array, *, eps: float = 1e-6) -> Array:
    """(r - mean) / std over the whole batch [B]."""
    r = finite(rewards)
    return standardised(r, jnp.nanmean(r), jnp.nanstd(r), eps)


def group(rewards: Array, size: int, *, eps: float = 1e-4, std: str = "group") -> Array:
    """(r - mean of the group) / std, groups of `size` neighbours [B] (GRPO, arXiv 2402.03300).

    std "group": DanceGRPO; "batch": one std for all, as Flow-GRPO and DiffusionNFT do: groups that hardly differ are not
    blown up; "none": differences of rewards.
    """
    r = finite(rewards).reshape(-1, size)
    mean = jnp.nanmean(r, 1, keepdims=True)
    if std == "none":
        return jnp.where(jnp.isfinite(r), r - mean, 0.0).reshape(-1)
    if std not in ("group", "batch"):
        raise ValueError(f"std must be 'group', 'batch' or 'none'; got {std!r}")
    spread = jnp.nanstd(r, 1, keepdims=True) if std == "group" else jnp.broadcast_to(jnp.nanstd(r), mean.shape)
    return standardised(r, mean, spread, eps).reshape(-1)


def leave_one_out(rewards: Array, size: int) -> Array:
    """r - mean of the others in the group [B] (RLOO, arXiv 2402.14740)."""
    r = finite(rewards).reshape(-1, size)
    n = jnp.isfinite(r).sum(1, keepdims=True)
    others = (jnp.nansum(r, 1, keepdims=True) - r) / jnp.maximum(n - 1, 1)
    return jnp.where(jnp.isfinite(r) & (n > 1), r - others, 0.0).reshape(-1)


def per_prompt(rewards: Array, prompt_id: Array, memory: History, *, min_count: int = 16,
               eps: float = 1e-6) -> tuple[Array, History]:  # fmt: skip
    """Standardised by the prompt's own last rewards (DDPO's PerPromptStatTracker, arXiv 2305.13301): ([B], memory).

    The new rewards are remembered first. A prompt with fewer than min_count rewards uses the batch's statistics.
    """
    r = finite(rewards)

    def remember(memory: History, item: tuple[Array, Array]) -> tuple[History, None]:
        p, value = item
        slot = memory.next[p] % memory.values.shape[1]
        kept = jnp.isfinite(value)
        values = memory.values.at[p, slot].set(jnp.where(kept, value, memory.values[p, slot]))
        return History(values, memory.next.at[p].add(kept.astype(jnp.int32))), None

    memory, _ = jax.lax.scan(remember, memory, (prompt_id, r))
    own = memory.values[prompt_id]
    enough = jnp.isfinite(own).sum(1) >= min_count
    mean = jnp.where(enough, jnp.nanmean(own, 1), jnp.nanmean(r))
    std = jnp.where(enough, jnp.nanstd(own, 1), jnp.nanstd(r))
    return standardised(r, mean, std, eps), memory


def finite(rewards: Array) -> Array:
    """Rewards in float32, infinities turned into NaN."""
    r = jnp.asarray(rewards, jnp.float32)
    return jnp.where(jnp.isfinite(r), r, jnp.nan)


def zero_groups(advantages: Array, size: int) -> Array:
    """The share of groups whose advantages are all 0: they teach nothing."""
    return (advantages.reshape(-1, size) == 0).all(1).mean()


Rule = Callable[[Array, Array, Any], tuple[Array, Any]]
Memory = Callable[[], Any]


def rule(kind: str, size: int, num_prompts: int, buffer: int, min_count: int) -> tuple[Rule, Memory]:
    """(advantages(rewards [B], prompt_id, memory) -> ([B], memory), empty memory) of a method's `advantage` option."""
    plain: dict[str, Callable[[Array], Array]] = {
        "batch": batch, "group": lambda r: group(r, size), "group_batch_std": lambda r: group(r, size, std="batch"),
        "rloo": lambda r: leave_one_out(r, size),
    }  # fmt: skip
    if kind == "prompt":
        if num_prompts < 1:
            raise ValueError("advantage='prompt' remembers rewards by prompt: set num_prompts to how many there are")
        return lambda r, p, m: per_prompt(r, p, m, min_count=min_count), lambda: history(num_prompts, buffer)
    if kind not in plain:
        raise ValueError(f"advantage {kind!r} is not known; choose one of prompt, {', '.join(plain)}")
    if kind != "batch" and size < 2:
        raise ValueError(f"advantage={kind!r} compares the samples of a prompt: batch.group must be 2 or more; got {size}")
    return lambda r, p, m: (plain[kind](r), m), lambda: {}
