"""Figures as PNG bytes, light or dark on a transparent ground; matplotlib is imported when one is drawn."""

from __future__ import annotations

import contextlib
import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .kl import best_of_n_kl
from .statistics import Interval, unflatten

COLOURS = {"gold": "#b7791f", "proxy": "#3b6fb5", "diversity": "#2f8f6b", "kl": "#8a5fb0", "best_of_n": "#a34d63",
           "right": "#2f9e5b", "wrong": "#d64545"}  # fmt: skip
DARK = {"gold": "#e0a94a", "proxy": "#7aa7e8", "diversity": "#5cc09a", "kl": "#b692dc", "best_of_n": "#dc8ba0"}
DIVERSITY_TARGET = 0.9


def enlarge(images: ArrayLike, size: int) -> np.ndarray:
    """Images [N, H, W, C], uint8 or float in [0, 1], as uint8 [N, k H, k W, 3], nearest, k H <= size; k is at least 1."""
    x = np.asarray(images)
    if x.ndim != 4 or x.shape[-1] not in (1, 3):
        raise ValueError(f"images must be [N, H, W, 1 or 3]; got shape {list(x.shape)}")
    if x.dtype != np.uint8:
        x = np.round(np.clip(np.nan_to_num(x), 0, 1) * 255).astype(np.uint8)
    k = max(1, size // x.shape[1])
    return np.repeat(x.repeat(k, 1).repeat(k, 2), 3 if x.shape[-1] == 1 else 1, axis=3)


def frame(images: ArrayLike, right: ArrayLike | None, size: int = 96, border: int = 4) -> np.ndarray:
    """`enlarge`d images [N, ...] with a frame: green where right [N] is true, red where false, none without right.

    Images higher than two sizes are shrunk to one.
    """
    x = enlarge(images, size)
    x = x if x.shape[1] <= 2 * size else np.stack([np.asarray(shrunk(image, size)) for image in x])
    if right is None:
        return np.pad(x, ((0, 0), (border, border), (border, border), (0, 0)), constant_values=255)
    out = np.empty((len(x), x.shape[1] + 2 * border, x.shape[2] + 2 * border, 3), np.uint8)
    for i, ok in enumerate(np.asarray(right, bool)):
        out[i] = [int(COLOURS["right" if ok else "wrong"][j : j + 2], 16) for j in (1, 3, 5)]
    out[:, border:-border, border:-border] = x
    return out


def shrunk(image: np.ndarray, height: int) -> Any:
    """A uint8 image [H, W, 3] as a PIL image of this height."""
    from PIL import Image

    width = max(1, round(image.shape[1] * height / image.shape[0]))
    return Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)


