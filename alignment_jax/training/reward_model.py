"""Trains a reward model on preference pairs, and says how far it can be believed: accuracy, calibration, person by person."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from .. import weights
from ..algorithms.losses import noised
from ..data import answers
from ..data.answers import Answers, Lists
from ..data.sources import Source
from ..diffusion import fold_in, normal
from ..evaluation import agreement
from ..evaluation.summary import plain
from ..rewards import JUDGES, preference, trained
from ..rewards.annotators import by_reward
from ..rewards.augment import augment
from ..rewards.critters import encode
from . import build
from .checkpoint import Checkpointer, save_json
from .interrupt import Interrupt
from .logging import MetricLog
from .state import TrainState
from .workdir import claim, folder, whose

Array = jax.Array
Tree = Any
TIES = ("half", "davidson", "drop")
CHUNK, ENOUGH, TIMES = 256, 1024, (0.1, 0.3, 0.5, 0.7, 0.9)


def taught(teacher: Any, pairs: Answers, rows: np.ndarray) -> Answers:
    """The pairs with p = sigma(r_a - r_b) of a reward of pictures for the answers `rows`; the others stay as they were given.

    Its odds tell more than one yes or no: what is too little to learn pictures under noise from is enough to learn pictures
    from, and these teach the rest.
    """
    reward = build.reward({"reward": teacher})
    assert reward is not None
    compare, p = by_reward(reward, soft=True), pairs.p.astype(np.float64).copy()
    for i in range(0, len(rows), CHUNK):
        part = rows[i : i + CHUNK]
        a, b = (pairs.sides(part)[side] / np.float32(255) for side in ("a", "b"))
        p[part] = compare(np.random.default_rng(0), a, b, [pairs.prompts[j] for j in part])
    return pairs._replace(p=p)


def check(config: Any, pairs: Answers) -> None:
    """Raises ValueError for settings that the pairs cannot answer."""
    if pairs.lists and (config.ties != "half" or config.teacher):
        raise ValueError("ranked lists are learned by their whole order, ties by every order within them: set ties='half' and teacher=''; "
                         f"got {config.ties!r} and {config.teacher!r}. For a reward's ranking: label --list --annotator")  # fmt: skip
    if config.ties not in TIES:
        raise ValueError(f"ties {config.ties!r} is not known; choose one of {', '.join(TIES)}")
    soft = (np.abs(pairs.p - 0.5) > 1e-6) & (np.abs(pairs.p - 0.5) < 0.5 - 1e-6)
    if config.ties == "davidson" and soft.any():
        raise ValueError(f"ties='davidson' reads answers, 1, 0 or 1/2 for a tie; {soft.sum()} labels are shares between, such as "
                         f"{pairs.p[soft][0]:g}. Use ties='half'")  # fmt: skip
    wants = config.own or config.temperature or config.offset
    if wants and len(pairs.people) < 2:
        raise ValueError("own, temperature and offset tell annotators apart, and these pairs name "
                         f"{'one, ' + repr(pairs.people[0]) if pairs.people[0] else 'none'}; set all three to False")  # fmt: skip
    if config.own and config.reads == "noisy":
        raise ValueError("own=True, a score for each annotator, is for pictures; a reward of noisy states has one score")
    if config.offset and not pairs.ordered:
        raise ValueError("offset=True learns a liking for the picture shown first, and these pairs are stored winner first: "
                         "the order in which they were shown is not in them")  # fmt: skip


def train(config: Any, workdir: str | Path) -> dict[str, Any]:
    """Trains config's reward model into workdir and returns its summary; a workdir that holds checkpoints is resumed.

    Writes reward.safetensors and reward.json (what {"name": "trained", "folder": workdir} reads), summary.json and
    reliability.png. config: see configs/critters_reward.py.
    """
    from tqdm import tqdm

    workdir = folder(workdir)
    whose(workdir, config)
    about = {k: config[k] for k in ("reads", "trunk", "width", "model", "layers", "own")} | {"people": []}
    bundle = trained.network(about).bundle  # what is wrong is said before pairs are read
    base = build.model(ml_collections.ConfigDict({"model": config.model, "seed": 0}))[1] if bundle else None
    shape = (32, 32) if bundle is None else jax.eval_shape(bundle.decode, base, jnp.zeros((1, *bundle.sample_shape))).shape[1:3]
    pairs = answers.load(config.pairs, config.data_dir, shape)
    rows, held = answers.split(pairs.prompts, config.held_out)
    if config.teacher and not pairs.lists:
        pairs = taught(config.teacher, pairs, rows)
    check(config, pairs)
    if config.ties == "drop":
        rows = rows[pairs.p[rows] != 0.5]
    about["people"] = list(pairs.people)
    net = trained.network(about)

    def reader(data: Answers | Lists) -> Callable[[np.ndarray], dict[str, Any]]:
        texts: Any = encode(data.prompts) if bundle is None else {"tokens": bundle.tokenize(data.prompts)}
        return lambda indices: data.sides(indices) | {"text": jax.tree.map(lambda x: x[indices], texts)}

    batch = learned = reader(pairs)
    shown = rows
    if pairs.lists:
        learned, shown = reader(pairs.lists), answers.split(pairs.lists.prompts, config.held_out)[0]

    frozen = {} if base is None else {"params": base}
    tx = optax.chain(optax.clip_by_global_norm(1.0),
                     optax.adamw(optax.cosine_onecycle_schedule(config.steps, config.learning_rate), weight_decay=1e-2))  # fmt: skip
    state = _start(config, net, len(pairs.people), tx, frozen)
    step = jax.jit(partial(train_step, config, net, tx, len(rows)), donate_argnums=0)
    source = Source(len(shown), config.batch, config.seed, lambda i, rng: learned(shown[i]))
    claim(workdir, config)
    checkpoints = Checkpointer(workdir, keep=1)
    if checkpoints.steps():
        state, position = checkpoints.restore(state)
        source.set_state(position)
    print(f"pairs           {len(rows)} to train on, {len(held)} of other prompts held out, {len(pairs.people)} annotators\n"
          f"trained         {sum(x.size for x in jax.tree.leaves(state.trained)):,} parameters, {config.steps} steps of "
          f"{config.batch} {'lists' if pairs.lists else 'pairs'}", flush=True)  # fmt: skip
    start, log, stop = int(state.step), MetricLog(workdir, int(state.step)), Interrupt()
    with stop, tqdm(total=config.steps, initial=start, desc=config.name, unit="step") as bar:
        for number in range(start, config.steps):
            state, info = step(state, frozen, next(source))
            bar.update()
            last = number + 1 == config.steps
            if last or stop.asked or (number + 1) % config.checkpoint_every == 0:
                log.write(number + 1, info)
                checkpoints.save(state, source.get_state())
            if stop.asked and not last:
                print(f"stopped at step {number + 1}; the same command goes on from there", flush=True)
                return {}
    checkpoints.close()
    log.close()
    kept = jax.device_get(state.ema)
    seen = np.random.default_rng(config.seed).permutation(rows)[:ENOUGH]
    scores = partial(pair_scores, score_program(net), kept, frozen, batch)
    inside = scores(seen)
    about["mean"] = [float(x) for x in np.concatenate(inside).mean(0)]
    weights.save(workdir / "reward.safetensors", _whole(kept["net"], frozen), dtype=np.float16)
    save_json(workdir / "reward.json", about)
    summary = measure(config, pairs, kept["people"], (seen, *inside), (held, *scores(held)))
    if bundle is not None:
        summary["by_time"] = [{"t": t, "accuracy": _accuracy(config, pairs, kept["people"], held, *scores(held, time=t))} for t in TIMES]
    if config.judge:
        summary["gold"] = against_gold(config.judge, batch, pairs, held, summary.pop("gap"))
    summary.pop("gap", None)
    (workdir / "reliability.png").write_bytes(agreement.reliability(summary["calibration"]["bins"]))
    summary = plain({"config": config.name, **summary})
    save_json(workdir / "summary.json", summary)
    print(told(summary))
    return summary


def _start(config: Any, net: trained.Network, people: int, tx: optax.GradientTransformation, frozen: Tree) -> TrainState:
    made = net.init(jax.random.key(config.seed))
    if frozen and config.trunk_rate:
        made["trunk"] = jax.tree.map(jnp.copy, trained.denoising(frozen["params"]))
    params = {"net": made,
              "people": {"log_temperature": jnp.zeros(people), "offset": jnp.zeros(people), "log_nu": jnp.zeros(())}}  # fmt: skip
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), {}, {}, jax.tree.map(jnp.copy, params), {},
                      jax.random.key(config.seed))  # fmt: skip


def as_seen(config: Any, people: Tree, gap: Array, annotator: Array) -> Array:
    """The gap [N] as each pair's annotator sees it; the mean log temperature is 0, for only ratios can be known."""
    temperature = people["log_temperature"] - people["log_temperature"].mean() if config.temperature else jnp.zeros_like(people["offset"])
    offset = people["offset"] if config.offset else jnp.zeros_like(people["offset"])
    return preference.annotated(gap, temperature[annotator], offset[annotator])


