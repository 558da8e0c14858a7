"""Several processes are one run: equal results, resumed by any number of them, and whoever is missing or differs is named."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import several
from safetensors.numpy import load_file
from several import ended

from alignment_jax import cli
from alignment_jax.training import distributed, preflight


def start(workdir, count, *more, steps="plain5", patience=60, **kwargs):
    """The processes of one run of the toy; more: flags, or a list of them for each process."""
    command = ["-m", "alignment_jax", "train", f"--config=tests/toy_config.py:{steps}", f"--workdir={workdir}"]
    commands = [[*command, *(more[i] if more and isinstance(more[0], list) else more)] for i in range(count)]
    return several.start(commands, ALIGNMENT_JAX_PATIENCE=str(patience), **kwargs)


def trained(workdir):
    return load_file(workdir / "trained.safetensors")["unet/kernel"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process with one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    codes, said = ended(start(workdir, 1, steps="5"))
    assert codes == [0], said
    return workdir


def rows(workdir, name="metrics.jsonl"):
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def test_two_processes_are_one_run_and_each_writes_its_own_file(alone, tmp_path):
    """Started as a user does who tries a pod at home."""
    command = ["train", "--config=tests/toy_config.py:5", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run([several.TESTS.parent / "launch" / "local.sh", "--processes=2", "--devices=2", "--", *command], text=True,
                          capture_output=True, timeout=400, env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(several.TESTS)})
    lines = done.stdout.splitlines()
    said = ["\n".join(line for line in lines if line.startswith(f"[process {i}]")) for i in (0, 1)]
    assert done.returncode == 0, done.stderr + "\n".join(lines[-40:])
    np.testing.assert_allclose(trained(tmp_path / "run"), trained(alone), atol=1e-5)
    one, two = rows(alone), rows(tmp_path / "run")
    assert [r["step"] for r in one] == [r["step"] for r in two] == [0, 1, 2, 3, 4, 5]
    for name in ("loss", "reward/mean", "reward/std", "gold/all", "kl/path"):
        a, b = ([r[name] for r in found if name in r] for found in (two, one))
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=name)
    assert two[1]["ratio/deviation_max"] == 0.0
    assert len(rows(tmp_path / "run", "metrics_1.jsonl")) == 6 and (tmp_path / "run" / "report.html").exists()
    assert "4 x cpu (2 process" in said[0] and "batch " not in said[1]


@pytest.mark.parametrize(("count", "devices"), [pytest.param(1, 1, marks=pytest.mark.slow), (1, 4),
                                                pytest.param(2, 2, marks=pytest.mark.slow)])  # fmt: skip
def test_a_run_goes_on_with_other_processes_and_devices(alone, count, devices, tmp_path):
    codes, said = ended(start(tmp_path / "run", 2, devices=1, steps="plain2"))
    assert codes == [0, 0], said[0][-2000:]
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"steps": 2', '"steps": 5'))
    codes, said = ended(start(tmp_path / "run", count, devices=devices))
    assert set(codes) == {0} and "resumed         from step 2" in said[0], said[0][-2000:]
    np.testing.assert_allclose(trained(tmp_path / "run"), trained(alone), atol=1e-5)


def test_when_a_process_is_killed_the_other_ends_in_time_and_the_same_command_goes_on(tmp_path):
    began = start(tmp_path / "run", 2, steps="plain100000", patience=15)
    until = time.monotonic() + 120
    while not (tmp_path / "run" / "trained.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.2)
    began[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    said = began[0].communicate(timeout=60)[0]
    assert time.monotonic() - killed < 40 and began[0].returncode != 0
    assert "a step was not finished" in said and "after the error: process 1 of 2 did not come within 5 s" in said, said[-3000:]
    assert "Start all processes with the same command" in said
    last = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit())
    seen = rows(tmp_path / "run")[-1]["step"]
    assert 0 < last <= seen <= last + 3, "no more than one interval is lost"
    again = start(tmp_path / "run", 2, steps="plain100000")
    until = time.monotonic() + 120
    while len(rows(tmp_path / "run")) <= last + 1 and time.monotonic() < until:
        time.sleep(0.2)
    for p in again:
        p.send_signal(signal.SIGTERM)
    codes, said = ended(again)
    assert codes == [75, 75] and f"resumed         from step {last}" in said[0] and "stopped at step" in said[0], said[0][-2000:]


@pytest.mark.slow
def test_twenty_kills_of_one_of_two_processes_lose_an_interval_each_and_end_with_the_same_arrays(tmp_path):
    codes, said = ended(start(tmp_path / "straight", 2, steps="plain150"))
    assert codes == [0, 0], said
    rng, run, log = np.random.default_rng(0), tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    kept = lambda: max((int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit()), default=0)
    for _ in range(20):
        before, both, until = kept(), start(run, 2, steps="plain150", patience=9), time.monotonic() + 120
        while not (log.exists() and rows(run) and rows(run)[-1]["step"] > before) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1))
        one = int(rng.integers(2))
        both[one].kill()
        killed, text = time.monotonic(), both[1 - one].communicate(timeout=60)[0]
        assert time.monotonic() - killed < 30 and both[1 - one].returncode != 0, text
        assert kept() <= rows(run)[-1]["step"] <= kept() + 2, "an interval is two steps"
    codes, said = ended(start(run, 2, steps="plain150"))
    assert codes == [0, 0] and "resumed         from step" in said[0], said
    np.testing.assert_allclose(trained(run), trained(tmp_path / "straight"), atol=1e-6)


def test_hosts_with_different_configs_are_named_with_both_hashes(tmp_path):
    codes, said = ended(start(tmp_path / "run", 2, [], ["--config.seed=1"]))
    assert codes == [2, 2]
    for text in said:
        assert "the hosts are not alike" in text and "process 1" in text and "config is" in text and "most have" in text


@pytest.mark.parametrize(("count", "come", "says"), [
    (2, [1], "process 0 does not answer at 127.0.0.1"), (2, [0], "process 1 of 2 did not come to 127.0.0.1"),
    (4, [0, 2], "process 1, 3 of 4 did not come to 127.0.0.1"),
])  # fmt: skip
def test_processes_that_do_not_come_are_named_by_all_that_did_in_time(count, come, says, tmp_path):
    """The code is not that of a mistake: who started them may try again."""
    began = time.monotonic()
    codes, said = ended(start(tmp_path / "run", count, patience=3, only=come))
    assert codes == [1] * len(come) and all(says in text and ("within 3 s" in text or "after 3 s" in text) for text in said), said
    assert time.monotonic() - began < 30


def test_preflight_says_that_all_hosts_are_alike_and_well(tmp_path):
    command = ["-m", "alignment_jax", "preflight", "--config=tests/toy_config.py:plain5", f"--workdir={tmp_path / 'run'}"]
    codes, said = ended(several.start([command] * 2, devices=2))
    assert codes == [0, 0] and "all 2 alike, one sum over all devices came through" in said[0], said
    assert all(f"process {i}      {preflight.socket.gethostname()}: 2 x cpu" in said[0] for i in (0, 1)) and "alike" not in said[1]


def test_devices_that_do_not_come_are_named_in_time(tmp_path):
    """As where another program holds a TPU: asking for devices then hangs, hears no signal, and the others wait for it.

    The code is that of a mishap, though a thread of each still hangs in the runtime, which would abort at the interpreter's end."""
    script = """if True:
        import time, jax
        from alignment_jax import cli
        if {stuck}:
            jax.local_device_count = lambda: time.sleep(100)
        cli.main(["", "preflight", "--config=tests/toy_config.py:plain5", "--workdir={folder}"])"""
    commands = [["-c", script.format(stuck=stuck, folder=tmp_path)] for stuck in (False, True)]
    codes, said = ended(several.start(commands, ALIGNMENT_JAX_PATIENCE="5"), timeout=60)
    assert codes == [1, 1] and all("these processes have no devices" in text for text in said), said
    assert all("process 1: no devices: nothing within 5 s" in text for text in said), said


