"""Whole runs from the command line: resuming, preemption, killing, sampling, listing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from alignment_jax import weights
from alignment_jax.evaluation.metrics import describe
from alignment_jax.training import loop, selfcheck
from alignment_jax.training.checkpoint import Checkpointer
from alignment_jax.training.logging import MetricLog, read
from alignment_jax.training.workdir import stopped

ROOT = Path(__file__).parents[2]
SMALL = ["--config.batch.prompts=4", "--config.batch.microbatch=4", "--config.method.k=1", "--config.method.anchor_weight=0",
         "--config.sampling.num_steps=2", "--config.lora.rank=2", "--config.evaluate_every=0", "--config.checkpoint_every=2",
         "--config.evaluation.num_prompts=8", "--config.evaluation.samples=2", "--config.evaluation.quick_prompts=4",
         "--config.evaluation.blend=(0.5,)", "--config.evaluation.blend_prompts=4"]  # fmt: skip


def cli(*arguments, check=True, **kwargs):
    done = subprocess.run([sys.executable, "-m", "alignment_jax", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT,
                          **kwargs)  # fmt: skip
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def start(workdir, steps, *more):
    return ["train", "--config=configs/critters.py:default", f"--workdir={workdir}", f"--config.steps={steps}", *SMALL, *more]


def toy(workdir, steps):
    """The same with a model of nine numbers and without the evaluation: for what is about processes and files."""
    return ["train", f"--config=tests/toy_config.py:plain{steps}", f"--workdir={workdir}"]


TOY = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One finished run of six steps."""
    workdir = tmp_path_factory.mktemp("run")
    code = ("import sys; from alignment_jax.cli import main; main(sys.argv); "
            "assert not {'torch', 'tensorflow', 'transformers'} & set(sys.modules), 'a heavy framework was imported'")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *start(workdir, 6)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir, done.stdout


def test_a_run_leaves_its_folder_and_says_first_what_will_happen(run):
    workdir, said = run
    for name in ("config.json", "metrics.jsonl", "summary.json", "report.html", "trained.safetensors", "checkpoints", "tensorboard"):
        assert (workdir / name).exists(), name
    assert "devices" in said and "4 prompts x 1 = 4 samples" in said and "of them trained" in said
    summary = json.loads((workdir / "summary.json").read_text())
    assert set(summary) == {"config", "method", "seed", "wall_seconds", "trained_parameters", "base", "aligned", "best_of_n",
                            "kl", "alarm"}  # fmt: skip
    for model in ("base", "aligned", "best_of_n"):
        assert set(summary[model]) == {"gold", "attribute", "proxy", "diversity"}
        assert {"mean", "low", "high", "n"} <= set(summary[model]["gold"]) & set(summary[model]["diversity"])
    assert set(summary["wall_seconds"]) == {"train", "evaluate", "total"} and summary["trained_parameters"] > 1000
    assert all(describe(name) for line in (workdir / "metrics.jsonl").read_text().splitlines() for name in json.loads(line))
    page = (workdir / "report.html").read_text()
    assert "<img" in page and "src=\"http" not in page


def test_a_run_is_resumed_by_the_same_command_and_a_terminated_one_ends_the_same(tmp_path):
    """SIGTERM in the middle: a checkpoint, exit 75; the same command then gives the arrays of the uninterrupted run."""
    command = [sys.executable, "-m", "alignment_jax", *toy(tmp_path / "w", 16)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=TOY)
    log = tmp_path / "w" / "metrics.jsonl"
    deadline = time.time() + 240
    while time.time() < deadline and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 75, said[-2000:]
    stopped_at = Checkpointer(tmp_path / "w").steps()[-1]
    assert 3 <= stopped_at < 16
    for name in ("w", "straight"):
        cli(*toy(tmp_path / name, 16), env=TOY)
    a, b = (weights.load(tmp_path / name / "trained.safetensors") for name in ("straight", "w"))
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 16


