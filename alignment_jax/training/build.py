"""From a config to the parts of a run, before anything compiles."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import weights
from ..algorithms import ALGORITHMS
from ..algorithms.aggregate import aggregated
from ..algorithms.base import Algorithm
from ..data import prompts as prompt_files
from ..data.sources import Source
from ..diffusion import NoiseSchedule, Sampler, sampling_grid, scheduler
from ..models import MODELS, stable_diffusion
from ..models.bundle import ModelBundle
from ..rewards import REWARDS, columns
from ..rewards.base import Reward
from ..rewards.combine import weighted
from ..weights import files as weight_files
from . import fit, sharding, steering, stream
from .names import call, named, nearest
from .optimizer import optimizer
from .programs import Guidance, Parts
from .state import full_partition, lora_partition

Tree = Any

class Plan(NamedTuple):
    """What follows from a config and the shapes of its parameters: parts, the sampler, the learning rate."""

    parts: Parts
    sampler: Sampler
    learning_rate: Callable[[int], Any]


class Run(NamedTuple):
    """What a config describes, built: parts, the base parameters, the sampler, the stream of data, the learning rate."""

    parts: Parts
    params: Tree
    sampler: Sampler
    source: Source
    learning_rate: Callable[[int], Any]


def model(config: Any, on: sharding.Layout | None = None) -> tuple[ModelBundle, Tree]:
    """(bundle, params) of config.model (a name, "module:factory", or a folder or hub id as diffusers writes it) and config.weights.

    on: where the parameters are put, None: on one device. weights: "shipped" (the model's own), "init" (random), or a .safetensors
    file of the whole model. model_options: the factory's arguments, and for folders `variant` (such as "fp16") and `param_dtype`,
    what parameters are kept in.
    """
    bundle, shapes, read = described(config)
    return bundle, read(None if on is None else sharding.check(on, shapes))


def described(config: Any) -> tuple[ModelBundle, Tree, Callable[..., Tree]]:
    """(bundle, shapes of its parameters, read) of a config as in `model`; only read(shardings or None) opens the weights."""
    kwargs, source = dict(config.get("model_options") or {}), config.get("weights", "shipped")
    stored = {k: kwargs.pop(k, None) for k in ("variant", "param_dtype")}
    path = None
    if config.model in MODELS or (":" in config.model and not Path(config.model).exists()):
        entry = named(config.model, MODELS, "model")
        bundle = call(entry.factory if hasattr(entry, "factory") else entry, kwargs, "model_options")
    else:
        path = folder(config.model, stored["variant"])
        bundle = call(stable_diffusion.stable_diffusion, kwargs, "model_options", folder=path)
    shapes = jax.eval_shape(bundle.init, jax.random.key(0))
    if source != "shipped" or path is None:
        where = entry.weights if source == "shipped" else source

        def read(where_to: Tree = None) -> Tree:
            if source == "init":
                return jax.jit(bundle.init, out_shardings=where_to)(jax.random.key(config.seed))
            return jax.device_put(weights.load(where, shapes), where_to)

        return bundle, shapes, read
    dtype = jnp.dtype(stored["param_dtype"] or "float32")

    def components(where_to: Tree = None) -> Tree:
        return {name: weight_files.load_component(path / name, like, stem=stable_diffusion.COMPONENTS[name], variant=stored["variant"],
                                                  dtype=dtype, sharding=where_to and where_to[name])
                for name, like in shapes.items()}  # fmt: skip

    kept = lambda x: jax.ShapeDtypeStruct(x.shape, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)
    return bundle, jax.tree.map(kept, shapes), components


def folder(source: str, variant: str | None = None) -> Path:
    """A model's folder, or the copy of a hub id (its weights of `variant` alone); a word that is neither is taken for a model's name."""
    if "/" not in source and not Path(source).expanduser().exists():
        raise ValueError(f"model {source!r} is not known." + nearest(source, MODELS)
                         + " Or: a folder as diffusers writes it, a hub id owner/name, your own 'module:name'.")  # fmt: skip
    return weight_files.resolve(source, allow=stable_diffusion.wanted(variant))


def reward(config: Any) -> Reward | None:
    """The reward of config.reward: what `one_reward` takes, or a weighted sum of such, [(reward, weight), ...]."""
    spec = config.get("reward")
    if not spec:
        return None
    spec = written(spec)
    if isinstance(spec, list | tuple):
        return weighted([(one_reward(part), float(weight)) for part, weight in spec])
    return one_reward(spec)


def written(spec: Any) -> Any:
    """A name as it is; the dictionary or list that a text such as "{'name': ...}" spells, as fields of the command line hold it."""
    if not isinstance(spec, str) or not spec.strip().startswith(("{", "[")):
        return spec
    try:
        return ast.literal_eval(spec.strip())
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{spec} is no dictionary or list as Python writes it, such as {{'name': 'trained', 'folder': 'runs/reward'}}: "
                         f"{error.args[0]}") from error  # fmt: skip


def one_reward(spec: Any) -> Reward:
    """A reward by name or "module:name", or by {"name": either, **the factory's arguments}.

    A user's own function score(images, prompts, metadata) becomes a host reward. An argument `reward` is itself one.
    """
    kwargs = {} if isinstance(spec, str) else dict(spec)
    if not isinstance(spec, str) and "name" not in kwargs:
        raise ValueError(f"a reward with arguments needs a name beside them; got {', '.join(map(str, kwargs))}")
    name = spec if isinstance(spec, str) else kwargs.pop("name")
    if "rewards" in kwargs:  # ensemble, several: made of others
        kwargs["rewards"] = [one_reward(part) for part in kwargs["rewards"]]
    found = named(name, REWARDS, "reward")
    if "reward" in kwargs:
        kwargs["reward"] = one_reward(kwargs["reward"])
    if isinstance(found, Reward):
        found = lambda made=found: made
    elif not hasattr(found, "factory") and list(inspect.signature(found).parameters)[:1] == ["images"]:
        score, about = found, (found.__doc__ or "").split("\n")[0]
        found = lambda: Reward(name, score, device=False, differentiable=False, summary=about)
    made = call(found.factory if hasattr(found, "factory") else found, kwargs, f"reward {name!r}")
    if not isinstance(made, Reward):
        raise ValueError(f"reward {name!r} must be a Reward, a function that returns one, or a function "
                         f"(images, prompts, metadata) -> (scores, info); it returned {type(made).__name__}")  # fmt: skip
    return made


def sampler(config: Any, bundle: ModelBundle) -> tuple[Sampler, Guidance]:
    """(sampler, guidance): the model's own settings, overridden by config.sampling.

    Settings are those of `diffusion.scheduler` where one is named, else of `sampling_grid`; and eta, flow_sde,
    guidance_scale, guidance_rescale, and guidance_interval: (low, high), the noise levels between which there is guidance, as a
    share of the schedule's time, 0 clean and 1 noise (discrete times are counted in thousandths, as they are numbered).
    """
    settings = {**bundle.sampling, **dict(config.get("sampling", {}))}
    guidance = Guidance(float(settings.pop("guidance_scale", 1.0)), float(settings.pop("guidance_rescale", 0.0)),
                        _interval(settings.pop("guidance_interval", (0.0, 1.0)), bundle.schedule))  # fmt: skip
    if "scheduler" in settings:
        name = settings.pop("scheduler")
        return call(scheduler, settings, "sampling", name=name, schedule=bundle.schedule, prediction=bundle.prediction), guidance
    eta, flow_sde = settings.pop("eta", 0.0), settings.pop("flow_sde", None)
    grid = call(sampling_grid, settings, "sampling", schedule=bundle.schedule)
    return Sampler(bundle.schedule, grid, bundle.prediction, eta, tuple(flow_sde) if flow_sde else None), guidance


def _interval(share: Any, schedule: NoiseSchedule) -> tuple[float, float] | None:
    """guidance_interval in the network's times; None: all of them."""
    try:
        low, high = (float(v) for v in share)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise ValueError("guidance_interval is two numbers, 0 <= low < high <= 1, shares of the schedule's time (1 is noise), such as "
                         f"0.2,0.8; got {share!r}")  # fmt: skip
    whole = schedule.t_max + 1 if schedule.discrete else 1.0
    return None if (low, high) == (0, 1) else (low * whole, high * whole)


def build_run(config: Any, on: sharding.Layout) -> Run:
    """Builds every part that the config names, on a layout. Raises ValueError, before compiling, for whatever does not fit."""
    fit.processes(config, on)
    bundle, params = model(config, on)
    plan = planned(config, bundle, params, reward(config))
    shape = jax.eval_shape(bundle.decode, params, jax.ShapeDtypeStruct((1, *bundle.sample_shape), np.float32)).shape[1:]
    needs = plan.parts.algorithm.needs
    fit.scorers(config, plan.parts, on)
    source = stream.source(config, needs.data, bundle, plan.parts.reward if needs.reward else None, shape)
    return Run(plan.parts, params, plan.sampler, source, plan.learning_rate)


def planned(config: Any, bundle: ModelBundle, params: Tree, reward_: Reward | None, shards: int | None = None) -> Plan:
    """Everything but parameters and data; params may be shapes alone. shards: as in `stream.batch_sizes`. Raises as `build_run` does."""
    sampler_, guidance = sampler(config, bundle)
    _, group, _ = stream.batch_sizes(config, shards)
    method = dict(config.method)
    entry = named(method.pop("name"), ALGORITHMS, "method")
    factory = entry.factory if hasattr(entry, "factory") else entry
    if method.get("advantage") == "prompt" and not method.get("num_prompts"):
        method["num_prompts"] = len(prompt_files.load(config.data.prompts))
    given: dict[str, Any] = {"shape": bundle.sample_shape, "group": group}
    if "loss" in method:  # a driver round another method: its name, or {"name": ..., its settings}
        method["loss"] = _inner(method["loss"], **given)
        given["cond"] = jax.eval_shape(bundle.encode_text, params, jnp.asarray(bundle.tokenize([""])))
    algorithm = call(factory, method, "method", sampler=sampler_, **given)
    fit.reward(config, algorithm, reward_)
    if reward_ is not None and algorithm.needs.reward:
        algorithm = _one_of_several(config, algorithm, reward_, sampler=sampler_, shape=bundle.sample_shape, size=group)
    redraw = _redraw(config, algorithm, bundle, sampler_, guidance, reward_)
    settings = dict(config.optimizer)
    ema = float(settings.pop("ema", 0.0))
    tx, rate = call(optimizer, settings, "optimizer", steps=int(config.steps))
    lora = dict(config.get("lora") or {})
    partition = call(lora_partition, lora, "lora") if lora else full_partition(config.get("trainable", "unet"))
    trained = jax.eval_shape(lambda p: partition.init(jax.random.key(0), p)[0], params)
    trains_text = any(name.startswith("text") for name in trained)
    if lora:
        fit.lora(config, bundle, partition, trained, params, trains_text)
    return Plan(Parts(bundle, algorithm, partition, tx, reward_, guidance, ema, trains_text, redraw), sampler_, rate)


def _redraw(config: Any, algorithm: Algorithm, bundle: ModelBundle, sampler_: Sampler, guidance: Guidance, reward_: Reward | None) -> Any:
    """What draws a rollout's samples in place of the plain chain: the test-time method of config.rollout, or None."""
    spec = config.get("rollout")
    settings = dict(written(spec) or {})
    if not settings:
        return None
    if "name" not in settings:
        raise ValueError(f"config.rollout needs a name beside its settings; got {', '.join(settings)}")
    name = settings.pop("name")
    method = steering.method(name, settings, bundle, sampler_, guidance, reward_)
    if method.needs.attention:
        raise ValueError(f"config.rollout cannot be {name}: a rollout knows its prompts as tokens, not as words with subjects; use a "
                         "method that reads no attention maps")  # fmt: skip
    return partial(steering.redrawn, method, bundle, guidance, reward_)


def _inner(spec: Any, **given: Any) -> Callable[[Sampler], Algorithm]:
    """The method that a driver's `loss` names, still without its sampler."""
    settings = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "name" not in settings:
        raise ValueError(f"method.loss needs a name beside its settings; got {', '.join(map(str, settings))}")
    entry = named(settings.pop("name"), ALGORITHMS, "method.loss")
    factory = entry.factory if hasattr(entry, "factory") else entry
    return lambda sampler: call(factory, settings, "method.loss", sampler=sampler, **given)


def _one_of_several(config: Any, algorithm: Algorithm, reward: Reward, **given: Any) -> Algorithm:
    """The method under config.aggregate where the reward has several columns; raises ValueError where the two do not fit."""
    spec, names = config.get("aggregate"), columns(reward)
    settings = dict(written(spec) or {})
    if names and names == algorithm.needs.columns and not settings:
        return algorithm
    if bool(settings) != bool(names):
        raise ValueError(f"{reward.name!r} gives {len(names)} scores a picture ({', '.join(names)}); say how they become one, such as "
                         "config.aggregate = {'how': 'maxmin'}" if names else f"config.aggregate needs a reward of several columns, "
                         f"such as {{'name': 'several', 'rewards': [...]}}; {reward.name!r} has one")  # fmt: skip
    return call(aggregated, settings, "aggregate", algorithm=algorithm, names=names, **given) if names else algorithm


def frozen_tree(run: Run, programs: Any, frozen_params: Tree) -> Tree:
    """The arguments that no step changes: base parameters, the reward's, the empty prompt's condition."""
    null = np.asarray(run.parts.bundle.tokenize([""]))
    frozen = {"params": frozen_params, "reward": run.parts.reward.params if run.parts.reward else None}
    return {**frozen, "null": programs.encode({"params": run.params}, null)}


def absolute(path: str | Path) -> Path:
    """A user's path, with ~ expanded."""
    return Path(path).expanduser().absolute()
