"""The one loop: it serves every algorithm, and owns memory, files and the clock."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from .. import weights
from ..evaluation.over_optimisation import early_stop
from ..evaluation.statistics import unflatten
from ..rewards.check import probe, score_host, to_uint8
from . import build, distributed, flops, preflight, sharding, step, stream
from .checkpoint import Checkpointer, save_json
from .evaluate import Evaluator
from .interrupt import PREEMPTED, Interrupt
from .logging import MetricLog, read
from .programs import Programs
from .state import TrainState
from .workdir import claim, folder, stopped, whose

Tree = Any


class Session(NamedTuple):
    """A run that is set up: its parts, programs, layout, the arrays no step changes, the microbatch size; what a failing host reward
    does; and score(pictures, condition) where devices are set apart for it."""  # fmt: skip

    run: build.Run
    programs: Programs
    layout: sharding.Layout
    frozen: Tree
    microbatch: int
    reward_errors: str = "raise"
    apart: Callable[[jax.Array, Tree], jax.Array] | None = None


def set_up(config: Any) -> tuple[Session, TrainState]:
    """Builds everything that a config names; checks the reward on a probe batch before anything long compiles."""
    layout = sharding.layout(config.get("sharding", {}))
    run = build.build_run(config, layout)
    if run.parts.reward is not None and run.parts.algorithm.needs.reward and not run.parts.reward.noisy:
        shape = jax.eval_shape(run.parts.bundle.decode, run.params, jnp.zeros((1, *run.parts.bundle.sample_shape))).shape
        warning = probe(run.parts.reward, shape[1:], run.source.prompts[:4])
        if warning:
            logging.warning(warning)
    programs, scorer = sharding.programs(layout, run.parts), sharding.apart(layout, run.parts.reward)
    key = jax.random.key(config.seed)
    trained, frozen_params = run.parts.partition.init(jax.random.fold_in(key, 0), run.params)
    frozen = build.frozen_tree(run, programs, frozen_params) | ({"reward": None} if scorer else {})
    frozen = sharding.place(layout, frozen)
    state = programs.init(jax.random.fold_in(key, 1), sharding.place(layout, trained), frozen["null"])
    errors = config.get("reward_errors", "raise")
    return Session(run, programs, layout, frozen, stream.batch_sizes(config)[2], errors, scorer), state


def device_batch(session: Session, batch: dict[str, Any]) -> dict[str, Any]:
    """A host batch as the algorithm sees it: condition encoded, pictures as samples, cut over the devices.

    What was precomputed, "cond" and samples, stays as it is.
    """
    data = sharding.shard(session.layout, {k: v for k, v in batch.items() if k != "prompts"})
    if "cond" in data and session.run.parts.trains_text:
        raise ValueError("precomputed text states do not change with the text encoder, which this run trains; leave data.latents empty")
    cond = data.pop("cond") if "cond" in data else session.programs.encode(session.frozen, data.pop("tokens"))
    out = {"cond": cond, "condition": data.pop("condition", {})}
    for name, sample_name in (("images", "x0"), ("winner", "winner"), ("loser", "loser")):
        if name in data:
            pictures = data.pop(name)
            out[sample_name] = _mapped(session, session.programs.to_samples, pictures)
    if "list" in data and np.issubdtype(data["list"].dtype, np.integer):
        n, k, *shape = data["list"].shape
        flat = _mapped(session, session.programs.to_samples, data.pop("list").reshape(n * k, *shape))
        out["list"] = flat.reshape(n, k, *flat.shape[1:])
    return out | data


class Laps:
    """Seconds of the parts of a step, each of which waits for its results: for a few steps, since nothing overlaps then."""

    def __init__(self) -> None:
        self.seconds, self._last = dict[str, float](), time.perf_counter()

    def __call__(self, part: str, results: Tree) -> None:
        jax.block_until_ready(results)
        now = time.perf_counter()
        self.seconds[f"seconds/{part}"], self._last = now - self._last, now


def waited(session: Session, seconds: dict[str, float]) -> dict[str, float]:
    """With seconds/host_wait, in which no device had work: the batch, and a host reward's answers about the last microbatch."""
    return seconds | {"seconds/host_wait": seconds["seconds/data"] + (seconds["seconds/reward"] if on_host(session) else 0.0)}


def unwatched(part: str, results: Tree) -> None:
    """The laps of a step that nobody watches."""


