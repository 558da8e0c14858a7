"""The launch scripts against stubs of gcloud, kubectl, sbatch and srun that record how they are called, and local.sh for real."""

import gzip
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
TRAIN = ["train", "--config=configs/sdxl.py:mapo", "--config.reward={'name': \"a b\", 'cost': '$(x) $$'}", "--workdir=/shared/run"]
PLACE = ["--zone=us-west4-a", "--project=mine"]
ALIVE = "--ssh-flag=-oServerAliveInterval=30"
HELP = ["local.sh", "slurm.sh", "gke.sh", "tpu_vm.sh"]


@pytest.fixture
def stubs(tmp_path):
    """A folder that comes first in PATH; calls() are the calls so far, [name, *arguments], and what kubectl was given to read."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("git", "gcloud", "kubectl", "sbatch", "srun", "scancel", "scontrol"):
        write(folder / name, "import json, os, sys\n"
              "call = [os.path.basename(sys.argv[0]), *sys.argv[1:]]\n"
              "[open(a[9:], 'w').close() for a in call if call[:2] == ['git', 'archive'] and a.startswith('--output=')]\n"
              "call += [sys.stdin.read()] if call[0] == 'kubectl' else []\n"
              f"open({str(tmp_path / 'calls')!r}, 'a').write(json.dumps(call) + '\\n')\n")  # fmt: skip
    return folder


def write(path: Path, code: str) -> Path:
    path.write_text(f"#!{sys.executable} -S\n{code}")
    path.chmod(0o755)
    return path


def environment(stubs: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "SLURM_", "ALIGNMENT_"))}
    return {**kept, "PATH": f"{stubs}:{os.environ['PATH']}", "TMPDIR": str(stubs.parent), "PYTHON": sys.executable, **more}


def launch(stubs: Path, script: str, *args: str, code: int = 0, **more: str) -> subprocess.CompletedProcess:
    done = subprocess.run([ROOT / "launch" / script, *args], capture_output=True, text=True, env=environment(stubs, **more), timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def calls(stubs: Path) -> list[list[str]]:
    path = stubs.parent / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def shown(text: str) -> list[list[str]]:
    """The commands that --dry_run printed, as a shell would read them."""
    return [shlex.split(line) for line in text.splitlines()]


def quick_to_start(stubs: Path, name: str, code: str) -> Path:
    return write(stubs.parent / name, "import os, signal, sys, time\n" + code)


@pytest.mark.parametrize("script", HELP)
def test_help_is_the_head_comment_and_two_examples(stubs, script):
    text = launch(stubs, script, "--help").stdout
    head = [line[2:] for line in (ROOT / "launch" / script).read_text().splitlines()[1:] if line.startswith("# ")]
    assert text.splitlines()[0] == head[0] and "shellcheck" not in text
    assert len(re.findall(rf"^  \./launch/{script} ", text, re.M)) == 2


TPU_VM = {
    "create": (["--accelerator_type=v5litepod-16", "--spot"], [
        ["gcloud", "compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod", "--accelerator-type=v5litepod-16",
         "--runtime-version=v2-alpha-tpuv5-lite", "--spot", *PLACE]]),
    "logs": ([], [
        ["gcloud", "compute", "tpus", "queued-resources", "describe", "pod", "--format=value(state.state)", *PLACE],
        ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--worker=all",
         "--command=hostname; tail -n 40 alignment_jax/run.log", ALIVE, *PLACE]]),
    "delete": ([], [["gcloud", "compute", "tpus", "queued-resources", "delete", "pod", "--force", "--quiet", *PLACE]]),
}  # fmt: skip
SLICE = TPU_VM["create"][0]


@pytest.mark.parametrize("action", TPU_VM)
def test_tpu_vm_calls_gcloud_with_exactly_this(stubs, action):
    flags, wanted = TPU_VM[action]
    launch(stubs, "tpu_vm.sh", action, "pod", *flags, *PLACE)
    assert calls(stubs) == wanted


@pytest.mark.parametrize("action", [*TPU_VM, "run", "install"])
def test_tpu_vm_dry_run_shows_the_calls_and_makes_none(stubs, action):
    args = [*TPU_VM.get(action, ([], None))[0], *PLACE]
    rest = ["--", *TRAIN] if action == "run" else []
    asks = [["git", "diff", "--quiet", "HEAD"]] if action == "install" else []
    printed = shown(launch(stubs, "tpu_vm.sh", action, "pod", *args, "--dry_run", *rest).stdout)
    assert calls(stubs) == asks
    launch(stubs, "tpu_vm.sh", action, "pod", *args, *rest)
    assert calls(stubs)[len(asks) :] == asks + [c for c in printed if c[0] != "rm"]


@pytest.mark.parametrize("kind, image", [("v5litepod-4", "v2-alpha-tpuv5-lite"), ("v5p-8", "v2-alpha-tpuv5"), ("v6e-8", "v2-alpha-tpuv6e"),
                                         ("v4-8", "tpu-ubuntu2204-base")])  # fmt: skip
def test_each_tpu_generation_has_its_image(stubs, kind, image):
    printed = launch(stubs, "tpu_vm.sh", "create", "pod", f"--accelerator_type={kind}", "--dry_run").stdout
    assert f"--runtime-version={image} " in printed
    printed = launch(stubs, "tpu_vm.sh", "create", "pod", f"--accelerator_type={kind}", "--runtime_version=v3-x", "--dry_run").stdout
    assert "--runtime-version=v3-x " in printed


def test_tpu_vm_install_copies_what_head_holds(stubs, tmp_path):
    launch(stubs, "tpu_vm.sh", "install", "pod", *PLACE)
    _, pack, copy, install = calls(stubs)
    archive = f"{tmp_path}/alignment_jax_pod.tar.gz"
    assert pack == ["git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD"] and not Path(archive).exists()
    assert copy == ["gcloud", "compute", "tpus", "tpu-vm", "scp", archive, "pod:alignment_jax.tar.gz", "--worker=all", *PLACE]
    assert install[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--worker=all"] and install[8:] == [ALIVE, *PLACE]
    assert "source alignment_jax/launch/env.sh && prepare_env .venv tpu" in install[7]
    assert subprocess.run(["bash", "-n", "-c", install[7].removeprefix("--command=")]).returncode == 0


@pytest.mark.parametrize("codes, log", [
    ([3, 0], ["start 0", "ended with 3", "start 1", "ended with 0"]),
    ([75, -9], ["start 0", "ended with 75", "start 1", "ended with 137"]),
    ([2], ["start 0", "a mistake in the command or its config, not started again", "ended with 2"])])  # fmt: skip
def test_a_worker_starts_the_same_command_again_until_it_ends_with_0_or_2(stubs, tmp_path, codes, log):
    """What run sends to the workers, run in a folder that looks like theirs; keep reads there how it went."""
    launch(stubs, "tpu_vm.sh", "run", "pod", "--retries=1", *PLACE, "--", *TRAIN)
    (call,) = calls(stubs)
    assert call[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--worker=all"] and call[8:] == [ALIVE, *PLACE]
    (outcome,) = [c[7].removeprefix("--command=") for c in round_of_keep(stubs) if "--worker=0" in c]

    def on_worker(command: str, *before: str) -> str:
        return subprocess.check_output([*before, "bash", "-c", command], cwd=tmp_path, env=environment(stubs), text=True, timeout=30)

    assert on_worker(outcome) == "no run\n"
    python = tmp_path / "alignment_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    write(python, "import json, os, sys\n"
          "lines = open('starts').readlines() if os.path.exists('starts') else []\n"
          "open('starts', 'a').write(json.dumps([sys.argv[1:], os.environ['ALIGNMENT_JAX_DISTRIBUTED']]) + '\\n')\n"
          f"code = {codes}[len(lines)]\n"
          "sys.exit(code) if code >= 0 else os.kill(os.getpid(), -code)\n")  # fmt: skip
    write(stubs / "sleep", "")
    on_worker(call[7].removeprefix("--command="))
    file, until = tmp_path / "alignment_jax/starts", time.time() + 8
    while not file.exists() or file.read_text().count("\n") < len(codes):
        assert time.time() < until
        time.sleep(0.05)
    subprocess.run(["flock", "run.lock", "true"], cwd=file.parent, check=True, timeout=8)  # free when the last start is over
    starts = [json.loads(line) for line in file.read_text().splitlines()]
    assert starts == [[["-m", "alignment_jax", *TRAIN], "1"]] * len(codes)
    said = (file.parent / "run.log").read_text().splitlines()
    assert [line for line in said if "Killed" not in line] == log  # bash tells of a signal
    assert on_worker(outcome) == f"{log[-1]}\n"
    assert on_worker(outcome, "flock", "alignment_jax/run.lock") == "going on\n"


ROUND = ["state", "create", "outcome", "archive", "scp", "rm", "install", "run", "delete"]


def round_of_keep(stubs: Path) -> list[list[str]]:
    printed = launch(stubs, "tpu_vm.sh", "keep", "pod", *SLICE, *PLACE, "--retries=1", "--dry_run", "--", *TRAIN).stdout
    return [line for line in shown(printed) if line[0] != "#"]


def test_keep_does_what_the_other_subcommands_do(stubs):
    commands = dict(zip(ROUND, round_of_keep(stubs), strict=True))
    parts = {"create": ["create"], "install": ["archive", "scp", "rm", "install"], "run": ["run"], "delete": ["delete"]}
    for action, words in parts.items():
        args = [*TPU_VM.get(action, ([], None))[0], *PLACE, "--retries=1", "--dry_run", *(["--", *TRAIN] if action == "run" else [])]
        assert shown(launch(stubs, "tpu_vm.sh", action, "pod", *args).stdout) == [commands[w] for w in words]
    assert commands["state"] == TPU_VM["logs"][1][0]
    assert commands["outcome"][6] == "--worker=0" and commands["outcome"][8:] == [ALIVE, *PLACE]
    assert {c[0] for c in calls(stubs)} == {"git"}  # that says what is not committed


def keep(stubs: Path, code: int, *rounds: tuple[str, str, str, str]) -> list[str]:
    """Runs keep in a world of (state, what worker 0 says, which call fails, the calls wanted) a round; the changes that it tells."""
    commands = {tuple(c): word for word, c in zip(ROUND, round_of_keep(stubs), strict=True)}
    file, record = stubs.parent / "rounds", stubs.parent / "calls"
    record.unlink(missing_ok=True)
    file.write_text(json.dumps([["", "", ""], *[r[:3] for r in rounds]]))
    write(stubs / "gcloud", "import json, sys\n"
          f"open({str(record)!r}, 'a').write(json.dumps(['gcloud', *sys.argv[1:]]) + '\\n')\n"
          f"rounds = json.load(open({str(file)!r}))[sys.argv[4] == 'describe':]\n"
          f"json.dump(rounds, open({str(file)!r}, 'w'))\n"
          "state, said, fails = rounds[0]\n"
          "if fails in sys.argv: sys.exit('ERROR: UNAVAILABLE')\n"
          "if sys.argv[4] == 'describe': print('WARNING: old', file=sys.stderr)\n"
          "if sys.argv[4] == 'describe': sys.exit('ERROR: NOT_FOUND: pod was not found') if state == 'NONE' else print(state)\n"
          "if '--worker=0' in sys.argv: print(said)\n")  # fmt: skip
    write(stubs / "sleep", "import json, os, sys\n"
          f"open({str(record)!r}, 'a').write(json.dumps(['sleep', *sys.argv[1:]]) + '\\n')\n"
          f"if len(json.load(open({str(file)!r}))) == 1: os.kill(os.getppid(), 9)\n")  # it should have ended  # fmt: skip
    done = launch(stubs, "tpu_vm.sh", "keep", "pod", *SLICE, *PLACE, "--retries=1", "--every=7", "--", *TRAIN, code=code)
    made = [c for c in calls(stubs) if c[:2] != ["git", "diff"]]
    words = [commands[tuple(c)] if c != ["sleep", "7"] else "sleep" for c in made]
    assert " ".join(words).split(" sleep ") == [r[3] for r in rounds]
    return [line.split(" pod: ")[1] for line in done.stdout.splitlines() if " pod: " in line]


def test_keep_gets_a_slice_again_when_it_is_taken_back_until_the_run_is_done(stubs):
    begin = "state outcome archive scp install run"
    told = keep(stubs, 0, ("NONE", "", "", "state create"), ("ACCEPTED", "", "", "state"), ("ACTIVE", "no run", "", begin),
                ("ACTIVE", "going on", "", "state outcome"), ("ACTIVE", "going on", "", "state outcome"),
                ("SUSPENDED", "", "", "state delete"), ("NONE", "", "", "state create"), ("ACTIVE", "no run", "", begin),
                ("ACTIVE", "ended with 0", "", "state outcome"))  # fmt: skip
    assert told == ["NONE", "ACCEPTED", "ACTIVE, no run", "ACTIVE, going on", "SUSPENDED", "NONE", "ACTIVE, no run", "ACTIVE, ended with 0"]


def test_keep_waits_in_the_other_states(stubs):
    wait = [(s, "", "", "state") for s in ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "DELETING")]
    gone = [(s, "", "", "state delete") for s in ("SUSPENDING", "SUSPENDED", "FAILED")]
    told = keep(stubs, 0, *wait, *gone, ("ACTIVE", "going on", "", "state outcome"), ("ACTIVE", "ended with 0", "", "state outcome"))
    assert told == [*[r[0] for r in wait + gone], "ACTIVE, going on", "ACTIVE, ended with 0"]


def test_keep_takes_up_a_run_starts_it_again_and_ends_with_a_mistake(stubs):
    """Started anew it knows nothing of the run; what a log says otherwise is no state."""
    keep(stubs, 2, ("ACTIVE", "going on", "", "state outcome"), ("ACTIVE", "ended with 1", "", "state outcome run"),
         ("ACTIVE", "", "--worker=0", "state outcome"), ("ACTIVE", "step 9 FAILED", "", "state outcome run"),
         ("ACTIVE", "ended with 12", "", "state outcome run"), ("ACTIVE", "ended with 2", "", "state outcome"))  # fmt: skip


def test_keep_does_not_take_the_end_of_an_earlier_run_for_that_of_its_own(stubs):
    keep(stubs, 0, ("ACTIVE", "ended with 2", "", "state outcome archive scp install run"), ("ACTIVE", "ended with 0", "", "state outcome"))


def test_keep_goes_on_when_a_call_fails_later_but_not_the_first(stubs):
    keep(stubs, 1, ("", "", "describe", "state"))
    keep(stubs, 1, ("NONE", "", "create", "state create"))
    begin = "state outcome archive scp install run"
    told = keep(stubs, 0, ("NONE", "", "", "state create"), ("", "", "describe", "state"), ("NONE", "", "create", "state create"),
                ("SUSPENDED", "", "delete", "state delete"), ("ACTIVE", "no run", "scp", "state outcome archive scp"),
                ("ACTIVE", "no run", "", begin), ("ACTIVE", "ended with 0", "", "state outcome"))  # fmt: skip
    assert told == ["NONE", "no answer: ERROR: UNAVAILABLE", "NONE", "SUSPENDED", "ACTIVE, no run", "ACTIVE, ended with 0"]


WRONG = [
    ("tpu_vm.sh", ["boil", "pod"], ["boil", "create install run logs delete keep"]),
    ("tpu_vm.sh", [], ["subcommand ''"]),
    ("tpu_vm.sh", ["logs"], ["NAME", "try logs pod"]),
    ("tpu_vm.sh", ["run", "--dry_run"], ["NAME", "--dry_run"]),
    ("tpu_vm.sh", ["create", "pod"], ["--accelerator_type", "v5litepod-16"]),
    ("tpu_vm.sh", ["create", "pod", "--accelerator_type=v5e-16"], ["'v5e-16'", "v5litepod-N", "v5p-N", "v6e-N", "v4-N"]),
    ("tpu_vm.sh", ["create", "pod", "--zones=a"], ["--zones=a", "--zone"]),
    ("tpu_vm.sh", ["run", "pod"], ["--", "train --config"]),
    ("tpu_vm.sh", ["run", "pod", "--", "--config=x"], ["--config=x", "train --config"]),
    ("tpu_vm.sh", ["run", "pod", "--retries=x", "--", "train"], ["--retries", "'x'"]),
    ("tpu_vm.sh", ["run", "pod", "--", "train", "--workdir=gs://b/run"], ["gs://", "mount"]),
    ("tpu_vm.sh", ["keep", "pod", "--", "train"], ["--accelerator_type", "v5litepod-16"]),
    ("tpu_vm.sh", ["keep", "pod", *SLICE], ["--", "train --config"]),
    ("tpu_vm.sh", ["keep", "pod", *SLICE, "--every=0", "--", "train"], ["--every", "'0'"]),
    ("gke.sh", [], ["NAME"]),
    ("gke.sh", ["--image=i"], ["NAME", "--image=i"]),
    ("gke.sh", ["a" * 29, "--image=i"], ["28"]),
    ("gke.sh", ["dpo", "--tpu_type=v6e-8", "--", "train"], ["--image"]),
    ("gke.sh", ["dpo", "--image=i", "--", "train"], ["--tpu_type", "--gpus_per_node"]),
    ("gke.sh", ["dpo", "--image=i", "--tpu_type=v5e-16", "--", "train"], ["'v5e-16'", "v5litepod-{4,8,16", "v5p-{8,16"]),
    ("gke.sh", ["dpo", "--image=i", "--tpu_type=v5litepod-12", "--", "train"], ["'v5litepod-12'", "v5litepod-{4,8,16"]),
    ("gke.sh", ["dpo", "--image=i", "--tpu_type=v4-x2", "--", "train"], ["'v4-x2'"]),
    ("gke.sh", ["dpo", "--image=i", "--tpu_type=v6e-8", "--gpus_per_node=8", "--", "train"], ["one of them"]),
    ("gke.sh", ["dpo", "--image=i", "--gpus_per_node=8", "--nodes=0", "--", "train"], ["from 1"]),
    ("gke.sh", ["dpo", "--image=i", "--tpu_type=v6e-8", "--", "train", "--workdir=gs://b"], ["gs://", "--claim"]),
    ("slurm.sh", ["--nodes=0", "--", "train"], ["--nodes", "'0'"]),
    ("slurm.sh", ["--gpus_per_node=x", "--", "train"], ["--gpus_per_node", "'x'"]),
    ("slurm.sh", ["--node=2", "--", "train"], ["--node=2", "--nodes"]),
    ("slurm.sh", [], ["train --config"]),
    ("local.sh", ["--processes=0", "--", "train"], ["--processes", "'0'", "--processes=2"]),
    ("local.sh", ["--devices=x", "--", "train"], ["--devices", "'x'"]),
    ("local.sh", ["--process=2", "--", "train"], ["--process=2", "--processes"]),
    ("local.sh", [], ["train --config"]),
]


@pytest.mark.parametrize("script, args, said", WRONG, ids=[" ".join([s, *a])[:60] for s, a, _ in WRONG])
def test_a_mistake_is_one_message_that_says_what_is_allowed(stubs, script, args, said):
    done = launch(stubs, script, *args, code=2)
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"{script}: ") and all(word in message for word in said), message
    assert f"see ./launch/{script} --help" in message and done.stdout == "" and calls(stubs) == []


# The openAPIV3Schema of JobSet's v1alpha2, without its descriptions; the resource is kubernetes-sigs/jobset's, under Apache-2.0. Made by
#   commit=08dfbdfd682714a9ab929633eca8dc95315187e7 file=config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml
#   curl -s https://raw.githubusercontent.com/kubernetes-sigs/jobset/$commit/$file | python -c '
#   import gzip, json, sys, yaml
#   def bare(x):
#       if isinstance(x, dict): return {k: bare(v) for k, v in x.items() if k != "description" or not isinstance(v, str)}
#       return [*map(bare, x)] if isinstance(x, list) else x
#   (version,) = yaml.safe_load(sys.stdin)["spec"]["versions"]
#   schema = json.dumps(bare(version["schema"]["openAPIV3Schema"]))
#   sys.stdout.buffer.write(gzip.compress(schema.encode(), mtime=0))' >tests/launch/jobset_schema.json.gz
def closed(schema):
    """As a server reads it that refuses unknown fields: an object with a list of properties has no others."""
    if isinstance(schema, list):
        return [closed(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    shut = schema.get("type") == "object" and "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields")
    return {**({"additionalProperties": False} if shut else {}), **{k: closed(v) for k, v in schema.items()}}


# Draft 4 is what OpenAPI 3.0 grew from; an int-or-string is an anyOf of the two there already
SCHEMA = jsonschema.Draft4Validator(closed(json.loads(gzip.decompress((Path(__file__).parent / "jobset_schema.json.gz").read_bytes()))))


def accept(manifest: dict) -> None:
    """Raises ValidationError or AssertionError unless a cluster would take it; the schema leaves kind and metadata to the server."""
    SCHEMA.validate(manifest)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    metadata = manifest["metadata"]
    assert set(metadata) <= {"name", "namespace", "labels", "annotations"}
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", metadata["name"])
    for value in metadata["labels"].values():
        assert re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?", value)
    assert all(isinstance(v, str) for v in metadata["annotations"].values())


def jobset(stubs: Path, *args: str) -> dict:
    """The manifest that kubectl was given; it fits the schema and is the one that --dry_run prints."""
    printed = launch(stubs, "gke.sh", "dpo", "--image=host/alignment_jax:1", *args, "--dry_run", "--", *TRAIN).stdout
    assert calls(stubs) == []
    launch(stubs, "gke.sh", "dpo", "--image=host/alignment_jax:1", *args, "--", *TRAIN)
    ((*call, manifest),) = calls(stubs)
    assert printed == f"# {' '.join(call)}\n{manifest}"
    assert call == ["kubectl", "apply", *[a for a in args if a.startswith("--namespace")], "-f", "-"]
    read = yaml.safe_load(manifest)
    accept(read)
    return read


JOB = ["spec", "replicatedJobs", 0, "template", "spec"]
POD = [*JOB, "template", "spec"]


@pytest.mark.parametrize("where, value, said", [
    ([*POD, "containers", 0, "imagePullPolice"], "Always", "'imagePullPolice' was unexpected"),
    ([*JOB, "backofLimit"], 0, "'backofLimit' was unexpected"),
    (["spec", "failurePolicy", "rules", 0, "onJobFailureReason"], ["PodFailurePolicy"], "'onJobFailureReason' was unexpected"),
    ([*JOB, "parallelism"], "4", "'4' is not of type 'integer'"),
    ([*POD, "containers", 0, "args"], "train", "'train' is not of type 'array'"),
    ([*POD, "containers", 0, "resources", "limits"], {"google.com/tpu": [4]}, "[4] is not valid under any"),
    (["spec", "failurePolicy", "rules", 0, "action"], "FailJob", "'FailJob' is not one of"),
    ([*POD, "containers", 0, "name"], None, "'name' is a required property"),
    ([*JOB, "podFailurePolicy", "rules", 0, "action"], None, "'action' is a required property"),
    (["kind"], "Job", "JobSet"), (["metadata", "name"], "Dpo", "Dpo"), (["metadata", "labels", "queue"], "not a label", "not a label"),
    (["metadata", "annotations", "count"], 1, "all(")], ids=lambda x: str(x[-1]) if isinstance(x, list) else "")  # fmt: skip
def test_a_manifest_with_a_mistake_is_refused(stubs, where, value, said):
    manifest = jobset(stubs, "--tpu_type=v6e-8")
    *path, last = where
    part = manifest
    for key in path:
        part = part[key]
    part[last] = value
    if value is None:
        del part[last]
    with pytest.raises((jsonschema.ValidationError, AssertionError), match=re.escape(said)):
        accept(manifest)


def test_a_jobset_of_tpu_slices(stubs):
    read = jobset(stubs, "--tpu_type=v5litepod-16", "--slices=2", "--claim=runs", "--queue=mine", "--max_restarts=3", "--namespace=ns")
    assert read["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "mine"}
    assert read["metadata"]["annotations"] == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    mistake = {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert read["spec"]["failurePolicy"] == {"maxRestarts": 3, "rules": [mistake]}
    (slices,) = read["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 4, 4, 0)
    pod = job["template"]["spec"]
    gke = "cloud.google.com/gke-tpu"
    assert pod["nodeSelector"] == {f"{gke}-accelerator": "tpu-v5-lite-podslice", f"{gke}-topology": "4x4"}
    (container,) = pod["containers"]
    # a policy on exit codes is allowed with this restartPolicy only
    ends = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert job["podFailurePolicy"] == {"rules": [{"action": "FailJob", "onExitCodes": ends}]} and pod["restartPolicy"] == "Never"
    assert container["image"] == "host/alignment_jax:1" and container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["env"] == [{"name": "ALIGNMENT_JAX_DISTRIBUTED", "value": "1"}]
    # Kubernetes reads $(NAME) in arguments, and two dollar signs as one
    assert [a.replace("$$", "$") for a in container["args"]] == ["python", "-m", "alignment_jax", *TRAIN]
    assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
    assert {"name": "shared", "persistentVolumeClaim": {"claimName": "runs"}} in pod["volumes"]


def test_a_jobset_of_gpu_nodes_says_where_process_0_is(stubs):
    read = jobset(stubs, "--nodes=2", "--gpus_per_node=8", "--gpu_type=nvidia-h100-80gb", "--claim=runs")
    (slices,) = read["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"], job["completionMode"]) == (1, 2, 2, "Indexed")
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"} and read["metadata"]["annotations"] == {}
    (container,) = pod["containers"]
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    # a JobSet's pods are NAME-REPLICATEDJOB-JOB-POD.SUBDOMAIN, and its subdomain is its name
    assert container["env"] == [{"name": "JAX_COORDINATOR_ADDRESS", "value": f"dpo-{slices['name']}-0-0.dpo:1234"},
                                {"name": "JAX_NUM_PROCESSES", "value": "2"}, {"name": "JAX_PROCESS_ID", "valueFrom": index}]  # fmt: skip
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}


@pytest.mark.parametrize("kind, accelerator, topology, hosts", [
    ("v5litepod-4", "tpu-v5-lite-podslice", "2x2", 1), ("v6e-256", "tpu-v6e-slice", "16x16", 64), ("v4-8", "tpu-v4-podslice", "2x2x1", 1),
    ("v5p-128", "tpu-v5p-slice", "4x4x4", 16)])  # fmt: skip
def test_a_tpu_type_is_hosts_and_a_topology(stubs, kind, accelerator, topology, hosts):
    (slices,) = jobset(stubs, f"--tpu_type={kind}")["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["parallelism"] == hosts and "shared" not in [v["name"] for v in pod["volumes"]]
    assert list(pod["nodeSelector"].values()) == [accelerator, topology]
    assert pod["containers"][0]["env"] == ([{"name": "ALIGNMENT_JAX_DISTRIBUTED", "value": "1"}] if hosts > 1 else [])
    assert math.prod(map(int, topology.split("x"))) == 4 * hosts


@pytest.mark.parametrize("code, told, ends", [("sys.exit(0)", False, 0), ("sys.exit(2)", False, 2), ("time.sleep(20)", True, 75)])
def test_a_pod_that_was_told_to_go_does_not_count_as_done(stubs, code, told, ends):
    """The command of the container, for real: the run hears of SIGTERM, and the pod ends with its code."""
    jobset(stubs, "--tpu_type=v6e-8")
    container = yaml.safe_load(calls(stubs)[0][-1])["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    run = quick_to_start(stubs, "run", f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nprint('up', flush=True)\n{code}\n")
    pod = subprocess.Popen([*container["command"], run], stdout=subprocess.PIPE, text=True)
    assert pod.stdout is not None and pod.stdout.readline() == "up\n"
    if told:
        pod.terminate()
    assert pod.wait(timeout=10) == ends


SUBMIT = ["--nodes=2", "--gpus_per_node=4", "--time=1:00:00", "--partition=a100", "--name=dpo", "--sbatch=--account=me"]


def test_slurm_submits_one_process_a_node(stubs):
    printed = launch(stubs, "slurm.sh", *SUBMIT, "--dry_run", "--", *TRAIN).stdout
    assert calls(stubs) == []
    launch(stubs, "slurm.sh", *SUBMIT, "--", *TRAIN)
    assert calls(stubs) == [[
        "sbatch", "--job-name=dpo", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--time=1:00:00", "--partition=a100",
        "--account=me", "--requeue", "--signal=B:USR1@120", "--open-mode=append", "--output=slurm-%j.log", "launch/slurm.sh", "--in_job",
        "4", *TRAIN]]  # fmt: skip
    subprocess.run(["bash", "-c", printed], env=environment(stubs), check=True)
    assert calls(stubs)[0] == calls(stubs)[1]


def in_job(stubs: Path, run: str, nodes: str = "2", gpus: str = "4", wait: str = "0.1") -> subprocess.Popen:
    """The batch script on the first node, with srun a program of ours."""
    write(stubs / "srun", f"import json, os, signal, sys, time\n{run}")
    more = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": nodes, "SLURM_CPUS_PER_TASK": "12", "PYTHON": "python", "KILL_WAIT": wait}
    return subprocess.Popen([ROOT / "launch/slurm.sh", "--in_job", gpus, *TRAIN], env=environment(stubs, **more), text=True,
                            stdout=subprocess.PIPE)  # fmt: skip


@pytest.mark.parametrize("nodes, gpus, seen", [("2", "4", ["0,1,2,3", "1", "12"]), ("1", "0", [None, None, "12"])])
def test_a_slurm_process_sees_all_gpus_of_its_node(stubs, nodes, gpus, seen):
    names = ["JAX_LOCAL_DEVICE_IDS", "ALIGNMENT_JAX_DISTRIBUTED", "SRUN_CPUS_PER_TASK"]
    job = in_job(stubs, f"print(json.dumps([sys.argv[1:], [os.environ.get(k) for k in {names}]])); sys.exit(6)", nodes, gpus)
    out, _ = job.communicate(timeout=30)
    assert json.loads(out) == [["--kill-on-bad-exit=1", "python", "-m", "alignment_jax", *TRAIN], seen]
    assert job.returncode == 6 and calls(stubs) == []


@pytest.mark.parametrize("number, wanted", [(signal.SIGUSR1, [["scancel", "--signal=TERM", "7"], ["scontrol", "requeue", "7"]]),
                                            (signal.SIGTERM, [])])  # fmt: skip
def test_a_slurm_job_waits_until_the_run_has_saved(stubs, number, wanted):
    """Before its time is up it tells the steps and goes back into the queue; when Slurm preempts or cancels it, that is Slurm's."""
    job = in_job(stubs, "print('up', flush=True); time.sleep(2); print('saved', flush=True)\n")
    assert job.stdout is not None and job.stdout.readline() == "up\n"
    job.send_signal(number)
    out, _ = job.communicate(timeout=30)
    assert out == "saved\n" and job.returncode == 0 and calls(stubs) == wanted


