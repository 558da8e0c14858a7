"""Which tokens of a prompt stand for what it is about: words to positions, on the host."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

Tokenize = Callable[[Sequence[str]], np.ndarray]
WORD = re.compile(r"\w+(?:['’-]\w+)*")
# words that name nothing one could see
FUNCTION_WORDS = frozenset(
    "a an the this that these those some any each every and or but nor not no of in on at by to from for with without into "
    "onto over under above below between behind beside near next through across around against along up down out off as than "
    "like is are was were be been being am do does did has have had having it its it's he she they them his her their hers "
    "theirs i you we me my your our us there here where when while which who whom whose what very too also so such both "
    "other another".split()
)  # fmt: skip


def words(tokenize: Tokenize, prompt: str) -> list[tuple[str, int, int]]:
    """(word, its first token, the one after its last) of a prompt, in order; what a tokenizer cut off is left out.

    A word is several tokens where the tokenizer splits it. Its place follows from the tokens of the text before it and of the
    text up to its end, which holds for any tokenizer that never merges across words: CLIP's byte pairs and word lists do not.
    """
    null, whole = _rows(tokenize, ["", prompt])
    differ = np.flatnonzero(null != whole)
    if not len(differ):
        return []
    lead = int(differ[0])  # start tokens, that every prompt has

    def length(row: np.ndarray) -> int:
        ends = np.flatnonzero(row[lead:] == null[lead])
        return lead + int(ends[0]) if len(ends) else len(row)

    found, total = [], length(whole)
    for match in WORD.finditer(prompt):
        first, end = (length(row) for row in _rows(tokenize, [prompt[: match.start()], prompt[: match.end()]]))
        if end > first:
            found.append((match.group().lower(), first, end))
        if end >= total:
            break
    return found


def subjects(tokenize: Tokenize, prompts: Sequence[str], named: str | Sequence[str] | None = None) -> np.ndarray:
    """int32 [B, L]: the number of the subject that a token belongs to, 1, 2, ...; 0 for the others.

    named: words or phrases ("monster,red hat"), each place of which is a subject of its own, its tokens together. None: every
    word that is no function word. Raises ValueError for a name that is in none of the prompts.
    """
    names = [named] if isinstance(named, str) else list(named or [])
    wanted = [WORD.findall(part.lower()) for name in names for part in str(name).split(",") if part.strip()]
    if named is not None and not all(wanted or [[]]):
        raise ValueError(f"subjects must be words of the prompts, such as \"monster,horns\"; got {named!r}")
    of_prompts = [words(tokenize, prompt) for prompt in prompts]
    out = np.zeros((len(prompts), _rows(tokenize, [""]).shape[-1]), np.int32)
    unseen = {" ".join(phrase) for phrase in wanted}
    for row, found in zip(out, of_prompts, strict=True):
        phrases = wanted or [[word] for word in dict.fromkeys(w for w, *_ in found) if word not in FUNCTION_WORDS]
        number = 0
        for i in range(len(found)):
            for phrase in phrases:
                if [w for w, *_ in found[i : i + len(phrase)]] == phrase:
                    number += 1
                    row[found[i][1] : found[i + len(phrase) - 1][2]] = number
                    unseen.discard(" ".join(phrase))
    if unseen:
        there = ", ".join(dict.fromkeys(w for found in of_prompts[:4] for w, *_ in found if w not in FUNCTION_WORDS))
        raise ValueError(f"subjects name {', '.join(sorted(unseen))}, which no prompt holds; the first prompts hold: {there}")
    return out


def _rows(tokenize: Tokenize, texts: Sequence[str]) -> np.ndarray:
    """Tokens [B, L], of a model with two tokenizers those of the first."""
    tokens = np.asarray(tokenize(texts))
    return tokens.reshape(len(texts), -1, tokens.shape[-1])[:, 0]
