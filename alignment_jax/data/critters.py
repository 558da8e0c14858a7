"""The critters world: monsters of named parts, exact captions, combinations that are held out.

Art: the style "critters" of DiceBear (CC0). Rendering needs the extra `critters`; captions and splits do not.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "body": ("blue", "purple", "pink", "orange", "green", "white"),
    "shape": ("dome", "block", "tower", "bell", "steps"),
    "top": ("none", "horns", "earsRound", "antenna", "sprout", "fin"),
    "eyes": ("round", "mono", "trio", "happy", "angry", "squint"),
    "mouth": ("smile", "grin", "teeth", "open", "frown", "zigzag"),
    "background": ("blue", "purple", "red", "brown", "green", "black"),
}
SIZES = tuple(len(values) for values in ATTRIBUTES.values())
WORDS: dict[str, tuple[str, ...]] = {
    **ATTRIBUTES,
    "top": ("", "horns", "round ears", "an antenna", "a sprout", "a fin"),
    "eyes": ("round eyes", "one big eye", "three eyes", "happy eyes", "angry eyes", "squinting eyes"),
    "mouth": ("a smile", "a grin", "teeth", "an open mouth", "a frown", "a zigzag mouth"),
}
NUISANCES: dict[str, int] = {"accent": 6, "pattern": 2, "cheeks": 2}  # what no caption names, and how many values
_BODY = ("7dd3fc", "a78bfa", "f0abfc", "fdba74", "bef264", "f1f5f9")
_BACKGROUND = ("1d4ed8", "6d28d9", "be123c", "92400e", "047857", "1e293b")
_ACCENT = ("7dd3fc", "a78bfa", "fda4af", "fbbf24", "6ee7b7", "f1f5f9")
_ACCENT_LIKE_BODY = (0, 1, -1, -1, -1, 5)  # the accent that could not be told from each body
WRONG_WORD = np.array([0.06, 0.10, 0.15, 0.15, 0.15, 0.06])  # per attribute: the noise of captions from the web
MISSING_WORD = 0.10


def caption(attributes: Sequence[int] | np.ndarray) -> str:
    """The exact caption of indices [6]; an index of -1 is left out, and a body, shape or background without a word is so.

    "a green bell monster with horns, one big eye and a smile on a blue background"
    """
    word = {name: WORDS[name][i] if i >= 0 else "" for name, i in zip(ATTRIBUTES, attributes, strict=True)}
    parts = [word[name] for name in ("top", "eyes", "mouth") if word[name]]
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    noun = " ".join(filter(None, ["a", word["body"], word["shape"], "monster"]))
    noun = re.sub(r"^a (?=[aeiou])", "an ", noun)
    text = noun + (f" with {listed}" if listed else "")
    return text + (f" on a {word['background']} background" if word["background"] else "")


def parse(text: str) -> np.ndarray:
    """Indices int32 [6] of the attributes that a caption names, -1 for those it does not.

    No word for the top means "none" when the caption names all five others, and nothing otherwise.
    """
    found = np.full(6, -1, np.int32)
    before, _, background = text.lower().partition(" on a ")
    for column, name in enumerate(ATTRIBUTES):
        where = background if name == "background" else before
        for i, words in enumerate(WORDS[name]):
            key = re.sub(r"^(a|an) ", "", words)
            if key and re.search(rf"\b{key}\b", where):
                found[column] = i
    if found[2] < 0 and np.all(np.delete(found, 2) >= 0):
        found[2] = 0
    return found


def held_out(attributes: np.ndarray) -> np.ndarray:
    """Whether the combinations [..., 6] of shape, top, eyes and mouth are kept from training: a fifth of them, by a hash."""
    _, shape, top, eyes, mouth, _ = np.moveaxis(np.asarray(attributes, np.uint64), -1, 0)
    mixed = 7919 * shape + 104729 * top + 1299709 * eyes + 15485863 * mouth + 12345
    return ((mixed * np.uint64(2654435761)) % np.uint64(2**32) >> np.uint64(16)) % np.uint64(5) == 0


def combinations(split: str) -> np.ndarray:
    """All attribute combinations int32 [N, 6] of the split: "train" or "held_out"."""
    if split not in ("train", "held_out"):
        raise ValueError(f"split {split!r} is not known; choose train or held_out")
    every = np.indices(SIZES).reshape(6, -1).T.astype(np.int32)
    return every[held_out(every) == (split == "held_out")]


def prompts(split: str, n: int, seed: int) -> list[str]:
    """n exact captions of the split's combinations, drawn without repetition."""
    every = combinations(split)
    return [caption(a) for a in every[np.random.default_rng((seed, 17)).permutation(len(every))[:n]]]


