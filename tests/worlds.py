"""Small worlds with known answers: a 2-D mixture with a trainable denoiser, and the 1-D linear-Gaussian chain."""

from __future__ import annotations

import functools
import inspect
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from alignment_jax.algorithms import ALGORITHMS
from alignment_jax.algorithms.dpo import diffusion_dpo
from alignment_jax.diffusion import Sampler, cosine, rectified_flow, sampling_grid
from alignment_jax.models.bundle import ModelBundle
from alignment_jax.rewards.base import Reward
from alignment_jax.training import step as steps
from alignment_jax.training.optimizer import optimizer
from alignment_jax.training.programs import Parts, build
from alignment_jax.training.state import full_partition, lora_partition

CENTRES = np.array([[-0.8, -0.8], [-0.8, 0.8], [0.8, -0.8], [0.8, 0.8]], np.float32)
WIDTH = 0.15


class Correction(nn.Module):
    """A small MLP beside the exact denoiser of the mixture; nearly zero at the start."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, t, label):
        h = jnp.concatenate([x, jnp.cos(jnp.pi * t)[:, None], label], -1).astype(self.dtype)
        for i in range(2):
            h = nn.silu(nn.Dense(32, dtype=self.dtype, name=f"dense_{i}")(h))
        out = nn.Dense(2, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02), name="out")(h)
        return out.astype(jnp.float32)


def mixture_bundle(dtype=jnp.float32, flow: bool = False) -> ModelBundle:
    """Four modes of equal weight; the exact posterior mean plus a trainable correction; cond {"label" [B, 2]}.

    flow: on a rectified flow.
    """
    net, schedule = Correction(dtype), rectified_flow(t_max=0.98) if flow else cosine(t_max=0.98)

    def exact(x, t):
        a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        variance = a**2 * WIDTH**2 + s**2
        d2 = jnp.square(x[:, None] - a[:, :, None] * CENTRES).sum(-1)
        weight = jax.nn.softmax(-d2 / (2 * variance), -1)
        mean = weight @ jnp.asarray(CENTRES)
        return mean + a * WIDTH**2 / variance * (x - a * mean)

    def denoise(params, x, t, cond):
        return exact(x, t) + net.apply({"params": params["net"]}, x, t, cond["label"])

    def init(key):
        return {"net": net.init(key, jnp.zeros((1, 2)), jnp.zeros((1,)), jnp.zeros((1, 2)))["params"],
                "text": {"token": {"kernel": jnp.ones((2, 2))}}}  # fmt: skip

    return ModelBundle(
        name="mixture", init=init, denoise=denoise,
        encode_text=lambda params, tokens: {"label": jnp.asarray(tokens, jnp.float32)},
        decode=lambda params, x: x, encode=lambda params, x: x, tokenize=lambda prompts: np.zeros((len(prompts), 2)),
        schedule=schedule, prediction="x0", sample_shape=(2,),
        sampling={"num_steps": 6, "spacing": "uniform", "eta": 1.0},
    )  # fmt: skip


def near(params, observation, condition):
    """The reward: minus the squared distance to the mode at (.8, .8)."""
    return -jnp.square(observation - jnp.asarray(CENTRES[3])).sum(-1)


# what makes each method learn on the mixture within its budget: overrides of its defaults
SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {}, "raft": {}, "rwr": {"lam": 2.0, "refresh": 10}, "lee": {"low": -1.0, "high": 0.0, "beta": 0.0},
    "ddpo": {"clip_range": 0.2, "advantage": "group"},
    # centred returns have a mean of 0 up to rounding, which the critic's bias would follow by Adam's full steps: they are clipped
    "dpok": {"clip_range": 0.2, "critic_learning_rate": 1e-2, "adv_clip": 1.0},
    "flow_grpo": {"clip_range": 0.2}, "dance_grpo": {"clip_range": 0.2},
    "mix_grpo": {"clip_range": 0.2, "window": 3, "every": 2},
    "diffusion_nft": {"reference_weight": 0.01, "old_decay": 0.3, "adaptive": False}, "guidance_distillation": {},
    "adjoint_matching": {"lam": 2.0}, "prdp": {"beta": 0.5}, "awm": {"reference_weight": 0.01, "adv_clip": 1.0},
    "diffusion_kto": {"beta": 25.0}, "mapo": {"margin_scale": 10.0}, "spin": {"beta": 50.0, "every": 10},
    "inpo": {"beta": 50.0, "steps": 3}, "smpo": {"beta": 50.0, "steps": 2, "gamma": 1.0}, "rank_dpo": {"beta": 25.0},
    "diffusion_dpo": {"beta": 50.0}, "refl": {"window": 0.5}, "draft": {"k": 3, "anchor_weight": 0.01},
    "drtune": {"k": 3}, "srpo": {"ceiling": 0.5}, "alignprop": {"mean_k": 4.0, "std_k": 2.0},
    "d3po": {"clip_range": 0.9, "pairs": "all"}, "spo": {"clip_range": 0.9},
    "lpo": {"clip_range": 0.9, "beta": 10.0, "threshold": 0.1},
    "online": {"loss": partial(diffusion_dpo, beta=50.0)}, "semi_online": {"loss": partial(diffusion_dpo, beta=50.0)},
}  # fmt: skip
ETA = {"ddpo": 1.0, "dpok": 1.0, "adjoint_matching": 1.0, "prdp": 1.0, "d3po": 1.0, "spo": 1.0, "lpo": 1.0}
FLOW_SDE = {"flow_grpo": ("sqrt", 0.7), "dance_grpo": ("constant", 0.7), "mix_grpo": ("sqrt", 0.7)}  # these methods get a rectified flow
LEARNING_RATE = dict.fromkeys(["ddpo", "dpok", "flow_grpo", "dance_grpo", "mix_grpo", "d3po"], 1e-3)


@functools.lru_cache(maxsize=6)
def mixture_parts(name: str, lora: bool, learning_rate: float | None, reward, dtype, eta: float | None, overrides: tuple):
    """(parts, programs, sampler) of a method on the mixture; the same call gets the same programs, compiled and all."""
    bundle = mixture_bundle(dtype, flow=name in FLOW_SDE)
    grid = sampling_grid(bundle.schedule, 6)
    sampler = Sampler(bundle.schedule, grid, "x0", eta=ETA.get(name, 0.0) if eta is None else eta, flow_sde=FLOW_SDE.get(name))
    entry = ALGORITHMS[name]
    kwargs = {"sampler": sampler, "shape": (2,), "group": 8} | SETTINGS[name] | dict(overrides)
    known = inspect.signature(entry.factory).parameters
    algorithm = entry.factory(**{k: v for k, v in kwargs.items() if k in known})
    tx, _ = optimizer(steps=100, name="adam", learning_rate=learning_rate or LEARNING_RATE.get(name, 5e-3))
    partition = lora_partition(rank=4, targets="net/dense") if lora else full_partition("net")
    parts = Parts(bundle, algorithm, partition, tx, Reward("near", reward), ema_decay=0.9)
    return parts, build(parts), sampler


def mixture_run(name: str, *, lora: bool = False, learning_rate: float | None = None, reward=near, dtype=jnp.float32,
                eta: float | None = None, fresh: bool = False, **overrides):  # fmt: skip
    """(parts, programs, state, frozen, sampler) of a method on the mixture; fresh: with programs that have not run yet."""
    make = mixture_parts.__wrapped__ if fresh else mixture_parts
    traced = near if ALGORITHMS[name].reward == "value" else reward  # scores are taken outside of the programs, in one_step
    parts, programs, sampler = make(name, lora, learning_rate, traced, dtype, eta, tuple(overrides.items()))
    params = parts.bundle.init(jax.random.key(0))
    trained, frozen_params = parts.partition.init(jax.random.key(1), params)
    frozen = {"params": frozen_params, "reward": None, "null": {"label": jnp.zeros((1, 2))}}
    state = programs.init(jax.random.key(2), trained, frozen["null"])
    return parts._replace(reward=Reward("near", reward)), programs, state, frozen, sampler


def mixture_data(needs: str, key: jax.Array, n: int = 64) -> dict[str, Any]:
    """A batch of what a method needs; labels are the rewarded mode, pairs prefer it; the empty label is 0."""
    data = {"cond": {"label": jnp.ones((n, 2))}, "condition": {}, "prompt_id": jnp.arange(n) // 8}
    good = CENTRES[3] + WIDTH * jax.random.normal(key, (n, 2))
    other = jax.random.randint(jax.random.fold_in(key, 1), (n,), 0, 3)
    bad = jnp.asarray(CENTRES)[other] + WIDTH * jax.random.normal(jax.random.fold_in(key, 2), (n, 2))
    if needs == "labels":
        data["x0"] = good
    if needs == "pairs":
        data |= {"winner": good, "loser": bad, "preference": jnp.ones(n)}
    if needs == "desirable":
        data |= {"x0": jnp.concatenate([good[: n // 2], bad[n // 2 :]]), "desirable": (jnp.arange(n) < n // 2).astype(jnp.float32)}
    if needs == "lists":
        near_ = jnp.asarray(CENTRES)[other][:, None] + WIDTH * jax.random.normal(jax.random.fold_in(key, 3), (n, 2, 2))
        data["list"] = jnp.concatenate([bad[:, None], good[:, None], near_], 1)
        data["score"] = near(None, data["list"], None)
    return data


def one_step(parts, programs, state, frozen, data, number: int, size: int = 64, first_update: bool = True):
    """The loop's step, without files: (state, metrics)."""
    n = steps.leading(data)
    keys = jax.random.split(jax.random.fold_in(state.key, number), 3)
    rolled = steps.mapped(lambda k, d: programs.rollout(state, frozen, k, d), n, size, jax.random.split(keys[0], n), data)
    rewards = parts.reward.score(None, rolled["x0"], {}) if parts.algorithm.needs.reward == "value" else None
    items, extra, info = programs.prepare(keys[1], state.extra, rolled, rewards)
    state = state._replace(extra=extra)
    n_items = steps.leading(items)
    item_keys = jax.random.split(keys[2], n_items)
    items = steps.anchored(programs, state, frozen, item_keys, items, rolled["cond"], size)
    state, metrics = steps.update(programs, state, frozen, item_keys, items, rolled["cond"], size, first_update)
    return state, {**info, **metrics}


