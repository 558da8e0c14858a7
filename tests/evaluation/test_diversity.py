"""Diversity has its closed forms, and errors do not count."""

import numpy as np
import pytest

from alignment_jax.evaluation.diversity import (
    feature_diversity,
    nuisance_recall,
    pixel_diversity,
    pixel_diversity_ratio,
    vendi_diversity,
    vendi_score,
)


def test_two_flat_pictures_differ_by_their_grey() -> None:
    images = np.zeros((3, 2, 4, 4, 3))
    images[:, 1] = 0.25
    got = pixel_diversity(images)
    assert got["mean"] == pytest.approx(0.25) and got["n"] == 3


def test_three_points_average_their_three_pairs() -> None:
    images = np.array([0.0, 0.3, 0.9]).reshape(1, 3, 1, 1, 1) * np.ones((2, 3, 2, 2, 3))
    assert pixel_diversity(images)["mean"] == pytest.approx((0.3 + 0.9 + 0.6) / 3)


def test_only_right_samples_count_and_prompts_without_a_pair_are_left_out() -> None:
    images = np.zeros((3, 3, 2, 2, 3))
    images[0, 1], images[0, 2], images[1, 1], images[2, 1] = 0.5, 1.0, 0.1, 0.9
    right = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 0]], bool)
    got = pixel_diversity(images, right)
    assert got["mean"] == pytest.approx((0.5 + 0.1) / 2) and got["n"] == 2


def test_no_pair_is_not_known_rather_than_zero() -> None:
    got = pixel_diversity(np.zeros((2, 2, 1, 1, 3)), np.zeros((2, 2), bool))
    assert np.isnan(got["mean"]) and got["n"] == 0


def test_halved_contrast_halves_diversity() -> None:
    images = np.random.default_rng(0).random((20, 4, 4, 4, 3))
    got = pixel_diversity_ratio(0.5 * images, None, images, None)
    assert got["mean"] == pytest.approx(0.5) and got["low"] == pytest.approx(0.5) and got["high"] == pytest.approx(0.5)


def test_right_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[P, G\] = \[2, 3\]"):
        pixel_diversity(np.zeros((2, 3, 1, 1, 3)), np.ones((3, 2), bool))


def test_feature_distance_is_cosine() -> None:
    features = np.array([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [3.0, 3.0]]])
    assert feature_diversity(features)["mean"] == pytest.approx((1.0 + 0.0) / 2)


def test_vendi_counts_different_samples() -> None:
    assert vendi_score(np.eye(5) * 3) == pytest.approx(5)
    assert vendi_score(np.ones((5, 3))) == pytest.approx(1)
    assert vendi_score(np.repeat(np.eye(2), 4, 0)) == pytest.approx(2)
    assert vendi_diversity(np.stack([np.eye(4), np.ones((4, 4))]))["mean"] == pytest.approx(2.5)


def test_nuisance_recall_is_one_for_real_draws_and_zero_for_one_value_whatever_the_group_size() -> None:
    rng = np.random.default_rng(0)
    classes = {"accent": 6, "pattern": 2}

    def draw(prompts: int, group: int) -> dict[str, np.ndarray]:
        return {"accent": rng.integers(0, 6, (prompts, group)),
                "pattern": (rng.random((prompts, group)) < 0.4).astype(int)}  # fmt: skip

    real = draw(4000, 2)
    for group in (2, 8):
        got = nuisance_recall(draw(3000, group), classes, real)
        assert got["accent"] == pytest.approx(1, abs=0.05) and got["pattern"] == pytest.approx(1, abs=0.05)
    fixed = {name: np.ones((5, 4), int) for name in classes}
    assert nuisance_recall(fixed, classes, real) == {"accent": 0.0, "pattern": 0.0, "mean": 0.0}


def test_nuisance_recall_halves_when_half_the_prompts_have_collapsed() -> None:
    values = np.random.default_rng(0).integers(0, 6, (4000, 4))
    values[::2] = 3
    assert nuisance_recall({"accent": values}, {"accent": 6})["mean"] == pytest.approx(0.5, abs=0.03)


def test_nuisance_values_outside_their_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pattern: values must be \[P, G\] in 0..1"):
        nuisance_recall({"pattern": np.full((2, 2), 2)}, {"pattern": 2})