@pytest.mark.parametrize("number, wanted", [(signal.SIGUSR1, [["scancel", "--signal=TERM", "7"]]), (signal.SIGTERM, [])])
def test_a_slurm_job_that_ends_with_a_mistake_does_not_go_back_into_the_queue(stubs, number, wanted):
    """Neither by itself nor by waiting for Slurm to put it back."""
    job = in_job(stubs, "print('up', flush=True); time.sleep(1); sys.exit(2)\n", wait="60")
    assert job.stdout is not None and job.stdout.readline() == "up\n"
    job.send_signal(number)
    assert job.wait(timeout=10) == 2 and calls(stubs) == wanted


def local(stubs: Path, code: str, *flags: str, **more: str) -> subprocess.Popen:
    """local.sh with a small program in the place of the training command."""
    python = quick_to_start(stubs, "python", "me = os.environ['JAX_PROCESS_ID']\n" + code)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where a shell runs the tests behind, children would ignore it
    return subprocess.Popen([ROOT / "launch/local.sh", *flags, "--", *TRAIN], text=True, stdout=subprocess.PIPE, start_new_session=True,
                            env=environment(stubs, **{"PYTHON": str(python), **more}))  # fmt: skip


def test_two_local_processes_know_who_they_are(stubs):
    names = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PLATFORMS", "XLA_FLAGS"]
    job = local(stubs, f"import json; print(json.dumps([me, sys.argv[1:], *[os.environ[k] for k in {names}]]), end='')", "--devices=4",
                XLA_FLAGS="--xla_a")  # fmt: skip
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 0
    said = {line[:11]: json.loads(line[12:]) for line in out.splitlines()}
    assert sorted(said) == ["[process 0]", "[process 1]"] and [said[k][0] for k in sorted(said)] == ["0", "1"]
    assert said["[process 0]"][1:] == said["[process 1]"][1:]
    _, args, address, *rest = said["[process 0]"]
    assert args == ["-m", "alignment_jax", *TRAIN] and re.fullmatch(r"127\.0\.0\.1:\d+", address)
    assert rest == ["2", "cpu", "--xla_a --xla_force_host_platform_device_count=4"]


