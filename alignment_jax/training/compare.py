"""Test-time methods beside each other at equal numbers of network calls: proxy, gold, diversity, calls, seconds, memory."""

from __future__ import annotations

import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..data import prompts as prompt_files
from ..evaluation import figures
from ..evaluation.over_optimisation import alarm
from ..evaluation.summary import measurement, plain
from ..rewards import JUDGES
from ..rewards.judge import by_reward
from ..test_time import TEST_TIME
from . import build, steering
from .calls import network_calls
from .checkpoint import save_json
from .generate import load_run, pictures, split
from .logging import machine

ROWS = 128  # of the network at once: what a batch of prompts with all their particles comes to
KINDS = ("gold", "proxy", "diversity")


def compare(file: str, names: Sequence[str], nfes: Sequence[int], out: str | Path, *, seed: int = 0, run: str = "",
            sizes: dict[str, int] | None = None) -> str:  # fmt: skip
    """Measures the methods that `file` names at each budget; NAME.json in `out` grows point by point, then table and figure of all there.

    Plain sampling by the file's first config is measured once, as "base"; a method whose sampler is another has its own "base" in
    its file. run: a run that is steered instead of the model itself. sizes: num_prompts, samples instead of the configs'. Budgets
    too small for a method are left out. Returns the table. Raises ValueError for a name that the file does not have, and for a
    method that no budget is enough for.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"no config at {file}; run this in a checkout of the project, or give --config")
    module = runpy.run_path(file)
    names = module["ARGUMENTS"] if list(names) == ["all"] else names
    configs = {name: module["get_config"](name) for name in (module["ARGUMENTS"][0], *names)}
    plans = {name: planned(configs[name], nfes) for name in names}  # what is wrong is said before work
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for config in configs.values():
        config.update(sizes or {})
    first, plain_ = configs[module["ARGUMENTS"][0]], dict[str, Any]()
    if not (folder / "base.json").exists():
        _write(folder / "base.json", first, [measured(first, None, seed, run)], seed, run)
    for name in names:
        config, sampling = configs[name], str(configs[name].sampling)
        if sampling != str(first.sampling) and sampling not in plain_:
            plain_[sampling] = measured(config, None, seed, run)
        points = []
        for nfe, settings in plans[name]:
            print(f"{name} within {nfe} calls: {settings}", flush=True)
            points.append({"nfe": nfe, **measured(config, settings, seed, run)})
            _write(folder / f"{name}.json", config, points, seed, run, base=plain_.get(sampling))
    return page(folder)


def planned(config: Any, nfes: Sequence[int]) -> list[tuple[int, dict[str, Any]]]:
    """For each budget of nfe network calls a sample the method's settings with the largest budget of at most these.

    A budget below the least, and one that buys no more than the one before it, is left out. Raises ValueError if all are.
    """
    settings = dict(config.method)
    bundle, _, _ = build.described(config)
    sampler, guidance = build.sampler(config, bundle)
    steering.method(bundle=bundle, sampler=sampler, guidance=guidance, reward=build.reward(config), **split(settings))
    budget = TEST_TIME[settings["name"]].budget

    def given(n: int) -> dict[str, Any]:
        return settings | ({budget: n} if budget else {})

    def calls(n: int) -> int:
        return network_calls(steering.cost(**split(given(n)), sampler=sampler, guidance_scale=guidance.scale))

    least = calls(1)
    more = calls(2) - least
    found: list[tuple[int, dict[str, Any]]] = []
    for nfe in sorted(n for n in nfes if n >= least):
        n = 1 + (nfe - least) // more if more else 1
        while n > 1 and calls(n) > nfe:  # not all methods' costs are a straight line
            n -= 1
        if all(given(n) != before for _, before in found):
            found.append((nfe, given(n)))
    if not found:
        raise ValueError(f"method {settings['name']} costs at least {least} network calls a sample here; --nfe={max(nfes)} is below that")
    return found


def measured(config: Any, settings: dict[str, Any] | None, seed: int, run: str) -> dict[str, Any]:
    """One point: the method (None: plain sampling) on the config's prompts, judged."""
    if run:
        bundle, params, _ = load_run(run)
    else:
        bundle, params = build.model(config)
    reward = build.reward(config)
    assert reward is not None
    sampler, guidance = build.sampler(config, bundle)
    texts = [p for p in prompt_files.load(config.prompts)[: config.num_prompts] for _ in range(config.samples)]
    counts = (steering.cost(**split(settings), sampler=sampler, guidance_scale=guidance.scale) if settings
              else {"network": sampler.num_steps * (1 if guidance.scale == 1 else 2), "decode": 1})  # fmt: skip
    batch = min(max(1, ROWS * sampler.num_steps // counts["network"]), len(texts))
    keys = jax.random.split(jax.random.key(seed), len(texts))
    meter: dict[str, float] = {}
    images, info = pictures(bundle, params, texts, keys, dict(config.sampling), batch=batch, method=settings,
                            reward=reward if settings else None, meter=meter)  # fmt: skip
    judge = JUDGES[config.judge]() if config.judge in JUDGES else by_reward(build.one_reward(config.judge))
    verdict = judge.look(images, judge.targets(texts))
    proxy = by_reward(reward).look(images, np.asarray(texts, object))["right"]
    grid = lambda x: np.asarray(x).reshape(config.num_prompts, config.samples, *np.shape(x)[1:])  # noqa: E731
    numbers = measurement(right=grid(verdict["right"]), attributes={}, proxy=grid(proxy),
                          images=grid(images) if config.samples > 1 else None)  # fmt: skip
    means = {name: float(np.mean(value)) for name, value in info.items()}
    found = {"method": settings, "calls": network_calls(counts), "counts": counts, **{k: numbers[k] for k in KINDS}, "info": means, **meter,
             "batch": batch, "machine": machine()}  # fmt: skip
    return dict(plain(found))


def page(folder: Path) -> str:
    """Writes comparison.md and comparison.png of all methods measured in a folder; returns the table."""
    base, bases, curves = _read(folder)
    rate = base["gold"]["high"] <= 1 and base["gold"]["low"] >= 0
    (folder / "comparison.png").write_bytes(figures.budget_curves(curves, base, rate=rate))
    rows = ["| method | settings | calls | decodes | reward | its gradient | gold | proxy | diversity | seconds | temporary MB | alarm |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |", _row("base", base, base, "")]  # fmt: skip
    for name in sorted(curves):
        plain_ = bases.get(name, base)
        points = [plain_, *curves[name]]
        if name in bases:
            rows.append(_row(f"plain, as {name} samples", plain_, base, ""))
        fired = alarm([p["proxy"] for p in points], [p["gold"] for p in points])["fired"]
        rows += [_row(name, point, base, "fires" if fired and i == len(curves[name]) - 1 else "") for i, point in enumerate(curves[name])]
    text = "\n".join(rows) + "\n"
    about = ("Test-time methods at equal numbers of network calls a sample (a backward pass counted as two). Gold: a judge that no method "
             "sees; proxy: the reward they follow; both with 95 % intervals over prompts. Diversity: within a prompt among right samples, "
             "relative to plain sampling. Seconds and temporary memory: of one sample, of one batch, on the machine that the method's "
             "file names beside the point. The alarm fires where the proxy rose and gold fell.\n\n")  # fmt: skip
    (folder / "comparison.md").write_text(f"{about}{text}\n![Over the calls](comparison.png)\n")
    return text


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """(plain sampling, that of methods with another sampler, the points of all methods)."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
    base = found.pop("base")["points"][0]
    return base, {name: f["base"] for name, f in found.items() if f.get("base")}, {name: f["points"] for name, f in found.items()}


def _row(name: str, point: dict[str, Any], base: dict[str, Any], fired: str) -> str:
    counts, settings = point["counts"], {k: v for k, v in (point["method"] or {}).items() if k != "name"}
    value = lambda v: "–" if v["mean"] is None else f"{v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]"  # noqa: E731
    spread, own = base["diversity"]["mean"], point["diversity"]["mean"]
    return (f"| {name} | {', '.join(f'{k} {v}' for k, v in settings.items())} | {point['calls']} | {counts.get('decode', 0)} | "
            f"{counts.get('reward', 0)} | {counts.get('reward backward', 0)} | {value(point['gold'])} | {value(point['proxy'])} | "
            f"{'–' if own is None or not spread else f'{own / spread:.2f}'} | {point['seconds']:.2f} | "
            f"{point['temporary_bytes'] / 1e6:.0f} | {fired} |")  # fmt: skip


def _write(path: Path, config: Any, points: list[dict[str, Any]], seed: int, run: str, base: dict[str, Any] | None = None) -> None:
    about = {"name": path.stem, "seed": seed, "run": run, "config": json.loads(config.to_json_best_effort())}
    save_json(path, {**about, **({"base": base} if base else {}), "points": points})