def nll(config: Any, people: Tree, scores: Array, batch: Tree, pairs: int) -> tuple[Array, dict[str, Array]]:
    """Weighted mean of -log P(label) over pairs with scores [2, B, people] of a and b, and a N(0, 1) prior on what is a person's;
    or of the rankings of lists with scores [K, B, 1]."""
    if "ranks" in batch:
        s, ranks = scores[..., 0].T, batch["ranks"]
        above = (ranks[:, :, None] > 0) & (ranks[:, :, None] < ranks[:, None, :])  # i is better than j
        right = (s[:, :, None] > s[:, None, :]) + 0.5 * (s[:, :, None] == s[:, None, :])
        return preference.plackett_luce(s, ranks).mean(), {"accuracy": (right * above).sum() / jnp.maximum(above.sum(), 1)}
    column = batch["annotator"] if config.own else jnp.zeros_like(batch["annotator"])
    a, b = (jnp.take_along_axis(s, column[:, None], 1)[:, 0] for s in scores)
    gap = as_seen(config, people, a - b, batch["annotator"])
    p, weight = batch["p"], batch["weight"]
    losses = preference.davidson(gap, p, people["log_nu"]) if config.ties == "davidson" else preference.bradley_terry(gap, p)
    share = weight / jnp.maximum(weight.sum(), 1e-12)
    known = p != 0.5
    right = ((gap > 0) == (p > 0.5)) + 0.5 * (gap == 0) * 1.0
    prior = (jnp.square(people["log_temperature"]).sum() + jnp.square(people["offset"]).sum()) / (2 * pairs)
    return (share * losses).sum() + prior, {"accuracy": (right * known).sum() / jnp.maximum(known.sum(), 1)}