def test_local_dry_run_shows_a_command_for_each_process(stubs):
    printed = launch(stubs, "local.sh", "--processes=3", "--dry_run", "--", "train", "--config=x", "--workdir=a b").stdout
    lines = [[w for w in line if not w.startswith("JAX_COORDINATOR_ADDRESS")] for line in shown(printed)]
    assert lines == [["env", "JAX_PLATFORMS=cpu", "XLA_FLAGS=--xla_force_host_platform_device_count=1", "JAX_NUM_PROCESSES=3",
                      f"JAX_PROCESS_ID={i}", sys.executable, "-m", "alignment_jax", "train", "--config=x", "--workdir=a b"]
                     for i in range(3)]  # fmt: skip


def test_a_local_process_that_fails_ends_the_others_and_its_code_is_passed_on(stubs):
    began = time.time()
    job = local(stubs, "if me == '1': sys.exit(7)\n"
                       "signal.signal(signal.SIGTERM, lambda *_: (print('told', flush=True), sys.exit(0)))\n"
                       "time.sleep(60)\n", "--processes=3")  # fmt: skip
    job.communicate(timeout=30)
    assert job.returncode == 7 and time.time() - began < 8


def test_a_local_process_that_does_not_listen_is_ended_all_the_same(stubs):
    job = local(stubs, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
                       "print(os.getpid(), flush=True)\n"
                       "time.sleep(0.5)\n"
                       "if me == '0': sys.exit(3)\n"
                       "time.sleep(60)\n")  # fmt: skip
    out, _ = job.communicate(timeout=9)
    assert job.returncode == 3
    for line in out.splitlines():
        with pytest.raises(ProcessLookupError):
            os.kill(int(line.split()[-1]), 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_local_goes_to_all_once_and_they_end_in_their_own_time(stubs, number):
    """To the whole group, as a terminal does it."""
    job = local(stubs, "def told(number, frame):\n"
                       "    print('told', number, flush=True)\n"
                       "    time.sleep(0.3)\n"
                       "    print('saved', flush=True)\n"
                       "    sys.exit(0)\n"
                       f"signal.signal({int(number)}, told)\n"
                       "print('up', flush=True)\n"
                       "time.sleep(60)\n")  # fmt: skip
    assert job.stdout is not None
    assert sorted(job.stdout.readline() for _ in range(2)) == ["[process 0] up\n", "[process 1] up\n"]
    os.killpg(job.pid, number)
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 0
    assert sorted(out.splitlines()) == sorted(f"[process {i}] {w}" for i in range(2) for w in (f"told {int(number)}", "saved"))
