"""Whether a method, its reward, the model and the devices fit each other; where they do not, the error says what would."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..algorithms import ALGORITHMS
from ..algorithms.base import Algorithm
from ..models.bundle import ModelBundle
from ..models.lora import unreached
from ..rewards import REWARDS
from ..rewards.base import Reward
from . import sharding, stream
from .programs import Parts
from .state import Partition

Tree = Any
NOISY = ("What fits: {'name': 'trained', 'folder': ...} of a train-reward run with reads='noisy' (configs/critters_reward.py:noisy), or "
         "your own Reward with noisy=True; spo judges steps by pictures")  # fmt: skip


def reward(config: Any, algorithm: Algorithm, given: Reward | None) -> None:
    """Raises ValueError where the method asks of the reward what it does not give."""
    name, asks = config.method.name, algorithm.needs.reward
    if not asks:
        return
    if given is None:
        choices = NOISY if asks == "state" else f"Set config.reward to one of {', '.join(REWARDS)}"
        raise ValueError(f"method {name} needs a reward. {choices}")
    if asks == "gradient" and not given.differentiable:
        fits = [n for n, entry in ALGORITHMS.items() if n != name and entry.reward != "gradient"]
        raise ValueError(f"method {name} takes gradients of the reward, and {given.name!r} has none; "
                         f"use a differentiable reward, or one of the methods {', '.join(fits)}")  # fmt: skip
    if given.noisy and asks not in ("step", "state"):
        raise ValueError(f"{given.name!r} scores noisy states; method {name} asks for scores of pictures. Methods that "
                         "judge steps are spo and lpo")  # fmt: skip
    if asks == "state" and not given.noisy:
        raise ValueError(f"method {name} judges the noisy states of the chain, and {given.name!r} scores pictures. {NOISY}")
    if asks in ("step", "state") and not given.device:
        raise ValueError(f"method {name} judges states inside the rollout, on the device, and {given.name!r} runs on the "
                         "host; use a device reward, or a method that scores whole pictures: d3po, online, ddpo")  # fmt: skip


def lora(config: Any, bundle: ModelBundle, partition: Partition, trained: Tree, params: Tree, trains_text: bool) -> None:
    """Raises ValueError where a user's own model applies arrays that LoRA trains without flax layers, which it cannot reach."""
    if ":" not in config.model or Path(config.model).exists():
        return
    tokens = jnp.asarray(bundle.tokenize([""]))
    cond = {"tokens": tokens} if trains_text else jax.eval_shape(bundle.encode_text, params, tokens)
    x = jnp.zeros((1, *bundle.sample_shape))
    missed = unreached(bundle.denoise, jax.eval_shape(partition.combine, trained, params), x, jnp.zeros(1), cond)
    if missed:
        raise ValueError(f"LoRA would not reach {', '.join(missed[:5])}{' and others' if len(missed) > 5 else ''}: no flax Dense or "
                         f"Conv layer of {config.model} applies them. Narrow lora.targets, or train whole parameters "
                         "(lora=None, config.trainable)")  # fmt: skip


def processes(config: Any, on: sharding.Layout) -> None:
    """Raises ValueError where several processes cannot each bring whole prompts of their own to the parts of the batch they hold."""
    parts = on.mesh.devices.reshape(sharding.shards(on.mesh), -1)
    owners = [sorted({device.process_index for device in part}) for part in parts]
    count = len({device.process_index for device in on.mesh.devices.flat})
    prompts, group, _ = stream.batch_sizes(config, len(parts))
    shared = next((who for who in owners if len(who) > 1), None)
    if shared:
        raise ValueError(f"sharding.tensor {on.mesh.shape['tensor']} lays one part of the batch on devices of the processes {shared}, each "
                         "of which reads prompts of its own. Choose a smaller tensor (1 always fits) and a larger fsdp")  # fmt: skip
    if prompts % count:
        raise ValueError(f"batch.prompts {prompts} does not divide over {count} processes; the nearest is {-(-prompts // count) * count}")
    runs = 1 + sum(a != b for a, b in pairwise(owners))
    if group > 1 and prompts % len(parts) and runs > count:  # the mesh follows the links between chips, not the hosts
        raise ValueError(f"batch.prompts {prompts} x group {group} on {len(parts)} parts would cut a prompt's group in two, and this mesh "
                         "lays neighbouring parts on different hosts, so that samples would be judged against other prompts; the nearest "
                         f"number of prompts is {-(-prompts // len(parts)) * len(parts)}")  # fmt: skip


def scorers(config: Any, parts: Parts, on: sharding.Layout) -> None:
    """Raises ValueError where devices are set apart for scoring and the method, the reward or the microbatch does not allow for it."""
    reward, size = parts.reward, stream.batch_sizes(config)[2]
    if on.scorers is None:
        return
    if reward is None or not reward.device or parts.algorithm.needs.reward != "value" or parts.redraw is not None:
        asked = f"{reward.name if reward else 'no reward'}{' and config.rollout' if parts.redraw else ''}"
        raise ValueError("sharding.scorers are devices that score finished pictures, for methods that ask for no more; "
                         f"{config.method.name} with {asked} has none to score there. Leave it at 0")  # fmt: skip
    if size % on.scorers.size:
        raise ValueError(f"microbatches of {size} do not divide over {on.scorers.size} sharding.scorers")