def run_steps(name: str, count: int, *, size: int = 64, n: int = 64, start=None, first: int = 0, first_update: bool = True, **kwargs):
    """Trains `count` steps; returns (parts, programs, state, frozen, sampler, list of metrics)."""
    parts, programs, state, frozen, sampler = mixture_run(name, **kwargs)
    state = state if start is None else start
    log = []
    for number in range(first, first + count):
        data = mixture_data(parts.algorithm.needs.data, jax.random.fold_in(jax.random.key(7), number), n)
        state, metrics = one_step(parts, programs, state, frozen, data, number, size, first_update)
        log.append({k: float(v) for k, v in metrics.items()})
    return parts, programs, state, frozen, sampler, log


def mean_reward(parts, trained, frozen, sampler, n: int = 512) -> float:
    """Mean reward of fresh samples."""
    from functools import partial

    from alignment_jax.diffusion import normal, sample

    keys = jax.random.split(jax.random.key(99), n)
    denoise = partial(parts.bundle.denoise, parts.partition.merge(trained, frozen["params"]))
    x_T = normal(jax.vmap(lambda k: jax.random.fold_in(k, 5))(keys), (n, 2))
    x0 = jax.jit(lambda k, x: sample(k, denoise, {"label": jnp.ones((n, 2))}, sampler, x)[0])(keys, x_T)
    return float(near(None, x0, None).mean())
