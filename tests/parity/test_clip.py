"""CLIP's towers and scorers compute what transformers, open_clip and diffusers do; fixtures are made by references/clip.py."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_clip
from common import FIXTURES
from tiny_clip import fixture, parameters, shapes

from alignment_jax.models import clip as models
from alignment_jax.rewards import clip as scorers
from alignment_jax.rewards.preprocess import CLIP_MEAN, CLIP_STD, pixels
from alignment_jax.weights.layouts import places

HERE = Path(__file__).parent
CASES = ("text_quick", "text_gelu", "vision", "whole", "pixels", "scores")
H_TEXT = {**models.BUILT_IN["vit_h14"]["text_config"], "num_hidden_layers": 23}
BIGG = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32, "hidden_act": "gelu",
        "projection_dim": 1280, "architectures": ["CLIPTextModelWithProjection"]}  # fmt: skip
L_TEXT = models.BUILT_IN["vit_l14"]["text_config"]
IDS, PICTURE = jnp.zeros((1, 77), jnp.int32), jnp.zeros((1, 224, 224, 3))
FULL = {
    "clip_l_text": (models.clip_text({**L_TEXT, "architectures": ["CLIPTextModel"], "projection_dim": 768}), (IDS,)),
    "clip_l_text_proj": (models.clip_text({**L_TEXT, "architectures": BIGG["architectures"], "projection_dim": 768}), (IDS,)),
    "openclip_h_text_sd21": (models.clip_text(H_TEXT), (IDS,)),
    "openclip_bigg_text_proj": (models.clip_text(BIGG), (IDS,)),
    "clip_vit_b32": (models.clip(models.BUILT_IN["vit_b32"]), (IDS, PICTURE)),
    "clip_vit_l14": (models.clip(models.BUILT_IN["vit_l14"]), (IDS, PICTURE)),
    "clip_vit_h14_hf_pickscore": (models.clip(models.BUILT_IN["vit_h14"]), (IDS, PICTURE)),
    "sd_safety_checker": (models.safety_checker(models.BUILT_IN["vit_l14"]), (PICTURE,)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip.write(tmp_path_factory.mktemp("clip"))


def error(ours, theirs):
    """Largest difference in units of the largest value."""
    assert ours.shape == theirs.shape and ours.dtype == jnp.float32
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize(("name", "make"), [("text_quick", models.clip_text), ("text_gelu", models.clip_text),
                                            ("vision", models.clip_vision), ("whole", models.clip)])  # fmt: skip
def test_towers_are_those_of_transformers(name, make):
    data = fixture(name)
    net, args = make(json.loads(str(data["config"]))), [data[k] for k in ("ids", "pixels") if k in data]
    out = jax.jit(net.apply)({"params": parameters(net, *args)}, *args)
    errors = {k: error(out[k], data[k]) for k in data.keys() - {"ids", "pixels", "config", "versions"}}
    print(name, {k: f"{e:.1e}" for k, e in errors.items()})
    assert set(out) == set(errors) and max(errors.values()) < 1e-4


def test_attention_is_causal_in_every_implementation_and_layers_can_be_rematerialised():
    data = fixture("text_quick")
    net, ids = models.clip_text(json.loads(str(data["config"]))), data["ids"]
    params = parameters(net, ids)
    loss = lambda params, net, ids: jnp.sum(net.apply({"params": params}, ids)["last_hidden_state"][:, :4] ** 2)
    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    later = ids.copy()
    later[:, 4:] = 7
    value, gradient = run(params, net, ids)
    np.testing.assert_allclose(value, run(params, net, later)[0], rtol=1e-6)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient))
    for change in ({"attention": "xla"}, {"remat": True}):
        other = models.CLIPText(net.text_model.clone(**change))
        value_, gradient_ = run(params, other, ids)
        np.testing.assert_allclose(value, value_, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * scale)


@pytest.mark.parametrize("name", FULL)
def test_names_and_shapes_are_those_of_the_checkpoint(name):
    net, args = FULL[name]
    ours = {k: list(v) for k, v in shapes(net, *args)[0].items()}
    theirs = json.loads(gzip.decompress((HERE / "manifests" / f"{name}.json.gz").read_bytes()))
    where = places(list(ours), "transformers", list(theirs))  # some files lack text_model.
    assert {where[k].name: v for k, v in ours.items()} == theirs


@pytest.mark.parametrize(("kind", "manifest"), [("linear", "laion_aesthetic_v2_linear"), ("relu", "laion_aesthetic_v2_relu")])
def test_aesthetic_heads_have_the_names_of_their_files(kind, manifest):
    theirs = json.loads(gzip.decompress((HERE / "manifests" / f"{manifest}.json.gz").read_bytes()))
    stems = scorers.HEADS["v2"][kind == "relu"]
    assert set(theirs) == {f"{s}{end}" for s in stems for end in ("weight", "bias")} and theirs[f"{stems[0]}weight"] == [1024, 768]


def test_pixels_are_those_of_pillow_and_torch():
    data = fixture("pixels")
    floats = data["images"].astype(np.float32) / 255
    levels = lambda x: (np.asarray(x) * np.float32(CLIP_STD) + np.float32(CLIP_MEAN)) * 255
    exact = pixels(floats, 28, mode="exact")
    assert np.abs(levels(exact) - levels(data["exact"])).max() < 1e-3  # bit for bit
    assert np.abs(levels(pixels(floats, 28)) - levels(data["diff"])).max() / 255 < 1e-5
    assert np.abs(levels(pixels(floats, 28, mode="tensor")) - levels(data["diff"])).max() / 255 < 1e-5
    assert np.abs(levels(pixels(floats, 28, antialias=False)) - levels(data["aliased"])).max() / 255 < 1e-5
    assert np.abs(data["aliased"] - data["diff"]).max() > 0.05  # whoever mixes the two up is far off


def reward_of(name, folder, mode="diff"):
    """The scorer of a fixture's name."""
    kind, _, head = name.partition("_")
    if kind == "aesthetic":
        return scorers.aesthetic(version="v1" if head == "v1" else "v2", head=folder / f"{head}.safetensors",
                                 weights=folder / "clip", mode=mode)  # fmt: skip
    if name == "hps":
        config = json.loads((folder / "clip" / "config.json").read_text())
        config = {k: {**v, "hidden_act": "gelu"} if isinstance(v, dict) else v for k, v in config.items()}
        return scorers.hps(version="v2.1", weights=folder / "hps.safetensors", tokenizer=folder / "clip", config=config, mode=mode)
    if name == "safety":
        return scorers.safety(weights=folder / "safety", mode=mode)
    return {"clip_score": scorers.clip_score, "pick_score": scorers.pick_score}[name](weights=folder / "clip", mode=mode)


