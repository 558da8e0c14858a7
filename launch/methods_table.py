"""Writes README.md's table of methods and docs/critters_methods.png from the code, the tests and tests/curves.

  python launch/methods_table.py
"""

import ast
import json
import runpy
from pathlib import Path

from alignment_jax.algorithms import ALGORITHMS

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- methods: launch/methods_table.py -->\n", "<!-- /methods -->\n"


def table() -> str:
    """The table as markdown: a row for each method and each of its measured configs."""
    curves, proofs, full = curves_(), proofs_(), full_size()
    rows = ["| method | loss form | paper | what it does | evidence | critters config | gold, 95 % interval | diversity | KL | calls "
            "| seconds |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, entry in ALGORITHMS.items():
        measured = [c for c in curves if c["method"] == name]
        evidence = [f"M {proofs[name]}" if proofs[name] else "", "C" if measured else "",
                    f"S {', '.join(full[name])}" if full[name] else ""]  # fmt: skip
        where = f"alignment_jax/{'/'.join(entry.factory.__module__.split('.')[1:])}.py"
        head = (f"| [`{name}`]({where}) | {entry.family} | {_link(entry.paper)} | {entry.summary} "
                f"| {'; '.join(filter(None, evidence))} ")  # fmt: skip
        heads = [head, *["| | | | | "] * (len(measured) - 1)]
        rows += [h + c for h, c in zip(heads, [_measured(c) for c in measured] or ["| | | | | | |"], strict=True)]
    if curves:
        base = {c["name"]: c["base"]["gold"] for c in curves}
        rows += ["", "Evidence. M: that many tests hold the method to a closed form, an independent computation or another method's limit; "
                 "C: a measured curve on the critters, in tests/curves; S: configs with the paper's settings that fit together at "
                 "full size.",
                 "", f"The base, at its own best guidance: gold {_interval(base['default'])}, diversity 1; with the noise of the "
                 f"sampler that DDPO needs {_interval(base['ddpo'])}. Gold: the share of 1 024 samples of "
                 "held-out prompts in which a judge that no training sees finds all that was asked for. Diversity: mean pixel "
                 "distance within a prompt among right samples, relative to the base. KL: of the paths, in nats. Calls: of the network "
                 "in training, in thousands, a backward pass counted as two. Seconds: training and evaluation on two "
                 "CPU cores that were shared with other work. Seed 0.",
                 "", "![Gold against diversity and KL](docs/critters_methods.png)"]  # fmt: skip
    return "\n".join(rows) + "\n"


def curves_() -> list[dict]:
    """What was measured, a config each."""
    return [json.loads(p.read_text()) for p in sorted((ROOT / "tests" / "curves").glob("*.json"))]


def proofs_() -> dict[str, int]:
    """For every method the number of test functions, outside the shared table, that build it: themselves or by a helper."""
    counts = dict.fromkeys(ALGORITHMS, 0)
    for path in sorted((ROOT / "tests" / "algorithms").glob("test_*.py")):
        if path.name == "test_every_algorithm.py":
            continue
        functions = {f.name: f for f in ast.parse(path.read_text()).body if isinstance(f, ast.FunctionDef)}
        words = {name: {n.id for n in ast.walk(f) if isinstance(n, ast.Name)} | {n.value for n in ast.walk(f) if isinstance(n, ast.Constant)
                 and isinstance(n.value, str)} for name, f in functions.items()}  # fmt: skip
        for name in functions:
            if name.startswith("test_"):
                seen, open_ = {name}, [name]
                while open_:  # helpers of the same file
                    new = (words[open_.pop()] & functions.keys()) - seen
                    seen |= new
                    open_ += new
                used = set().union(*(words[f] for f in seen))
                for method in counts:
                    counts[method] += method in used
    return counts


def full_size() -> dict[str, list[str]]:
    """For every method the Stable Diffusion configs that use it."""
    found: dict[str, list[str]] = {name: [] for name in ALGORITHMS}
    for file in ("sd15", "sd21", "sdxl"):
        config = runpy.run_path(str(ROOT / "configs" / f"{file}.py"))
        for argument in config["ARGUMENTS"]:
            found[config["get_config"](argument).method.name].append(f"`{file}.py:{argument}`")
    return found


def figure(path: Path) -> None:
    """Gold against diversity and against KL, a point with its interval for each config, coloured by loss form."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = [c for c in curves_() if c["method"] in ALGORITHMS]
    families = sorted({ALGORITHMS[c["method"]].family for c in curves})
    fig, axes = plt.subplots(1, 2, figsize=(13, 6.5), sharey=True)
    for c in curves:
        gold, colour = c["aligned"]["gold"], f"C{families.index(ALGORITHMS[c['method']].family)}"
        after, before = (c[m]["diversity"]["mean"] for m in ("aligned", "base"))
        for axis, x in zip(axes, (None if after is None else after / before, max(c["kl"], 0.1))):
            if x is not None:
                ends = [[gold["mean"] - gold["low"]], [gold["high"] - gold["mean"]]]
                axis.errorbar(x, gold["mean"], yerr=ends, fmt="o", color=colour, ms=5, lw=1)
                axis.annotate(c["name"], (x, gold["mean"]), xytext=(4, 3), textcoords="offset points", fontsize=7)
    base = curves[0]["base"]["gold"]
    for axis, label in zip(axes, ("pixel diversity among right samples, relative to the base", "KL of the paths to the base [nats]")):
        axis.axhspan(base["low"], base["high"], color="0.85", zorder=0)
        axis.set_xlabel(label)
    axes[0].set_ylabel("gold: all asked-for attributes right")
    axes[1].set_xscale("log")
    axes[0].text(0.02, base["mean"], "base, guided", transform=axes[0].get_yaxis_transform(), fontsize=7, va="center")
    handles = [plt.Line2D([], [], marker="o", ls="", color=f"C{i}", label=f) for i, f in enumerate(families)]
    axes[1].legend(handles=handles, fontsize=8, title="loss form")
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def _measured(curve: dict) -> str:
    before, after = (curve[m]["diversity"]["mean"] for m in ("base", "aligned"))
    ratio = "–" if after is None else f"{after / before:.2f}"  # no prompt with two right samples to compare
    alarm = " (alarm)" if curve["alarm"]["fired"] else ""
    calls = f"{curve['network_calls'] / 1000:.0f}" if "network_calls" in curve else ""
    return (f"| `critters.py:{curve['name']}` | {_interval(curve['aligned']['gold'])}{alarm} | {ratio} | {curve['kl']:.3g} "
            f"| {calls} | {curve['wall_seconds']['total']:.0f} |")  # fmt: skip


def _interval(value: dict) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _link(paper: str) -> str:
    number = paper.removeprefix("arXiv ")
    return f"[{number}](https://arxiv.org/abs/{number})" if paper.startswith("arXiv") else paper


def written(readme: str) -> str:
    """The README's text with the present table."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(written(path.read_text()))
    figure(ROOT / "docs" / "critters_methods.png")
