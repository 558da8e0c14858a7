"""One self-contained page that says what a run did: verdict, pictures, curves, numbers, and what to do next."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import figures
from .over_optimisation import gao_fit
from .summary import plain

TEMPLATE = Path(__file__).with_name("report_template.html.jinja")
SMALL = 64  # pictures up to this size are shown pixel by pixel
MODELS = ("base", "aligned", "best_of_n")
DIVERSITIES = {
    "pixel_right": ("Pixel distance among right samples", "the declared measure"),
    "pixel": ("Pixel distance among all samples", "errors count as diversity"),
    "feature": ("Feature distance", "cosine, in the gold judge's features"),
    "vendi": ("Vendi score", "effective number of different samples of a prompt"),
}


def write_report(workdir: str | os.PathLike[str], *, summary: Mapping[str, Any], history: Sequence[Mapping[str, Any]],
                 prompts: Sequence[str], images: Mapping[str, ArrayLike], right: Mapping[str, ArrayLike],
                 blend: Sequence[Mapping[str, Any]] = (), best_of_n: Sequence[Mapping[str, Any]] = (),
                 selected_from: int = 8, gain: Mapping[str, float] | None = None,
                 diversity_ratio: Mapping[str, Any] | None = None, real: Mapping[str, Any] | None = None,
                 costs: Mapping[str, Mapping[str, float]] | None = None, trained: Mapping[str, Any] | None = None,
                 config_text: str = "", commands: Mapping[str, str] | None = None, notes: Sequence[str] = (),
                 rate: bool | None = None, pairs: int = 24, groups: int = 3) -> Path:  # fmt: skip
    """Writes workdir/report.html and returns its path; one file, nothing is loaded from anywhere.

    Args:
      summary: the object of summary.json (`summary.summary`).
      history: rows of metrics.jsonl with the catalogue's names, "step" and "time" (seconds of training); intervals as
        name/low and name/high (`statistics.flatten`). Drawn: reward/mean, proxy, gold/all, diversity/pixel_right and
        kl/path.
      prompts: P held-out prompts.
      images: {"base": [P, G, H, W, C], "aligned": [P, G, H, W, C]} in [0, 1], entry by entry from the same noise;
        optionally "best_of_n" [P, 1 or G, H, W, C].
      right: the gold judge's all-right verdicts, {"base": [P, G], "aligned": [P, G]}, and "best_of_n" if pictured.
      blend: the reward-KL curve by blending, [{"lambda", "kl", "gold": Interval, "proxy": Interval, "diversity"?}].
      best_of_n: the base's best-of-n curve, [{"n", "gold": Interval, "proxy": Interval}].
      selected_from: the n of the model "best_of_n" in summary and images.
      gain: gold of aligned over base on the same prompts (`statistics.paired_bootstrap`).
      diversity_ratio: aligned to base with its interval (`diversity.pixel_diversity_ratio`); None: the plain ratio.
      real: real renders' values, as a summary's "diversity".
      costs: per picture, {"base" | "aligned" | "best_of_n": {"network_calls", "reward_calls"?, "seconds"}}.
      trained: what was trained, label -> text. config_text: the whole config. commands: label -> shell command.
      notes: sentences on how it was measured. rate: gold is the share of right samples, not a score (None: it is where it
        lies in [0, 1]). pairs, groups: how many before/after pairs and prompts' groups are shown:
        the first ones, none chosen.

    Raises ValueError when the shapes of prompts, images and right do not belong together.
    """
    s = plain(summary)
    pictures = {name: np.asarray(value) for name, value in images.items()}
    verdicts = {name: np.asarray(value, bool) for name, value in right.items()}
    _check(prompts, pictures, verdicts)
    draw_panel = bool(blend or best_of_n)
    names = {"base": "Base", "aligned": "Aligned", "best_of_n": f"Best of {selected_from}"}
    percent = all(0 <= _get(s, m, "gold", end, default=0.0) <= 1 for m in MODELS for end in ("mean", "low", "high"))
    percent = percent if rate is None else rate
    ratio = plain(diversity_ratio) if diversity_ratio else _plain_ratio(s)
    context = {
        "s": s, "names": names, "models": MODELS, "percent": percent, "ratio": ratio, "gain": plain(gain),
        "verdict": _verdict(s, ratio, percent), "verb": _verb(s),
        "pairs": _pairs(prompts, pictures, verdicts, pairs), "groups": _groups(prompts, pictures, verdicts, groups),
        "curves": _picture(partial(figures.curves, rate=percent), list(history)),
        "panel": _picture(partial(figures.over_optimisation_panel, rate=percent), list(blend), list(best_of_n)) if draw_panel else None,
        "attributes": _attributes(s), "columns": _columns(s), "diversity": _diversity(s, plain(real or {}), percent),
        "real": bool(real) or any("nuisance_recall" in s[m]["diversity"] for m in ("base", "aligned")),
        "large": pictures["base"].shape[2] > SMALL,
        "peak": _peak(blend), "costs": _costs(plain(costs or {})), "trained": trained or {},
        "config_text": config_text, "commands": commands or {}, "notes": notes, "pair_count": len(prompts),
    }  # fmt: skip
    path = Path(workdir) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".html.partial")
    unfinished.write_text(_render(context), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def number(value: float | None, percent: bool = False, digits: int = 3) -> str:
    """A number for people; an en dash where it is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    return (f"{100 * value:.1f}\u00a0%" if percent else f"{value:.{digits}f}").replace("-", "−")


