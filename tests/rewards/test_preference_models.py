"""Preference models against their closed forms, what accuracy and calibration mean, careful ensembles, and the trainer."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from scipy.optimize import minimize

from alignment_jax.data import answers
from alignment_jax.data.critters import prompts as captions
from alignment_jax.evaluation import agreement
from alignment_jax.rewards import columns, ensemble, several, weighted
from alignment_jax.rewards.base import Reward
from alignment_jax.rewards.preference import annotated, bradley_terry, davidson, plackett_luce
from alignment_jax.rewards.trained import trained
from alignment_jax.training import reward_model

SCORES = np.array([0.0, 0.4, -0.7, 1.2, 2.0])


def games(n=20_000, seed=0):
    """(i [n], j [n], gap [n]) of random pairs of the five items."""
    rng = np.random.default_rng(seed)
    i = rng.integers(0, 5, n)
    j = (i + rng.integers(1, 5, n)) % 5
    return i, j, SCORES[i] - SCORES[j]


def fitted(loss, start):
    """The minimum of loss(parameters), by its own gradient."""
    value = jax.jit(jax.value_and_grad(loss))
    return minimize(lambda v: [np.asarray(x, np.float64) for x in value(jnp.asarray(v, jnp.float32))], start, jac=True,
                    method="L-BFGS-B", options={"ftol": 1e-12, "gtol": 1e-7}).x  # fmt: skip


def test_bradley_terry_finds_the_scores_and_the_optimum_that_scipy_finds():
    i, j, gap = games()
    won = (np.random.default_rng(1).random(len(gap)) < 1 / (1 + np.exp(-gap))).astype(np.float64)
    ours = fitted(lambda s: bradley_terry(s[i] - s[j], won).mean(), np.zeros(5))
    wins = np.zeros((5, 5))
    np.add.at(wins, (np.where(won == 1, i, j), np.where(won == 1, j, i)), 1)
    likelihood = lambda s: (wins * np.logaddexp(0, s[None] - s[:, None])).sum() / len(gap)  # noqa: E731  no gradient of ours
    scipys = minimize(likelihood, np.zeros(5), method="BFGS", options={"gtol": 1e-7}).x
    ours, scipys, truth = (s - s.mean() for s in (ours, scipys, SCORES))
    np.testing.assert_allclose(ours, scipys, atol=2e-3)
    p = 1 / (1 + np.exp(-(truth[:, None] - truth[None])))
    information = np.diag(((wins + wins.T) * p * (1 - p)).sum(1)) - (wins + wins.T) * p * (1 - p)
    error = np.sqrt(np.diag(np.linalg.pinv(information)))
    assert (np.abs(ours - truth) < 3 * error).all()


def test_only_differences_count_and_a_soft_label_is_a_log_odds():
    s = jnp.asarray(SCORES, jnp.float32)
    ranks = np.array([[2, 1, 3, 3, 1]])
    for loss in (lambda s: bradley_terry(s[:4] - s[1:], 0.3).sum(), lambda s: plackett_luce(s[None], ranks).sum(),
                 lambda s: davidson(s[:4] - s[1:], 0.5, 0.2).sum()):  # fmt: skip
        np.testing.assert_allclose(loss(s + 7), loss(s), rtol=1e-5)
        np.testing.assert_allclose(jax.grad(loss)(s).sum(), 0, atol=1e-5)
    best = fitted(lambda g: bradley_terry(g, 0.8).sum(), np.zeros(1))
    np.testing.assert_allclose(best, math.log(0.8 / 0.2), atol=1e-3)


def test_davidson_finds_how_often_people_tie_and_has_bradley_terry_as_its_limit():
    i, j, gap = games(seed=2)
    nu = 0.8
    odds = np.exp(np.stack([gap / 2, np.full(len(gap), math.log(nu)), -gap / 2], 1))
    odds /= odds.sum(1, keepdims=True)
    answer = np.array([1.0, 0.5, 0.0])[(np.random.default_rng(3).random((len(gap), 1)) > odds.cumsum(1)[:, :2]).sum(1)]
    found = fitted(lambda v: davidson(v[i] - v[j], answer, v[5]).mean(), np.zeros(6))
    assert math.exp(found[5]) == pytest.approx(nu, abs=0.04)
    np.testing.assert_allclose(found[:5] - found[:5].mean(), SCORES - SCORES.mean(), atol=0.08)
    # a tie that is scored as half a win each pulls scores together: that is what the third answer is for
    half = fitted(lambda v: bradley_terry(v[i] - v[j], answer).mean(), np.zeros(5))
    assert np.ptp(half) < np.ptp(SCORES) - 0.3
    g = jnp.asarray(gap[:50], jnp.float32)
    np.testing.assert_allclose(davidson(g, jnp.ones(50), -30.0), bradley_terry(g), rtol=1e-5)


def by_orders(w, ranks):
    """-log of the Plackett-Luce probability summed over every order that the ranks allow."""
    total = 0.0
    for order in itertools.permutations(np.flatnonzero(ranks)):
        if list(ranks[list(order)]) == sorted(ranks[list(order)]):
            left = [w[list(order[k:])].sum() for k in range(len(order))]
            total += np.prod(w[list(order)] / left)
    return -math.log(total)


def test_plackett_luce_with_ties_sums_over_the_orders_within_them():
    rng = np.random.default_rng(4)
    s = rng.normal(size=(12, 5)) * np.array([[0.3], [3.0], [6.0]]).repeat(4, 0)
    ranks = rng.integers(1, 4, (12, 5))
    ranks[3, 2] = ranks[7, 0] = 0  # no item
    ranks[0] = 1  # all tied: nothing is said
    want = [by_orders(np.exp(a), b) for a, b in zip(s, ranks, strict=True)]
    np.testing.assert_allclose(plackett_luce(jnp.asarray(s, jnp.float32), ranks), want, rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda s: plackett_luce(s, ranks).sum())(jnp.asarray(s * 20, jnp.float32))
    assert np.isfinite(gradient).all()  # an empty block must not leave a NaN behind


def test_plackett_luce_of_two_is_bradley_terry_of_equal_scores_log_k_and_top_m_the_first_choices():
    s = jnp.asarray(np.random.default_rng(5).normal(size=(6, 2)), jnp.float32)
    np.testing.assert_allclose(plackett_luce(s, np.array([[1, 2]] * 6)), bradley_terry(s[:, 0] - s[:, 1]), rtol=1e-5)
    np.testing.assert_allclose(plackett_luce(jnp.zeros((1, 4)), np.array([[3, 1, 2, 4]])), math.log(24), rtol=1e-5)
    s = jnp.asarray(SCORES[None], jnp.float32)
    first = -jax.nn.log_softmax(s)[0, 3]
    np.testing.assert_allclose(plackett_luce(s, np.array([[2, 4, 3, 1, 5]]), top=1), [first], rtol=1e-5)
    chances = [math.exp(-float(plackett_luce(s[:, :3], np.array([order]))[0])) for order in itertools.permutations((1, 2, 3))]
    assert sum(chances) == pytest.approx(1, abs=1e-5)


def test_an_annotators_temperature_and_liking_for_the_first_picture_are_found():
    i, j, gap = games(30_000, seed=6)
    who = np.random.default_rng(7).integers(0, 3, len(gap))
    temperature, offset = np.array([0.5, 1.0, 2.0]), np.array([0.0, 0.6, -0.4])
    won = (np.random.default_rng(8).random(len(gap)) < 1 / (1 + np.exp(-(gap + offset[who]) / temperature[who]))).astype(np.float32)
    config = ml_collections.ConfigDict({"own": False, "temperature": True, "offset": True, "ties": "half"})
    batch = {"annotator": jnp.asarray(who), "p": jnp.asarray(won), "weight": jnp.ones(len(gap))}

    def loss(v):
        people = {"log_temperature": v[5:8], "offset": v[8:11], "log_nu": 0.0}
        return reward_model.nll(config, people, (v[i][:, None], v[j][:, None]), batch, len(gap))[0]

    found = fitted(loss, np.zeros(11))
    np.testing.assert_allclose(np.exp(found[5:8] - found[5:8].mean()), temperature, rtol=0.06)  # their product is 1
    np.testing.assert_allclose(found[8:11], offset, atol=0.06)
    assert float(annotated(jnp.float32(1.0), math.log(2.0), 1.0)) == pytest.approx(1.0)


def test_the_four_conventions_of_accuracy_do_not_agree_where_there_are_ties():
    gap = [2.0, -1.0, 0.0, 0.05, 3.0]
    p, prompts = [1.0, 1.0, 1.0, 0.5, 0.0], ["a", "a", "b", "b", "c"]
    found = {name: agreement.accuracy(gap, p, prompts, name, 0.1)["mean"] for name in agreement.PROTOCOLS}
    assert found == {"half": pytest.approx(1.5 / 4), "strict": pytest.approx(1 / 4), "inversions": pytest.approx((0.5 + 1 + 0) / 3),
                     "three_way": pytest.approx((1 + 0 + 0.5 + 1 + 0) / 5)}  # fmt: skip
    assert agreement.best_threshold([0.1, 0.1, 5.0], [0.5, 0.5, 1.0], ["a", "b", "c"]) == 0.1
    with pytest.raises(ValueError, match="choose one of half"):
        agreement.accuracy(gap, p, prompts, "micro")
    rows = agreement.by_confidence([1.0, -1.0, 1.0, 1.0], [0.55, 0.6, 0.95, 0.2], ["a", "b", "c", "d"])
    assert [(r["low"], r["accuracy"]["mean"], r["accuracy"]["n"]) for r in rows] == [(0.5, 0.5, 2), (0.7, 0.0, 1), (0.9, 1.0, 1)]
    # pairs of one prompt that stand or fall together are one prompt's evidence, not many
    alone = agreement.clustered([1.0, 0.0] * 50, np.arange(100))
    together = agreement.clustered([1.0] * 50 + [0.0] * 50, np.repeat(np.arange(10), 10))
    assert together["high"] - together["low"] > 2.5 * (alone["high"] - alone["low"])
    sure = agreement.clustered(np.ones(11), np.arange(11))
    assert sure["low"] < 0.8 and sure["high"] == 1.0  # eleven out of eleven are no certainty


def test_calibration_sees_overconfidence_and_not_the_order_of_storage():
    rng = np.random.default_rng(9)
    truth = rng.normal(size=40_000) * 2
    won = (rng.random(len(truth)) < 1 / (1 + np.exp(-truth))).astype(float)
    right, over = agreement.calibration(truth, won), agreement.calibration(3 * truth, won)
    assert right["ece"] < 0.01 and right["temperature"] == pytest.approx(1, abs=0.04) and right["nll"] < right["nll_even"]
    assert over["ece"] > 0.05 and over["temperature"] == pytest.approx(3, abs=0.12)
    flip = np.where(won == 1, 1.0, -1.0)  # winner first, as files are stored
    stored = agreement.calibration(flip * truth, np.ones(len(won)))
    assert stored["ece"] == pytest.approx(right["ece"], abs=1e-12)
    assert agreement.reliability(right["bins"]).startswith(b"\x89PNG")


def fixed(name, values, **kwargs):
    """A reward that gives the values [B]."""
    return Reward(name, lambda params, observation, condition: params * observation, jnp.asarray(values, jnp.float32), **kwargs)


def test_an_ensemble_is_not_raised_by_one_hacked_member():
    honest = [fixed("a", [1.0, 1.0]), fixed("b", [1.0, 1.2])]
    hacked = [*honest, fixed("c", [1.0, 9.0])]
    ones = jnp.ones(2)
    ask = lambda r, x=ones: r.score(r.params, x, r.encode(["", ""]))  # noqa: E731
    mean, std = np.mean([1.0, 1.2, 9.0]), np.std([1.0, 1.2, 9.0])
    np.testing.assert_allclose(ask(ensemble(hacked, k=0.5)), [1.0, mean - 0.5 * std], rtol=1e-5)
    np.testing.assert_allclose(ask(ensemble(hacked, how="min")), [1.0, 1.0])
    assert ask(ensemble(hacked, k=1.0))[1] < ask(ensemble(hacked, k=0.0))[1] - 3
    # where all agree the std has no slope, and its root an infinite one
    slope = jax.grad(lambda x: ask(ensemble(honest), x)[0])(ones)
    np.testing.assert_allclose(slope, [1.0, 0.0])
    for kwargs, said in (({"how": "max"}, "'lcb'"), ({"k": -1.0}, "k of 0 or more")):
        with pytest.raises(ValueError, match=said):
            ensemble(honest, **kwargs)
    with pytest.raises(ValueError, match="stand alone"):
        ensemble([fixed("a", [1.0]), fixed("n", [1.0], noisy=True)])


def test_rewards_side_by_side_stay_apart_on_the_device_and_on_the_host():
    both = several([fixed("a", [1.0, 2.0]), fixed("b", [3.0, 4.0])])
    np.testing.assert_array_equal(jax.jit(both.score)(both.params, jnp.ones(2), both.encode(["", ""])), [[1, 3], [2, 4]])
    assert columns(both) == ("a", "b") and columns(fixed("a", [1.0])) == ()
    nested = several([both, fixed("c", [5.0, 6.0])])
    assert columns(nested) == ("a", "b", "c") and nested.score(nested.params, jnp.ones(2), nested.encode([""])).shape == (2, 3)
    host = [Reward(n, lambda images, prompts, metadata, n=n: (np.full(len(images), float(n)), {}), device=False) for n in "12"]
    scores, info = several(host).score(np.zeros((3, 2, 2, 3)), [""] * 3, {})
    assert scores.tolist() == [[1, 2]] * 3 and info["2"].tolist() == [2] * 3
    assert weighted([(host[0], 2.0), (host[1], 1.0)]).score(np.zeros((1, 2, 2, 3)), [""], {})[0] == [4]


def written(folder, n=96, people=("ann", "bob"), p=1.0):
    """Pairs of grey pictures of which the brighter is better, as `label` stores them."""
    rng = np.random.default_rng(0)
    bright, dark = (rng.integers(low, low + 60, (n, 1, 1, 1)).repeat(32, 1).repeat(32, 2).repeat(3, 3) for low in (150, 40))
    folder.mkdir(exist_ok=True)
    np.savez(folder / "pairs.npz", winner=bright.astype(np.uint8), loser=dark.astype(np.uint8), prompts=np.asarray(captions("train", n, 0)),
             preference=np.full(n, p), annotator=np.asarray([people[i % len(people)] for i in range(n)]))  # fmt: skip
    return str(folder / "pairs.npz")


def settings(which, pairs, **changes):
    import runpy

    c = runpy.run_path("configs/critters_reward.py")["get_config"](which)
    c.update({"pairs": pairs, "steps": 12, "batch": 8, "checkpoint_every": 6, "augment": False, "held_out": 0.3, **changes})
    return c


def test_a_trained_model_is_a_reward_by_its_folder_with_a_score_for_each_person(tmp_path):
    pairs = written(tmp_path)
    summary = reward_model.train(settings("people", pairs, steps=30), tmp_path / "people")
    assert summary["accuracy"]["half"]["mean"] > 0.8 and set(summary["people"]) == {"ann", "bob"}
    assert summary["worst_person"]["name"] in ("ann", "bob") and json.loads((tmp_path / "people" / "summary.json").read_text()) == summary
    assert (tmp_path / "people" / "reliability.png").stat().st_size > 1000
    each, ann, mean = (trained(folder=tmp_path / "people", person=who) for who in ("each", "ann", ""))
    assert columns(each) == ("ann", "bob")
    x, condition = jnp.stack([jnp.full((32, 32, 3), v) for v in (0.2, 0.7)]), ann.encode(captions("train", 2, 0))
    scores = each.score(each.params, x, condition)
    assert scores.shape == (2, 2) and (scores[1] > scores[0]).all()
    np.testing.assert_allclose(ann.score(ann.params, x, condition), scores[:, 0], rtol=1e-5)
    np.testing.assert_allclose(mean.score(mean.params, x, condition), scores.mean(1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="choose 'each' or one of ann, bob"):
        trained(folder=tmp_path / "people", person="carl")
    with pytest.raises(FileNotFoundError, match="train-reward"):
        trained(folder=tmp_path)


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, monkeypatch):
    config = settings("picture", written(tmp_path), trunk="none")
    whole = reward_model.train(config, tmp_path / "whole")
    write = reward_model.MetricLog.write

    def killed(self, step, metrics):  # after the first checkpoint, before the second
        write(self, step, metrics)
        if step == 12:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reward_model.MetricLog, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            reward_model.train(config, tmp_path / "half")
    again = reward_model.train(config, tmp_path / "half")
    assert again["accuracy"] == whole["accuracy"] and again["calibration"] == whole["calibration"]
    with pytest.raises(ValueError, match="holds a run of another config"):
        reward_model.train(settings("picture", config.pairs, trunk="none", seed=1), tmp_path / "half")


def test_answers_of_several_people_to_one_pair_stay_apart(tmp_path):
    file = written(tmp_path, 8)
    with np.load(file) as stored:
        arrays = {k: stored[k] for k in stored}
    np.savez(file, **arrays, answers=np.array([[1.0, 0.0]] * 8), annotators=np.array(["ann", "bob"]))
    pairs = answers.load(file, "", (32, 32))
    assert pairs.people == ("ann", "bob") and len(pairs.p) == 16 and pairs.weight.sum() == 8
    sides = pairs.sides(np.array([4, 5]))  # both about the third pair: the mean's winner is a, and bob says b
    assert sides["p"].tolist() == [1, 0] and sides["annotator"].tolist() == [0, 1]
    np.testing.assert_array_equal(sides["a"], arrays["winner"][[2, 2]])
    assert not pairs.ordered  # bob's 0 says nothing of which picture was shown first
    rows, held = answers.split(pairs.prompts, 0.5)
    assert not {pairs.prompts[i] for i in rows} & {pairs.prompts[i] for i in held}


@pytest.mark.slow
def test_a_noisy_model_reads_states_and_needs_no_decoder(tmp_path):
    config = settings("noisy", written(tmp_path, 40), steps=2, held_out=0.4, judge="", teacher="")
    summary = reward_model.train(config, tmp_path / "noisy")
    assert [row["t"] for row in summary["by_time"]] == list(reward_model.TIMES)
    reward = trained(folder=tmp_path / "noisy")
    assert reward.noisy and reward.encode is None
    cond = {"states": jnp.ones((3, 24, 128)), "mask": jnp.ones((3, 24), bool), "pooled": jnp.arange(3.0)[:, None] * jnp.ones((3, 128))}
    x, t = jax.random.normal(jax.random.key(0), (3, 32, 32, 3)), jnp.array([0.1, 0.5, 0.9])
    score = jax.jit(reward.score)(reward.params, x, {"t": t, "cond": cond})
    order = jnp.array([2, 0, 1])
    turned = jax.jit(reward.score)(reward.params, x[order], {"t": t[order], "cond": jax.tree.map(lambda c: c[order], cond)})
    assert score.shape == (3,)
    np.testing.assert_allclose(turned, score[order], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_teachers_odds_replace_the_answers_that_are_trained_on_and_no_others(tmp_path):
    """The held-out answers stay the people's: a pupil measured against its teacher would look better than it is."""
    pairs = answers.load(written(tmp_path), "", (32, 32))
    rows, held = answers.split(pairs.prompts, 0.3)
    taught = reward_model.taught("own_reward:dark", pairs, rows)
    sides = pairs.sides(np.arange(len(pairs.p)))
    gap = (sides["b"].mean((1, 2, 3)) - sides["a"].mean((1, 2, 3))) / 255
    np.testing.assert_allclose(taught.p[rows], 1 / (1 + np.exp(-10 * gap[rows])), rtol=1e-4)
    assert (taught.p[rows] < 0.5).all() and (taught.p[held] == 1).all() and (pairs.p == 1).all()
    config = settings("picture", str(tmp_path / "pairs.npz"), steps=40, trunk="none", teacher="own_reward:dark")
    summary = reward_model.train(config, tmp_path / "pupil")
    assert summary["accuracy"]["half"]["mean"] < 0.3  # it learned to prefer the dark one
    with pytest.raises(ValueError, match="labels are shares between"):
        reward_model.train(settings("picture", str(tmp_path / "pairs.npz"), teacher="own_reward:dark", ties="davidson"), tmp_path / "x")