def grid(before: ArrayLike, after: ArrayLike, right_before: ArrayLike | None = None,
         right_after: ArrayLike | None = None, prompts: Sequence[str] | None = None, *, columns: int = 8,
         dark: bool = False) -> bytes:  # fmt: skip
    """Pairs of pictures from the same noise, before above after, framed by gold's verdict, the prompt below each pair.

    before, after [N, H, W, C] in [0, 1]; right_before, right_after [N] bool or None; prompts: N captions or None.
    """
    pairs = frame(before, right_before), frame(after, right_after)
    count, height, width = pairs[0].shape[:3]
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    with _style(dark, size=7) as Figure:
        text = 0.62 if prompts else 0.0
        cell = (1.06, 2.12 * height / width + text)
        figure = Figure(figsize=(cell[0] * columns + 0.55, cell[1] * rows))
        outer = figure.add_gridspec(rows, columns, left=0.55 / (cell[0] * columns + 0.55), right=1, top=1, bottom=0,
                                    wspace=0.04, hspace=0)  # fmt: skip
        for i in range(count):
            axes = figure.add_subplot(outer[i // columns, i % columns])
            stacked = np.concatenate([pairs[0][i], np.zeros_like(pairs[0][i][:4]), pairs[1][i]])
            opaque = np.full((*stacked.shape[:2], 1), 255, np.uint8)
            opaque[height : height + 4] = 0
            axes.imshow(np.concatenate([stacked, opaque], 2), interpolation="nearest")
            axes.set_anchor("N")
            axes.axis("off")
            if i % columns == 0:
                for name, y in (("before", height / 2), ("after", height * 1.5 + 4)):
                    axes.text(-8, y, name, rotation=90, ha="right", va="center", color=_ink(dark)[1])
            if prompts:
                caption = "\n".join(textwrap.wrap(prompts[i], 21)[:5])
                axes.text(width / 2, 2 * height + 12, caption, ha="center", va="top", fontsize=5.6, color=_ink(dark)[1])
        return _png(figure, dpi=150)


def curves(history: Sequence[Mapping[str, Any]], *, diversity_floor: float = DIVERSITY_TARGET, rate: bool = True,
           dark: bool = False) -> bytes:  # fmt: skip
    """Proxy reward, gold judge, diversity and KL over training time (over steps where rows have no "time").

    history: rows with the catalogue's names (metrics.py); reward/mean is drawn raw and smoothed, name/low and name/high
    as a band. A quantity that was not measured says so. rate: gold is the share of right samples, not a score.
    """
    titles = _titles(rate)
    clock = "time" if history and all("time" in row for row in history) else "step"
    with _style(dark) as Figure:
        figure = Figure(figsize=(9.4, 5.2), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True)
        figure.get_layout_engine().set(hspace=0.09, wspace=0.06)
        colours = _colours(dark)
        for ax, (kind, title, name) in zip(axes.flat, (
            ("proxy", titles["proxy"], "proxy"), ("gold", titles["gold"], "gold/all"),
            ("diversity", titles["diversity"], "diversity/pixel_right"),
            ("kl", "KL from the base, nats", "kl/path"),
        ), strict=True):  # fmt: skip
            ax.set_title(title, loc="left", fontweight="bold")
            drawn = _line(ax, history, clock, name, colours[kind])
            if kind == "proxy":
                drawn = _training_reward(ax, history, clock, colours[kind], dark) or drawn
            first = unflatten(history, name)[0]["mean"] if drawn and kind == "diversity" else math.nan
            if math.isfinite(first):
                ax.axhline(diversity_floor * first, color=_ink(dark)[1], lw=0.9, ls=(0, (4, 3)))
                ax.annotate(f"{diversity_floor:.2f} of the base", (1, diversity_floor * first), (-2, 3), ha="right",
                            xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=7.5,
                            color=_ink(dark)[1])  # fmt: skip
            if kind == "kl":
                ax.set_ylim(bottom=0)
            if kind == "gold" and rate:
                _percent(ax, unflatten(history, name))
            if not drawn:
                _nothing(ax, dark)
        for ax in axes[1]:
            ax.set_xlabel("seconds of training" if clock == "time" else "training step")
        return _png(figure)


def over_optimisation_panel(points: Sequence[Mapping[str, Any]], best_of_n: Sequence[Mapping[str, Any]] = (), *,
                            rate: bool = True, dark: bool = False) -> bytes:  # fmt: skip
    """Gold, proxy and diversity against sqrt(KL): where the proxy still means gold, the first two rise together.

    points: the blend of base and tuned model, {"lambda": 0..1.25, "kl": nats, "gold", "proxy": Intervals, "diversity":
    Interval (optional)}; lambda 1 is the aligned model and drawn filled. best_of_n: {"n", "gold", "proxy"} of
    the base, drawn at KL = log n - (n - 1) / n. Whiskers: 95 % intervals. rate: as in `curves`.
    """
    kinds = ("gold", "proxy", "diversity") if any("diversity" in p for p in points) else ("gold", "proxy")
    panels = [(kind, _titles(rate)[kind]) for kind in kinds]
    with _style(dark) as Figure:
        figure = Figure(figsize=(9.4, 3.3), layout="constrained")
        axes = figure.subplots(1, len(panels))
        figure.get_layout_engine().set(wspace=0.06)
        for ax, (kind, title) in zip(axes, panels, strict=True):
            ax.set_title(title, loc="left", fontweight="bold")
            ax.set_xlabel("√KL from the base, √nats")
            rows = sorted((p for p in points if p.get(kind)), key=lambda p: p["lambda"])
            colour = _colours(dark)[kind]
            _scatter(ax, [math.sqrt(max(p["kl"], 0.0)) for p in rows], [p[kind] for p in rows], colour,
                     [f"{p['lambda']:g}" for p in rows], [p["lambda"] == 1 for p in rows],
                     "blend, labelled λ", dark)  # fmt: skip
            rows = [b for b in best_of_n if b.get(kind)]
            if rows:
                _scatter(ax, [math.sqrt(best_of_n_kl(b["n"])) for b in rows], [b[kind] for b in rows],
                         _colours(dark)["best_of_n"], [f"{b['n']:g}" for b in rows], [False] * len(rows),
                         "best of n, labelled n", dark, marker="s", below=True)  # fmt: skip
                ax.legend(loc="best", frameon=False, fontsize=7.5, handlelength=1.8)
            ax.margins(x=0.06, y=0.16)
            _percent(ax, [p[kind] for p in [*points, *best_of_n] if p.get(kind)] if kind == "gold" and rate else [])
            ax.set_xlim(left=min(-0.02 * ax.get_xlim()[1], 0.0))
            if not points and not rows:
                _nothing(ax, dark)
        return _png(figure)


def budget_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], base: Mapping[str, Any], *, rate: bool = True) -> bytes:
    """Gold, proxy and diversity of test-time methods over the network calls that a sample costs.

    curves: method -> points {"calls", "gold", "proxy", "diversity": Intervals}; base: the same of plain sampling. Best-of-n,
    if it is there, is drawn black: what a method must beat.
    """
    with _style(False) as Figure:
        figure = Figure(figsize=(12.6, 5.2), layout="constrained")
        axes = figure.subplots(1, 3)
        budgets = sorted({round(r["nfe"]) for rows in curves.values() for r in rows if "nfe" in r})
        markers, names = "osD^v<>Phx*d", sorted(curves, key=lambda name: (name != "best_of_n", name))
        for ax, kind in zip(axes, ("gold", "proxy", "diversity"), strict=True):
            ax.set_title(_titles(rate)[kind], loc="left", fontweight="bold")
            ax.set_xlabel("network calls a sample, a backward pass counted as two")
            ax.set_xscale("log")
            if budgets:
                ax.set_xticks(budgets, [str(b) for b in budgets])
                ax.minorticks_off()
            if base[kind]["low"] is not None:  # of two samples that are not both right no diversity is known
                ax.axhspan(base[kind]["low"], base[kind]["high"], color="0.5", alpha=0.18, lw=0)
            for i, name in enumerate(names):
                rows = [r for r in sorted(curves[name], key=lambda r: r["calls"]) if r[kind]["mean"] is not None]
                mean, low, high = (np.array([r[kind][end] for r in rows], float) for end in ("mean", "low", "high"))
                colour = "black" if name == "best_of_n" else f"C{(i + i // 10) % 10}"  # a marker and a colour meet once in sixty
                ax.errorbar([r["calls"] for r in rows], mean, np.nan_to_num([mean - low, high - mean]), color=colour, alpha=0.9,
                            elinewidth=0.7, lw=1.2, marker=markers[i % len(markers)], ms=4, label=name)  # fmt: skip
        figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7.5, frameon=False, ncols=8, loc="outside lower center")
        axes[0].set_ylabel("grey: plain sampling")
        return _png(figure)