def train_step(config: Any, net: trained.Network, tx: optax.GradientTransformation, pairs: int, state: TrainState, frozen: Tree,
               batch: Tree) -> tuple[TrainState, dict[str, Array]]:  # fmt: skip
    """One step; the average of the parameters follows with decay .99."""
    key = jax.random.fold_in(state.key, state.step)
    sides = inputs(net, frozen, key, batch, augmented=config.augment)

    def loss(params: Tree) -> tuple[Array, dict[str, Array]]:
        scores = net.score(_whole(params["net"], frozen), jax.tree.map(lambda *x: jnp.concatenate(x), *sides))
        return nll(config, params["people"], scores.reshape(len(sides), -1, scores.shape[-1]), batch, pairs)

    (value, info), grads = jax.value_and_grad(loss, has_aux=True)(state.trained)
    updates, opt_state = tx.update(grads, state.opt_state, state.trained)
    if "trunk" in updates["net"]:
        updates["net"]["trunk"] = jax.tree.map(lambda u: config.trunk_rate * u, updates["net"]["trunk"])
    params = optax.apply_updates(state.trained, updates)
    average = jax.tree.map(lambda m, p: 0.99 * m + 0.01 * p, state.ema, params)
    return state._replace(step=state.step + 1, trained=params, opt_state=opt_state, ema=average), {"loss": value, **info}


