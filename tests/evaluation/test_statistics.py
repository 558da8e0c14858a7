"""Intervals contain what they should as often as they say."""

import math

import numpy as np
import pytest
from scipy import stats

from alignment_jax.evaluation.statistics import (
    bootstrap_mean,
    flatten,
    interval,
    mean_interval,
    paired_bootstrap,
    rate,
    ratio_interval,
    unflatten,
    wilson,
)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 10), (50, 100), (832, 1024), (64, 64)])
def test_wilson_agrees_with_scipy(k: int, n: int) -> None:
    expected = stats.binomtest(k, n).proportion_ci(method="wilson")
    got = wilson(k, n)
    np.testing.assert_allclose([got["low"], got["high"]], [expected.low, expected.high], atol=1e-12)
    assert got["mean"] == k / n and got["n"] == n


def test_wilson_knows_the_planning_number() -> None:
    got = wilson(200, 400)  # half-width 4.9 points at n = 400
    assert (got["high"] - got["low"]) / 2 == pytest.approx(0.049, abs=5e-4)


@pytest.mark.parametrize(("k", "n"), [(-1, 10), (11, 10), (0, 0)])
def test_wilson_refuses_impossible_counts(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        wilson(k, n)


def test_wilson_covers_a_small_rate_where_the_normal_interval_does_not() -> None:
    p, n = 0.05, 40
    counts = np.random.default_rng(0).binomial(n, p, 4000)
    ends = {k: wilson(k, n) for k in np.unique(counts)}
    wilson_hits = np.mean([ends[k]["low"] <= p <= ends[k]["high"] for k in counts])
    normal_hits = np.mean(np.abs(counts / n - p) <= 1.96 * np.sqrt(counts / n * (1 - counts / n) / n))
    assert wilson_hits > 0.93 > normal_hits


def test_rate_covers_when_samples_of_a_prompt_resemble_each_other() -> None:
    rng, hits, naive = np.random.default_rng(1), [], []
    for _ in range(500):
        p = rng.beta(0.6, 0.4, (64, 1))  # mean 0.6; prompts are easy or hard
        right = rng.random((64, 8)) < p
        ours, plain = rate(right), wilson(right.sum(), right.size)
        hits.append(ours["low"] <= 0.6 <= ours["high"])
        naive.append(plain["low"] <= 0.6 <= plain["high"])
    assert np.mean(hits) > 0.92 and np.mean(naive) < 0.75
    assert ours["n"] == right.size and ours["mean"] == pytest.approx(right.mean())


def test_rate_of_single_samples_is_wilson() -> None:
    right = np.random.default_rng(0).random(200) < 0.7
    assert rate(right) == rate(right[:, None]) == wilson(right.sum(), 200)


def test_mean_interval_is_students_and_counts_prompts_as_units() -> None:
    x = np.random.default_rng(0).normal(size=30)
    expected = stats.ttest_1samp(x, 0).confidence_interval()
    got = mean_interval(x)
    np.testing.assert_allclose([got["low"], got["high"]], [expected.low, expected.high])
    repeated = mean_interval(np.repeat(x[:, None], 8, 1))  # eight copies of a sample are no news
    np.testing.assert_allclose([repeated["low"], repeated["high"]], [expected.low, expected.high])


def test_one_sample_has_a_mean_and_no_interval() -> None:
    got = mean_interval([3.0])
    assert got["mean"] == 3 and math.isnan(got["low"]) and math.isnan(got["high"])


def test_failed_scores_are_left_out_and_infinite_ones_refused() -> None:
    x = np.random.default_rng(0).normal(size=(20, 4))
    x[3, 1] = x[5] = np.nan
    got = mean_interval(x)
    assert got["n"] == 75 and got["mean"] == pytest.approx(np.nanmean(x)) and got["low"] < got["mean"] < got["high"]
    assert mean_interval([1.0, np.nan, 2.0]) == mean_interval([1.0, 2.0])
    assert mean_interval([np.nan])["n"] == 0
    with pytest.raises(ValueError, match="1 of 3 values are NaN or infinite"):
        mean_interval([1.0, np.inf, 2.0])


def test_bootstrap_leaves_out_undefined_entries_and_agrees_with_student() -> None:
    x = np.random.default_rng(0).normal(size=200)
    got = bootstrap_mean(np.concatenate([x, [np.nan] * 50]))
    expected = mean_interval(x)
    np.testing.assert_allclose([got["low"], got["high"]], [expected["low"], expected["high"]], atol=0.02)
    assert got["n"] == 200


def test_paired_bootstrap_sees_a_difference_that_unpaired_intervals_hide() -> None:
    rng = np.random.default_rng(0)
    prompt = rng.normal(size=(100, 1))
    a, b = (prompt + shift + 0.1 * rng.normal(size=(100, 4)) for shift in (0.1, 0.0))
    got = paired_bootstrap(a, b, seed=0)
    assert got["low"] > 0.05 and got["high"] < 0.15 and got["p"] < 0.01 and got["n"] == 100
    assert mean_interval(a)["low"] < mean_interval(b)["high"]
    assert paired_bootstrap(a, b, seed=0) == got


def test_paired_bootstrap_calls_noise_noise() -> None:
    rng = np.random.default_rng(0)
    p = [paired_bootstrap(*rng.normal(size=(2, 25)), seed=i)["p"] for i in range(40)]
    assert np.mean(np.array(p) < 0.05) <= 0.15


def test_paired_values_must_have_one_shape() -> None:
    with pytest.raises(ValueError, match="one shape"):
        paired_bootstrap(np.zeros(3), np.zeros(4))


def test_ratio_interval_contains_the_ratio_and_is_narrower_for_paired_prompts() -> None:
    rng = np.random.default_rng(0)
    b = rng.uniform(0.2, 0.4, 200)
    a = 0.9 * b + 0.005 * rng.normal(size=200)
    paired, shuffled = ratio_interval(a, b), ratio_interval(rng.permutation(a), b)
    assert paired["low"] < 0.9 < paired["high"]
    assert paired["high"] - paired["low"] < 0.3 * (shuffled["high"] - shuffled["low"])


def test_an_interval_survives_the_metrics_file() -> None:
    value = interval(0.5, 0.4, 0.6, 100)
    history = [{"step": 0}, {"step": 1, **flatten("gold/all", value)}]
    assert unflatten(history, "gold/all") == [value]


def test_ends_that_are_not_known_are_left_out_of_the_metrics_file() -> None:
    """The trap: NaN is no JSON, and one watched prompt has no interval over prompts."""
    one = bootstrap_mean([0.3])
    assert flatten("d", one) == {"d": 0.3, "d/n": 1}
    back = unflatten([flatten("d", one)], "d")[0]
    assert back["mean"] == 0.3 and math.isnan(back["low"]) and math.isnan(back["high"])
    assert flatten("d", mean_interval([math.nan])) == {"d/n": 0} and unflatten([{"d/n": 0}], "d") == []