def _titles(rate: bool) -> dict[str, str]:
    return {"proxy": "Proxy reward", "gold": "Gold judge, all right" if rate else "Gold judge's score",
            "diversity": "Diversity among right samples" if rate else "Diversity within a prompt"}  # fmt: skip


def _scatter(ax: Any, x: list[float], y: list[Interval], colour: str, labels: list[str], filled: list[bool], name: str,
             dark: bool, marker: str = "o", below: bool = False) -> None:  # fmt: skip
    from matplotlib.patheffects import withStroke

    mean = np.array([v["mean"] for v in y], float)
    low, high = (np.array([v[end] if v[end] is not None else np.nan for v in y], float) for end in ("low", "high"))
    ends = np.nan_to_num(np.maximum([mean - low, high - mean], 0.0))
    ax.plot(x, mean, color=colour, lw=1.4, ls=(0, (2, 1.5)) if below else "-", label=name, marker=marker, ms=4.6,
            mfc=_ink(dark)[2], mec=colour, mew=1.3, zorder=3)  # fmt: skip
    ax.errorbar(x, mean, ends, fmt="none", ecolor=colour, elinewidth=0.9, alpha=0.55, zorder=2)
    falls = len(mean) > 1 and mean[-1] < mean[0]
    side = 1 if below or falls else -1
    for xi, yi, label, solid in zip(x, mean, labels, filled, strict=True):
        if solid:
            ax.plot([xi], [yi], marker=marker, ms=6.4, color=colour, zorder=4)
        if xi > 0:  # the base needs no label, and both curves start there
            note = ax.annotate(label, (xi, yi), (5 * side, -10 if below and not falls else 4), fontsize=7, color=colour,
                               textcoords="offset points", ha="left" if side > 0 else "right", zorder=5,
                               fontweight="bold" if solid else "normal")  # fmt: skip
            note.set_path_effects([withStroke(linewidth=2.2, foreground=_ink(dark)[2])])


