"""Rewards from one's own preference pairs: what `train-reward` leaves in a folder, as a reward by that folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import weights
from ..data.critters import SIZES
from ..models import ASSETS, MODELS, ModelBundle
from ..models.recogniser import StridedCNN
from ..models.scorer import Scorer, activations, text_features
from ..models.stable_diffusion import stable_diffusion
from .augment import augment
from .base import Reward
from .combine import Columns
from .critters import encode

Array = jax.Array
READS = ("picture", "noisy")
TRUNKS = ("proxy", "none")


class Network(NamedTuple):
    """A reward model as pure functions: init(key) -> {"trunk", "head"}; score(params, inputs) -> log-odds [B, people].

    inputs: {"picture" [B,H,W,C] in [0, 1], "attributes"} or {"x" [B,...], "t" [B], "cond"}. bundle: whose states are read.
    """

    init: Callable[[Array], Any]
    score: Callable[[Any, Mapping[str, Any]], Array]
    bundle: ModelBundle | None = None


def picture_network(people: int, width: int, trunk: str) -> Network:
    """A convolutional network on critters' pictures beside the attributes that the caption asks for.

    trunk: "proxy" starts it from the recogniser of the proxy reward, as public reward models start from CLIP; "none" from nothing.
    """
    if trunk not in TRUNKS:
        raise ValueError(f"trunk {trunk!r} is not known; choose one of {', '.join(TRUNKS)}")
    net, head = StridedCNN({}), Scorer(people, width)

    def init(key: Array) -> Any:
        keys = jax.random.split(key)
        made = net.init(keys[0], jnp.zeros((1, 32, 32, 3)))["params"]
        if trunk == "proxy":
            whole = weights.load(ASSETS / "proxy.safetensors")
            made = {name: jax.tree.map(jnp.asarray, whole[name]) for name in made}
        return {"trunk": made, "head": head.init(keys[1], jnp.zeros((1, 192)), asked(np.zeros((1, len(SIZES)), int)))["params"]}

    def score(params: Any, inputs: Mapping[str, Any]) -> Array:
        features: Any = net.apply({"params": params["trunk"]}, inputs["picture"])[1]
        scores: Any = head.apply({"params": params["head"]}, features, asked(inputs["attributes"]))
        return scores

    return Network(init, score)


def asked(attributes: Any) -> Array:
    """The attributes int [B, 6] that a caption asks for as [B, 35] of 0 and 1; all 0 for one that it does not name (-1)."""
    columns = jnp.asarray(attributes)
    return jnp.concatenate([jax.nn.one_hot(columns[:, i], n) for i, n in enumerate(SIZES)], -1)


def noisy_network(people: int, width: int, model: str, layers: str) -> Network:
    """A scorer of the chain's states, before any decoder: features of the diffusion network itself (LRM, arXiv 2502.01051).

    Means of the layers' outputs beside the pooled text. Departure: no guided middle features.
    """
    bundle = _bundle(model)
    head, features = Scorer(people, width), activations(bundle.denoise, layers)

    def init(key: Array) -> Any:
        keys = jax.random.split(key)
        shapes = jax.eval_shape(bundle.init, keys[0])
        cond = jax.eval_shape(bundle.encode_text, shapes, jnp.asarray(bundle.tokenize([""])))
        x = jax.ShapeDtypeStruct((1, *bundle.sample_shape), jnp.float32)
        feature, text = jax.eval_shape(lambda p, x, c: (features(p, x, jnp.zeros(1), c), text_features(c)), shapes, x, cond)
        return {"head": head.init(keys[1], jnp.zeros(feature.shape), jnp.zeros(text.shape))["params"]}

    def score(params: Any, inputs: Mapping[str, Any]) -> Array:
        found = features(params["trunk"], inputs["x"], inputs["t"], inputs["cond"])
        scores: Any = head.apply({"params": params["head"]}, found,
                                 text_features(inputs["cond"]))  # fmt: skip
        return scores

    return Network(init, score, bundle)


def _bundle(model: str) -> ModelBundle:
    if model in MODELS:
        return MODELS[model].factory()
    if Path(model).expanduser().is_dir():
        return stable_diffusion(folder=Path(model).expanduser())
    raise ValueError(f"a noisy reward reads the states of a model: {', '.join(MODELS)} or a folder as diffusers writes it; got {model!r}")


def network(about: Mapping[str, Any]) -> Network:
    """The network that a reward model's reward.json, or a config, describes."""
    people = len(about["people"]) if about["own"] else 1
    if about["reads"] not in READS:
        raise ValueError(f"reads {about['reads']!r} is not known; choose one of {', '.join(READS)}")
    if about["reads"] == "noisy":
        return noisy_network(people, int(about["width"]), about["model"], about["layers"])
    return picture_network(people, int(about["width"]), about["trunk"])


def trained(*, folder: str | Path, person: str = "") -> Reward:
    """The reward model of a `train-reward` folder: log-odds [B], 0 for an average picture of its training pairs.

    person: of a model with a score for each annotator, whose score it is; "each": all of them side by side [B, M]; "":
    their mean. A model that reads noisy states gives a `noisy` reward: score(params, x_t, {"t", "cond"}).
    Raises FileNotFoundError for a folder without a reward model, ValueError for a person that it does not know.
    """
    folder = Path(folder).expanduser()
    file = folder / "reward.json"
    if not file.is_file():
        raise FileNotFoundError(f"no reward model at {folder}: it has no reward.json. To make one: "
                                "python -m alignment_jax train-reward --config=configs/critters_reward.py --workdir=DIR")  # fmt: skip
    about = json.loads(file.read_text())
    net, people = network(about), about["people"] if about["own"] else []
    if person not in ("", *people, *(["each"] if people else [])):
        raise ValueError(f"person {person!r} is not known to {folder}; "
                         + (f"choose 'each' or one of {', '.join(people)}" if people else "it has one score for all people"))  # fmt: skip
    params = weights.load(folder / "reward.safetensors", _like(net, about))
    # the mean matters to no comparison; it makes 0 mean something
    params["mean"] = np.asarray(about["mean"], np.float32)
    pick = people.index(person) if person in people else None
    reduce = (lambda s: s) if person == "each" else (lambda s: s.mean(-1)) if pick is None else (lambda s: s[:, pick])
    reach = float(np.exp(params["head"]["logit_scale"]))
    common: dict[str, Any] = {
        "name": f"trained {folder.name}" + (f" {person}" if person else ""), "params": params, "licence": "as its pairs",
        "range": (-reach - max(about["mean"]), reach - min(about["mean"])), "summary": "log-odds learned from preference pairs",
    }  # fmt: skip

    def noisy(params: Any, x: Array, condition: Any) -> Any:
        return reduce(net.score(params, {"x": x, **condition}) - params["mean"])

    def score(params: Any, observation: Array, condition: Any) -> Any:
        return reduce(net.score(params, {"picture": observation, "attributes": condition["attributes"]}) - params["mean"])

    chosen: Any = noisy if about["reads"] == "noisy" else score
    if person == "each":
        chosen = Columns(tuple(people), chosen)
    if about["reads"] == "noisy":
        return Reward(score=chosen, noisy=True, **common)
    return Reward(score=chosen, encode=encode, augment=augment, **common)


def _like(net: Network, about: Mapping[str, Any]) -> Any:
    """The shapes of a folder's parameters."""
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    if net.bundle is not None:
        shapes = {**shapes, "trunk": denoising(jax.eval_shape(net.bundle.init, jax.random.key(0)))}
    return shapes


def denoising(params: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a bundle's parameters that `denoise` reads when the text is encoded."""
    return {"unet": params["unet"]}
