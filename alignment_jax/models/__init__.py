"""Networks, and models as bundles of pure functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .bundle import ModelBundle
from .critters import ASSETS, critters


class Entry(NamedTuple):
    """A model that configs can name: its factory, its shipped weights, where it is described."""

    factory: Callable[..., ModelBundle]
    weights: Path
    family: str
    paper: str
    summary: str


MODELS = {
    "critters": Entry(critters, ASSETS / "base.safetensors", "pixel UNet", "this project (docs in assets/critters)",
                      "32x32 monsters from captions; 4.2 M parameters with its text tower"),
}  # fmt: skip

__all__ = ["ASSETS", "MODELS", "Entry", "ModelBundle", "critters"]
