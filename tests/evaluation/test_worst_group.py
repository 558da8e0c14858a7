"""A mean over people can rise while one of them is worse off: the report names the worst group of each model."""

import math

import numpy as np

from alignment_jax.evaluation.over_optimisation import alarm
from alignment_jax.evaluation.report import write_report
from alignment_jax.evaluation.statistics import interval
from alignment_jax.evaluation.summary import measurement, summary, worst

RNG = np.random.default_rng(0)
PLAIN = interval(0.5, 0.4, 0.6, 12)


def model(ann, bob):
    """A measurement of six prompts, two samples each, that two people score about ann and bob."""
    scores = {"ann": ann + 0.1 * RNG.normal(size=(6, 2)), "bob": bob + 0.1 * RNG.normal(size=(6, 2))}
    right = RNG.random((6, 2)) < 0.5
    return measurement(right=right, attributes={}, proxy=(scores["ann"] + scores["bob"]) / 2, columns=scores)


def test_the_mean_rises_and_the_worst_group_falls(tmp_path):
    base, aligned = model(0.0, 0.2), model(3.0, -1.0)
    assert aligned["proxy"]["mean"] > base["proxy"]["mean"] + 0.5
    assert base["worst"]["name"] == "ann" and aligned["worst"]["name"] == "bob"
    assert aligned["worst"]["mean"] == aligned["columns"]["bob"]["mean"] < base["worst"]["mean"] - 0.5
    whole = summary(config="c", method="m", seed=0, wall_seconds={"train": 1, "evaluate": 1, "total": 2}, trained_parameters=1, base=base,
                    aligned=aligned, best_of_n=base, kl=1.0, alarm=alarm([PLAIN, PLAIN], [PLAIN, PLAIN]))  # fmt: skip
    images = {name: RNG.random((6, 2, 8, 8, 3)) for name in ("base", "aligned")}
    page = write_report(tmp_path, summary=whole, history=[], prompts=["p"] * 6, images=images,
                        right={name: np.ones((6, 2), bool) for name in images}).read_text()  # fmt: skip
    assert "Worst of these" in page and "ann, bob" in page
    assert f"{aligned['worst']['mean']:.3f}".replace("-", "−") in page


def test_a_group_without_scores_is_not_the_worst():
    found = worst({"ann": np.full((3, 2), np.nan), "bob": np.ones((3, 2))})
    assert found["worst"]["name"] == "bob" and math.isnan(found["columns"]["ann"]["mean"])
    assert "worst" not in measurement(right=np.ones((3, 2), bool), attributes={}, proxy=np.ones((3, 2)))
