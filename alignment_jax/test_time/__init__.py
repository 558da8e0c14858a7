"""Alignment without training: each method one file, from noise and a condition to a sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .base import Method, Needs
from .best_of_n import best_of_n


class Entry(NamedTuple):
    """A method that `sample --method` can name; budget: the whole number that more network calls go into."""

    factory: Callable[..., Method]
    family: str
    paper: str
    summary: str
    reward: str | None = None
    budget: str | None = None


TEST_TIME = {
    "best_of_n": Entry(best_of_n, "search", "arXiv 2112.00861", "the best of n samples; random search", "value", "n"),
}

__all__ = ["TEST_TIME", "Entry", "Method", "Needs"]
