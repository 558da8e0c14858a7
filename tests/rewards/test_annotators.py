"""Annotators: the Bradley-Terry law, ties, and pairs written and read back."""

import numpy as np
import pytest

from alignment_jax.data.prompts import load_pairs
from alignment_jax.rewards.annotators import bradley_terry
from alignment_jax.rewards.critters import Judge
from alignment_jax.training.label import label

# a judge that reads how many of six attributes are right from the brightness of a picture
JUDGE = Judge(lambda prompts: np.zeros((len(prompts), 6), int),
              lambda x, t: {"attributes": np.arange(6)[None] < np.round(x.mean((1, 2, 3)) * 6)[:, None]}, (), {}, {})  # fmt: skip


def pictures(right, n=4000):
    return np.full((n, 4, 4, 3), right / 6, np.float32)


def test_answers_follow_bradley_terry_with_a_share_at_random():
    rng = np.random.default_rng(0)
    for gap in (0, 1, 2):
        a, b, prompts = pictures(2 + gap), pictures(2), ["x"] * 4000
        want = 0.9 / (1 + np.exp(-gap / 0.7)) + 0.05
        hard = bradley_terry(JUDGE, temperature=0.7, noise=0.1)(rng, a, b, prompts)
        assert set(np.unique(hard)) <= {0.0, 1.0} and abs(hard.mean() - want) < 4 * 0.5 / 4000**0.5
        soft = bradley_terry(JUDGE, temperature=0.7, noise=0.1, soft=True)(rng, a, b, prompts)
        np.testing.assert_allclose(soft, want)
        swapped = bradley_terry(JUDGE, temperature=0.7, noise=0.1, soft=True)(rng, b, a, prompts)
        np.testing.assert_allclose(soft + swapped, 1.0)  # no favourite side


def test_scores_closer_than_the_threshold_are_a_tie():
    compare = bradley_terry(JUDGE, tie=1.5)
    rng = np.random.default_rng(0)
    assert (compare(rng, pictures(3, 8), pictures(2, 8), ["x"] * 8) == 0.5).all()
    assert (compare(rng, pictures(4, 8), pictures(2, 8), ["x"] * 8) != 0.5).all()


def test_impossible_noise_is_refused():
    with pytest.raises(ValueError, match="temperature must be above 0"):
        bradley_terry(JUDGE, temperature=0.0)


def test_a_labelled_file_holds_better_winners_and_reads_back(tmp_path):
    out = str(tmp_path / "pairs.npz")
    made = label(model="critters", run=None, prompts="critters:train:32", annotator="critters_annotator", out=out, seed=0, pairs=32,
                 settings={"num_steps": 4})  # fmt: skip
    assert made == {"pairs": 32, "ties": 0}
    pairs = load_pairs(out)
    assert pairs["winner"].shape == pairs["loser"].shape == (32, 32, 32, 3) and (pairs["preference"] == 1).all()
    from alignment_jax.rewards import critters_gold

    judge = critters_gold()
    score = [judge.look(pairs[k] / np.float32(255), judge.targets(pairs["prompts"]))["attributes"].sum(1) for k in ("winner", "loser")]
    assert score[0].mean() > score[1].mean()
    assert np.load(out)["annotator"][0] == "critters_annotator"  # synthetic labels say so
    with pytest.raises(ValueError, match="annotator 'nobody' is not known"):
        label(model="critters", run=None, prompts="critters:train:2", annotator="nobody", out=out, seed=0, pairs=2, settings={})