def ends(value: Mapping[str, Any] | None, percent: bool = False, digits: int = 3) -> str:
    """An Interval's ends for people, "54.3–60.3"; empty where they are not known."""
    if not isinstance(value, Mapping) or value.get("low") is None or value.get("high") is None:
        return ""
    scale, digits = (100, 1) if percent else (1, digits)
    low, high = (f"{scale * value[end]:.{digits}f}" for end in ("low", "high"))
    return f"{low} to {high}".replace("-", "−") if value["low"] < 0 else f"{low}–{high}"


def _render(context: Mapping[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)  # fmt: skip
    environment.filters.update(number=number, ends=ends)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(context)


def _verb(s: Mapping[str, Any]) -> str:
    base, aligned = s["base"]["gold"], s["aligned"]["gold"]
    if aligned["low"] is not None and base["high"] is not None and aligned["low"] > base["high"]:
        return "rose"
    if aligned["high"] is not None and base["low"] is not None and aligned["high"] < base["low"]:
        return "fell"
    return "same"


def _verdict(s: Mapping[str, Any], ratio: Mapping[str, Any] | None, percent: bool) -> str:
    base, aligned = s["base"]["gold"], s["aligned"]["gold"]
    here, there = (f"{number(v['mean'], percent)} ({ends(v, percent)})" for v in (base, aligned))
    said = {"rose": f"Gold rose from {here} to {there}", "fell": f"Gold fell from {here} to {there}",
            "same": f"Gold did not change beyond the noise: {here} before, {there} after"}[_verb(s)]  # fmt: skip
    if ratio and ratio["mean"] is not None:
        said += f", with {ratio['mean']:.2f} of the base’s diversity"
    return said + (", and the over-optimisation alarm fired." if s["alarm"]["fired"] else ", and the alarm is silent.")


def _plain_ratio(s: Mapping[str, Any]) -> dict[str, Any] | None:
    before, after = (_get(s, m, "diversity", "pixel_right", "mean") for m in ("base", "aligned"))
    return {"mean": after / before, "low": None, "high": None, "n": 0} if before and after is not None else None


def _get(tree: Any, *path: str, default: Any = None) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return default if tree is None else tree


def _pairs(prompts: Sequence[str], images: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray],
           count: int) -> list[dict[str, Any]]:  # fmt: skip
    shown = [m for m in MODELS if m in images]
    return [{"prompt": prompts[i], "shots": [_shot(m, images[m][i, 0], right[m][i, 0]) for m in shown]}
            for i in range(min(count, len(prompts)))]  # fmt: skip


def _groups(prompts: Sequence[str], images: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray],
            count: int) -> list[dict[str, Any]]:  # fmt: skip
    shown = min(8, images["aligned"].shape[1])
    if shown < 2:
        return []
    return [{"prompt": prompts[i], "rows": [
        {"model": m, "shots": [_shot(m, images[m][i, j], right[m][i, j]) for j in range(shown)]}
        for m in ("base", "aligned")]} for i in range(min(count, len(prompts)))]  # fmt: skip


def _shot(model: str, image: np.ndarray, right: Any) -> dict[str, Any]:
    return {"model": model, "uri": _image(image), "right": bool(right)}


def _peak(blend: Sequence[Mapping[str, Any]]) -> str:
    """Where the fitted law of over-optimisation puts gold's peak; empty without a base and three other points."""
    base = [p["gold"]["mean"] for p in blend if p["lambda"] == 0]
    points = [(math.sqrt(p["kl"]), p["gold"]["mean"]) for p in blend if p["kl"] > 0]
    if not base or len({d for d, _ in points}) < 3:
        return ""
    fit = gao_fit([d for d, _ in points], [g - base[0] for _, g in points])
    law = f"Fitted to these points, gold = d (α − β log d) with d = √KL, α = {fit.alpha:.3f}, β = {fit.beta:.3f}, "
    if fit.peak > max(d for d, _ in points):
        return law + "has no peak among them."
    return law + f"peaks at √KL = {fit.peak:.2f}."