@pytest.mark.parametrize("command", ["train-reward", "sample", "evaluate", "plan"])
def test_what_one_process_does_is_refused_as_one_of_several(monkeypatch, command):
    """Each would do all of it, and write the same files."""
    for name, value in zip(distributed.NAMES, ("127.0.0.1:1", "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{command} is the work of one process, and this is process 1 of 2"):
        cli._alone(command)


@pytest.mark.parametrize(("node", "port"), [("node[003-004]", 61440 + 7), ("a,b", 61440 + 7)])
def test_where_jax_finds_out_by_itself_slurm_says_who_is_who(monkeypatch, node, port):
    for name in distributed.NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALIGNMENT_JAX_DISTRIBUTED", "1")
    with pytest.raises(ValueError, match="finds neither Cloud TPU nor Slurm here"):
        distributed.place()
    slurm = {"JOB_ID": "7", "STEP_NODELIST": node, "NTASKS": "2", "PROCID": "1", "LOCALID": "0", "STEP_NUM_NODES": "2"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert distributed.place() == (node.replace("[003-004]", "003").split(",")[0], port, 2, 1)


def test_the_roll_is_called_among_strangers_and_a_port_that_is_taken_is_said():
    """A health check that says nothing it knows, and a process of another run, are not counted."""
    port = several.free_port()
    one = distributed.Place("127.0.0.1", port, 2, 1)
    with ThreadPoolExecutor() as pool:
        called = pool.submit(distributed._call, one._replace(number=0), 20.0)
        for said in (b"GET / HTTP/1.1\n", b"7\n"):
            until = time.monotonic() + 10
            while time.monotonic() < until:
                try:
                    with socket.create_connection(("127.0.0.1", port)) as stranger:
                        stranger.sendall(said)
                    break
                except OSError:
                    time.sleep(0.05)
        assert not called.done()
        distributed._answer(one, 20.0)
        assert called.result(timeout=20) is None
    with socket.create_server(("", port)), pytest.raises(ConnectionError, match=f"cannot listen on port {port} .*is an earlier run still"):
        distributed._call(one._replace(number=0), 1.0)


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES is set and JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID is not"):
        distributed.start()


FACTS = {"host": "a", "config": "1", "code": "2", "python": "3", "jax": "4", "flax": "5", "optax": "6", "devices": "4 x TPU", "clock": 0.0,
         "free": 9.0}  # fmt: skip


@pytest.mark.parametrize(("change", "says"), [
    ({"sick": "0.10 GB free at /runs, at least 1 are wanted"}, r"process 2 \(b\): 0.10 GB free"), ({"jax": "0"}, "jax is 0, most have 4"),
    ({"devices": "3 x TPU"}, "devices is 3 x TPU, most have 4 x TPU"), ({"code": "x"}, "code is x, most have 2"),
    ({"clock": 500.0}, r"its clock is \+500 s off, 90 are allowed; set it by NTP"),
])  # fmt: skip
def test_the_host_that_differs_or_is_sick_is_named(monkeypatch, change, says):
    everyone = [FACTS, FACTS, {**FACTS, "host": "b", **change}]
    monkeypatch.setattr(preflight, "together", lambda name, word, patience: [json.dumps(f) for f in everyone])
    with pytest.raises(ValueError, match=says):
        preflight.preflight(FACTS)


def test_a_host_whose_devices_do_not_answer_is_named_in_time(monkeypatch):
    words = {"preflight": [json.dumps(FACTS), json.dumps({**FACTS, "host": "b"})]}
    monkeypatch.setattr(preflight, "together", lambda name, word, patience: words.get(name, ["well", word]))
    assert len(preflight.preflight(FACTS)) == 2
    monkeypatch.setattr(preflight, "_sum_of_ones", lambda: time.sleep(5))
    with pytest.raises(TimeoutError, match=r"process 1 \(b\): nothing within 0.2 s"):
        preflight.preflight(FACTS, patience=0.2)
    monkeypatch.setattr(preflight, "_sum_of_ones", lambda: 0.5)
    with pytest.raises(TimeoutError, match=r"process 1 \(b\): the sum of \d ones was 0.5"):
        preflight.preflight(FACTS)