def listed(folder, k=4, n=80):
    """Lists of grey pictures of which the brighter is better, as `label --list` stores them; of each, two tie and one is not ranked."""
    rng = np.random.default_rng(0)
    level = rng.permuted(np.tile(np.linspace(20, 230, k), (n, 1)), axis=1)
    score = level.copy()
    score[np.arange(n), np.argsort(level)[:, 1]] = level.min(1)  # the two darkest tie
    score[np.arange(n), np.argsort(level)[:, 2]] = np.nan
    pictures = np.broadcast_to(level[..., None, None, None], (n, k, 32, 32, 3)).astype(np.uint8)
    np.savez(folder / "lists.npz", list=pictures, score=score, prompts=np.asarray(captions("train", n, 0)), annotator=np.full(n, "lamp"))
    return str(folder / "lists.npz"), pictures, score


def test_ranked_lists_are_read_as_ranks_with_ties_and_as_the_pairs_within_them(tmp_path):
    file, pictures, score = listed(tmp_path)
    pairs = answers.load(file, "", (32, 32))
    sides = pairs.lists.sides(np.arange(80))
    np.testing.assert_array_equal(np.sort(sides["ranks"], 1), np.tile([0, 1, 2, 2], (80, 1)))  # not ranked, best, a tie
    assert (sides["list"][np.arange(80), sides["ranks"].argmin(1) * 0 + (sides["ranks"] == 1).argmax(1)] == 230).all()
    assert len(pairs.p) == 3 * 80 and sorted(pairs.p)[:80] == [0.5] * 80 and set(sorted(pairs.p)[80:]) == {1.0}
    shown = pairs.sides(np.arange(len(pairs.p)))
    brighter = shown["a"].mean((1, 2, 3)) > shown["b"].mean((1, 2, 3))
    assert brighter[pairs.p == 1].all() and np.allclose(pairs.weight, 1 / 3)
    with pytest.raises(ValueError, match="pictures of 16 x 16; got 32 x 32"):
        answers.load(file, "", (16, 16))