@pytest.mark.parametrize("name", ["clip_score", "pick_score", "hps", "safety", "aesthetic_v1", "aesthetic_linear", "aesthetic_relu"])
def test_scores_and_their_gradients_are_those_of_torch(name, folder):
    data = fixture("scores")
    reward, images = reward_of(name, folder), fixture("pixels")["images"][:2].astype(np.float32) / 255
    prompts = data["prompts"][[0, 4]].tolist()
    condition = reward.encode(prompts) if reward.encode else {}

    def total(x):
        values = reward.score(reward.params, x, condition)
        return values.sum(), values

    (_, values), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(images)
    errors = error(values, data[f"{name}/diff"]), error(gradient, data[f"{name}/gradient"])
    print(f"{name}: score {errors[0]:.1e}, gradient {errors[1]:.1e} of their scale")
    assert errors[0] < 1e-4 and errors[1] < 1e-3
    assert reward.differentiable and reward.range[0] <= values.min() and values.max() <= reward.range[1]


@pytest.mark.parametrize("name", ["clip_score", "hps", "aesthetic_linear"])
def test_exact_scores_of_uint8_pictures_are_those_of_pillow_and_torch(name, folder):
    data, reward = fixture("scores"), reward_of(name, folder, "exact")
    condition = reward.encode(data["prompts"][[0, 4]].tolist()) if reward.encode else {}
    values = jax.jit(reward.score)(reward.params, fixture("pixels")["images"][:2] / np.float32(255), condition)
    found = error(values, data[f"{name}/exact"])
    print(f"{name}: exact {found:.1e}")
    assert found < 1e-4 and not reward.differentiable


def test_safety_flags_are_those_of_diffusers(folder):
    data, reward = fixture("scores"), reward_of("safety", folder, "exact")
    tables = {k: v + 0.35 * k.endswith("weights") for k, v in reward.params["head"].items()}
    flags = scorers.unsafe(tables, data["features"])
    assert 10 < data["flags"].sum() < 54 and (flags == data["flags"]).all()
    special = scorers._concepts(tables, "special_care_embeds", data["features"]).max(1) > 0.0005
    plain = scorers._concepts(tables, "concept_embeds", data["features"]).max(1)
    assert (special & (plain > -0.0095) & (plain < 0.0005)).any(), "no example where special care decides"
    features = jax.jit(reward.tower.features)(reward.params["tower"], fixture("pixels")["images"] / np.float32(255))
    assert (scorers.unsafe(reward.params["head"], features) == data["flagged_pictures"]).all()


def test_tokens_are_those_of_open_clip(folder):
    data = fixture("scores")
    tokenize = models.clip_tokenizer(folder / "clip", length=16, style="open_clip")
    np.testing.assert_array_equal(tokenize(data["prompts"].tolist()), data["ids"])


@pytest.mark.parity
def test_fixtures_are_what_the_references_compute_today(parity_python, tmp_path):
    subprocess.run([parity_python, HERE / "references" / "clip.py", tmp_path], check=True, stderr=sys.stderr)
    for name in CASES:
        with np.load(tmp_path / f"clip_{name}.npz") as new, np.load(FIXTURES / f"clip_{name}.npz") as old:
            assert set(new) == set(old)
            for key in set(old) - {"versions"}:
                if old[key].dtype.kind == "f":
                    np.testing.assert_allclose(new[key], old[key], atol=1e-5 * np.abs(old[key]).max())
                else:
                    np.testing.assert_array_equal(new[key], old[key])
