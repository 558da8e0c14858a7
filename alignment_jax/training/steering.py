"""Test-time methods bound to a model and a reward: what `sample --method` and `evaluate --methods` draw with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..diffusion import Denoise, Sampler, fold_in, guided
from ..diffusion.sample import normal
from ..models import lora
from ..models.bundle import ModelBundle
from ..models.subjects import subjects as number_subjects
from ..rewards import columns
from ..rewards.base import Reward
from ..rewards.check import score_host, to_uint8
from ..test_time import PROMPT_METHODS, TEST_TIME, Method
from .calls import counted
from .names import call, named
from .programs import Guidance

Tree = Any


def method(name: str, settings: Mapping[str, Any], bundle: ModelBundle, sampler: Sampler, guidance: Guidance,
           reward: Reward | None) -> Method:  # fmt: skip
    """The method by name or "module:factory". Raises ValueError for whatever does not fit the sampler or the reward."""
    made = _made(name, settings, sampler, bundle.sample_shape, guidance)
    needs = made.needs
    if "subjects" in settings and not needs.attention:
        raise ValueError(f"method {name} reads no attention maps, so subjects={settings['subjects']!r} would change nothing; leave it out")
    if needs.reward:
        reward = one_score(name, reward)
        if needs.reward == "gradient" and not (reward.device and reward.differentiable):
            fits = ", ".join(n for n, e in TEST_TIME.items() if e.reward == "value")
            raise ValueError(f"method {name} takes gradients of the reward, and {reward.name!r} has none; use a differentiable "
                             f"reward, or a method that takes scores: {fits}")  # fmt: skip
    if needs.noise and sampler.deterministic:
        raise ValueError(f"method {name} chooses among the sampler's noises, and this sampler has none; set --eta=1 (or a "
                         "scheduler with noise: ddpm, euler_ancestral, sde-dpmsolver++)")  # fmt: skip
    if needs.still and not sampler.deterministic:
        raise ValueError(f"method {name} needs a sampler without noise; set --eta=0")
    if needs.guidance and guidance.scale == 1.0:
        raise ValueError(f"method {name} acts through classifier-free guidance, and guidance_scale=1 has none; set it above 1")
    if needs.attention and bundle.attention is None:
        raise ValueError(f"method {name} reads cross-attention maps, and model {bundle.name} gives none")
    return made


def one_score(name: str, reward: Reward | None) -> Reward:
    """The reward, for a method that follows it. Raises ValueError where there is none, and for one that gives no single score."""
    if reward is None:
        raise ValueError(f"method {name} needs a reward; set --reward (see: list rewards)")
    if reward.noisy or columns(reward):
        raise ValueError(f"method {name} needs one score of a picture, and {reward.name!r} gives "
                         + ("scores of noisy states" if reward.noisy else f"{len(columns(reward))}: {', '.join(columns(reward))}"))
    return reward


def _made(name: str, settings: Mapping[str, Any], sampler: Sampler, shape: tuple[int, ...], guidance: Guidance) -> Method:
    """The method from its factory, which knows nothing of words: the setting "subjects" is for `subjects`."""
    if name in PROMPT_METHODS:
        raise ValueError(f"method {name} searches texts, and only `sample` draws with it; here choose one of {', '.join(TEST_TIME)}")
    entry = named(name, {**TEST_TIME, **PROMPT_METHODS}, "method")
    factory = entry.factory if hasattr(entry, "factory") else entry
    own = {k: v for k, v in settings.items() if k != "subjects"}
    made: Method = call(factory, own, f"method {name!r}", sampler=sampler, shape=shape, guidance=guidance.scale)
    return made


def subjects(made: Method | None, settings: Mapping[str, Any] | None, bundle: ModelBundle, texts: list[str]) -> dict[str, np.ndarray]:
    """{"subjects": int32 [B, L]} for a method that reads attention maps, else {}; see `models.subjects`."""
    if made is None or not made.needs.attention:
        return {}
    return {"subjects": number_subjects(bundle.tokenize, texts, (settings or {}).get("subjects"))}


def seen(bundle: ModelBundle, params: Tree, keys: jax.Array, sampler: Sampler, x0: jax.Array, cond: Tree) -> jax.Array:
    """What the network looks at in samples x0 [B, ...]: maps [B,h,w,L], the mean over x0 noised to each of the chain's times."""
    assert bundle.attention is not None
    noise, times = normal(fold_in(keys, 1 << 25), x0.shape), sampler.grid

    def add(total: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        t, alpha, sigma = now
        return total + look(params, alpha * x0 + sigma * noise, jnp.broadcast_to(t, len(x0)), cond) / sampler.num_steps, None

    look = bundle.attention
    like = jax.eval_shape(look, params, x0, jnp.zeros(len(x0)), cond)
    return jax.lax.scan(add, jnp.zeros(like.shape), tuple(jnp.asarray(a)[: sampler.num_steps] for a in times))[0]


def networks(bundle: ModelBundle, params: Tree, policy: Denoise, null: Tree, guidance: Guidance, reward: Reward | None,
             reward_params: Tree, texts: list[str] | None = None) -> dict[str, Callable[..., Any]]:  # fmt: skip
    """What a method sees; texts: the prompts that a host reward's condition, {"row" [B]}, counts through."""
    own = partial(bundle.denoise, params)

    def guide(scale: float, null: Tree = null) -> Denoise:
        return guided(own, null, scale, rescale=guidance.rescale, interval=guidance.interval)

    def score(keys: jax.Array, x0: jax.Array, condition: Tree, augment: bool = False) -> jax.Array:
        assert reward is not None
        observation = bundle.decode(params, x0)
        if not reward.device:
            shape = jax.ShapeDtypeStruct((len(x0),), jnp.float32)
            said: jax.Array = jax.pure_callback(partial(_on_host, reward, texts or []), shape, observation, condition["row"])
            return said
        if augment and reward.augment is not None:
            observation = jax.vmap(lambda k, o, augment=reward.augment: augment(k, o[None])[0])(keys, observation)
        scored: jax.Array = reward.score(reward_params, observation, condition)
        return scored

    found: dict[str, Callable[..., Any]] = {"policy": policy, "unguided": own, "guide": guide}
    if reward is not None:
        found |= {"reward": score, "augmented": partial(score, augment=True)}
    if bundle.attention is not None:
        found["attention"] = partial(bundle.attention, params)
    return found


def condition(reward: Reward | None, texts: list[str]) -> Tree:
    """What the reward must know of the prompts, a tree of arrays with leading axis B."""
    if reward is None:
        return {}
    if not reward.device:
        return {"row": np.arange(len(texts))}
    return reward.encode(texts) if reward.encode else {}


def redrawn(made: Method, bundle: ModelBundle, guidance: Guidance, reward: Reward | None, params: Tree, frozen: Tree, keys: jax.Array,
            data: Tree, rolled: Tree) -> Tree:  # fmt: skip
    """The rollout with the method's samples for its own x0 [B, ...]; the plain chain, then unused, is compiled away.

    Raises ValueError for a rollout that keeps more of its chain than the sample.
    """
    more = set(rolled) - set(data) - {"x0"}
    if more or "x0" not in rolled:
        raise ValueError("config.rollout replaces the samples of methods that learn from samples alone, such as raft, rwr, online and "
                         f"diffusion_nft; this one keeps {', '.join(sorted(more)) or 'no samples'} of its own rollout")  # fmt: skip
    tuned = bundle._replace(denoise=lora.adapted(bundle.denoise))
    policy = guided(partial(tuned.denoise, params), frozen["null"], guidance.scale, rescale=guidance.rescale,
                    interval=guidance.interval)  # fmt: skip
    found = networks(tuned, params, policy, frozen["null"], guidance, reward, frozen["reward"])
    x0, _ = made.draw(keys, found, {"cond": data["cond"], "condition": data["condition"], "null": frozen["null"]})
    return {**rolled, "x0": x0}


def _on_host(reward: Reward, texts: list[str], observation: Any, rows: Any) -> np.ndarray:
    prompts = [texts[i] for i in np.asarray(rows)]
    return score_host(reward, to_uint8(jnp.asarray(observation)), prompts, {}, batch_index=0, on_error="mask")[0]


def cost(name: str, settings: Mapping[str, Any], sampler: Sampler, guidance_scale: float = 1.0) -> dict[str, int]:
    """What one sample of a method costs: "network", "decode", "reward", and their backward; counted on networks of one number."""
    counter: Counter[str] = Counter()
    shape, guidance, own = (4, 4, 1), Guidance(guidance_scale), jnp.float32(0.5)
    made = _made(name, settings, sampler, shape, guidance)

    def denoise(w: Any, x: Any, t: Any, cond: Any) -> Any:
        return w * x + 0.0 * cond["c"].sum((1, 2))[:, None, None, None]

    def maps(w: Any, x: Any, t: Any, cond: Any) -> Any:
        return jax.nn.softmax(w * x + cond["c"].sum(-1)[:, None, None, :], -1)

    scale = lambda w, x: w * x  # noqa: E731
    score = counted(lambda w, x, condition: w * x.mean((1, 2, 3)), counter, "reward")
    bundle = ModelBundle("one number", lambda key: own, counted(denoise, counter, "network"), scale, counted(scale, counter, "decode"),
                         scale, lambda prompts: np.zeros((len(prompts), 1)), sampler.schedule, sampler.prediction, shape, {},
                         counted(maps, counter, "network"))  # fmt: skip
    null, reward = {"c": jnp.zeros((1, 4, 2))}, Reward("mean", score)
    policy = guided(partial(bundle.denoise, own), null, guidance.scale)
    found = networks(bundle, own, policy, null, guidance, reward, own)
    data = {"cond": {"c": jnp.ones((1, 4, 2))}, "condition": {}, "null": null, "subjects": jnp.ones((1, 4), bool)}
    jax.block_until_ready(jax.jit(lambda keys: made.draw(keys, found, data))(jax.random.split(jax.random.key(0), 1)))
    jax.effects_barrier()
    return dict(counter)
