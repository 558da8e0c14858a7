"""Writes README.md's table of methods from the code and from tests/curves.

  python launch/methods_table.py
"""

import json
from pathlib import Path

from alignment_jax.algorithms import ALGORITHMS

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- methods: launch/methods_table.py -->\n", "<!-- /methods -->\n"


def table() -> str:
    """The table as markdown: a row for each method and each of its measured configs."""
    curves = [json.loads(p.read_text()) for p in sorted((ROOT / "tests" / "curves").glob("*.json"))]
    rows = ["| method | loss form | paper | what it does | critters config | gold, 95 % interval | diversity | seconds |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, entry in ALGORITHMS.items():
        head = f"| `{name}` | {entry.family} | {_link(entry.paper)} | {entry.summary} "
        measured = [_measured(c) for c in curves if c["method"] == name]
        rows += [head + m for m in measured] or [head + "| | | | |"]
    if curves:
        base = {c["name"]: c["base"]["gold"] for c in curves}
        rows += ["", f"The base, at its own best guidance: gold {_interval(base['default'])}, diversity 1; with the noise of the "
                 f"sampler that DDPO needs {_interval(base['ddpo'])}. Gold: the share of 1 024 samples of "
                 "held-out prompts in which a judge that no training sees finds all that was asked for. Diversity: mean pixel "
                 "distance within a prompt among right samples, relative to the base. Seconds: training and evaluation on two "
                 "CPU cores that were shared with other work. Seed 0."]  # fmt: skip
    return "\n".join(rows) + "\n"


def _measured(curve: dict) -> str:
    before, after = (curve[m]["diversity"]["mean"] for m in ("base", "aligned"))
    ratio = "–" if after is None else f"{after / before:.2f}"  # no prompt with two right samples to compare
    alarm = " (alarm)" if curve["alarm"]["fired"] else ""
    return (f"| `critters.py:{curve['name']}` | {_interval(curve['aligned']['gold'])}{alarm} | {ratio} "
            f"| {curve['wall_seconds']['total']:.0f} |")  # fmt: skip


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
