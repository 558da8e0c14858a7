"""Search over prompts: bandits over suffixes, evolution of wordings, and OPT2I's loop round any rewriter.

A search is search(score, prompt, seed) -> Found. score(prompts) -> [N] draws pictures of candidates and says how well these
show the ORIGINAL prompt; a candidate that is asked for again is drawn with other noise. NaN or an infinity: it could not
be drawn or judged, and is never chosen. The original prompt is always a candidate and wins ties, so the best found is no
worse by the search's own score, which flatters the winner of many: score it again on fresh noise.
budget: the number of scored prompts. The seed decides everything that the scores do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Score = Callable[[list[str]], np.ndarray]
History = list[tuple[str, float]]
Rewrite = Callable[[str, History], list[str]]


class Found(NamedTuple):
    """The best prompt with its score, the original prompt's score, and all that was scored, in that order."""

    prompt: str
    score: float
    base: float
    history: History


Search = Callable[[Score, str, int], Found]


def prompt_bandit(*, suffixes: Sequence[str] = (), budget: int = 64, rule: str = "ucb1", width: float = 0.0) -> Search:
    """A bandit whose arms are the prompt with each of the suffixes, and the prompt alone; the arm of the best mean is found.

    rule "ucb1": argmax_i m_i + width sqrt(2 ln t / n_i) (Auer, Cesa-Bianchi, Fischer 2002; scores in an interval of that
    width: at most 8 width^2 ln t / gap_i^2 + 1 + pi^2 / 3 draws of a worse arm are expected, once scaled). "thompson":
    argmax_i N(m_i, width^2 / (4 n_i)), after arXiv 1209.3353. width 0: twice the standard deviation of the scores so far,
    as an interval's is at most half of its width. Each arm is drawn once first. Raises ValueError without suffixes, and for a
    budget that does not draw every arm.
    """
    suffixes = _texts("suffixes", suffixes)
    if not suffixes:
        raise ValueError("prompt_bandit chooses among suffixes, and suffixes is empty; give some, such as "
                         '--option suffixes=\'[", highly detailed", ", 4k"]\'')  # fmt: skip
    if rule not in ("ucb1", "thompson"):
        raise ValueError(f"rule {rule!r} is not known; choose ucb1 or thompson")
    if not width >= 0:
        raise ValueError(f"width is that of the interval of scores, or 0 to estimate it; got {width}")
    if budget < len(suffixes) + 1:
        raise ValueError(f"budget={budget} does not draw each of {len(suffixes)} suffixes and the prompt itself once; "
                         f"at least {len(suffixes) + 1} is needed, several times that to choose well")  # fmt: skip

    def search(score: Score, prompt: str, seed: int) -> Found:
        rng = np.random.default_rng(seed)
        arms = list(dict.fromkeys([prompt, *(with_suffix(prompt, s) for s in suffixes)]))
        first = _scores(score, arms)
        history = list(zip(arms, first.tolist(), strict=True))
        n, total = np.ones(len(arms)), np.where(np.isfinite(first), first, -np.inf)  # an arm that failed is out
        while len(history) < budget and np.isfinite(total).any():
            scale = width or 2.0 * float(np.std([s for _, s in history if np.isfinite(s)]))
            bonus = np.sqrt(2 * np.log(len(history)) / n) if rule == "ucb1" else rng.standard_normal(len(arms)) / (2 * np.sqrt(n))
            i = int(np.argmax(total / n + scale * bonus))
            value = float(_scores(score, [arms[i]])[0])
            history.append((arms[i], value))
            n[i], total[i] = n[i] + 1, total[i] + value if np.isfinite(value) else -np.inf
        means = total / n
        best = int(np.argmax(means))
        return Found(arms[best], _nan(means[best]), _nan(means[0]), history)

    return search


def prompt_evolution(*, suffixes: Sequence[str] = (), words: Mapping[str, Sequence[str]] | None = None,
                     weights: Sequence[float] = (), budget: int = 64, kept: int = 4, children: int = 8,
                     unweighted: frozenset[str] = frozenset()) -> Search:  # fmt: skip
    """A (kept + children) evolution of wordings: suffixes on or off, words exchanged, words weighted.

    words: {a word of the prompt: what may stand in its place}. weights: written as "(word:1.3)" on words that are not in
    `unweighted`; `training.prompt_search.emphasised` says what a weight does. A child takes each gene from one of two kept
    parents, and changes each of L genes with probability 1 / L, one at least. No wording is scored twice; ends early when there
    are no others. Raises ValueError where nothing may change.
    """
    suffixes, table = _texts("suffixes", suffixes), _table(words or {})
    if not isinstance(weights, list | tuple) or not all(isinstance(w, int | float) and np.isfinite(w) for w in weights):
        raise ValueError(f"weights must be a list of numbers, such as [0.7, 1.3]; got {weights!r}")
    if not suffixes and not table and not len(weights):
        raise ValueError("prompt_evolution has nothing to change: give suffixes, a list; words, an object such as "
                         '{"big": ["huge", "giant"]}; or weights, such as [0.7, 1.3]')  # fmt: skip
    if min(budget, kept, children) < 1:
        raise ValueError(f"budget, kept and children must be at least 1; got {budget}, {kept} and {children}")

    def search(score: Score, prompt: str, seed: int) -> Found:
        rng = np.random.default_rng(seed)
        parts = [_core(token) for token in prompt.split()]
        choices = [(core, *table.get(core.lower(), ())) for _, core, _ in parts]
        scales = [(1.0, *weights) if c and c[0].isalnum() and c.lower() not in unweighted else (1.0,) for _, c, _ in parts]
        sizes = np.array([*map(len, choices), *map(len, scales), *[2] * len(suffixes)])
        genes = np.flatnonzero(sizes > 1)

        def write(genome: np.ndarray) -> str:
            if not genome.any():
                return prompt
            word, scale, on = np.split(genome, [len(parts), 2 * len(parts)])
            said = [before + _weighted(choices[i][word[i]], scales[i][scale[i]]) + after for i, (before, _, after) in enumerate(parts)]
            text = " ".join(filter(None, said))
            for suffix, use in zip(suffixes, on, strict=True):
                text = with_suffix(text, suffix) if use else text
            return text

        def child(parents: list[np.ndarray]) -> np.ndarray:
            a, b = (parents[i] for i in rng.integers(len(parents), size=2))
            genome = np.where(rng.random(len(sizes)) < 0.5, a, b)
            changed = genes[rng.random(len(genes)) < 1 / len(genes)]
            for g in changed if len(changed) else rng.choice(genes, 1):
                genome[g] = (genome[g] + rng.integers(1, sizes[g])) % sizes[g]
            return genome

        base = np.zeros(len(sizes), int)
        history = [(prompt, float(_scores(score, [prompt])[0]))]
        population, seen = [(_key(history[0][1]), base)], {prompt}
        while len(history) < budget and len(genes):
            parents, new = [g for _, g in population], dict[str, np.ndarray]()
            for _ in range(200 * children):  # so many tries in vain: nearly every wording is known
                genome = child(parents)
                if (text := write(genome)) not in seen:
                    new[text] = genome
                    seen.add(text)
                if len(new) == min(children, budget - len(history)):
                    break
            if not new:
                break
            values = _scores(score, list(new))
            history += zip(new, values.tolist(), strict=True)
            population += [(_key(v), g) for v, g in zip(values, new.values(), strict=True)]
            population = sorted(population, key=lambda entry: -entry[0])[:kept]  # stable: the older wins ties
        return _found(history)

    return search


