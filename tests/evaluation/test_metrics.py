"""The catalogue of metric names."""

import pytest

from alignment_jax.evaluation.metrics import METRICS, describe


def test_every_metric_has_one_short_line() -> None:
    for name, meaning in METRICS.items():
        assert meaning.endswith(".") and "\n" not in meaning and 15 < len(meaning) < 160, name


def test_kinds_and_ends_of_intervals_are_described() -> None:
    assert describe("gold/eyes") == METRICS["gold/<attribute>"]
    assert describe("mouth/clean") == METRICS["<head>/clean"]
    assert describe("gold/all") == METRICS["gold/all"]
    assert "95 %" in describe("gold/all/low") and describe("gold/all/low").startswith(METRICS["gold/all"])


def test_an_unknown_name_is_refused_and_the_nearest_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'grad_norm'"):
        describe("gradnorm")
