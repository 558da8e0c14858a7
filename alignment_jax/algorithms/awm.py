"""AWM: PPO with the denoising loss of re-noised own samples as minus the log-likelihood (arXiv 2509.25050).

Departures: on the network's own output, whatever its parameterisation; times are drawn independently, not by strata; no
weighting of the loss over times.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..diffusion import Sampler, draw, target
from . import advantages
from .base import Algorithm, Info, Needs, Networks, Tree, mean_square
from .losses import noised, ppo

Array = jax.Array


def awm(sampler: Sampler, shape: tuple[int, ...], *, group: int = 8, clip_range: float = 1.0, adv_clip: float = 5.0,
        draws: int = 6, reference_weight: float = 0.003, ema_weight: float = 1.0, ema_decay: float = 0.3,
        advantage: str = "group_batch_std") -> Algorithm:  # fmt: skip
    """L = max(-A rho, -A clip(rho, 1 - e, 1 + e)) + reference_weight |v_theta - v_ref|^2 + ema_weight |v_theta - v_ema|^2.

    rho = exp(l_old - l_theta), l = mean |v(x_t, t, c) - v|^2 with one (t, eps) for new, old and averaged policy; v: what the
    network predicts. A = clip(A / adv_clip, -1, 1). At theta = old the gradient is A times that of the denoising loss, and
    with reference_weight w the fixed point tilts: v_theta = v_ref + Cov(A, v | x_t) / w. draws: re-noised copies of each
    sample. Values are the official code's for SD3.5-M; reference_weight is 1e-4 there for PickScore, ema_decay is at its cap.
    """
    if not 0 < clip_range:
        raise ValueError(f"clip_range bounds exp of a difference of losses and must be positive, the paper's is 1; got {clip_range}")
    rule, memory = advantages.rule(advantage, group, 0, 0, 0)
    copies: dict[str, object] = {"ema": ("ema", ema_decay)} if ema_weight else {}
    copies |= {"reference": "frozen"} if reference_weight else {}
    weights = {"reference": reference_weight, "ema": ema_weight}

    def rollout(keys: Array, extra: Tree, networks: Networks, data: Tree) -> Tree:
        x0, _ = draw(keys, networks["policy"], data["cond"], sampler, shape)
        return {**data, "x0": x0}

    def prepare(key: Array, extra: Tree, rollout: Tree, rewards: Array) -> tuple[Tree, Tree, Info]:
        a, extra = rule(rewards, rollout.get("prompt_id"), extra)
        items = {"x0": rollout["x0"], "row": jnp.arange(len(a)), "advantage": jnp.clip(a / adv_clip, -1, 1)}
        return jax.tree.map(lambda x: jnp.repeat(x, draws, 0), items), extra, {"advantage/std": a.std()}

    def matched(name: str, keys: Array, networks: Networks, items: Tree) -> tuple[Array, Array]:
        """The network's output at the item's (t, eps), and its denoising loss [N]."""
        x_t, t, eps = noised(keys, items["x0"], sampler.schedule)
        output = networks[name](x_t, t, items["cond"])
        goal = target(sampler.prediction, items["x0"], eps, sampler.schedule.alpha(t), sampler.schedule.sigma(t))
        return output, mean_square(output - goal)

    def anchor(keys: Array, networks: Networks, items: Tree) -> Tree:
        others = {name: matched(name, keys, networks, items)[0] for name in copies}
        return {**items, "error": matched("policy", keys, networks, items)[1], **others}

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        output, error = matched("policy", keys, networks, items)
        old = jnp.where(items["first"], jax.lax.stop_gradient(error), items["error"])
        value = ppo(old - error, items["advantage"], clip_range)
        deviation = jnp.abs(jnp.exp(old - error) - 1)
        info = {"denoising_error": error, "ratio/deviation_max": deviation,
                "ratio/clip_fraction": (deviation > clip_range).astype(jnp.float32)}  # fmt: skip
        for name in copies:
            info[f"drift/{name}"] = mean_square(output - items[name])
            value = value + weights[name] * info[f"drift/{name}"]
        return value, info

    return Algorithm(Needs("prompts", "value", copies), loss, lambda key: memory(), rollout, prepare, anchor)
