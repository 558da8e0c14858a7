"""Searches over texts on synthetic rewards whose best prompt and whose rates are known."""

import itertools
from math import log, pi

import numpy as np
import pytest

from alignment_jax.test_time import PROMPT_METHODS
from alignment_jax.test_time.prompts import prompt_bandit, prompt_evolution, prompt_rewriter, with_suffix

SUFFIXES = ["alpha", "beta", "gamma", "delta", "epsilon"]


def coins(means, seed):
    """score(prompts): a fresh coin for each draw of an arm, with the mean of the arm's last word; and the draws of each."""
    rng, drawn = np.random.default_rng((seed, 99)), []

    def score(prompts):
        drawn.extend(prompts)
        return np.array([float(rng.random() < means.get(p.split()[-1], 0.0)) for p in prompts])

    return score, drawn


def separable(prompt, seed=0, choices=3, genes=6):
    """(table, score, the best score) of a prompt of `genes` words w0 w1 ... whose words contribute on their own."""
    rng = np.random.default_rng(seed)
    table = {f"w{i}": [f"w{i}x{j}" for j in range(1, choices)] for i in range(genes)}
    value = {w: rng.normal() for word, others in table.items() for w in [word, *others]}
    best = sum(max(value[w] for w in [word, *others]) for word, others in table.items())
    asked = []

    def score(prompts):
        asked.extend(prompts)
        return np.array([sum(value[w] for w in p.split()) for p in prompts])

    return table, score, best, asked


def searches(score):
    """Every method on a prompt of four words, with what it found."""
    rng = np.random.default_rng(3)

    def rewrite(prompt, history):
        words = history[-1][0].split() if history else prompt.split()
        return [" ".join(rng.permutation(words)) + f" {rng.choice(SUFFIXES)}" for _ in range(4)]

    made = {"prompt_bandit": prompt_bandit(suffixes=SUFFIXES, budget=24),
            "prompt_evolution": prompt_evolution(suffixes=SUFFIXES, words={"big": ["huge"]}, weights=[1.5], budget=24),
            "prompt_rewriter": prompt_rewriter(rewriter=rewrite, budget=24)}  # fmt: skip
    assert set(made) == set(PROMPT_METHODS)
    return {name: search(score, "a big red cat", 7) for name, search in made.items()}


def by_letters(prompts):
    """A reward of a text itself: bounded, deterministic, unequal."""
    return np.array([(sum(map(ord, p)) * 7919 % 1009) / 1009 for p in prompts])


def test_ucb1_finds_the_best_suffix_in_95_of_100_seeds_and_draws_worse_ones_less_often_than_its_bound():
    means = {"cat": 0.3, "alpha": 0.4, "beta": 0.8, "gamma": 0.3, "delta": 0.2, "epsilon": 0.4}
    budget, right, worse = 400, 0, {name: 0 for name in means if name != "beta"}
    search = prompt_bandit(suffixes=SUFFIXES, budget=budget, width=1.0)
    for seed in range(100):
        score, drawn = coins(means, seed)
        right += search(score, "a cat", seed).prompt == "a cat beta"
        assert len(drawn) == budget
        for name in worse:
            worse[name] += sum(p.split()[-1] == name for p in drawn) / 100
    assert right >= 95, right
    for name, mean_draws in worse.items():  # Auer, Cesa-Bianchi, Fischer 2002, theorem 1
        gap = 0.8 - means[name]
        assert mean_draws <= 8 * log(budget) / gap**2 + 1 + pi**2 / 3, (name, mean_draws)
    assert sum(worse.values()) < budget / 2  # and the bound is not empty: drawing evenly would give 5/6 of the budget


@pytest.mark.parametrize("rule", ["ucb1", "thompson"])
@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (50.0, -1000.0)])
def test_a_bandit_that_estimates_the_width_knows_no_units(rule, scale, shift):
    means = {"cat": 0.3, "alpha": 0.4, "beta": 0.8, "gamma": 0.3, "delta": 0.2, "epsilon": 0.4}
    right = 0
    for seed in range(40):
        score, _ = coins(means, seed)
        found = prompt_bandit(suffixes=SUFFIXES, budget=200, rule=rule)(lambda p, score=score: scale * score(p) + shift, "a cat", seed)
        right += found.prompt == "a cat beta"
    assert right >= 38, right