def test_lists_of_two_have_the_loss_of_pairs_and_longer_ones_that_of_plackett_and_luce():
    rng = np.random.default_rng(0)
    s = jnp.asarray(rng.normal(size=(2, 6, 1)), jnp.float32)
    config = ml_collections.ConfigDict({"own": False, "temperature": False, "offset": False, "ties": "half"})
    people = {"log_temperature": jnp.zeros(1), "offset": jnp.zeros(1), "log_nu": jnp.zeros(())}
    batch = {"p": jnp.ones(6), "weight": jnp.ones(6), "annotator": jnp.zeros(6, int)}
    of_pairs = reward_model.nll(config, people, s, batch, 10)
    of_lists = reward_model.nll(config, people, s, {"ranks": jnp.tile(jnp.array([1, 2]), (6, 1))}, 10)
    np.testing.assert_allclose(of_lists[0], of_pairs[0], rtol=1e-5)
    np.testing.assert_allclose(of_lists[1]["accuracy"], of_pairs[1]["accuracy"])
    s = jnp.asarray(rng.normal(size=(4, 5, 1)), jnp.float32)
    order = np.asarray(s[..., 0].T)[:, ::-1]  # the last one is the best
    exact = np.mean([-sum(row[i] - np.log(np.exp(row[i:]).sum()) for i in range(4)) for row in order])
    found, info = reward_model.nll(config, people, s, {"ranks": jnp.tile(jnp.array([4, 3, 2, 1]), (5, 1))}, 10)
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    right = [row[i] > row[j] for row in order for i, j in itertools.combinations(range(4), 2)]
    np.testing.assert_allclose(info["accuracy"], np.mean(right))


