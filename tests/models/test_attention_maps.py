"""Attention maps over a prompt's tokens, and which tokens a word is."""

import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tiny_sd
from PIL import Image

from alignment_jax.evaluation.attention import overlays
from alignment_jax.models.attention_maps import attention_maps
from alignment_jax.models.clip import clip_tokenizer
from alignment_jax.models.layers import JointAttention
from alignment_jax.models.stable_diffusion import stable_diffusion
from alignment_jax.models.subjects import subjects, words
from alignment_jax.models.unet import unet
from alignment_jax.training import build

# the maps' level lies in the middle, as in Stable Diffusion 1
CROSS_DOWN, CROSS_UP = tiny_sd.CROSS_DOWN, tiny_sd.CROSS_UP
CONFIG = {"block_out_channels": [8, 8, 16], "layers_per_block": 1, "attention_head_dim": 2, "cross_attention_dim": 12,
          "norm_num_groups": 4, "down_block_types": [CROSS_DOWN] * 2 + ["DownBlock2D"],
          "up_block_types": ["UpBlock2D"] + [CROSS_UP] * 2}  # fmt: skip
X, T, STATES = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 16, 8, 4), (2,), (2, 7, 12)]))


def moved(init, *inputs):
    """Parameters that are not the initial ones: a zero projection would hide what is attended to."""
    rng = np.random.default_rng(4)
    return jax.tree.map(lambda v: rng.normal(0.0, 0.3, v.shape).astype(np.float32), jax.eval_shape(init, jax.random.key(3), *inputs))


@pytest.fixture(scope="module")
def network():
    net = unet(CONFIG)
    return net, moved(net.init, X, T, STATES)["params"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: tiny_sd.write(kind, tmp_path_factory.mktemp(kind)) for kind in ("sd15", "sdxl")}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize(("size", "remat"), [
    ((16, 8), False), ((8, 4), True), *(pytest.param(*rest, marks=pytest.mark.slow) for rest in [((16, 8), True), ((8, 4), False)]),
])  # fmt: skip
def test_maps_are_the_mean_of_the_layers_own_probabilities(network, size, remat):
    """Dense and by hand, from what enters each layer; of the layers with that many positions alone, the others left out."""
    net, params = network
    seen = []

    def record(inner, inputs, more, context):
        if context.module.name == "attn2":
            seen.append((context.module.path, [np.asarray(v, np.float64) for v in inputs]))
        return inner(*inputs, **more)

    with nn.intercept_methods(record):
        net.apply({"params": params}, X, T, STATES)
    expected = []
    for path, (x, states) in seen:
        if x.shape[1] != size[0] * size[1]:
            continue
        weights = params
        for name in path:
            weights = weights[name]
        q, k = x @ np.asarray(weights["to_q"]["kernel"], np.float64), states @ np.asarray(weights["to_k"]["kernel"], np.float64)
        for head in np.split(np.arange(q.shape[-1]), 2):
            expected.append(softmax(q[..., head] @ k[..., head].swapaxes(1, 2) / np.sqrt(len(head))))
    assert len(seen) == 7 and len(expected) == 2 * 3
    found = jax.jit(lambda p: attention_maps(net.clone(remat=remat), p, size, X, T, STATES))(params)
    assert found.shape == (2, *size, 7)
    np.testing.assert_allclose(found, np.mean(expected, 0).reshape(2, *size, 7), atol=2e-6)
    np.testing.assert_allclose(found.sum(-1), 1.0, atol=1e-6)
    assert found.std((1, 2)).max() > 1e-3  # positions differ