def test_a_bandit_finds_the_base_prompt_when_every_suffix_harms():
    score, _ = coins({"cat": 0.9, **dict.fromkeys(SUFFIXES, 0.3)}, 0)
    assert prompt_bandit(suffixes=SUFFIXES, budget=200)(score, "a cat", 0).prompt == "a cat"


def test_evolution_finds_the_optimum_of_a_separable_problem_in_95_of_100_seeds():
    """729 wordings, 200 of them scored."""
    prompt, right = "w0 w1 w2 w3 w4 w5", 0
    for seed in range(100):
        table, score, best, asked = separable(prompt, seed)
        found = prompt_evolution(words=table, budget=200)(score, prompt, seed)
        right += np.isclose(found.score, best)
        assert len(asked) == len(set(asked)) == 200
    assert right >= 95, right


def test_evolution_beats_random_search_at_equal_budget():
    prompt, ours, random = "w0 w1 w2 w3 w4 w5", 0.0, 0.0
    for seed in range(30):
        table, score, best, _ = separable(prompt, seed)
        every = [" ".join(p) for p in itertools.product(*([w, *table[w]] for w in prompt.split()))]
        drawn = np.random.default_rng(seed).choice(len(every), 60, replace=False)
        ours += best - prompt_evolution(words=table, budget=60)(score, prompt, seed).score
        random += best - score([every[i] for i in drawn]).max()
    assert ours < 0.5 * random, (ours, random)


def test_evolution_switches_suffixes_exchanges_words_and_weights_those_that_carry_meaning():
    """The optimum of one of each; the punctuation stays where it was, and no article is weighted."""
    wanted = ["huge", "(cat:1.5)", ", 4k"]
    score = lambda prompts: np.array([sum(w in p for w in wanted) - 0.1 * p.count(":") for p in prompts])
    search = prompt_evolution(suffixes=[", 4k", "blurred"], words={"Big": ["huge"]}, weights=[0.5, 1.5], budget=300,
                              unweighted=frozenset({"a", "on"}))  # fmt: skip
    found = search(score, "A big, red cat on a mat", 0)
    assert found.prompt.replace(" blurred", "") == "A huge, red (cat:1.5) on a mat, 4k"
    assert not any("(a:" in p.lower() or "(on:" in p for p, _ in found.history)


def test_evolution_ends_when_there_are_no_other_wordings():
    found = prompt_evolution(suffixes=["b", "c"], budget=1000)(by_letters, "a", 0)
    assert sorted(p for p, _ in found.history) == ["a", "a b", "a b c", "a c"]


def test_a_word_may_be_left_out():
    found = prompt_evolution(words={"very": [""]}, budget=9)(lambda p: np.array([-len(q) for q in p]), "a very red cat", 0)
    assert found.prompt == "a red cat"


@pytest.mark.parametrize("name", PROMPT_METHODS)
def test_the_original_is_scored_first_the_best_is_no_worse_and_the_budget_is_kept(name):
    found = searches(by_letters)[name]
    assert found.history[0] == ("a big red cat", by_letters(["a big red cat"])[0])
    assert found.score >= found.base == found.history[0][1]
    assert (found.prompt, found.score) in found.history and found.score == max(s for _, s in found.history)
    assert 1 < len(found.history) <= 24
    if name != "prompt_bandit":  # which draws an arm again, with other noise
        assert len({p for p, _ in found.history}) == len(found.history)


@pytest.mark.parametrize("name", PROMPT_METHODS)
def test_the_same_seed_finds_the_same(name):
    assert searches(by_letters)[name] == searches(by_letters)[name]


@pytest.mark.parametrize("name", PROMPT_METHODS)
def test_the_original_wins_ties(name):
    assert searches(lambda p: np.zeros(len(p)))[name].prompt == "a big red cat"


