"""A CLIP of random weights on disk, with its tokenizer and the heads of scorers, as their fixtures had it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from parity.common import FIXTURES, random_weights
from safetensors.numpy import save_file

from alignment_jax.models.clip import clip, safety_checker
from alignment_jax.weights.torch_names import import_torch, torch_name, torch_shape


def fixture(name):
    """A fixture's arrays."""
    with np.load(FIXTURES / f"clip_{name}.npz") as file:
        return dict(file)


def shapes(net, *args):
    """({name: shape} in PyTorch's layout, tree of shapes) of a module called with args."""
    like = jax.eval_shape(net.init, jax.random.key(0), *args)["params"]
    return {torch_name(k): torch_shape(k, v.shape) for k, v in flatten_dict(like, sep="/").items()}, like


def parameters(net, *args):
    """A module's random weights, as the reference has them."""
    names, like = shapes(net, *args)
    return import_torch(random_weights(names), like)


def write(folder: Path) -> Path:
    """Fills a folder: clip/ (weights, config, tokenizer), hps.safetensors, safety/, v1, linear and relu.safetensors."""
    config, data = json.loads(str(fixture("whole")["config"])), fixture("scores")

    def store(path, names):
        path.parent.mkdir(exist_ok=True)
        save_file({k: np.asarray(v) for k, v in random_weights(names).items()}, path)

    ids, pixels = jnp.zeros((1, 16), jnp.int32), jnp.zeros((1, 28, 28, 3))
    store(folder / "clip" / "model.safetensors", shapes(clip(config), ids, pixels)[0])
    store(folder / "hps.safetensors", {k: tuple(v) for k, v in json.loads(str(data["open_clip"])).items()})
    checker = random_weights(shapes(safety_checker(config), pixels)[0])
    (folder / "safety").mkdir()
    save_file({k.replace("vision_model.", "vision_model.vision_model.", 1): v for k, v in checker.items()},
              folder / "safety" / "model.safetensors")  # fmt: skip
    for name in ("clip", "safety"):
        (folder / name / "config.json").write_text(json.dumps(config))
    for name, head in json.loads(str(data["heads"])).items():
        store(folder / f"{name}.safetensors", {k: tuple(v) for k, v in head.items()})
    vocabulary = {token: i for i, token in enumerate(data["vocabulary"].tolist())}
    (folder / "clip" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "clip" / "merges.txt").write_text("\n".join(["#version: 0.2", *data["merges"].tolist()]))
    return folder
