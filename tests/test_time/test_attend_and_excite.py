"""Attend-and-Excite: its loss by hand, its refinements, and both kinds of model."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tiny_sd
from gaussian import chain

from alignment_jax.diffusion import draw
from alignment_jax.models.subjects import subjects
from alignment_jax.test_time.attend_and_excite import attend_and_excite, attended, smooth
from alignment_jax.test_time.base import ascent, start
from alignment_jax.training import build, steering
from alignment_jax.training.programs import Guidance

ROOT = Path(__file__).parents[2]
CAPTIONS = ["a green bell monster with horns, one big eye and a smile on a blue background", "a white monster"]


def test_the_loss_is_the_papers_by_hand():
    """Softmax of 100 A without the start token, a 3 x 3 Gaussian of deviation 1/2 reflected at the border, peak, least subject."""
    rng = np.random.default_rng(0)
    maps = rng.dirichlet(np.ones(6), (2, 5, 4)).astype(np.float32)
    numbers = np.array([[0, 1, 2, 2, 0, 0], [0, 0, 0, 1, 0, 0]])
    e = np.exp(100.0 * maps[..., 1:].astype(np.float64))
    shares = np.concatenate([np.zeros((2, 5, 4, 1)), e / e.sum(-1, keepdims=True)], -1)
    kernel = np.exp(-2.0 * np.square([[1, 0, 1], [1, 0, 1], [1, 0, 1]]) - 2.0 * np.square([[1, 1, 1], [0, 0, 0], [1, 1, 1]]))
    kernel /= kernel.sum()

    def peak(a):
        padded = np.pad(a, 1, mode="reflect")
        return max((padded[i : i + 3, j : j + 3] * kernel).sum() for i in range(5) for j in range(4))

    expected = [min(peak(shares[0, ..., 1]), peak(shares[0, ..., 2] + shares[0, ..., 3])), peak(shares[1, ..., 3])]
    np.testing.assert_allclose(attended(jnp.asarray(maps), jnp.asarray(numbers)), expected, rtol=1e-4)


def test_smoothing_keeps_a_constant_and_takes_a_single_position():
    np.testing.assert_allclose(smooth(jnp.full((1, 3, 3, 2), 0.7)), 0.7, rtol=1e-6)
    np.testing.assert_allclose(smooth(jnp.full((2, 1, 1, 2), 0.7)), 0.7, rtol=1e-6)


def test_a_step_raises_the_least_subject_and_no_subject_has_no_gradient():
    maps = lambda x: jax.nn.softmax(x, -1)  # noqa: E731
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 5))
    numbers = jnp.array([[0, 1, 0, 2, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])
    value = lambda x: (attended(maps(x), numbers, 5.0), None)  # noqa: E731
    before, gradient, _ = ascent(value, x)
    after = value(x + 0.1 * gradient)[0]
    assert (after[:2] > before[:2]).all() and before[2] == after[2] == 1.0
    assert not np.asarray(gradient[2]).any()


# -- the chain -------------------------------------------------------------------------------------------------------


def toy(**settings):
    """(draw, log of t at which maps were asked for) on a chain of ten steps whose x is the logit of the one subject's map."""
    sampler, asked = chain(10, eta=0.0), []

    def maps(x, t, cond):
        jax.debug.callback(lambda t: asked.append(float(t[0])), t)
        return jnp.stack([jnp.full_like(x, -30.0), x, jnp.zeros_like(x)], -1)[:, None] / 10.0

    method = attend_and_excite(sampler, (1,), sharpness=10.0, **settings)
    networks = {"policy": lambda x, t, cond: 0.0 * x, "attention": maps}

    def run(n=4, numbers=(0, 1, 0)):
        keys = jax.random.split(jax.random.key(2), n)
        data = {"cond": {"c": jnp.zeros(n)}, "subjects": jnp.broadcast_to(jnp.array(numbers), (n, 3))}
        out = jax.jit(lambda keys: method.draw(keys, networks, data))(keys)
        jax.effects_barrier()
        return out, draw(keys, networks["policy"], data["cond"], sampler, (1,))[0]

    return run, asked, sampler


def test_maps_are_asked_for_in_the_first_share_of_the_chain_and_once_more_for_each_refinement():
    run, asked, sampler = toy(strength=1e-6, share=0.5, refinements=3)
    (_, info), _ = run()
    times = [float(t) for t in np.asarray(sampler.grid.t)]
    counts = [asked.count(t) for t in times[:10]]
    # thresholds .05, .5 and .8 at steps 0, 2 and 4 of ten: with steps this small who is short of one stays so
    assert counts == [1, 1, 4, 1, 4, 0, 0, 0, 0, 0], counts
    assert set(info["refinements"].tolist()) == {0, 3, 6}


def test_a_threshold_that_is_met_ends_the_refinement_of_that_sample_alone():
    """Stopping for the whole batch, or going on for it, would make a picture depend on its neighbours."""
    run, *_ = toy(strength=2.0, share=0.1, refinements=50, thresholds={0.0: 0.9})
    (x0, info), plain = run()
    assert (info["attention"] >= 0.9).all() and (info["refinements"] < 50).all()
    assert len(set(info["refinements"].tolist())) > 1
    order = np.argsort(np.asarray(plain)[:, 0])
    assert (np.diff(info["refinements"][order]) <= 0).all()  # who starts nearer needs fewer
    assert (x0 > plain).all()


