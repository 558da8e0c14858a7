"""Latents and text states computed once are those that the model computes, and an interrupted pass goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment_jax.data.pairs import PairRecord
from alignment_jax.data.sources import pair_reader
from alignment_jax.models import critters
from alignment_jax.training.precompute import latent_source, precompute

PROMPTS = ["a green bell monster", "a monster with horns", "a blue monster", "", "a red monster with a smile"]
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
BUNDLE = critters(features=(8, 16))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)  # not init, which compiles for long
    shapes = jax.eval_shape(BUNDLE.init, jax.random.key(0))
    return jax.tree.map(lambda s: 0.1 * rng.standard_normal(s.shape, np.float32), shapes)


def read(rows):
    return {"images": IMAGES[rows], "prompts": [PROMPTS[i] for i in rows]}


def spread(params, pictures):
    return 2 * pictures - 1, jnp.full_like(pictures, -2.0)


def test_what_is_read_back_is_what_the_model_computes(params, tmp_path):
    precompute(BUNDLE, params, read, 5, tmp_path / "a", batch=2, part=3, dtype="float32")
    batch = next(latent_source(tmp_path / "a", batch=5, seed=0))
    rows = batch["prompt_id"]
    np.testing.assert_allclose(batch["x0"], BUNDLE.encode(params, IMAGES[rows] / np.float32(255)), atol=1e-6)
    want = BUNDLE.encode_text(params, BUNDLE.tokenize([PROMPTS[i] for i in rows]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), batch["cond"], jax.tree.map(np.asarray, want))
    null = jax.tree.map(np.asarray, BUNDLE.encode_text(params, BUNDLE.tokenize([""])))
    exact = lambda p, x: (BUNDLE.encode(p, x), jnp.full_like(x, -jnp.inf))  # noqa: E731
    precompute(BUNDLE, params, read, 5, tmp_path / "b", batch=2, part=3, dtype="float32", encode_moments=exact)
    np.testing.assert_array_equal(next(latent_source(tmp_path / "b", batch=5, seed=0))["x0"], batch["x0"])
    dropped = next(latent_source(tmp_path / "a", batch=5, seed=0, drop=1.0))["cond"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, np.broadcast_to(b, a.shape), atol=1e-5), dropped, null)


def test_samples_have_the_moments_and_the_stream_resumes(params, tmp_path):
    precompute(BUNDLE, params, read, 5, tmp_path, encode_moments=spread, batch=4, part=4)
    source = latent_source(tmp_path, batch=5, seed=1)
    first, state, second = next(source), source.get_state(), next(source)
    noise = first["x0"] - (IMAGES[first["prompt_id"]] / np.float32(127.5) - 1)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - np.exp(-1)) < 0.01 and first["x0"].dtype == np.float32
    source.set_state(state)
    jax.tree.map(np.testing.assert_array_equal, next(source), second)


def test_an_interrupted_pass_goes_on_and_another_set_is_refused(params, tmp_path):
    asked = []

    def failing(rows):
        asked.extend(rows.tolist())
        if 4 in rows:
            raise KeyboardInterrupt
        return read(rows)

    with pytest.raises(KeyboardInterrupt):
        precompute(BUNDLE, params, failing, 5, tmp_path, batch=2, part=2)
    with pytest.raises(ValueError, match="lacks 1 of 3 parts, first part_00002.array_record"):
        latent_source(tmp_path, batch=2, seed=0)
    asked.clear()
    precompute(BUNDLE, params, lambda rows: asked.extend(rows.tolist()) or read(rows), 5, tmp_path, batch=2, part=2)
    assert asked == [0, 1, 4, 4]  # the first batch is a check, the last one was missing
    assert sorted(next(latent_source(tmp_path, batch=5, seed=0))["prompt_id"]) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="holds another set"):
        precompute(BUNDLE, params, read, 4, tmp_path, batch=2, part=2)
    with pytest.raises(ValueError, match="other data or weights"):
        precompute(BUNDLE, params, lambda rows: read(rows) | {"images": 255 - IMAGES[rows]}, 5, tmp_path, batch=2, part=2)
    with pytest.raises(ValueError, match="x0/mean has values that float16 cannot hold"):
        precompute(BUNDLE, params, read, 5, tmp_path / "b", batch=2, encode_moments=lambda p, x: (1e6 * x, None))
    with pytest.raises(FileNotFoundError, match="no precomputed latents"):
        latent_source(tmp_path / "absent", batch=2, seed=0)


def test_pairs_keep_preference_and_weight(params, tmp_path):
    pairs = [PairRecord(PROMPTS[i], IMAGES[i], IMAGES[4 - i], [0.5, 1.0, 0.3][i], 0.1 * i) for i in range(3)]
    for index in (1, 0):  # two processes
        precompute(BUNDLE, params, pair_reader(pairs, (32, 32)), 3, tmp_path, encode_moments=spread, batch=2, part=2, shard=(index, 2))
    batch = next(latent_source(tmp_path, batch=3, seed=0))
    rows = batch["prompt_id"]
    np.testing.assert_allclose(batch["preference"], np.array([0.5, 1.0, 0.7], np.float32)[rows])
    np.testing.assert_allclose(batch["weight"], 0.1 * rows, rtol=1e-6)
    want = IMAGES[np.where(rows == 2, 4 - rows, rows)] / 127.5 - 1
    assert abs((batch["winner"] - want).mean()) < 0.03 and batch["loser"].shape == (3, 32, 32, 3)
