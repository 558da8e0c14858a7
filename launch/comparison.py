"""Writes docs/comparison.md and docs/comparison.png: training by reward, training by preference and test-time methods at equal calls.

  python -m pytest tests/test_curves.py -m slow                                                          # what is trained
  python -m alignment_jax evaluate --methods=all --nfe=32,106,320 --out=tests/curves/test_time           # what is steered
  python launch/comparison.py

A trained model spends 100 thousand network calls before its first picture and 8 or 16 a picture then; a steered one spends
BUDGET a picture from the first on: over 1 024 pictures it is the same.
"""

import json
from pathlib import Path
from typing import Any

from alignment_jax.algorithms import ALGORITHMS
from alignment_jax.training.calls import network_calls

ROOT = Path(__file__).parents[1]
CURVES = ROOT / "tests" / "curves"
CALLS, SAMPLES, BUDGET = 100_000, 1024, 106
PARADIGMS = {"reward": "fine-tuning by a reward", "preference": "fine-tuning by preferences or examples", "test time": "at test time"}
WORDS = """\
Counts are in thousands, of the whole: training, and at test time 1 024 pictures; labels are drawn and scored once before. Proxy: the
reward that is followed, higher is better, 0 the best. Gold: the share of samples of held-out prompts in which a judge that no method
sees finds all that was asked for; 95 % intervals over prompts; seed 0. Watched: the same on 32 of these prompts before and after
training, sampled alike. Diversity: pixel distance within a prompt among right samples, relative to the base at guidance 2. KL: of the
paths to the base, in nats. Seconds: of processors, all of training and its evaluation, and at test time wall time of 1 024 pictures
beside other work, on another machine; those of srpo, smpo, spin, rank_dpo, flow_grpo, lee, lpo and semi_online are of a
busy machine, about four times as many. MB: the process's peak, at test time the temporaries of a batch. An alarm: the proxy
rose and gold fell."""
COLOURS = {"reward": "C0", "preference": "C2", "test time": "C3"}


def rows() -> list[dict[str, Any]]:
    """One row a method, with everything in the units of the page; those of equal calls only."""
    return sorted(trained() + steered(), key=lambda r: (list(PARADIGMS).index(r["paradigm"]), -r["gold"]["mean"]))


def trained() -> list[dict[str, Any]]:
    """Rows of tests/curves whose training cost CALLS, give or take 3 %."""
    found = []
    for path in sorted(CURVES.glob("*.json")):
        c = json.loads(path.read_text())
        if "network_calls" not in c or abs(c["network_calls"] / CALLS - 1) > 0.03:
            continue
        steps, counts, sampling = c["config"]["steps"], c["calls_a_step"], c["config"]["sampling"]
        a_sample = sampling["num_steps"] * (2 if sampling["guidance_scale"] != 1 else 1)
        scores = ALGORITHMS[c["method"]].reward
        pairs = 4096 if "pairs" in c["config"]["data"] else 0
        found.append({
            "name": c["name"], "paradigm": "reward" if scores and c["method"] != "online" else "preference",
            "labels": f"{pairs} pairs" if pairs else "24 000 captions" if "labels" in c["config"]["data"] else "",
            "queries": counts.get("reward", 0) * steps, "query_gradients": counts.get("reward backward", 0) * steps,
            "forwards": counts.get("network", 0) * steps, "backwards": counts.get("network backward", 0) * steps,
            "a_sample": a_sample, "seconds": c.get("cpu_seconds"), "memory": c.get("peak_bytes"), "gold": c["aligned"]["gold"],
            "proxy": c["aligned"]["proxy"], "diversity": _ratio(c["aligned"]["diversity"], c["base"]["diversity"]), "kl": c["kl"],
            "alarm": c["alarm"]["fired"], "seed": c["seed"], "watched": [c["over_time"][i]["gold/all"]["mean"] for i in (0, -1)],
        })  # fmt: skip
    return found


def steered() -> list[dict[str, Any]]:
    """Rows of tests/curves/test_time, each at the largest measured budget of at most BUDGET calls."""
    folder, found = CURVES / "test_time", []
    if not (folder / "base.json").exists():
        return []
    base = json.loads((folder / "base.json").read_text())["points"][0]
    for path in sorted(folder.glob("*.json")):
        c = json.loads(path.read_text())
        points = [p for p in c["points"] if p["calls"] <= BUDGET]
        if path.stem == "base" or not points or c["config"]["reward"] != "critters_proxy":
            continue
        p = max(points, key=lambda p: p["calls"])
        counts = p["counts"]
        found.append({
            "name": path.stem, "paradigm": "test time", "labels": "", "queries": counts.get("reward", 0) * SAMPLES,
            "query_gradients": counts.get("reward backward", 0) * SAMPLES, "forwards": counts.get("network", 0) * SAMPLES,
            "backwards": counts.get("network backward", 0) * SAMPLES, "a_sample": network_calls(counts), "seconds": None,
            "memory": None, "gold": p["gold"], "proxy": p["proxy"], "diversity": _ratio(p["diversity"], base["diversity"]), "kl": None,
            "alarm": False, "seed": c["seed"], "wall": p["seconds"] * SAMPLES, "temporary": p["temporary_bytes"],
        })  # fmt: skip
    return found


