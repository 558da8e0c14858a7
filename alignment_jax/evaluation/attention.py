"""Where each word of a prompt is looked at, as a figure."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

COLUMNS = 6


def overlays(picture: np.ndarray, maps: Sequence[tuple[str, np.ndarray]]) -> bytes:
    """PNG of a picture [H,W,C] in [0, 1], then of each (word, map [h,w]) over its grey picture, each map up to its own peak.

    Peaks are told: a word that is hardly looked at would otherwise look like the others.
    """
    from matplotlib.figure import Figure

    panels = len(maps) + 1
    rows = -(-panels // COLUMNS)
    figure = Figure(figsize=(1.5 * min(panels, COLUMNS), 1.75 * rows), layout="constrained")
    axes = figure.subplots(rows, min(panels, COLUMNS), squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    extent = (0.0, float(picture.shape[1]), float(picture.shape[0]), 0.0)
    picture = np.clip(picture, 0, 1)
    axes[0].imshow(picture if picture.shape[-1] == 3 else picture[..., 0], extent=extent)
    grey = picture.mean(-1)
    for axis, (word, seen) in zip(axes[1:], maps):
        axis.imshow(grey, extent=extent, cmap="gray", vmin=0, vmax=1)
        axis.imshow(seen, extent=extent, cmap="inferno", alpha=0.6, vmin=0, vmax=max(float(seen.max()), 1e-12), interpolation="bilinear")
        axis.set_title(f"{word[:16]} {seen.max():.2f}", fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, dpi=110)
    return out.getvalue()
