"""Rewards by name, and the judges that have the last word."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import clip, critters, jpeg, trained
from .base import Reward, Tower
from .combine import columns, ensemble, several, weighted
from .critters import Judge, critters_gold
from .relative import relative

INF = float("inf")


class Entry(NamedTuple):
    """A reward that configs can name: its factory, and what is known of it before its weights are read."""

    factory: Callable[..., Reward]
    family: str
    licence: str
    range: tuple[float, float]
    summary: str
    differentiable: bool = True


REWARDS = {
    "critters_proxy": Entry(critters.critters_proxy, "device", "Apache-2.0", (critters.FLOOR, 0.0),
                            "mean log-probability of the asked attributes, robust recogniser"),
    "critters_fragile": Entry(critters.critters_fragile, "device", "Apache-2.0", (critters.FLOOR, 0.0),
                              "the same of a recogniser that knows clean pictures only: easily hacked"),
    "trained": Entry(trained.trained, "device", "as its pairs", (-INF, INF), "log-odds of one's own preference pairs, from a folder"),
    "ensemble": Entry(ensemble, "several", "as its parts", (-INF, INF), "mean - k std, or the least, of several: none is hacked alone"),
    "several": Entry(several, "several", "as its parts", (-INF, INF), "rewards side by side, for config.aggregate to make one of"),
    "relative": Entry(relative, "several", "as its part", (-INF, INF), "a reward for the prompt with wanted and with unwanted words: srpo"),
    "jpeg_compressibility": Entry(jpeg.jpeg_compressibility, "host", "none needed", (-INF, 0.0), "minus the JPEG size in kB", False),
    "jpeg_incompressibility": Entry(jpeg.jpeg_incompressibility, "host", "none needed", (0.0, INF), "the JPEG size in kB", False),
    "clip_score": Entry(clip.clip_score, "device", *clip.ABOUT["clip_score"]),
    "pick_score": Entry(clip.pick_score, "device", *clip.ABOUT["pick_score"]),
    "hps": Entry(clip.hps, "device", *clip.ABOUT["hps"]),
    "aesthetic": Entry(clip.aesthetic, "device", *clip.ABOUT["aesthetic"]),
    "safety": Entry(clip.safety, "device", *clip.ABOUT["safety"]),
}  # fmt: skip
JUDGES: dict[str, Callable[[], Judge]] = {"critters_gold": critters_gold}

__all__ = ["JUDGES", "REWARDS", "Entry", "Judge", "Reward", "Tower", "columns", "ensemble", "several", "weighted"]
