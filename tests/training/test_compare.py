"""evaluate --methods: budgets are what is really spent, and the results stand in a table and a figure."""

import json
import runpy
from pathlib import Path

import pytest

from alignment_jax.evaluation.statistics import interval
from alignment_jax.training import compare
from alignment_jax.training.checkpoint import save_json

ROOT = Path(__file__).parents[2]
FILE = str(ROOT / "configs" / "critters_test_time.py")
CONFIG = runpy.run_path(FILE)["get_config"]


@pytest.mark.parametrize(("nfe", "n"), [(16, 1), (47, 2), (48, 3), (106, 6)])
def test_the_largest_budget_within_the_calls_is_found_and_guidance_costs_twice(nfe, n):
    assert compare.planned(CONFIG("best_of_n"), [nfe]) == [(nfe, {"name": "best_of_n", "n": n})]


def test_budgets_too_small_for_a_method_or_that_buy_no_more_are_left_out():
    assert [(nfe, s["n"]) for nfe, s in compare.planned(CONFIG("best_of_n"), [15, 40, 32, 33])] == [(32, 2)]


def test_a_budget_below_one_sample_is_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(ValueError, match="at least 16 network calls a sample here; --nfe=15 is below that"):
        compare.compare(FILE, ["best_of_n"], [15, 9], tmp_path / "out")
    with pytest.raises(ValueError, match="choose one of"):
        compare.compare(FILE, ["no_such"], [100], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_methods_are_measured_beside_plain_sampling(tmp_path):
    table = compare.compare(FILE, ["best_of_n"], [16, 47], tmp_path, sizes={"num_prompts": 3, "samples": 2})
    base, steered = (json.loads((tmp_path / f"{name}.json").read_text())["points"] for name in ("base", "best_of_n"))
    one, two = steered
    assert one["calls"] == base[0]["calls"] == 16 and two["calls"] == two["counts"]["network"] == 32 and two["counts"]["reward"] == 2
    assert one["gold"] == base[0]["gold"] and one["proxy"] == base[0]["proxy"], "one sample of n is plain sampling, noise and all"
    assert two["proxy"]["mean"] >= one["proxy"]["mean"] and abs(two["info"]["reward"] - two["proxy"]["mean"]) < 1e-4
    assert len(table.splitlines()) == 5 and (tmp_path / "comparison.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_method_with_another_sampler_is_held_against_plain_sampling_with_that(tmp_path):
    table = compare.compare(FILE, ["best_of_n", "best_of_n_still"], [16], tmp_path, sizes={"num_prompts": 2, "samples": 1})
    still = json.loads((tmp_path / "best_of_n_still.json").read_text())
    assert still["base"]["proxy"] == still["points"][0]["proxy"] and "plain, as best_of_n_still samples" in table
    assert "base" not in json.loads((tmp_path / "best_of_n.json").read_text())


def test_the_alarm_stands_beside_the_last_budget_where_the_proxy_rose_and_gold_fell(tmp_path):
    def point(proxy, gold):
        near = lambda m: interval(m, m - 0.02, m + 0.02, 100)  # noqa: E731
        return {"method": {"name": "x"}, "calls": 8, "counts": {}, "gold": near(gold), "proxy": near(proxy), "diversity": near(0.1),
                "seconds": 1.0, "temporary_bytes": 1}  # fmt: skip

    save_json(tmp_path / "base.json", {"points": [point(-1.0, 0.6)]})
    save_json(tmp_path / "hacked.json", {"points": [point(-0.5, 0.7), point(-0.1, 0.2)]})
    save_json(tmp_path / "good.json", {"points": [point(-0.5, 0.7), point(-0.1, 0.9)]})
    fired = [line.split("|")[1].strip() for line in compare.page(tmp_path).splitlines() if "fires" in line]
    assert fired == ["hacked"]


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "curves" / "test_time").glob("*.json")), ids=lambda p: p.stem)
def test_the_committed_points_belong_to_the_present_config(path):
    stored = json.loads(path.read_text())
    name = runpy.run_path(FILE)["ARGUMENTS"][0] if path.stem == "base" else path.stem
    assert stored["config"] == json.loads(CONFIG(name).to_json_best_effort()), "measure anew: see the head of the config"
    assert stored["points"] and all(p["calls"] <= p.get("nfe", p["calls"]) for p in stored["points"])
