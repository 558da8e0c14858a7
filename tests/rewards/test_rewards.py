"""The critters' rewards and judge on fresh renders; combinations keep their parts; JPEG size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment_jax import rewards
from alignment_jax.data import critters
from alignment_jax.rewards.augment import augment
from alignment_jax.rewards.jpeg import kilobytes

N = 96


@pytest.fixture(scope="module")
def fresh():
    """Renders of held-out combinations that no file of the project holds (another seed), and their prompts."""
    drawn = [critters.draw("held_out", i, seed=99) for i in range(N)]
    attributes = np.stack([d["attributes"] for d in drawn])
    return np.stack([d["image"] for d in drawn]).astype(np.float32) / 255, [critters.caption(a) for a in attributes]


def test_the_judge_is_right_on_fresh_renders_and_wrong_on_rubbish(fresh):
    images, prompts = fresh
    judge = rewards.critters.critters_gold()
    targets = judge.targets(prompts)
    assert judge.look(images, targets)["right"].mean() > 0.96
    assert judge.look(np.random.default_rng(0).random(images.shape).astype(np.float32), targets)["right"].mean() < 0.05
    assert judge.look(images[::-1], targets)["right"].mean() < 0.05  # another prompt's picture
    blend = 0.5 * images + 0.5 * images[::-1]
    assert judge.look(blend, targets)["right"].mean() < 0.4  # two pictures at once are unclear, not right


def test_proxy_and_judge_differ_in_architecture_and_the_fragile_one_breaks_under_augmentation(fresh):
    images, prompts = fresh
    robust, fragile = rewards.critters.critters_proxy(), rewards.critters.critters_fragile()
    condition = robust.encode(prompts)
    changed = augment(jax.random.key(0), jnp.asarray(images))
    score = {(r.name, k): np.asarray(r.score(r.params, x, condition)).mean()
             for r in (robust, fragile) for k, x in (("clean", images), ("changed", changed))}  # fmt: skip
    assert min(score["critters_proxy", "clean"], score["critters_fragile", "clean"]) > -0.1
    assert score["critters_proxy", "changed"] > -0.2 > score["critters_fragile", "changed"]
    assert robust.augment is not None and fragile.augment is None
    for r in (robust, fragile):
        gradient = jax.grad(lambda x, r=r: r.score(r.params, x, condition).sum())(changed)
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_shipped_recognisers_are_half_precision_and_the_judge_sees_the_accent(fresh):
    from safetensors.numpy import load_file

    images, prompts = fresh
    for name in ("proxy", "gold", "fragile"):
        assert {v.dtype for v in load_file(rewards.critters.ASSETS / f"{name}.safetensors").values()} == {np.dtype(np.float16)}
    judge = rewards.critters.critters_gold()
    seen = judge.look(images, judge.targets(prompts))
    nuisances = [critters.draw("held_out", i, seed=99)["nuisances"] for i in range(N)]
    has_top = judge.targets(prompts)[:, 2] > 0  # only there can the accent be seen
    assert (seen["nuisances"]["accent"] == [n["accent"] for n in nuisances])[has_top].mean() > 0.9
    pattern = np.array([n["pattern"] for n in nuisances])
    assert (seen["nuisances"]["pattern"] == pattern).mean() > max(pattern.mean(), 1 - pattern.mean()) + 0.05
    assert seen["features"].shape == (N, 256) and np.isfinite(seen["features"]).all()


def test_mean_probability_is_in_its_range_and_ignores_what_is_not_asked(fresh):
    images, prompts = fresh
    r, model = rewards.critters.critters_proxy(), rewards.critters.StridedCNN(rewards.critters.HEADS)
    right = rewards.critters.mean_probability(model, r.params, images[:8], r.encode(prompts[:8]))
    wrong = rewards.critters.mean_probability(model, r.params, images[7::-1], r.encode(prompts[:8]))
    assert right.min() > 0.95 and right.max() <= 1 + 1e-6 and wrong.max() < 0.9
    attributes = r.encode(prompts[:8])["attributes"].copy()
    attributes[:, 1:] = -1
    assert rewards.critters.mean_probability(model, r.params, images[:8], {"attributes": attributes}).min() > 0.95


def test_unasked_attributes_do_not_count(fresh):
    images, _ = fresh
    r = rewards.critters.critters_proxy()
    body = critters.ATTRIBUTES["body"].index("green")
    got = r.score(r.params, images[:4], r.encode(["a green monster"] * 4))
    log_p = rewards.critters.log_probabilities(rewards.critters.StridedCNN(rewards.critters.HEADS), r.params, images[:4],
                                               jnp.array([[body, -1, -1, -1, -1, -1]] * 4))  # fmt: skip
    np.testing.assert_allclose(got, np.maximum(log_p[:, 0], -6), rtol=1e-5)
    with pytest.raises(ValueError, match="names nothing that this reward knows: 'a dog'"):
        r.encode(["a dog"])


def test_augmentation_keeps_gradients_finite_and_pictures_in_range():
    x = jax.random.uniform(jax.random.key(1), (4, 32, 32, 3))
    seen = augment(jax.random.key(0), x)
    assert float(seen.min()) >= -1e-6 and float(seen.max()) <= 1 + 1e-6 and not np.allclose(seen, x)
    gradient = jax.grad(lambda x: augment(jax.random.key(0), x).sum())(x * 3)  # far outside [0, 1]: still a gradient
    assert np.isfinite(gradient).all() and np.abs(gradient).sum() > 0


def test_weighted_sums_keep_their_parts():
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    up, down = rewards.jpeg.jpeg_incompressibility(), rewards.jpeg.jpeg_compressibility()
    both = rewards.weighted([(up, 2.0), (down, 0.5)])
    total, parts = both.score(images, ["a"] * 3, {})
    np.testing.assert_allclose(total, 1.5 * kilobytes(images), rtol=1e-5)
    assert set(parts) == {up.name, down.name} and not both.device and both.range == (-np.inf, np.inf)
    proxy, fragile = rewards.critters.critters_proxy(), rewards.critters.critters_fragile()
    mixed = rewards.weighted([(proxy, 1.0), (fragile, -1.0)])
    prompts = ["a green bell monster"] * 3
    x = images[:, :16, :16].repeat(2, 1).repeat(2, 2) / np.float32(255)
    want = proxy.score(proxy.params, x, proxy.encode(prompts)) - fragile.score(fragile.params, x, fragile.encode(prompts))
    np.testing.assert_allclose(mixed.score(mixed.params, x, mixed.encode(prompts)), want, rtol=1e-4, atol=1e-5)
    for bad, message in (([], "at least one"), ([(up, 1.0), (up, 1.0)], "told apart"), ([(up, 1.0), (proxy, 1.0)], "cannot be summed")):
        with pytest.raises(ValueError, match=message):
            rewards.weighted(bad)


def test_jpeg_size_orders_noise_above_a_flat_picture():
    flat, noise = np.full((1, 32, 32, 3), 128, np.uint8), np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    assert kilobytes(flat)[0] < 1.0 < kilobytes(noise)[0]