def prompt_rewriter(*, rewriter: Rewrite | None = None, budget: int = 150, shown: int = 5, patience: int = 3) -> Search:
    """OPT2I (arXiv 2403.17804): a rewriter sees the `shown` best prompts with their scores, worst first, and gives more.

    rewriter(prompt, history) -> new prompts; a language model in the paper, which scores about thirty times five of them.
    What was scored before is not scored again; ends after `patience` answers in a row without anything new. Raises
    ValueError for an answer that is no list of texts, or an empty one.
    """
    if not callable(rewriter):
        raise ValueError("prompt_rewriter needs a rewriter: rewrite(prompt, history) -> list of prompts, on the command line "
                         f"--option rewriter=module:function or the URL of an endpoint; got {rewriter!r}")  # fmt: skip
    if min(budget, shown, patience) < 1:
        raise ValueError(f"budget, shown and patience must be at least 1; got {budget}, {shown} and {patience}")

    def search(score: Score, prompt: str, seed: int) -> Found:
        del seed  # the rewriter's own
        history, idle = [(prompt, float(_scores(score, [prompt])[0]))], 0
        while len(history) < budget and idle < patience:
            answer = rewriter(prompt, sorted((h for h in history if np.isfinite(h[1])), key=lambda h: h[1])[-shown:])
            texts = [t.strip() for t in _texts("the rewriter's answer", answer)]
            if not any(texts):
                raise ValueError(f"the rewriter gave no prompts after {len(history)} scored ones; it must return at least one")
            known = {p for p, _ in history}
            new = [t for t in dict.fromkeys(texts) if t and t not in known][: budget - len(history)]
            idle = 0 if new else idle + 1
            history += zip(new, _scores(score, new).tolist(), strict=True) if new else []
        return _found(history)

    return search


def with_suffix(prompt: str, suffix: str) -> str:
    """The prompt and a suffix, with a space between them unless the suffix begins with a comma or the like."""
    suffix = suffix.strip()
    return f"{prompt}{suffix}" if suffix[:1] in tuple(",.;:!") else f"{prompt} {suffix}"


def _found(history: History) -> Found:
    """The best of a history that begins with the original prompt, which wins ties."""
    best = max(history, key=lambda h: _key(h[1]))  # the first of equals
    return Found(best[0], _nan(best[1]), _nan(history[0][1]), history)


def _scores(score: Score, prompts: list[str]) -> np.ndarray:
    values = np.asarray(score(prompts), np.float64)
    if values.shape != (len(prompts),):
        raise ValueError(f"score must return one number a prompt, shape {(len(prompts),)}; got {values.shape}")
    return values


def _key(value: float) -> float:
    return value if np.isfinite(value) else -np.inf


def _nan(value: float) -> float:
    return float(value) if np.isfinite(value) else float("nan")


def _texts(name: str, value: Sequence[str]) -> list[str]:
    """value as a list of texts; a bare text would count as its letters."""
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{name} must be a list of texts; got {value!r:.200}")
    return list(value)


def _table(words: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    if not isinstance(words, Mapping):
        raise ValueError(f'words must be an object such as {{"big": ["huge", "giant"]}}; got {words!r:.200}')
    spaced = [w for w in words if len(w.split()) != 1]
    if spaced:
        raise ValueError(f"words exchanges single words, and {spaced[0]!r} is not one; what stands in its place may be several")
    return {word.lower(): _texts(f"words[{word!r}]", others) for word, others in words.items()}


def _core(token: str) -> tuple[str, str, str]:
    """A token as (punctuation, word, punctuation): what is exchanged and weighted is the word."""
    body = token.rstrip(",.;:!?\"'")
    core = body.lstrip("\"'")
    return body[: len(body) - len(core)], core, token[len(body) :]


def _weighted(word: str, scale: float) -> str:
    return word if scale == 1.0 or not word else f"({word}:{scale:g})"