def _attributes(s: Mapping[str, Any]) -> dict[str, Any]:
    names = list(s["base"]["attribute"])
    rows = [{"name": name, "values": {m: _get(s, m, "attribute", name) for m in MODELS}} for name in names]
    lows = [v["low"] for row in rows for v in row["values"].values() if v and v["low"] is not None]
    start = math.floor(min(lows, default=0.0) * 10) / 10
    return {"rows": rows, "start": start, "span": max(1 - start, 1e-6)}


def _columns(s: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the scores of groups or aspects, and last of the worst one of each model, which need not be the same."""
    rows = [{"name": name, "note": "", "values": {m: _get(s, m, "columns", name) for m in MODELS}} for name in s["base"].get("columns", {})]
    if rows:
        least = {m: _get(s, m, "worst", default={}) for m in MODELS}
        who = {v["name"] for v in least.values() if v.get("name")}
        rows.append({"name": "Worst of these", "note": ", ".join(sorted(who)), "values": least})
    return rows


def _diversity(s: Mapping[str, Any], real: Mapping[str, Any], percent: bool) -> list[dict[str, Any]]:
    columns = {**{m: _get(s, m, "diversity", default={}) for m in ("base", "aligned")}, "real": real}
    rows: list[dict[str, Any]] = []
    # where gold is a score there are no right samples, and the declared measure is that of all
    shown = DIVERSITIES if percent else {**DIVERSITIES, "pixel": ("Pixel distance within a prompt", "the declared measure")}
    for key, (label, note) in shown.items():
        if key == "pixel_right" and not percent:
            continue
        values = {c: _interval(d.get(key)) for c, d in columns.items()}
        if any(values.values()):
            rows.append({"name": label, "note": note, "values": values, "minor": False})
    recalls = {c: d.get("nuisance_recall") or {} for c, d in columns.items()}
    kinds = list(recalls["base"])
    for kind in sorted(kinds, key=lambda k: k != "mean"):
        label = "Nuisance recall" if kind == "mean" else f"of {kind}"
        note = "variety in what no prompt names; real renders are 1" if kind == "mean" else ""
        values = {c: _interval(r.get(kind)) for c, r in recalls.items()}
        values["real"] = values["real"] or _interval(1.0)
        rows.append({"name": label, "note": note, "values": values, "minor": kind != "mean"})
    return rows


def _interval(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    return dict(value) if isinstance(value, Mapping) else {"mean": float(value), "low": None, "high": None, "n": None}


def _costs(costs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    labels = {"network_calls": ("Network calls a picture", 0), "reward_calls": ("Reward calls a picture", 0),
              "seconds": ("Seconds a picture", 4)}  # fmt: skip
    return [{"name": label, "digits": digits, "values": {m: _get(costs, m, key) for m in MODELS}}
            for key, (label, digits) in labels.items() if any(_get(costs, m, key) is not None for m in MODELS)]


def _picture(draw: Any, *data: Any) -> dict[str, str]:
    return {"light": _uri(draw(*data)), "dark": _uri(draw(*data, dark=True))}


def _image(image: np.ndarray, largest: int = 256) -> str:
    from PIL import Image

    picture = Image.fromarray(figures.enlarge(image[None], 1)[0])
    if max(picture.size) > largest:
        picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(picture.size) > SMALL:  # a photograph in PNG would be ten times as large
        picture.save(buffer, "JPEG", quality=92, subsampling=0)
        return _uri(buffer.getvalue(), "jpeg")
    picture.save(buffer, "PNG", optimize=True)
    return _uri(buffer.getvalue())


def _uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode("ascii")


def _check(prompts: Sequence[str], images: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> None:
    for name in ("base", "aligned"):
        if name not in images or name not in right:
            raise ValueError(f"images and right need 'base' and 'aligned'; got {sorted(images)} and {sorted(right)}")
    if images["base"].shape != images["aligned"].shape:
        raise ValueError(f"pictures before and after must have one shape; got {np.shape(images['base'])} and "
                         f"{np.shape(images['aligned'])}")  # fmt: skip
    for name, value in images.items():
        if name not in MODELS or value.ndim != 5 or len(prompts) != len(value):
            raise ValueError(f"images[{name!r}] must be one of {MODELS} and [P={len(prompts)}, G, H, W, C]; got "
                             f"shape {list(value.shape)}")  # fmt: skip
        if name not in right or right[name].shape != value.shape[:2]:
            raise ValueError(f"right[{name!r}] must be [P, G] = {list(value.shape[:2])} like its images; got "
                             f"{list(right[name].shape) if name in right else 'nothing'}")  # fmt: skip