@pytest.mark.parametrize("name", PROMPT_METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_candidate_without_a_score_is_never_chosen(name, bad):
    """The trap: NaN compares as false with everything, and max() of a list may return it; +inf would win."""
    found = searches(lambda p: np.where([q != "a big red cat" for q in p], bad, 0.25))[name]
    assert (found.prompt, found.score) == ("a big red cat", 0.25)
    found = searches(lambda p: np.where([q == "a big red cat" for q in p], bad, by_letters(p)))[name]
    assert found.prompt != "a big red cat" and np.isfinite(found.score)
    found = searches(lambda p: np.full(len(p), bad))[name]
    assert found.prompt == "a big red cat" and np.isnan(found.score) and np.isnan(found.base)


def test_the_rewriter_sees_its_best_prompts_worst_first_and_best_so_far_never_falls():
    """OPT2I's loop; and what the rewriter repeats is not scored again."""
    seen, asked = [], []

    def rewrite(prompt, history):
        assert prompt == "start"
        seen.append(history)
        return [f"{history[-1][0]} more", "start", f"{history[0][0]} else", f"{history[-1][0]} more"]

    def score(prompts):
        asked.extend(prompts)
        return by_letters(prompts)

    found = prompt_rewriter(rewriter=rewrite, budget=40, shown=3)(score, "start", 0)
    assert len(asked) == len(set(asked)) == len(found.history) <= 40
    best = [h[-1][1] for h in seen]
    assert best == sorted(best) and all([s for _, s in h] == sorted(s for _, s in h) and len(h) <= 3 for h in seen)
    assert seen[0] == [("start", by_letters(["start"])[0])]


def test_a_rewriter_without_anything_new_is_asked_patience_times_and_no_more():
    calls = []
    found = prompt_rewriter(rewriter=lambda p, h: calls.append(1) or [p], budget=40, patience=4)(by_letters, "start", 0)
    assert len(calls) == 4 and found.prompt == "start"


def test_suffixes_join_as_one_writes():
    assert [with_suffix("a cat", s) for s in (", 4k", "4k", " 4k ", ".")] == ["a cat, 4k", "a cat 4k", "a cat 4k", "a cat."]


@pytest.mark.parametrize("make, said", [
    (lambda: prompt_bandit(), "suffixes is empty"),
    (lambda: prompt_bandit(suffixes=", 4k"), "must be a list of texts"),  # the trap: its letters as arms
    (lambda: prompt_bandit(suffixes=["a", 3]), "must be a list of texts"),
    (lambda: prompt_bandit(suffixes=["a", "b"], budget=2), "at least 3"),
    (lambda: prompt_bandit(suffixes=["a"], rule="ucb2"), "ucb1 or thompson"),
    (lambda: prompt_bandit(suffixes=["a"], width=-1), "width"),
    (lambda: prompt_evolution(), "nothing to change"),
    (lambda: prompt_evolution(words={"big": "huge"}), "must be a list of texts"),
    (lambda: prompt_evolution(words={"big cat": ["dog"]}), "single words"),
    (lambda: prompt_evolution(words=["big"]), "words must be an object"),
    (lambda: prompt_evolution(weights="heavy"), "list of numbers"),
    (lambda: prompt_evolution(weights=1.5), "list of numbers"),
    (lambda: prompt_evolution(suffixes=["a"], budget=0), "at least 1"),
    (lambda: prompt_rewriter(), "needs a rewriter"),
    (lambda: prompt_rewriter(rewriter=lambda p, h: [], budget=9)(by_letters, "a", 0), "gave no prompts"),
    (lambda: prompt_rewriter(rewriter=lambda p, h: "a cat", budget=9)(by_letters, "a", 0), "must be a list of texts"),
    (lambda: prompt_evolution(suffixes=["a"])(lambda p: np.zeros((len(p), 2)), "a", 0), "one number a prompt"),
])  # fmt: skip
def test_bad_input_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