def one_step(session: Session, state: TrainState, batch: dict[str, Any], updates: int = 1,
             lap: Callable[[str, Tree], None] = unwatched) -> tuple[TrainState, dict[str, Any]]:  # fmt: skip
    """rollout, rewards, items, anchor, update: one pass of the algorithm over one host batch; lap is told when each is done."""
    programs, frozen, size = session.programs, session.frozen, session.microbatch
    needs = session.run.parts.algorithm.needs
    data = device_batch(session, batch)
    n = step.leading(data)
    number = int(state.step)
    roll_key, prepare_key, item_key = jax.random.split(jax.random.fold_in(state.key, number), 3)
    cut = step.cut(n, size)
    parts, scored = list[Tree](), Scores(session, batch["prompts"], cut, number) if needs.reward == "value" else None
    # nothing is waited for but, while a microbatch is drawn, the host's scores of the one before: two of them are pictures at a time
    for k, d in step.microbatches((jax.random.split(roll_key, n), data), cut):
        parts.append(programs.rollout(state, frozen, k, d))
        if scored:
            scored.ask(parts[-1])
    lap("rollout", parts)
    rewards, metrics = scored.joined() if scored else (None, {})
    lap("reward", rewards)
    rolled = step.join(parts, cut)
    del parts, scored
    items, extra, info = programs.prepare(prepare_key, state.extra, rolled, rewards)
    state = state._replace(extra=extra)
    cond = rolled["cond"]
    del rolled  # whole trajectories, of which the items hold what they need
    n_items = step.leading(items)
    keys = jax.random.split(item_key, n_items)
    items = step.anchored(programs, state, frozen, keys, items, cond, size)
    lap("anchor", items)
    if n_items % updates:
        raise ValueError(f"{n_items} items do not divide into {updates} updates; choose one of "
                         f"{[d for d in range(1, 17) if n_items % d == 0]}")  # fmt: skip
    order = jax.random.permutation(prepare_key, n_items) if updates > 1 else None
    for part in range(updates):
        rows = None if order is None else order[part * (n_items // updates) : (part + 1) * (n_items // updates)]
        chosen = (keys, items) if rows is None else step.rows((keys, items), rows)
        state, update_info = step.update(programs, state, frozen, chosen[0], chosen[1], cond, size, part == 0)
    lap("update", state)
    return state, {**metrics, **info, **update_info, "samples_seen": (number // updates + 1) * n}


def on_host(session: Session) -> bool:
    """Whether the reward is a function of the host."""
    reward = session.run.parts.reward
    return reward is not None and not reward.device


class Scores:
    """Rewards [B] of a rollout's microbatches, where they were drawn, on devices of their own, or on the host.

    A host reward is asked by every process for its own samples alone, and one microbatch late, so that the devices draw meanwhile.
    Means of what else it says (reward/...) are those of this process; NaN where it failed and may.
    """

    def __init__(self, session: Session, prompts: Sequence[str], cut: step.Cut, number: int):
        self.session, self.prompts, self.cut, self.number = session, prompts, cut, number
        self.pictures, self.scores, self.infos = list[jax.Array](), list[jax.Array](), list[dict[str, Any]]()

    def ask(self, rolled: Tree) -> None:
        """To be called with each microbatch."""
        programs, frozen, condition = self.session.programs, self.session.frozen, rolled.get("condition", {})
        if self.session.apart:
            self.scores.append(self.session.apart(programs.to_pictures(frozen, rolled["x0"]), condition))
        elif not on_host(self.session):
            self.scores.append(programs.score(frozen, rolled["x0"], condition))
        else:
            self.pictures.append(programs.to_pictures(frozen, rolled["x0"]))
            if len(self.pictures) > 1 and self.cut.n == self.cut.size * self.cut.parts:
                self._ask_host(self.pictures.pop(0), self.prompts[len(self.scores) :: self.cut.parts])

    def joined(self) -> tuple[jax.Array, dict[str, Any]]:
        """(rewards [B], metrics), after the last."""
        cut = self.cut
        if cut.n < cut.size * cut.parts and self.pictures:  # a microbatch that is filled up holds samples of other processes
            self.pictures, cut = [step.join(self.pictures, cut)], step.cut(cut.n, cut.n)
        for pictures in self.pictures:
            self._ask_host(pictures, self.prompts[len(self.scores) :: cut.parts])
        rewards, infos = step.join(self.scores, cut), self.infos
        shown = {f"reward/{k}": np.nanmean([info[k] for info in infos]) for k in infos[0] if all(k in i for i in infos)} if infos else {}
        return rewards, {"reward/mean": jnp.nanmean(rewards), "reward/std": jnp.nanstd(rewards), **shown}

    def _ask_host(self, pictures: jax.Array, prompts: Sequence[str]) -> None:
        session, reward = self.session, self.session.run.parts.reward
        assert reward is not None
        own = to_uint8(sharding.own(session.layout, pictures))
        values, info = score_host(reward, own, prompts, {}, batch_index=self.number, on_error=session.reward_errors)
        self.scores.append(sharding.shard(session.layout, values))
        self.infos.append({k: v for k, v in info.items() if np.shape(v) == (len(own),)})


def _mapped(session: Session, program: Any, x: jax.Array) -> jax.Array:
    """program(frozen, x) over microbatches of x [B, ...]."""
    n = len(x)
    return step.mapped(lambda k, part: program(session.frozen, part), n, session.microbatch, jnp.zeros(n), x)


def train(config: Any, workdir: str | Path, profile: tuple[int, int] | None = None) -> Path:
    """Trains, evaluates and writes the report; a workdir that holds checkpoints is resumed. Returns the workdir.

    profile: (first, last) steps, of which workdir/profile gets a trace for XProf and TensorBoard, and metrics.jsonl the seconds of
    each part (seconds/data, rollout, reward, anchor, update, and host_wait) with the FLOP/s that they reach.
    SIGTERM and Ctrl-C save a checkpoint and end quietly, so that a preempted run goes on where it was: after SIGTERM the exit code
    is PREEMPTED, by which whoever started the run can tell that it is to be started again.
    """
    began = time.time()
    workdir = folder(workdir)
    whose(workdir, config)
    stopping, (first, until) = 0, profile or (0, -1)
    if first > config.steps:
        raise ValueError(f"--profile={first}:{until} begins after the run's {config.steps} steps")
    if jax.process_count() > 1:
        preflight.preflight(preflight.facts(config, workdir))
    session, state = set_up(config)
    if jax.process_index() == 0:
        claim(workdir, config)
    distributed.together("workdir", patience=600.0)  # setting up reads weights, on some hosts for the first time
    steps, updates = int(config.steps), int(config.batch.get("updates", 1))
    checkpoints = Checkpointer(workdir)
    state = resume(workdir, session, state)
    start = int(state.step) // updates
    steps = start if stopped(workdir) else steps
    if start and jax.process_index() == 0:
        print(f"resumed         from step {start}{', after those of --profile' if 0 < until <= start else ''}", flush=True)
    log = MetricLog(workdir, start)
    announce(config, session, state, steps)
    evaluator = Evaluator(config, session) if config.get("evaluation") else None
    stop = Interrupt()
    guard = Guard(workdir, session, log) if evaluator and config.get("early_stop") else None
    if evaluator and config.evaluate_every and start == 0 and steps > 0:
        log.write(0, evaluator.quick(state, base=True))
        if guard:
            guard.look(state)
    samples = config.batch.prompts * config.batch.get("group", 1)
    trained_seconds = time.time()
    from tqdm import tqdm

    needed = flops.one_step(config, session.run.parts.reward) if profile else 0.0
    with stop, tqdm(total=steps, initial=start, desc="align", unit="step", disable=jax.process_index() > 0) as bar:
        for number in range(start, steps):
            clock = time.perf_counter()
            watched = first <= number + 1 <= until
            if watched and number + 1 == max(first, start + 1):
                jax.profiler.start_trace(workdir / "profile")
            laps = Laps() if watched else None
            lap, batch = laps or unwatched, next(session.run.source)
            lap("data", None)
            state, metrics = one_step(session, state, batch, updates, lap)
            metrics |= waited(session, laps.seconds) | flops.utilisation(needed, sum(laps.seconds.values())) if laps else {}
            last, stopping = number + 1 == steps, stop.agreed()
            if watched and (stopping or number + 1 == min(until, steps)):
                jax.profiler.stop_trace()
            metrics = {k: float(v) for k, v in metrics.items()} | {"lr": float(session.run.learning_rate(int(state.step) - 1))}
            metrics["images_per_second"] = samples / (time.perf_counter() - clock)
            if not np.isfinite(metrics["loss"]):
                raise FloatingPointError(f"the loss is {metrics['loss']} at step {number + 1}; the last checkpoint is step "
                                         f"{max(checkpoints.steps(), default=0)}. Try a lower learning rate.")  # fmt: skip
            judged = evaluator and config.evaluate_every and ((number + 1) % config.evaluate_every == 0 or last)
            if evaluator and judged:
                metrics |= evaluator.quick(state)
            log.write(number + 1, metrics)
            bar.update()
            bar.set_postfix({k: f"{metrics[k]:.3g}" for k in ("loss", "reward", "reward/mean", "gold/all") if k in metrics})
            if stopping or last or (config.checkpoint_every and (number + 1) % config.checkpoint_every == 0):
                save(workdir, checkpoints, session, state)
            if guard and judged and guard.look(state):
                state = resume(workdir, session, state)
                break
            if stopping:
                break
    checkpoints.close()
    log.close()
    if stopping:
        if jax.process_index() == 0:
            print(f"stopped at step {int(state.step) // updates}; the same command goes on from there", flush=True)
        distributed.together("stopped")  # whoever started the processes may end the others once one has ended with a code
        if stopping == signal.SIGTERM:
            raise SystemExit(PREEMPTED)
        return workdir
    if evaluator:
        clocks = {"train": time.time() - trained_seconds, "since": began}
        evaluator.report(workdir, state, log.rows, clocks, stopped(workdir))
    return workdir


def resume(workdir: Path, session: Session, state: TrainState) -> TrainState:
    """The newest checkpoint, or the best one of a run that was stopped early; `state` itself where there is none."""
    checkpoints = Checkpointer(workdir, "best" if stopped(workdir) else "checkpoints")
    if checkpoints.steps():
        restored, position = checkpoints.restore(state)
        state = sharding.place(session.layout, restored)
        session.run.source.set_state(position)
    checkpoints.close()
    return state


class Guard:
    """Early stopping on the gold panel: keeps the best state in workdir/best, and says when gold has fallen from it."""

    def __init__(self, workdir: Path, session: Session, log: MetricLog):
        self.workdir, self.session, self.log, self.best = workdir, session, log, Checkpointer(workdir, "best", keep=1)

    def look(self, state: TrainState) -> bool:
        """To be called after each measurement; True: stop, stopped.json and trained.safetensors are those of the best state."""
        gold = unflatten(self.log.rows, "gold/all")
        verdict = early_stop(gold)
        if verdict["best"] == len(gold) - 1:
            self.best.save(state, self.session.run.source.get_state())
        if not verdict["stop"]:
            return False
        step = self.best.steps()[-1]
        reason = f"Stopped early at step {int(state.step)}: {verdict['reason']} The state of step {step} is kept."
        ship(self.workdir, averaged(self.best.restore(state)[0]))
        if jax.process_index() == 0:
            save_json(self.workdir / "stopped.json", {"step": step, "reason": reason})
            print(f"\n{reason}", flush=True)
        distributed.together(f"stopped at {step}")  # resuming reads it
        return True


def save(workdir: Path, checkpoints: Checkpointer, session: Session, state: TrainState) -> None:
    """A checkpoint to resume from, and the tuned parameters alone for whoever samples."""
    checkpoints.save(state, session.run.source.get_state())
    ship(workdir, averaged(state))


def ship(workdir: Path, trained: Tree) -> None:
    """trained.safetensors; every process takes part, and process 0 writes."""
    trained = sharding.whole(trained)
    if jax.process_index() == 0:
        weights.save(workdir / "trained.safetensors", trained)


def averaged(state: TrainState) -> Tree:
    """What is evaluated, sampled and exported: the averaged parameters, or the last ones where none are kept."""
    return state.trained if state.ema is None else state.ema


def announce(config: Any, session: Session, state: TrainState, steps: int) -> None:
    """The first lines of a run: what will happen."""
    prompts, group, micro = stream.batch_sizes(config)
    trained = sum(x.size for x in jax.tree.leaves(state.trained))
    total = sum(x.size for x in jax.tree.leaves(session.run.params))
    devices = jax.devices()
    lines = [
        f"devices         {len(devices)} x {devices[0].device_kind} ({jax.process_count()} process)",
        f"method          {config.method.name}, {steps} steps, seed {config.seed}",
        f"model           {config.model}, {total:,} parameters, {trained:,} of them trained"
        + (" (LoRA)" if config.get("lora") else ""),
        f"batch           {prompts} prompts x {group} = {prompts * group} samples a step, in microbatches of {micro}",
    ]
    if config.get("expected_minutes"):
        lines.append(f"expected        about {config.expected_minutes:g} minutes on 2 CPU cores, evaluation included")
    if jax.process_index() == 0:
        print("\n".join(lines), flush=True)


def evaluate_run(workdir: str | Path) -> dict[str, Any]:
    """Judges the newest checkpoint of a run anew; rewrites its report and returns the summary."""
    import ml_collections

    workdir = folder(workdir)
    if not (workdir / "config.json").is_file():
        raise FileNotFoundError(f"no run at {workdir}: it has no config.json")
    config = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))
    if not Checkpointer(workdir).steps():
        raise FileNotFoundError(f"{workdir} holds no checkpoint yet")
    session, state = set_up(config)
    state = resume(workdir, session, state)
    rows = read(workdir / "metrics.jsonl")
    clock = {"train": rows[-1]["time"] if rows else 0.0, "since": time.time()}
    return Evaluator(config, session).report(workdir, state, rows, clock, stopped(workdir))