def test_a_reward_model_learns_from_ranked_lists(tmp_path):
    file, _, _ = listed(tmp_path)
    summary = reward_model.train(settings("picture", file, steps=30, batch=4, trunk="none"), tmp_path / "lists")
    assert summary["accuracy"]["half"]["mean"] > 0.9 and summary["pairs"]["ties"] * 3 == summary["pairs"]["held_out"]
    for changes, said in (({"ties": "davidson"}, "set ties='half'"), ({"teacher": "own_reward:dark"}, "label --list"),
                          ({"own": True}, "tell annotators apart")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            reward_model.train(settings("picture", file, **changes), tmp_path / "refused")


def test_questions_that_the_pairs_cannot_answer_are_refused(tmp_path):
    both = written(tmp_path)
    one, soft = written(tmp_path / "one", people=("ann",)), written(tmp_path / "soft", p=0.8)
    for pairs, changes, said in (
        (both, {"offset": True}, "stored winner first"), (one, {"own": True}, "name one, 'ann'"),
        (soft, {"ties": "davidson"}, "labels are shares between"), (both, {"ties": "ignore"}, "choose one of half"),
        (both, {"held_out": 0.0}, "leaves 0 of 96 pairs for measuring"), (both, {"trunk": "clip"}, "choose one of proxy"),
        (both, {"reads": "noisy", "model": "nothing"}, "or a folder"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            reward_model.train(settings("picture", pairs, **changes), tmp_path / "refused")