def inputs(net: trained.Network, frozen: Tree, key: Array, batch: Tree, *, augmented: bool = False,
           time: Array | None = None) -> list[Tree]:  # fmt: skip
    """What the network reads of both sides, or of every picture of a list. A bundle's states share their time, random or the
    share `time` of the trained range, and not their noise: it will compare states that differ by noise."""
    shown = [batch["a"], batch["b"]] if "a" in batch else list(jnp.unstack(batch["list"], axis=1))
    keys = jax.random.split(key, len(shown))
    pictures = [x.astype(jnp.float32) / 255.0 for x in shown]
    if net.bundle is None:
        return [{"picture": augment(k, x) if augmented else x, **batch["text"]} for k, x in zip(keys, pictures, strict=True)]
    bundle, params = net.bundle, frozen["params"]
    cond = bundle.encode_text(params, batch["text"]["tokens"])
    samples = [bundle.encode(params, x) for x in pictures]
    one = jax.random.split(keys[0], len(samples[0]))
    _, t, _ = noised(one, samples[0], bundle.schedule)
    if time is not None:
        t = jnp.full_like(t, bundle.schedule.t_min + time * (bundle.schedule.t_max - bundle.schedule.t_min))
    noisy = [bundle.schedule.add_noise(x, normal(fold_in(one, 1 + j), x.shape), t) for j, x in enumerate(samples)]
    return [{"x": x, "t": t, "cond": cond} for x in noisy]


def _whole(net: Tree, frozen: Tree) -> Tree:
    return net if "trunk" in net else {**net, "trunk": trained.denoising(frozen["params"])}


def score_program(net: trained.Network) -> Callable[..., list[Array]]:
    """program(params, frozen, key, batch, time) -> scores [B, people] of both sides."""

    def program(params: Tree, frozen: Tree, key: Array, batch: Tree, time: Array) -> list[Array]:
        return [net.score(_whole(params, frozen), side) for side in inputs(net, frozen, key, batch, time=time)]

    return jax.jit(program)


def pair_scores(program: Callable[..., list[Array]], kept: Tree, frozen: Tree, batch: Callable[[np.ndarray], Any], rows: np.ndarray,
                time: float = 0.0) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Scores [N, people] of both sides of the pairs `rows`, clean, or of a bundle's states at the share `time` of its range."""
    out = []
    for i in range(0, len(rows), CHUNK):
        chosen = rows[np.minimum(np.arange(i, i + CHUNK), len(rows) - 1)]
        out.append([np.asarray(s) for s in program(kept["net"], frozen, jax.random.key(i), batch(chosen), jnp.float32(time))])
    a, b = (np.concatenate(side)[: len(rows)] for side in zip(*out, strict=True))
    return a, b


