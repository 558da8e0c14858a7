"""JPEG size as a reward: the classical host reward of DDPO (arXiv 2305.13301, section 6.1)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from .base import Reward


def kilobytes(images: np.ndarray, quality: int = 95) -> np.ndarray:
    """Size of every picture uint8 [B,H,W,C] as a JPEG, in units of 1000 bytes: [B]."""
    from PIL import Image

    def size(image: np.ndarray) -> float:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
        return buffer.tell() / 1000

    return np.array([size(image) for image in images], np.float32)


def jpeg_compressibility() -> Reward:
    """Minus the kilobytes of the picture as a JPEG of quality 95."""

    def score(images: np.ndarray, prompts: Sequence[str], metadata: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return -kilobytes(images), {}

    return Reward("jpeg_compressibility", score, device=False, differentiable=False, range=(float("-inf"), 0.0),
                  licence="none needed", summary="minus the JPEG size in kB")  # fmt: skip


def jpeg_incompressibility() -> Reward:
    """The kilobytes of the picture as a JPEG of quality 95."""

    def score(images: np.ndarray, prompts: Sequence[str], metadata: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return kilobytes(images), {}

    return Reward("jpeg_incompressibility", score, device=False, differentiable=False, range=(0.0, float("inf")),
                  licence="none needed", summary="the JPEG size in kB")  # fmt: skip