def noisy_caption(attributes: np.ndarray, rng: np.random.Generator) -> str:
    """A caption as the web has them: wrong words (6-15 % an attribute) and missing ones (10 %)."""
    noisy = np.array(attributes)
    wrong = rng.random(6) < WRONG_WORD
    shifts = np.array([rng.integers(1, size) for size in SIZES])
    noisy = np.where(wrong, (noisy + shifts) % np.array(SIZES), noisy)
    return caption(np.where(rng.random(6) < MISSING_WORD, -1, noisy))


def draw_nuisances(attributes: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """What no caption names: accent colour (unlike the body), pattern 40 %, cheeks 30 %, and the pose."""
    accents = [i for i in range(len(_ACCENT)) if i != _ACCENT_LIKE_BODY[int(attributes[0])]]
    return {
        "accent": int(rng.choice(accents)), "pattern": int(rng.random() < 0.4), "cheeks": int(rng.random() < 0.3),
        "scale": float(rng.uniform(1.0, 1.16)), "shift_x": float(rng.uniform(-7, 7)),
        "shift_y": float(rng.uniform(0, 6)), "rotation": float(rng.uniform(-4, 4)),
        "details": int(rng.integers(2**31)),
    }  # fmt: skip


@cache
def _style() -> Any:
    try:
        import dicebear_styles
        from dicebear.style import Style
    except ImportError as error:
        raise ImportError("rendering critters needs dicebear-core, dicebear-styles and resvg-py: "
                          "pip install 'alignment_jax[critters]'") from error  # fmt: skip
    return Style(json.loads((Path(next(iter(dicebear_styles.__path__))) / "critters.json").read_text()))


def render(attributes: Sequence[int] | np.ndarray, nuisances: dict[str, Any]) -> np.ndarray:
    """The picture uint8 [32,32,3] of a critter: drawn at 128 px, averaged over 4x4."""
    import resvg_py
    from dicebear.avatar import Avatar
    from PIL import Image

    style = _style()
    body, shape, top, eyes, mouth, background = (int(a) for a in attributes)
    options: dict[str, Any] = {
        "seed": str(nuisances["details"]), "size": 128, "animationVariant": "none",
        "bodyVariant": ATTRIBUTES["shape"][shape], "eyesVariant": ATTRIBUTES["eyes"][eyes],
        "mouthVariant": ATTRIBUTES["mouth"][mouth], "bodyColor": _BODY[body], "backgroundColor": _BACKGROUND[background],
        "accentColor": _ACCENT[nuisances["accent"]], "topProbability": 100 if top else 0,
        "patternProbability": 100 * nuisances["pattern"], "cheeksProbability": 100 * nuisances["cheeks"],
        "scale": nuisances["scale"], "rotate": nuisances["rotation"],
        "translateX": nuisances["shift_x"], "translateY": nuisances["shift_y"],
    }  # fmt: skip
    if top:
        options["topVariant"] = ATTRIBUTES["top"][top]
    png = bytes(resvg_py.svg_to_bytes(svg_string=Avatar(style, options).to_string()))
    big = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.float32)
    return np.round(big.reshape(32, 4, 32, 4, 3).mean((1, 3))).astype(np.uint8)


def draw(split: str, index: int, seed: int = 0) -> dict[str, Any]:
    """Critter number `index` of a split: attributes [6], nuisances, the picture and its noisy caption; deterministic."""
    every = combinations(split)
    # every pass over the combinations is a new permutation: any prefix of the data is balanced
    turn, place = divmod(index, len(every))
    attributes = every[_permutation(split, turn, seed)[place]]
    rng = np.random.default_rng((seed, split == "held_out", index))
    nuisances = draw_nuisances(attributes, rng)
    return {"attributes": attributes, "nuisances": nuisances, "caption": noisy_caption(attributes, rng),
            "image": render(attributes, nuisances)}  # fmt: skip


@cache
def _permutation(split: str, turn: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, split == "held_out", turn, 5)).permutation(len(combinations(split)))
