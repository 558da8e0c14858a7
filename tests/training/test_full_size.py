"""Every argument of the Stable Diffusion configs fits together at full size: whole steps in shapes, from folders without weights."""

import importlib.util
from functools import wraps
from pathlib import Path

import full_size
import jax
import jax.numpy as jnp
import pytest

from alignment_jax.models.stable_diffusion import stable_diffusion
from alignment_jax.training import abstract, build
from alignment_jax.weights import files

ROOT = Path(__file__).parents[2]
SIZES = {"sd15": (859_520_964, 123_060_480), "sd21": (865_910_724, 340_387_840), "sdxl": (2_567_463_684, 123_060_480)}


def module(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


CONFIGS = {name: module(name) for name in full_size.UNETS}
QUICK = {("sd15", "ddpo_compressibility")}
CASES = [pytest.param(name, argument, marks=() if (name, argument) in QUICK else pytest.mark.slow)
         for name, loaded in CONFIGS.items() for argument in loaded.ARGUMENTS]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folders of `full_size.write_all`."""
    return full_size.write_all(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def without_weights():
    """Parameters are shapes alone, and networks are traced once."""
    once = {}

    def bundle(folder, **options):
        if (key := (str(folder), *options.items())) not in once:
            made = stable_diffusion(folder, **options)
            once[key] = made._replace(**{n: jax.jit(getattr(made, n)) for n in ("init", "denoise", "encode_text", "decode", "encode")})
        return once[key]

    def reward(config, build_reward=build.reward):
        if (key := str(config.reward)) not in once:
            made = build_reward(config)
            once[key] = made._replace(score=jax.jit(made.score)) if made.device else made
        return once[key]

    with pytest.MonkeyPatch.context() as patch, files.shapes_only():
        patch.setattr(build.stable_diffusion, "stable_diffusion", wraps(stable_diffusion)(bundle))
        patch.setattr(build, "reward", reward)
        yield


def small(config, world):
    """The config on the test's folders, with fewer samples and steps: what is traced is as large as ever."""
    full_size.point(config, world)
    config.sampling.num_steps = 2
    if "k" in config.method and config.method.name == "drtune":
        config.method.k = 2
    config.model_options.remat = True
    config.batch.update(prompts=4, group=min(config.batch.group, 2), microbatch=4)
    return config


@pytest.mark.parametrize("name, argument", CASES)
def test_a_step_fits_together_in_shapes(name, argument, world, without_weights):
    config = CONFIGS[name].get_config(argument)
    config.model = str(world / name)
    programs = abstract.one_step(small(config, world))
    state = programs["init"].result
    frozen = programs["encode"].arguments[0]["params"]
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    unet = count(frozen.get("unet", {})) + (0 if config.lora else count(state.trained))
    assert (unet, count(frozen["text_encoder"])) == SIZES[name]
    assert jax.tree.structure(programs["apply"].result[0]) == jax.tree.structure(state)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.trained))
    (grads, _), sums = programs["gradient"].result
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, state.trained) and sums["loss"].shape == ()
    if config.lora:
        assert count(state.trained) < 0.06 * unet
