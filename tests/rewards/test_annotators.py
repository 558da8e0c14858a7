"""Annotators: the Bradley-Terry law, ties, order, taste and drift; pairs and lists written and read back."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from alignment_jax.data.prompts import load_lists, load_pairs
from alignment_jax.rewards import REWARDS
from alignment_jax.rewards.annotators import (
    agreement,
    annotator_reward,
    both_orders,
    bradley_terry,
    by_reward,
    ranked,
    scores,
)
from alignment_jax.rewards.base import Reward
from alignment_jax.rewards.critters import Judge
from alignment_jax.training import label as labelling
from alignment_jax.training.label import label

# a judge that reads how many of six attributes are right from the brightness of a picture
JUDGE = Judge(lambda prompts: np.zeros((len(prompts), 6), int),
              lambda x, t: {"attributes": np.arange(6)[None] < np.round(x.mean((1, 2, 3)) * 6)[:, None]}, (), {}, {})  # fmt: skip
# a judge to whom picture 1 shows attribute 0 alone, and picture 0 attribute 1 alone
TWO = Judge(lambda prompts: np.zeros((len(prompts), 2), int),
            lambda x, t: {"attributes": np.stack([x[:, 0, 0, 0] > 0.5, x[:, 0, 0, 0] <= 0.5], 1)}, (), {}, {})  # fmt: skip
BRIGHT = Reward("bright", lambda params, x, condition: 6 * x.mean((1, 2, 3)))


def pictures(right, n=4000):
    return np.full((n, 4, 4, 3), right / 6, np.float32)


def logit(p):
    return np.log(p / (1 - p))


def test_answers_follow_bradley_terry_with_a_share_at_random():
    rng = np.random.default_rng(0)
    for gap in (0, 1, 2):
        a, b, prompts = pictures(2 + gap), pictures(2), ["x"] * 4000
        want = 0.9 / (1 + np.exp(-gap / 0.7)) + 0.05
        for make in (lambda **k: bradley_terry(JUDGE, **k), lambda **k: by_reward(BRIGHT, **k)):  # people, or a reward
            hard = make(temperature=0.7, noise=0.1)(rng, a, b, prompts)
            assert set(np.unique(hard)) <= {0.0, 1.0} and abs(hard.mean() - want) < 4 * 0.5 / 4000**0.5
            soft = make(temperature=0.7, noise=0.1, soft=True)(rng, a, b, prompts)
            np.testing.assert_allclose(soft, want, rtol=1e-5)
            swapped = make(temperature=0.7, noise=0.1, soft=True)(rng, b, a, prompts)
            np.testing.assert_allclose(soft + swapped, 1.0)  # no favourite side


def test_scores_closer_than_the_threshold_are_a_tie():
    rng = np.random.default_rng(0)
    for compare in (bradley_terry(JUDGE, tie=1.5), by_reward(BRIGHT, tie=1.5)):
        assert (compare(rng, pictures(3, 8), pictures(2, 8), ["x"] * 8) == 0.5).all()
        assert (compare(rng, pictures(4, 8), pictures(2, 8), ["x"] * 8) != 0.5).all()


@pytest.mark.parametrize("make", [lambda: bradley_terry(JUDGE, temperature=0.0), lambda: by_reward(BRIGHT, temperature=0.0),
                                  lambda: by_reward(BRIGHT, noise=1.0)])  # fmt: skip
def test_impossible_noise_is_refused_when_the_annotator_is_made(make):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        make()


def test_asking_in_both_orders_takes_away_a_liking_for_the_first():
    """RLAIF: a judge biased by 1.5 in log-odds calls equal pictures .82; averaged it says 1/2, and the orders agree."""

    def biased(rng, a, b, prompts):
        return 1 / (1 + np.exp(-6 * (a - b).mean((1, 2, 3)) - 1.5))

    rng, prompts = np.random.default_rng(0), ["x"] * 4
    assert biased(rng, pictures(2, 4), pictures(2, 4), prompts)[0] > 0.8
    np.testing.assert_allclose(both_orders(biased)(rng, pictures(2, 4), pictures(2, 4), prompts), 0.5)
    one, other = (both_orders(biased)(rng, *pair, prompts) for pair in ((pictures(3, 4), pictures(2, 4)), (pictures(2, 4), pictures(3, 4))))
    np.testing.assert_allclose(one + other, 1.0)
    assert one[0] > 0.6
    first = both_orders(lambda rng, a, b, prompts: np.ones(len(a)))
    assert (first(rng, pictures(3, 4), pictures(2, 4), prompts) == 0.5).all()


def test_taste_differs_between_people_and_is_the_same_for_one():
    a, b, prompts = np.ones((1, 1, 1, 1), np.float32), np.zeros((1, 1, 1, 1), np.float32), ["x"]

    def opinion(person, taste):
        return float(bradley_terry(TWO, taste=taste, soft=True, person=person)(np.random.default_rng(0), a, b, prompts)[0])

    assert opinion(0, 0.0) == 0.5 == opinion(1, 0.0)
    found = [opinion(person, 1.0) for person in range(40)]
    assert opinion(3, 1.0) == found[3] and len(set(found)) == 40
    assert 0.2 < np.mean(np.array(found) > 0.5) < 0.8


def test_taste_drifts_with_the_number_of_calls_and_repeats_exactly():
    """log w_0 - log w_1 is a random walk whose variance grows by 2 drift^2 a call; the first call knows of none."""
    a, b, rng = np.ones((1, 1, 1, 1), np.float32), np.zeros((1, 1, 1, 1), np.float32), np.random.default_rng(0)

    def course(person):
        compare = bradley_terry(TWO, drift=0.05, temperature=1.0, soft=True, person=person)
        return [logit(float(compare(rng, a, b, ["x"])[0])) for _ in range(10)]

    walks = np.array([course(person) for person in range(300)])
    assert (walks[:, 0] == 0).all() and course(7) == walks[7].tolist()
    odds = np.log((1 + walks / 2) / (1 - walks / 2))  # s_a - s_b = w_0 - w_1 with w_0 + w_1 = 2
    np.testing.assert_allclose(odds.var(0)[[1, 4, 9]], 2 * 0.05**2 * np.array([1, 4, 9]), rtol=0.35)
    assert (np.array([bradley_terry(TWO, soft=True)(rng, a, b, ["x"])[0] for _ in range(3)]) == 0.5).all()


def test_agreement_is_corrected_for_chance():
    p = np.array([1, 1, 0, 0, 1, 0.5, 1, 1])
    found = agreement(p, np.array([1, 0, 0, 0, 1, 1.0, 0.5, 1]))
    assert found["n"] == 6 and found["agreement"] == 5 / 6
    np.testing.assert_allclose(found["kappa"], (5 / 6 - 0.5) / 0.5)  # 4 of 6 and 3 of 6 say the first: chance 1/2
    rng = np.random.default_rng(0)
    x, y = ((rng.random(20000) < share).astype(float) for share in (0.9, 0.8))
    chance = agreement(x, y)
    assert chance["agreement"] > 0.7 and abs(chance["kappa"]) < 0.03  # agreeing by habit is no agreement
    assert np.isnan(agreement(np.full(3, 0.5), x[:3])["agreement"])


def test_ranking_by_comparisons_gives_back_the_scores_of_a_bradley_terry_annotator():
    right = np.array([[0, 1, 3], [2, 2, 1]])
    lists = np.stack([[pictures(r, 1)[0] for r in row] for row in right])
    found = ranked(by_reward(BRIGHT, temperature=2.0, soft=True), np.random.default_rng(0), lists, ["x", "y"])
    np.testing.assert_allclose(found, (right - right.mean(1, keepdims=True)) / 2, atol=1e-5)


def test_an_annotator_leads_as_a_reward_whose_differences_are_its_log_odds():
    reward = annotator_reward(by_reward(BRIGHT, soft=True), group=2)
    images = np.stack([np.full((4, 4, 3), v, np.uint8) for v in (0, 51, 102, 102)])
    values, _ = reward.score(images, ["x", "x", "y", "y"], {})
    np.testing.assert_allclose(values[1] - values[0], 6 * 51 / 255, rtol=1e-5)
    assert values[2] == values[3]
    with pytest.raises(ValueError, match="annotator 'nobody' is not known"):
        annotator_reward("nobody", group=2)
    with pytest.raises(ValueError, match="group must be 2 or more"):
        annotator_reward("critters_annotator", group=1)


def test_a_reward_that_fails_on_a_picture_makes_a_tie_and_one_of_latents_no_annotator():
    def score(images, prompts, metadata):
        return np.where(images[:, 0, 0, 0] > 200, np.nan, 1.0 * images[:, 0, 0, 0]), {}

    failing = Reward("failing", score, device=False, differentiable=False)
    compare = by_reward(failing, soft=True)
    a, b = pictures(np.array([6.0, 2.0])[:, None, None, None], 2), pictures(1, 2)
    p = compare(np.random.default_rng(0), a * np.ones((2, 1, 1, 1), np.float32), b, ["x"] * 2)
    assert p[0] == 0.5 and p[1] > 0.99
    with pytest.raises(ValueError, match="reads latents"):
        by_reward(BRIGHT._replace(noisy=True))




@pytest.fixture
def world(monkeypatch):
    """label without a network: pictures of one brightness, a different one for each key; REWARDS knows "bright"."""
    import jax

    def drawn(bundle, params, texts, keys, settings):
        level = np.asarray(jax.vmap(lambda k: jax.random.uniform(k))(keys))
        return np.broadcast_to(level[:, None, None, None], (len(texts), 4, 4, 3)).astype(np.float32), {}

    monkeypatch.setattr(labelling.build, "model", lambda config: (None, None))
    monkeypatch.setattr(labelling, "pictures", drawn)
    monkeypatch.setitem(REWARDS, "bright", SimpleNamespace(factory=lambda: BRIGHT))
    darker = lambda rng, a, b, prompts: (a.mean((1, 2, 3)) < b.mean((1, 2, 3))) * 1.0  # noqa: E731
    monkeypatch.setitem(sys.modules, "own_people", SimpleNamespace(dark=lambda: darker, lamp=lambda: BRIGHT))
    common = {"model": "any", "run": None, "prompts": "critters:train:8", "seed": 0, "settings": {}}
    return lambda out, **kwargs: label(out=str(out), **common, **kwargs)


def test_any_reward_labels_pairs_and_several_annotators_keep_their_answers(world, tmp_path):
    made = world(tmp_path / "a.npz", annotator="bright", pairs=64, options={"soft": True, "temperature": 0.5})
    pairs = load_pairs(str(tmp_path / "a.npz"))
    bright = [pairs[side].mean((1, 2, 3)) / 255 for side in ("winner", "loser")]
    assert (bright[0] >= bright[1]).all() and made == {"pairs": 64, "ties": int((bright[0] == bright[1]).sum())}
    np.testing.assert_allclose(pairs["preference"], 1 / (1 + np.exp(-12 * (bright[0] - bright[1]))), rtol=1e-3)

    made = world(tmp_path / "b.npz", annotator=["bright", "own_people:dark", "own_people:lamp"], pairs=64, options={"temperature": 1e-4})
    assert made["bright and own_people:dark"]["agreement"] == 0.0 and made["bright and own_people:lamp"]["agreement"] == 1.0
    stored = np.load(tmp_path / "b.npz")
    assert stored["annotators"].tolist() == ["bright", "own_people:dark", "own_people:lamp"]
    np.testing.assert_allclose(stored["preference"], np.full(64, 2 / 3))
    np.testing.assert_array_equal(stored["answers"], np.tile([1.0, 0.0, 1.0], (64, 1)))
    assert "own_people:dark" in str(stored["annotator"][0])  # whose word it is is said with every pair


def test_an_annotator_may_be_a_dictionary_with_arguments_as_a_reward_in_a_config(world, tmp_path, monkeypatch):
    made = SimpleNamespace(factory=lambda scale=1.0: BRIGHT._replace(name=f"bright {scale:g}", score=lambda *a: scale * BRIGHT.score(*a)))
    monkeypatch.setitem(REWARDS, "scaled", made)
    picky = lambda best=0: lambda rng, a, b, prompts: np.full(len(a), float(best))  # noqa: E731
    monkeypatch.setitem(sys.modules, "own_people", SimpleNamespace(picky=picky))
    asked = ["scaled", "{'name': 'scaled', 'scale': -1.0}", {"name": "own_people:picky", "best": 1}]
    found = world(tmp_path / "a.npz", annotator=asked, pairs=64, options={"temperature": 1e-4})
    assert found["scaled and bright -1"]["agreement"] == 0.0  # the argument reached the factory, and tells the two apart
    stored = np.load(tmp_path / "a.npz")
    assert stored["annotators"].tolist() == ["scaled", "bright -1", "own_people:picky"]
    for spec, said in (("{'name': 'nobody', 'x': 1}", "is not known"), ("{'scale': 1.0}", "needs a name"),
                       ("{'name': 'scaled', 'scal': 1}", "Did you mean 'scale'"), ("{'name': ", "no dictionary"),
                       ("{'name': 'critters_annotator', 'soft': True}", "no field 'soft'")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            world(tmp_path / "x.npz", annotator=spec, pairs=2)


def test_lists_are_written_as_rankings_read_them(world, tmp_path):
    assert world(tmp_path / "c.npz", annotator="bright", pairs=8, size=3) == {"lists": 8, "size": 3}
    lists = load_lists(str(tmp_path / "c.npz"))
    assert lists["list"].shape == (8, 3, 4, 4, 3) and lists["list"].dtype == np.uint8
    np.testing.assert_allclose(lists["score"], 6 * lists["list"].mean((2, 3, 4)) / 255, rtol=1e-4)
    world(tmp_path / "d.npz", annotator="own_people:dark", pairs=8, size=3)  # no reward behind it: ranked by comparisons
    lists = load_lists(str(tmp_path / "d.npz"))
    assert (np.argmax(lists["score"], 1) == np.argmin(lists["list"].mean((2, 3, 4)), 1)).all()


@pytest.mark.parametrize("kwargs, message", [
    ({"annotator": "nobody"}, "annotator 'nobody' is not known"), ({"annotator": "brigt"}, "Did you mean 'bright'"),
    ({"annotator": ["bright", "bright"]}, "told apart by name"), ({"annotator": "bright", "size": 1}, "2 pictures or more"),
    ({"annotator": "critters_annotator", "options": {"soft": True}}, "has its own law"),
    ({"annotator": "bright", "options": {"temperatur": 1.0}}, "Did you mean 'temperature'"),
])  # fmt: skip
def test_what_label_cannot_do_is_said_before_a_picture_is_drawn(world, tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        world(tmp_path / "x.npz", pairs=2, **kwargs)
    assert not (tmp_path / "x.npz").exists()


def test_a_labelled_file_holds_better_winners_and_reads_back(tmp_path):
    out = str(tmp_path / "pairs.npz")
    made = label(model="critters", run=None, prompts="critters:train:32", annotator="critters_annotator", out=out, seed=0, pairs=32,
                 settings={"num_steps": 4})  # fmt: skip
    assert made == {"pairs": 32, "ties": 0}
    pairs = load_pairs(out)
    assert pairs["winner"].shape == pairs["loser"].shape == (32, 32, 32, 3) and (pairs["preference"] == 1).all()
    from alignment_jax.rewards import critters_gold

    judge = critters_gold()
    found = [judge.look(pairs[k] / np.float32(255), judge.targets(pairs["prompts"]))["attributes"].sum(1) for k in ("winner", "loser")]
    assert found[0].mean() > found[1].mean()
    assert np.load(out)["annotator"][0] == "critters_annotator"  # synthetic labels say so
    assert scores(BRIGHT, np.zeros((0, 4, 4, 3)), []).shape == (0,)
