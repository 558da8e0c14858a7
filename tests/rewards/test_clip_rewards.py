"""Scorers on CLIP as people use them: shared towers, pictures of any kind, prompts that are too long, wrong files."""

import json
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_clip

from alignment_jax import rewards
from alignment_jax.models.clip import BUILT_IN, clip, clip_text, clip_tokenizer
from alignment_jax.rewards import clip as scorers
from alignment_jax.rewards.check import probe
from alignment_jax.rewards.preprocess import as_rgb, pixels, resize_matrix
from alignment_jax.training.build import one_reward

PROMPTS = ["a red cat", "the dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip.write(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(0), (2, 20, 31, 3))


def test_scorers_of_one_tower_run_it_once(folder, images):
    tower = dict(weights=folder / "clip")
    parts = [(scorers.clip_score(scale=2.5, **tower), 1.0), (scorers.pick_score(**tower), -0.5),
             (scorers.aesthetic(head=folder / "linear.safetensors", **tower), 2.0),
             (scorers.safety(weights=folder / "safety"), 0.5)]  # fmt: skip
    both = rewards.weighted(parts)
    condition = both.encode(PROMPTS)
    towers = lambda text: len(re.findall(r"f32\[\d+,4,4,32\] = (?:dot_general|conv_general_dilated)", text))  # embeddings of patches
    text = str(jax.make_jaxpr(both.score)(both.params, images, condition))
    assert towers(text) == 2  # three scorers share one tower, the fourth has another's weights
    alone = [r.score(r.params, images, r.encode(PROMPTS) if r.encode else {}) for r, _ in parts]
    np.testing.assert_allclose(both.score(both.params, images, condition), sum(w * s for (_, w), s in zip(parts, alone)), atol=1e-5)
    size = lambda tree: sum(np.size(x) for x in jax.tree.leaves(tree))
    assert size(both.params) == sum(size(r.params) for r, _ in parts) - 2 * size(parts[0][0].params["tower"])
    assert both.differentiable
    assert [r.name for r, _ in parts] == ["clip_score", "pick_score", "aesthetic_v2", "safety"]
    other = rewards.weighted([parts[0], (scorers.aesthetic(head=folder / "v1.safetensors", version="v1", antialias=False, **tower), 1.0)])
    text = str(jax.make_jaxpr(other.score)(other.params, images, other.encode(PROMPTS)))
    assert towers(text) == 2  # other pixels, so nothing to share


def test_options_of_clip_score(folder, images):
    plain = scorers.clip_score(weights=folder / "clip")
    wanted = scorers.clip_score(weights=folder / "clip", scale=2.5, prefix="the ", clip_at_zero=True)
    value = lambda r, prompts: r.score(r.params, images, r.encode(prompts))
    cosine = value(plain, ["the red cat", "the red dog"])
    np.testing.assert_allclose(value(wanted, ["red cat", "red dog"]), 2.5 * np.maximum(cosine, 0), atol=1e-6)
    assert wanted.range == (0.0, 2.5) and plain.range == (-1.0, 1.0) and np.abs(cosine).max() <= 1
    assert probe(plain, (20, 31, 3), PROMPTS) is None


def test_gradient_is_that_of_finite_differences_and_passes_saturated_pixels(folder, images):
    reward = scorers.aesthetic(head=folder / "relu.safetensors", weights=folder / "clip")
    total = jax.jit(lambda x: reward.score(reward.params, x, {}).sum())
    x, direction = 0.25 + 0.5 * images, jax.random.normal(jax.random.key(1), images.shape)
    step = 2e-2 * direction / jnp.abs(direction).max()
    numeric = (total(x + step) - total(x - step)) / 2
    gradient = jax.jit(jax.grad(total))
    assert abs(jnp.vdot(gradient(x), step) - numeric) < 2e-2 * abs(numeric) + 1e-6
    bright = images.at[0].set(1.3)
    assert jnp.abs(gradient(bright)[0]).max() > 0 and total(bright) == total(bright.at[0].set(1.0))


def test_bfloat16_is_near_float32(folder, images):
    a, b = (scorers.clip_score(weights=folder / "clip", dtype=d) for d in (jnp.float32, "bfloat16"))
    values = [r.score(r.params, images, r.encode(PROMPTS)) for r in (a, b)]
    assert values[1].dtype == jnp.float32 and np.abs(values[0] - values[1]).max() < 0.02
    assert a.tower.name != b.tower.name


def test_resizing_keeps_constants_and_the_middle():
    for antialias in (True, False):
        for size, source in ((7, 30), (30, 7), (9, 9)):
            np.testing.assert_allclose(resize_matrix(size, source, antialias).sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(resize_matrix(9, 9), np.eye(9), atol=1e-12)
    flat = pixels(jnp.full((1, 12, 40, 3), 0.25), 8, mean=(0.0,) * 3, std=(1.0,) * 3)
    np.testing.assert_allclose(flat, 0.25, atol=1e-6)
    wide = jnp.zeros((1, 8, 24, 3)).at[:, :, 8:16].set(1.0)
    np.testing.assert_array_equal(pixels(wide, 8, mean=(0.0,) * 3, std=(1.0,) * 3), 1.0)


def test_pictures_of_any_kind_become_rgb():
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert as_rgb(grey).shape == (1, 2, 3, 3) and (as_rgb(grey)[0, ..., 2] == grey).all()
    clear = np.zeros((2, 3, 4), np.uint8)
    assert (as_rgb(clear) == 255).all()  # nothing but the white behind it
    assert (as_rgb(np.concatenate([clear[..., :3], np.full((2, 3, 1), 128, np.uint8)], -1)) == 127).all()
    assert (as_rgb(np.full((2, 3, 3), 0.5, np.float32)) == 128).all() and as_rgb([grey, grey]).shape == (2, 2, 3, 3)
    for bad, words in ((np.zeros((0, 4, 4, 3), np.uint8), "no pictures"), ([], "no pictures"), (np.full((2, 2), 7.0), r"\[0, 1\]"),
                       (np.zeros((3, 8, 8, 5), np.uint8), "channels come last"), (grey.astype(np.int64), "int64"),
                       ([grey, grey[:1]], "several sizes"), (np.full((2, 2), np.nan), r"\[0, 1\]")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            as_rgb(bad)


def test_long_prompts_are_cut_and_said_so_once(folder, caplog):
    reward = scorers.clip_score(weights=folder / "clip")
    long = "a red cat " * 5 + "and a zebra"
    with caplog.at_level(logging.WARNING):
        ids = reward.encode([long, "the dog"])["ids"]
        reward.encode([long])
        assert len(caplog.records) == 1 and "zebra" in caplog.text.replace(" ", "")
        reward.encode([f"{i} {long}" for i in range(20)])
    assert len(caplog.records) == 10 and "Others are not named" in caplog.records[-1].message
    assert ids.shape == (2, 16) and ids.dtype == np.int32 and (ids[:, 0] == 524).all() and ids[0, -1] == 525
    padded = clip_tokenizer(folder / "clip", length=16)(["the dog"])[0]
    zeros = clip_tokenizer(folder / "clip", length=16, style="open_clip")(["the dog"])[0]
    end = int(np.argmax(padded == 525))
    assert (padded[end:] == 525).all() and zeros[end] == 525 and (zeros[end + 1 :] == 0).all() and (zeros[:end] == padded[:end]).all()


def test_mistakes_are_named(folder, tmp_path):
    config = json.loads((folder / "clip" / "config.json").read_text())
    for call, words in (
        (lambda: scorers.hps(), "version, 'v2' or 'v2.1'"),
        (lambda: scorers.hps(version="v2.1"), "HPS_v2.1_compressed.pt"),
        (lambda: scorers.aesthetic(version="v3"), "'v1' or 'v2'"),
        (lambda: scorers.aesthetic(), "needs head"),
        (lambda: scorers.aesthetic(head=folder / "v1.safetensors", weights=folder / "clip"), "no aesthetic head v2"),
        (lambda: scorers.clip_score(weights=folder / "clip", config="vit_b16"), "vit_b32, vit_l14"),
        (lambda: scorers.clip_score(weights=folder / "clip", config="vit_b32"), "does not fit the model"),
        (lambda: scorers.clip_score(weights=folder / "clip", mode="fast"), "'fast'; choose from 'diff'"),
        (lambda: pixels(jnp.zeros((1, 8, 8, 1)), 4), "as_rgb"),
        (lambda: clip_text({"model_type": "t5"}), "'t5'"),
        (lambda: clip_text({"hidden_act": "gelu_new"}), "'gelu_new'.*'quick_gelu'"),
        (lambda: clip_text({"num_attention_heads": 7}), "7 heads"),
        (lambda: clip({**config, "vision_config": {"image_size": [224, 224]}}), "image_size"),
        (lambda: jax.eval_shape(clip_text({}).init, jax.random.key(0), jnp.zeros((1, 78), jnp.int32)), "78 tokens"),
        (lambda: one_reward({"name": "clip_score", "wights": "x"}), "'wights'. Did you mean 'weights'"),
        (lambda: one_reward({"weights": "x"}), "needs a name"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        clip_tokenizer(tmp_path)


def test_configs_name_a_reward_with_its_arguments(folder):
    made = one_reward({"name": "clip_score", "weights": str(folder / "clip"), "scale": 100.0})
    assert made.range == (-100.0, 100.0)


def test_known_before_reading_is_true_after(folder):
    made = {"clip_score": scorers.clip_score(weights=folder / "clip"), "pick_score": scorers.pick_score(weights=folder / "clip"),
            "safety": scorers.safety(weights=folder / "safety")}  # fmt: skip
    for name, reward in made.items():
        entry = rewards.REWARDS[name]
        assert (reward.name, reward.licence, reward.summary) == (name, entry.licence, entry.summary)
    for name in ("critters_proxy", "jpeg_compressibility"):
        entry, reward = rewards.REWARDS[name], rewards.REWARDS[name].factory()
        assert (reward.licence, reward.range, reward.summary, reward.differentiable) == entry[2:]


def test_built_in_sizes_have_the_published_counts():
    for name, count in (("vit_b32", 151_277_313), ("vit_l14", 427_616_513), ("vit_h14", 986_109_441)):
        net = clip(BUILT_IN[name])
        shapes = tiny_clip.shapes(net, jnp.zeros((1, 77), jnp.int32), jnp.zeros((1, 224, 224, 3)))[0]
        assert sum(int(np.prod(s)) for s in shapes.values()) == count