def test_a_step_is_the_gradient_times_the_papers_step_size():
    """alpha = strength sqrt(linspace(1, 1/2)): at the second of ten steps strength sqrt(17 / 18)."""
    run, _, sampler = toy(strength=0.5, share=0.2, refinements=0)
    (x0, _), _ = run()
    x = jax.random.normal(jax.random.key(0), (4, 1))
    keys = jax.random.split(jax.random.key(2), 4)
    _, states = draw(keys, lambda x, t, cond: 0.0 * x, {}, sampler, (1,), keep=True)
    x, ratio = states.x[0], [states.x[i + 1] / states.x[i] for i in range(10)]
    for i, alpha in enumerate([0.5, 0.5 * np.sqrt(17 / 18)]):
        a = jax.nn.sigmoid(x)  # of two kept tokens, logits x and 0
        x = (x + alpha * a * (1 - a)) * ratio[i]
    for i in range(2, 10):
        x = x * ratio[i]
    np.testing.assert_allclose(x0, x, rtol=1e-4)


@pytest.mark.parametrize("off", [{"strength": 0.0}, {"share": 0.0}])
def test_no_strength_or_no_steps_is_the_plain_chain(off):
    run, asked, _ = toy(**off)
    (x0, info), plain = run()
    np.testing.assert_array_equal(x0, plain)
    assert info == {} and asked == []


def test_a_prompt_without_subjects_is_the_plain_chain():
    (x0, info), plain = toy(strength=5.0)[0](numbers=(0, 0, 0))
    np.testing.assert_allclose(x0, plain, rtol=1e-6)
    assert (info["attention"] == 1).all() and (info["refinements"] == 0).all()


@pytest.mark.parametrize("wrong", [{"share": 1.5}, {"strength": -1.0}, {"refinements": -1}, {"sharpness": 0.0}, {"thresholds": {"2": 0.5}}])
def test_settings_outside_their_ranges_are_refused(wrong):
    with pytest.raises(ValueError, match="got"):
        attend_and_excite(chain(4), (1,), **wrong)


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_critters_the_least_subject_is_looked_at_more():
    """At the first step, whose gradient's norm is near .005: a state's is 55."""
    bundle, params = build.model(ml_collections.ConfigDict({"model": "critters", "weights": "shipped", "seed": 0}))
    sampler, _ = build.sampler(ml_collections.ConfigDict({"sampling": {"num_steps": 4}}), bundle)
    cond, numbers = bundle.encode_text(params, bundle.tokenize(CAPTIONS)), jnp.asarray(subjects(bundle.tokenize, CAPTIONS))
    networks = {"policy": partial(bundle.denoise, params), "attention": partial(bundle.attention, params)}
    method = attend_and_excite(sampler, bundle.sample_shape, strength=300.0, share=0.25, refinements=4, sharpness=20.0, thresholds={0: 1})
    keys = jax.random.split(jax.random.key(0), 2)
    _, info = jax.jit(lambda k: method.draw(k, networks, {"cond": cond, "subjects": numbers}))(keys)
    x_T, _ = start(keys, sampler, bundle.sample_shape)
    before = attended(jax.jit(bundle.attention)(params, x_T, jnp.full(2, sampler.grid.t[0]), cond), numbers, 20.0)
    assert (info["attention"] > 1.05 * before).all() and (info["refinements"] == 4).all(), (before, info)


def test_a_method_without_maps_takes_no_subjects_and_a_model_without_maps_no_method():
    bundle = build.model(ml_collections.ConfigDict({"model": "critters", "weights": "shipped", "seed": 0}))[0]
    sampler, guidance = build.sampler(ml_collections.ConfigDict({"sampling": {}}), bundle)
    with pytest.raises(ValueError, match="zigzag reads no attention maps, so subjects='horns'"):
        steering.method("zigzag", {"subjects": "horns"}, bundle, sampler, Guidance(2.0), None)
    with pytest.raises(ValueError, match="reads cross-attention maps, and model critters gives none"):
        steering.method("attend_and_excite", {}, bundle._replace(attention=None), sampler, guidance, None)
    config = ml_collections.ConfigDict({"rollout": {"name": "attend_and_excite"}})
    with pytest.raises(ValueError, match="config.rollout cannot be attend_and_excite"):
        build._redraw(config, None, bundle, sampler, guidance, None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_stable_diffusion_from_the_command_line(kind, tmp_path):
    folder, env = tiny_sd.write(kind, tmp_path / kind), {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, "-m", "alignment_jax", "sample", f"--model={folder}", "--prompts=a red house and a cat",
                           "--num_steps=2", "--guidance_scale=3", "--method=attend_and_excite", "--option=refinements=1",
                           "--option=subjects=house,cat", "--save_attention", f"--out={tmp_path / 'out'}"],
                          capture_output=True, text=True, cwd=ROOT, env=env)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    info = json.loads((tmp_path / "out" / "info.json").read_text())
    assert info["method"]["subjects"] == "house,cat" and 0 < info["attention"][0] < 1 and "maps" not in info
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"0000.png", "0000_attention.png"}