def _percent(ax: Any, values: Sequence[Interval]) -> None:
    """Labels a rate's axis in per cent; leaves other scales alone."""
    if values and all(0 <= v["mean"] <= 1 for v in values):
        ax.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")


def _line(ax: Any, history: Sequence[Mapping[str, Any]], clock: str, name: str, colour: str) -> bool:
    rows = [row for row in history if row.get(name) is not None and np.isfinite(row[name])]
    if not rows:
        return False
    x, values = [row[clock] for row in rows], unflatten(rows, name)
    ax.fill_between(x, [v["low"] for v in values], [v["high"] for v in values], color=colour, alpha=0.18, lw=0)
    ax.plot(x, [v["mean"] for v in values], color=colour, lw=1.8, marker="o" if len(rows) < 40 else None, ms=3.6)
    return True


def _training_reward(ax: Any, history: Sequence[Mapping[str, Any]], clock: str, colour: str, dark: bool) -> bool:
    rows = [row for row in history if row.get("reward/mean") is not None and np.isfinite(row["reward/mean"])]
    if not rows:
        return False
    x, y = np.array([row[clock] for row in rows]), np.array([row["reward/mean"] for row in rows], float)
    half = max(1, len(y) // 25)
    smooth = [y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))]
    ax.plot(x, y, color=colour, lw=0.8, alpha=0.3)
    ax.plot(x, smooth, color=colour, lw=1.4, ls=(0, (2, 1.2)), label="training samples, smoothed")
    ax.legend(loc="lower right", frameon=False, fontsize=7.5)
    return True


def _nothing(ax: Any, dark: bool) -> None:
    ax.text(0.5, 0.5, "not measured in this run", transform=ax.transAxes, ha="center", color=_ink(dark)[1])
    ax.set_yticks([])


def _colours(dark: bool) -> dict[str, str]:
    return {**COLOURS, **DARK} if dark else COLOURS


def _ink(dark: bool) -> tuple[str, str, str]:
    return ("#e8e6e1", "#a5a29b", "#1d1f23") if dark else ("#23252a", "#6f6c66", "#ffffff")


@contextlib.contextmanager
def _style(dark: bool, size: float = 9) -> Iterator[Any]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # draws to memory by itself: no pyplot, no backend, nothing global

    ink, soft, _ = _ink(dark)
    settings: Any = {
        "font.size": size, "axes.titlesize": size + 0.5, "axes.titlepad": 9, "text.color": ink, "axes.labelcolor": soft,
        "axes.titlecolor": ink, "xtick.color": soft, "ytick.color": soft, "axes.edgecolor": soft, "axes.linewidth": 0.7,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": soft,
        "grid.alpha": 0.16, "grid.linewidth": 0.7, "axes.axisbelow": True, "xtick.major.size": 2.5,
        "ytick.major.size": 2.5, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
        "font.family": ["DejaVu Sans"],
    }  # fmt: skip
    with rc_context(settings):
        yield Figure


def _png(figure: Any, dpi: int = 170) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, transparent=True, metadata={"Software": None},
                   bbox_inches="tight", pad_inches=0.04)  # fmt: skip
    return buffer.getvalue()