def test_a_truncated_checkpoint_says_what_to_do(run, tmp_path):
    import shutil

    shutil.copytree(run[0], tmp_path / "w")
    newest = max((tmp_path / "w" / "checkpoints").iterdir(), key=lambda p: int(p.name) if p.name.isdigit() else -1)
    for file in [f for f in newest.rglob("*") if f.is_file() and f.stat().st_size > 200]:
        os.truncate(file, 10)
    done = cli(*start(tmp_path / "w", 6), check=False)
    assert done.returncode == 2 and "cannot be read" in done.stderr and "Delete that folder to go on from step" in done.stderr


def test_samples_of_a_run_and_of_the_base_share_their_noise(run, tmp_path):
    (tmp_path / "p.txt").write_text("a green bell monster with horns, one big eye and a smile on a blue background\n" * 2)
    arrays = []
    for extra in ([], ["--run", run[0], "--scale=0"], ["--run", run[0], "--scale=20"]):
        cli("sample", "--model=critters", f"--prompts={tmp_path / 'p.txt'}", f"--out={tmp_path / 'o'}", "--num_steps=2",
            "--save_arrays", "--seed=3", *extra)  # fmt: skip
        arrays.append(np.load(tmp_path / "o" / "images.npy"))
    assert arrays[0].shape == (2, 32, 32, 3) and arrays[0].dtype == np.float32
    np.testing.assert_allclose(arrays[0], arrays[1], atol=1e-5)
    assert np.abs(arrays[0] - arrays[2]).max() > 1e-3
    assert (tmp_path / "o" / "0001.png").exists()


def test_lists_are_json_objects_and_mistakes_are_one_line():
    from alignment_jax.training import catalogue

    for table in (catalogue.algorithms, catalogue.rewards, catalogue.models, catalogue.metrics):
        assert all({"name", "family", "paper", "summary"} <= set(row) and row["summary"] for row in table())
    rows = json.loads(cli("list", "configs", "--json").stdout)
    assert {"configs/critters.py:default", "configs/critters.py:hackable"} <= {r["name"] for r in rows}
    wrong = cli("train", "--config=configs/critters.py:default", "--workdir=runs/x", "--config.batch.promts=3", check=False)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr and '"prompts" instead of "promts"' in wrong.stderr


