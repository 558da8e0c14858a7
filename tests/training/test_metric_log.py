"""metrics.jsonl stays JSON whatever is measured, and a resumed run continues it."""

import json
import math

import numpy as np
import pytest

from alignment_jax.training.logging import MetricLog, read


def strict(line):
    """A line as a parser reads it that follows the standard: NaN and Infinity are no JSON."""

    def refused(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(line, parse_constant=refused)


def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path):
    log = MetricLog(tmp_path)
    log.write(1, {"loss": 0.5, "reward/mean": np.float32("nan"), "kl": math.inf})
    log.write(2, {"loss": np.float32(0.25)})
    log.close()
    rows = [strict(line) for line in log.path.read_text().splitlines()]
    assert rows[0]["reward/mean"] is None and rows[0]["kl"] is None and rows[0]["loss"] == 0.5
    assert [row["loss"] for row in read(log.path)] == [0.5, 0.25]
    assert math.isnan(read(log.path)[0]["reward/mean"]) and math.isnan(read(log.path)[0]["kl"])
    resumed = MetricLog(tmp_path, 1)  # the kept lines are written anew
    resumed.write(2, {"loss": 0.125})
    resumed.close()
    rows = [strict(line) for line in log.path.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 0.125)] and rows[0]["kl"] is None


def test_a_line_that_an_older_version_wrote_with_nan_is_still_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0.1, "loss": NaN}\n{"step": 2, "ti')
    (row,) = read(tmp_path / "metrics.jsonl")
    assert row["step"] == 1 and math.isnan(row["loss"])


@pytest.mark.parametrize("value", [3, np.int32(3), np.ones(())])
def test_scalars_of_every_kind_are_numbers(value, tmp_path):
    log = MetricLog(tmp_path)
    log.write(0, {"x": value})
    log.close()
    assert strict(log.path.read_text())["x"] == float(value)