def _gap(config: Any, pairs: Answers, people: Tree, rows: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    column = pairs.annotator[rows] if config.own else np.zeros(len(rows), int)
    gap = (a - b)[np.arange(len(rows)), column]
    return np.asarray(as_seen(config, people, jnp.asarray(gap), jnp.asarray(pairs.annotator[rows])))


def _accuracy(config: Any, pairs: Answers, people: Tree, rows: np.ndarray, a: np.ndarray, b: np.ndarray) -> Any:
    return agreement.accuracy(_gap(config, pairs, people, rows, a, b), pairs.p[rows], np.array(pairs.prompts)[rows])


def measure(config: Any, pairs: Answers, people: Tree, seen: tuple[np.ndarray, ...], held: tuple[np.ndarray, ...]) -> dict[str, Any]:
    """The summary of held-out pairs (rows, scores of a, of b); those seen in training choose the threshold of ties."""
    names, rows = np.array(pairs.prompts), held[0]
    gap, inside = (_gap(config, pairs, people, *part) for part in (held, seen))
    p, prompts = pairs.p[rows], names[rows]
    threshold = agreement.best_threshold(inside, pairs.p[seen[0]], names[seen[0]])
    accuracy = {protocol: agreement.accuracy(gap, p, prompts, protocol, threshold) for protocol in agreement.PROTOCOLS}
    modelled = p != 0.5 if config.ties == "davidson" else np.ones(len(p), bool)  # Davidson's odds are those among answers
    temperature = np.exp(people["log_temperature"] - people["log_temperature"].mean())
    each = {}
    for i, name in enumerate(pairs.people):
        own = pairs.annotator[rows] == i
        each[name or "unnamed"] = {
            "accuracy": agreement.accuracy(gap[own], p[own], prompts[own]),
            **({"temperature": temperature[i]} if config.temperature else {}),
            **({"offset": people["offset"][i]} if config.offset else {}),
        }  # fmt: skip
    judged = {name: v["accuracy"]["mean"] for name, v in each.items() if v["accuracy"]["n"]}
    worst = min(judged, key=lambda name: judged[name], default="")
    return {
        "pairs": {"held_out": len(rows), "ties": int((p == 0.5).sum())}, "accuracy": accuracy, "tie_threshold": threshold,
        "accuracy_on_training_pairs": agreement.accuracy(inside, pairs.p[seen[0]], names[seen[0]]),
        "by_confidence": agreement.by_confidence(gap, p, prompts), "calibration": agreement.calibration(gap[modelled], p[modelled]),
        "people": each, "worst_person": {"name": worst, "accuracy": judged.get(worst)},
        **({"nu": float(np.exp(people["log_nu"]))} if config.ties == "davidson" else {}), "gap": gap,
    }  # fmt: skip


def against_gold(judge: str, batch: Callable[[np.ndarray], Any], pairs: Answers, rows: np.ndarray, gap: np.ndarray) -> dict[str, Any]:
    """{"model", "labels"}: how often each puts pairs in the order of the judge's count of right attributes, where it has one."""
    made = JUDGES[judge]()
    prompts = [pairs.prompts[i] for i in rows]
    targets = made.targets(prompts)
    sides = batch(rows)
    count = [(made.look(sides[side] / np.float32(255), targets)["attributes"] & (targets >= 0)).sum(1) for side in ("a", "b")]
    order = 0.5 + 0.5 * np.sign(count[0] - count[1])
    return {"model": agreement.accuracy(gap, order, prompts), "labels": agreement.accuracy(pairs.p[rows] - 0.5, order, prompts)}


def told(summary: dict[str, Any]) -> str:
    """A summary in a few lines."""
    said = lambda v: f"{v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" if v["low"] is not None else f"{v['mean']}"  # noqa: E731
    c = summary["calibration"]
    lines = [f"held out        {summary['pairs']['held_out']} pairs; accuracy {said(summary['accuracy']['half'])}, on training pairs "
             f"{said(summary['accuracy_on_training_pairs'])}",
             f"calibration     ECE {c['ece']:.3f}, {c['nll']:.3f} nats a pair (a coin {c['nll_even']:.3f}), best temperature "
             f"{c['temperature']:.2f}"]  # fmt: skip
    lines += [f"sure {row['low']:g} to {row['high']:g}   {said(row['accuracy'])}, {row['accuracy']['n']} pairs"
              for row in summary["by_confidence"]]  # fmt: skip
    lines += [f"time {row['t']:g}        {said(row['accuracy'])}" for row in summary.get("by_time", [])]
    if "gold" in summary:
        lines.append(f"gold's order    the model {said(summary['gold']['model'])}, the labels {said(summary['gold']['labels'])}")
    if len(summary["people"]) > 1:
        lines += [f"{name:15} {said(v['accuracy'])}" + (f", temperature {v['temperature']:.2f}" if "temperature" in v else "")
                  for name, v in summary["people"].items()]  # fmt: skip
    return "\n".join(lines)