def test_every_config_builds_and_knows_its_fields():
    import importlib.util

    fields = {"seed", "steps", "checkpoint_every", "evaluate_every", "model", "reward", "method", "optimizer", "batch", "sampling",
              "lora"}  # fmt: skip
    steered = {"method", "model", "sampling", "reward", "judge", "prompts", "num_prompts", "samples"}
    for path in sorted((ROOT / "configs").glob("critters*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for argument in module.ARGUMENTS:
            config = module.get_config(argument)
            wanted = steered if path.stem == "critters_test_time" else fields
            assert config.get("kind") in ("recogniser", "reward") or wanted <= set(config), (path, argument)
        with pytest.raises(ValueError, match="choose one of"):
            module.get_config("nonsense")


@pytest.mark.floor
def test_selfcheck_passes():
    lines = []
    assert all(good for _, good, _ in selfcheck.run(lines.append)), lines


@pytest.mark.floor
def test_a_host_reward_of_ones_own_trains(tmp_path):
    """An own reward as module:function, through a policy gradient; its own numbers are in the metrics."""
    config = selfcheck.tiny_config(reward="own_reward:brightness")
    session, state = loop.set_up(config)
    state, metrics = loop.one_step(session, state, next(session.run.source))
    assert 0.0 <= float(metrics["reward/mean"]) <= 1.0 and float(metrics["ratio/deviation_max"]) == 0.0


def test_ctrl_c_saves_and_ends_quietly(tmp_path):
    process = subprocess.Popen([sys.executable, "-m", "alignment_jax", *toy(tmp_path / "w", 500)], cwd=ROOT, env=TOY,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    log = tmp_path / "w" / "metrics.jsonl"
    deadline = time.time() + 240
    while time.time() < deadline and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and "the same command goes on from there" in said and "Traceback" not in said
    assert Checkpointer(tmp_path / "w").steps()[-1] >= 3


def test_a_full_disk_at_a_save_keeps_the_previous_checkpoint(tmp_path):
    """Files may not grow past 100 bytes once the first checkpoint is there: the second fails as on a full disk."""
    code = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from alignment_jax.training import loop
save, saved = loop.save, []
def once(*a):
    if saved: resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    save(*a); saved.append(1)
loop.save = once
from alignment_jax.cli import main
main(sys.argv)
"""
    done = subprocess.run([sys.executable, "-c", code, *toy(tmp_path / "w", 6)], capture_output=True, text=True, cwd=ROOT, env=TOY)
    said = next((line for line in done.stderr.splitlines() if line.startswith("error:")), "")  # amid orbax's own warnings
    assert done.returncode == 2 and "checkpoint 4 could not be written" in said and "Step 2 is kept" in said, done.stderr[-2000:]
    cli(*toy(tmp_path / "w", 6), env=TOY)  # with space again, the same command goes on
    assert Checkpointer(tmp_path / "w").steps()[-1] == 6


def test_early_stopping_goes_back_to_the_state_with_the_best_gold(tmp_path):
    """Gold .9 at step 1 and .1 at step 2: the run stops and keeps the parameters of step 1."""
    session, state = loop.set_up(selfcheck.tiny_config())
    log = MetricLog(tmp_path)
    guard = loop.Guard(tmp_path, session, log)
    states = []
    for step, gold in enumerate((0.5, 0.9, 0.1)):
        log.write(step, {"gold/all": gold, "gold/all/low": gold - 0.05, "gold/all/high": gold + 0.05, "gold/all/n": 128})
        asked = guard.look(state)
        assert asked == (step == 2)
        states.append(jax.tree.map(np.array, state.trained))
        if not asked:
            state, _ = loop.one_step(session, state, next(session.run.source))
    assert "Stopped early" in stopped(tmp_path) and "The state of step 1 is kept" in stopped(tmp_path)
    best = loop.resume(tmp_path, session, state)
    assert int(best.step) == 1
    for tree in (best.trained, weights.load(tmp_path / "trained.safetensors")):
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(states[1]), strict=True))


def test_bfloat16_trains_with_a_ratio_of_exactly_one():
    config = selfcheck.tiny_config(model_options={"dtype": "bfloat16"})
    session, state = loop.set_up(config)
    for _ in range(2):  # the second step has LoRA factors unlike zero, whose rounding differs between two programs
        state, metrics = loop.one_step(session, state, next(session.run.source))
        assert float(metrics["ratio/deviation_max"]) == 0.0 and np.isfinite(float(metrics["loss"]))
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(state.trained))


@pytest.mark.slow
def test_twenty_kills_lose_at_most_one_interval_and_end_with_the_same_arrays(tmp_path):
    cli(*start(tmp_path / "straight", 60))
    rng = np.random.default_rng(0)
    command = [sys.executable, "-m", "alignment_jax", *start(tmp_path / "w", 60)]
    for _ in range(20):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log = tmp_path / "w" / "metrics.jsonl"
        before = log.read_text().count("\n") if log.exists() else 0
        deadline = time.time() + 120
        while time.time() < deadline and process.poll() is None and not (log.exists() and log.read_text().count("\n") > before):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.wait()
    cli(*start(tmp_path / "w", 60))
    a, b = (weights.load(tmp_path / name / "trained.safetensors") for name in ("straight", "w"))
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_profile_has_a_trace_of_its_steps_and_their_parts_seconds(tmp_path):
    cli("train", "--config=tests/toy_config.py:plain4", f"--workdir={tmp_path / 'run'}", "--profile=steps=2:3",
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")})  # fmt: skip
    rows = read(tmp_path / "run" / "metrics.jsonl")
    timed = [row["step"] for row in rows if "seconds/rollout" in row]
    assert timed == [2, 3] and all(rows[1][f"seconds/{part}"] > 0 for part in ("data", "rollout", "reward", "anchor", "update"))
    assert rows[1]["seconds/host_wait"] == rows[1]["seconds/data"] + rows[1]["seconds/reward"]  # a reward on the host
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    for asked, says in (("5:3", "'5:3' is not FIRST:LAST"), ("5:6", "--profile=5:6 begins after the run's 4 steps")):
        wrong = cli("train", "--config=tests/toy_config.py:plain4", f"--workdir={tmp_path / 'other'}", f"--profile={asked}", check=False,
                    env={**os.environ, "PYTHONPATH": str(ROOT / "tests")})  # fmt: skip
        assert wrong.returncode == 2 and says in wrong.stderr
