"""The alarm tells over-optimisation from health and from noise."""

import numpy as np
import pytest

from alignment_jax.evaluation.over_optimisation import alarm, early_stop, gao_fit
from alignment_jax.evaluation.statistics import Interval, interval, wilson


def rates(values, n: int = 256) -> list[Interval]:
    return [wilson(round(n * v), n) for v in values]


def means(values, half: float = 0.02) -> list[Interval]:
    return [interval(v, v - half, v + half, 256) for v in values]


RISING = means([-0.6, -0.4, -0.3, -0.2, -0.1])


def test_fires_when_the_proxy_rises_and_gold_falls_from_its_best() -> None:
    got = alarm(RISING, rates([0.57, 0.70, 0.66, 0.45, 0.30]), means([0.2] * 5, 0.005))
    assert got["fired"] and got["reason"].startswith("Over-optimised")
    assert "Gold fell to 0.301" in got["reason"] and "from the best of the run, 0.699" in got["reason"]


def test_fires_when_gold_falls_below_the_base() -> None:
    got = alarm([RISING[0], RISING[-1]], rates([0.57, 0.19]))
    assert got["fired"] and "the base's 0.570" in got["reason"]


def test_is_silent_on_a_healthy_run() -> None:
    got = alarm(RISING, rates([0.57, 0.65, 0.72, 0.78, 0.81]), means([0.2, 0.197, 0.193, 0.19, 0.186], 0.005))
    assert not got["fired"] and "0.93 of the base's" in got["reason"]


def test_is_silent_when_gold_stays_where_it_was() -> None:
    assert not alarm(RISING, rates([0.57, 0.58, 0.60, 0.59, 0.55]))["fired"]


def test_noise_alone_fires_it_in_fewer_than_one_run_in_twenty() -> None:
    rng = np.random.default_rng(0)
    proxy = means(np.linspace(0, 1, 12))
    fired = [alarm(proxy, [wilson(k, 256) for k in rng.binomial(256, 0.6, 12)])["fired"] for _ in range(600)]
    assert np.mean(fired) < 0.05


def test_a_fall_of_a_quarter_is_found_in_nearly_every_run() -> None:
    rng = np.random.default_rng(0)
    truth = np.concatenate([np.linspace(0.57, 0.7, 6), np.linspace(0.7, 0.45, 6)])
    proxy = means(np.linspace(0, 1, 12))
    fired = [alarm(proxy, [wilson(k, 256) for k in rng.binomial(256, truth)])["fired"] for _ in range(200)]
    assert np.mean(fired) > 0.95


def test_fires_when_diversity_is_lost_though_gold_rises() -> None:
    got = alarm(RISING, rates([0.57, 0.65, 0.72, 0.78, 0.85]), means([0.2, 0.18, 0.15, 0.12, 0.09], 0.005))
    assert got["fired"] and got["reason"].startswith("Collapsing") and "0.45 of the base's" in got["reason"]


def test_diversity_near_its_floor_within_the_noise_is_no_proof() -> None:
    assert not alarm(RISING, rates([0.57] * 5), means([0.2, 0.2, 0.2, 0.2, 0.147], 0.01))["fired"]


def test_a_model_that_only_got_worse_is_not_called_over_optimised() -> None:
    got = alarm(means([-0.3, -0.5, -0.9]), rates([0.57, 0.4, 0.2]))
    assert not got["fired"] and "worse model" in got["reason"]


def test_unknown_intervals_and_unknown_diversity_prove_nothing() -> None:
    nan = float("nan")
    unknown = [interval(v, nan, nan, 1) for v in (0.6, 0.1)]
    assert not alarm(unknown, unknown, [interval(0.2, 0.19, 0.21, 9), interval(nan, nan, nan, 0)])["fired"]


def test_the_alarm_needs_a_base_and_pairs() -> None:
    with pytest.raises(ValueError, match="the base first"):
        alarm(RISING, rates([0.5]))


def test_early_stop_waits_for_proof_and_returns_to_the_best() -> None:
    assert not early_stop(rates([0.57, 0.70, 0.66]))["stop"]
    got = early_stop(rates([0.57, 0.70, 0.66, 0.52]))
    assert got["stop"] and got["best"] == 1
    assert not early_stop(rates([0.57, 0.70, 0.66, 0.52]), delta=0.2)["stop"]
    assert not early_stop(rates([0.57]))["stop"]


@pytest.mark.parametrize(("form", "peak"), [("rl", np.exp(0.30 / 0.15 - 1)), ("best_of_n", 0.30 / 0.30)])
def test_gao_fit_recovers_its_parameters_and_the_peak(form: str, peak: float) -> None:
    d = np.linspace(0, 4, 15)
    penalty = d * np.log(np.maximum(d, 1e-300)) if form == "rl" else d**2
    gold = 0.30 * d - 0.15 * penalty + 0.003 * np.random.default_rng(0).normal(size=15)
    fit = gao_fit(d, gold, form)
    assert fit.alpha == pytest.approx(0.30, abs=0.01) and fit.beta == pytest.approx(0.15, abs=0.01)
    assert fit.peak == pytest.approx(peak, rel=0.05) and fit.rmse < 0.006
    around = fit(np.array([0.9, 1.0, 1.1]) * fit.peak)
    assert around.argmax() == 1 and fit.gold_at_peak == pytest.approx(around[1])


def test_gao_fit_sees_no_peak_in_a_line() -> None:
    assert gao_fit([1, 2, 3], [0.1, 0.25, 0.45]).peak == np.inf


def test_gao_fit_refuses_what_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="two different d > 0"):
        gao_fit([0.0, 1.0], [0.0, 0.1])
    with pytest.raises(ValueError, match="'rl' or 'best_of_n'"):
        gao_fit([1.0, 2.0], [0.0, 0.1], "bon")