def _ratio(after: dict[str, Any], before: dict[str, Any]) -> float | None:
    return None if after["mean"] is None or not before["mean"] else after["mean"] / before["mean"]


def _bases() -> str:
    """What the base does, by its sampler, at guidance 2."""
    found = {c["config"]["sampling"]["eta"]: c["base"] for c in map(json.loads, (p.read_text() for p in CURVES.glob("*.json")))
             if c["config"]["sampling"]["guidance_scale"] == 1 and "flow_sde" not in c["config"]["sampling"]}  # fmt: skip
    said = [f"with eta {eta:g} gold {_value(b['gold'])}, proxy {_value(b['proxy'])}" for eta, b in sorted(found.items())]
    return f"The base itself at guidance 2, 16 calls a picture: {'; '.join(said)}."


def _value(v: dict[str, Any]) -> str:
    return f"{v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]"


def page() -> str:
    """The page's text."""
    head = ["method", "labels", "reward queries", "their gradients", "forwards", "backwards", "calls a picture", "seconds", "MB", "proxy",
            "gold", "watched", "diversity", "KL"]  # fmt: skip
    about = (__doc__ or "").strip().split("\n\n")
    text = ["# Three paradigms on one world, at equal compute", "", about[2].replace("BUDGET", str(BUDGET)), "", WORDS, "", _bases(), ""]
    table = rows()
    for paradigm, title in PARADIGMS.items():
        text += [f"## {title[0].upper()}{title[1:]}", "", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        text += [_row(r) for r in table if r["paradigm"] == paradigm] + [""]
    return "\n".join([*text, "![Gold against diversity and proxy](comparison.png)", "", "Made by", "", "```bash",
                      *(line.strip() for line in about[1].split("\n")), "```", ""])  # fmt: skip


def _row(r: dict[str, Any]) -> str:
    thousands = lambda n: f"{n / 1000:.0f}" if n else ""  # noqa: E731
    seconds, memory = r["seconds"] or r.get("wall"), r["memory"] or r.get("temporary")
    cells = [f"`{r['name']}`", r["labels"], thousands(r["queries"]), thousands(r["query_gradients"]), thousands(r["forwards"]),
             thousands(r["backwards"]), str(r["a_sample"]), f"{seconds:.0f}" if seconds else "", f"{memory / 1e6:.0f}" if memory else "",
             _value(r["proxy"]), _value(r["gold"]) + (" (alarm)" if r["alarm"] else ""),
             "{:.3f} → {:.3f}".format(*r["watched"]) if "watched" in r else "",
             "–" if r["diversity"] is None else f"{r['diversity']:.2f}", "" if r["kl"] is None else f"{r['kl']:.3g}"]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def figure(path: Path) -> None:
    """Gold against diversity, and gold against the proxy; a point with its interval for each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(14, 7), sharey=True)
    for r in rows():
        gold = r["gold"]
        ends = [[gold["mean"] - gold["low"]], [gold["high"] - gold["mean"]]]
        for axis, x in zip(axes, (r["diversity"], r["proxy"]["mean"]), strict=True):
            if x is not None:
                axis.errorbar(x, gold["mean"], yerr=ends, fmt="o", color=COLOURS[r["paradigm"]], ms=5, lw=0.8)
                axis.annotate(r["name"], (x, gold["mean"]), xytext=(4, 3), textcoords="offset points", fontsize=7)
    base = json.loads((CURVES / "default.json").read_text())["base"]["gold"]
    for axis, label in zip(axes, ("pixel diversity among right samples, relative to the base", "proxy reward"), strict=True):
        axis.axhspan(base["low"], base["high"], color="0.85", zorder=0)
        axis.set_xlabel(label)
    axes[0].set_ylabel("gold: all asked-for attributes right (grey: the base, guided)")
    handles = [plt.Line2D([], [], marker="o", ls="", color=COLOURS[k], label=title) for k, title in PARADIGMS.items()]
    axes[1].legend(handles=handles, fontsize=9)
    fig.tight_layout()
    fig.savefig(path, dpi=110)


if __name__ == "__main__":
    (ROOT / "docs" / "comparison.md").write_text(page())
    figure(ROOT / "docs" / "comparison.png")