def test_collecting_changes_neither_the_output_nor_the_program(network):
    net, params = network
    plain = jax.jit(lambda p: net.apply({"params": p}, X, T, STATES))
    both = jax.jit(lambda p: net.apply({"params": p}, X, T, STATES, mutable=["intermediates"]))
    np.testing.assert_array_equal(plain(params), both(params)[0])
    assert "intermediates" not in jax.eval_shape(net.init, jax.random.key(0), X, T, STATES)
    with nn.intercept_methods(lambda inner, inputs, more, context: None if context.method_name == "sow" else inner(*inputs, **more)):
        never = jax.jit(lambda p: net.apply({"params": p}, X, T, STATES)).lower(params).as_text()
    assert never == plain.lower(params).as_text()


def test_what_comes_after_the_last_layer_is_not_computed(network):
    """Nor does it have a gradient, whose pass with respect to x costs about as much as the network itself."""
    net, params = network

    def flops(function):
        return jax.jit(function).lower(params, X).compile().cost_analysis()["flops"]

    def whole(p, x):
        return net.apply({"params": p}, x, T, STATES)

    def maps(p, x):
        return attention_maps(net, p, (8, 4), x, T, STATES)

    assert flops(maps) < 0.55 * flops(whole)
    assert flops(jax.grad(lambda p, x: maps(p, x).max(), argnums=1)) < 0.55 * 2 * flops(whole)
    spoilt = {k: jax.tree.map(lambda v: v * jnp.nan, v) if k.startswith(("up_blocks.2", "conv_out")) else v
              for k, v in params.items()}  # fmt: skip
    np.testing.assert_array_equal(jax.jit(maps)(spoilt, X), jax.jit(maps)(params, X))


def test_a_resolution_without_layers_is_refused(network):
    net, params = network
    with pytest.raises(ValueError, match=r"no attention over text at 3 x 3 positions; layers of this network have \[8, 32, 128\]"):
        attention_maps(net, params, (3, 3), X, T, STATES)


def test_joint_attention_gives_the_texts_share_over_its_sum():
    """Against the joint softmax over positions and tokens by hand; padding is never looked at."""
    net = JointAttention(2)
    x, text = jax.random.normal(jax.random.key(0), (2, 4, 4, 16)), jax.random.normal(jax.random.key(1), (2, 5, 6))
    mask = jnp.arange(5) < jnp.array([[5], [3]])
    params = moved(net.init, x, text, mask)["params"]
    norm = nn.GroupNorm(8).apply({"params": params["norm"]}, x).reshape(2, 16, 16)
    qkv = np.asarray(norm @ params["to_qkv"]["kernel"] + params["to_qkv"]["bias"]).reshape(2, 16, 2, 24)
    q, k = qkv[..., :8], qkv[..., 8:16]
    token = np.asarray(text @ params["to_text_kv"]["kernel"] + params["to_text_kv"]["bias"]).reshape(2, 5, 2, 16)[..., :8]
    scores = np.einsum("bnhd,bmhd->bhnm", q, np.concatenate([k, token], 1)) / np.sqrt(8)
    scores[1, ..., -2:] = -1e9
    share = softmax(scores)[..., 16:]
    found = attention_maps(net, params, (4, 4), x, text, mask)
    np.testing.assert_allclose(found.reshape(2, 16, 5), (share / share.sum(-1, keepdims=True)).mean(1), atol=1e-5)
    assert (np.asarray(found)[1, ..., 3:] == 0).all()


def test_the_critters_model_gives_maps():
    bundle, params = build.model(ml_collections.ConfigDict({"model": "critters", "weights": "shipped", "seed": 0}))
    tokens = bundle.tokenize(["a green bell monster with horns on a blue background", "a white monster"])
    x, t, cond = jax.random.normal(jax.random.key(0), (2, 32, 32, 3)), jnp.full(2, 0.6), bundle.encode_text(params, tokens)
    maps = jax.jit(bundle.attention)(params, x, t, cond)
    assert maps.shape == (2, 8, 8, 24)
    np.testing.assert_allclose(maps.sum(-1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(maps[1, ..., 4:], 0.0)
    np.testing.assert_allclose(jax.jit(bundle.attention)(params, x, t, {"tokens": tokens}), maps, atol=1e-6)


@pytest.mark.parametrize(("kind", "size"), [("sd15", (8, 12)), ("sdxl", (4, 6))])
def test_stable_diffusion_gives_maps_of_any_shape_of_picture(kind, size, folders):
    bundle = stable_diffusion(folders[kind], height=16, width=24)
    params, tokens = moved(bundle.init), bundle.tokenize(["a cat", "a red house"])
    x, t = jax.random.normal(jax.random.key(1), (2, *bundle.sample_shape)), jnp.full(2, 500.0)
    maps = jax.jit(bundle.attention)(params, x, t, bundle.encode_text(params, tokens))
    assert maps.shape == (2, *size, 77)
    np.testing.assert_allclose(maps.sum(-1), 1.0, atol=1e-5)


# -- words and tokens ------------------------------------------------------------------------------------------------


def pieces(folder, prompt, first, end):
    """What the tokenizer itself calls the tokens of a word."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
    return "".join(tokenizer.convert_ids_to_tokens(tokenizer([prompt])["input_ids"][0][first:end])).replace("</w>", " ").split()


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_word_is_all_of_its_byte_pairs_and_no_other(kind, folders):
    """Counting words instead of tokens is off by one for each word that is split before."""
    tokenize, prompt = stable_diffusion(folders[kind]).tokenize, "A cat on the moon, a red-blue house and a cat"
    found = words(tokenize, prompt)
    assert [w for w, *_ in found] == ["a", "cat", "on", "the", "moon", "a", "red-blue", "house", "and", "a", "cat"]
    assert found[0][1] == 1 and any(end - first > 1 for _, first, end in found)
    assert all(a[2] <= b[1] for a, b in zip(found, found[1:]))
    for word, first, end in found:
        assert "".join(pieces(folders[kind], prompt, first, end)) == word, (word, first, end)


def test_the_last_word_does_not_take_the_end_of_text_and_cut_words_are_left_out(folders):
    tokenize = clip_tokenizer(folders["sd15"], length=77)
    whole, (_, _, end) = tokenize(["a cat"])[0], words(tokenize, "a cat")[-1]
    assert whole[end] == tokenize([""])[0, 1] != whole[end - 1]
    assert words(tokenize, "") == words(tokenize, " , ") == []
    cut = words(tokenize, "house " * 90)
    assert cut[-1][2] == 76 and len(cut) < 90


def test_subjects_are_the_content_words_or_those_that_are_named():
    bundle = build.model(ml_collections.ConfigDict({"model": "critters", "weights": "shipped", "seed": 0}))[0]
    prompts = ["a green bell monster with horns and a smile on a green background", "a white monster"]
    found = subjects(bundle.tokenize, prompts)
    np.testing.assert_array_equal(found[0, :14], [0, 0, 1, 2, 3, 0, 4, 0, 0, 5, 0, 0, 6, 7])
    np.testing.assert_array_equal(found[1, :5], [0, 0, 1, 2, 0])
    named = subjects(bundle.tokenize, prompts, "Bell Monster, green")
    np.testing.assert_array_equal(named[0, :14], [0, 0, 1, 2, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0])
    assert not named[1].any()
    with pytest.raises(ValueError, match="subjects name hat, which no prompt holds; .*green, bell, monster"):
        subjects(bundle.tokenize, prompts, "monster,hat")
    with pytest.raises(ValueError, match="must be words of the prompts"):
        subjects(bundle.tokenize, prompts, ", ")


def test_overlays_are_a_png_with_a_panel_for_each_word():
    rng = np.random.default_rng(0)
    one, seven = (overlays(rng.random((8, 8, 3)), [("word", rng.random((4, 4)))] * n) for n in (1, 7))
    sizes = [Image.open(io.BytesIO(png)).size for png in (one, seven)]
    assert sizes[0][0] < sizes[1][0] and sizes[0][1] < sizes[1][1]
