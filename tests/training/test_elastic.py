"""A UNet of Stable Diffusion, cut in every way, trains as on one device; and a run goes on bit for bit on whatever devices there are.

  python tests/training/test_elastic.py WORLD FOLDER AXES JOBS        is one process of these tests
"""

import json
import os
import re
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
import several
import tiny_sd

from alignment_jax.training import distributed, loop, sharding
from alignment_jax.training.checkpoint import Checkpointer
from alignment_jax.training.state import TrainState

CAPTIONS = ["a red house", "a cat on the moon", "the sea", "a blue house"]
METHODS = {"shallow": {"name": "sft"}, "sft": {"name": "sft"}, "ddpo": {"name": "ddpo", "clip_range": 0.1},
           # keeps a reference, a critic with its own Adam, and the last rewards of every prompt
           "dpok": {"name": "dpok", "clip_range": 0.1, "kl_weight": 0.1, "width": 16, "advantage": "prompt", "min_count": 1,
                    "buffer": 4}}  # fmt: skip
# devices of a process, processes, how the devices are used
LAYOUTS = {"one": (1, 1, {}), "fsdp": (8, 1, {"data": 1, "fsdp": 8}), "tensor": (8, 1, {"data": 4, "tensor": 2}),
           "data, fsdp and tensor": (8, 1, {"data": 2, "fsdp": 2, "tensor": 2}), "four devices": (4, 1, {"data": 1, "fsdp": 4}),
           "two processes": (4, 2, {"data": 2, "fsdp": 4})}  # fmt: skip
# what the processes of a layout do, one thing after the other: "train" is compared with one device; what "keep" leaves after two steps
# on eight devices is gone on with on others
JOBS = {"one": ["train shallow, keep shallow", "train sft, train ddpo, keep dpok"],
        "data, fsdp and tensor": ["train shallow, keep shallow", "train sft, train ddpo, keep dpok"],
        "tensor": ["train sft, train ddpo"], "fsdp": ["train sft, train ddpo, keep dpok"], "four devices": ["keep dpok"],
        "two processes": ["keep dpok"]}  # fmt: skip
KEPT_BY = {"keep shallow": "data, fsdp and tensor", "keep dpok": "fsdp"}
# the kernels that tensor parallelism cuts: four transformers, each with attention to itself and to the text and a feed-forward layer
BY_TENSOR = {"to_q": 8, "to_k": 8, "to_v": 8, "to_out.0": 8, "ff.net.0.proj": 4, "ff.net.2": 4}


def in_pieces(kind, what):
    """{n: how many arrays of the UNet are to lie in n pieces}; fsdp 8 cannot cut a bias of 4."""
    arrays = 168 if what == "shallow" else 208
    return {"one": {1: arrays}, "fsdp": {8: arrays - 1, 1: 1}, "tensor": {2: 40, 1: arrays - 40},
            "data, fsdp and tensor": {4: 40, 2: arrays - 40}, "four devices": {4: arrays}, "two processes": {4: arrays}}[kind]  # fmt: skip


def settings(world, job):
    """A config, as a dictionary, of eight pictures a step.

    Gradients differ in how their sums are rounded. Where nothing but that is left of one, Adam makes a full step of it all the same;
    and it hides a gradient that is off by a factor, as clipping does. Runs that are compared with one device take plain steps.
    """
    kept, name = job.split()
    method, model = METHODS[name], "shallow" if name == "shallow" else "sd15"
    labelled = method["name"] == "sft"
    return {
        "seed": 0, "steps": 3, "model": str(world / model), "weights": "shipped", "model_options": {"dtype": "float32", "remat": False},
        "reward": "" if labelled else "own_reward:warmth", "method": method, "batch": {"prompts": 4, "group": 2},
        "optimizer": {"name": "adam", "learning_rate": 1e-4, "ema": 0.9} if kept == "keep" else
                     {"name": "sgd", "learning_rate": 0.05, "clip_norm": 0.0},
        "sampling": {"num_steps": 2, "eta": 1.0, "guidance_scale": 3.0, "scheduler": "ddim"},
        "data": {"labels": "npz", "path": str(world / "labels.npz"), "drop": 0.25} if labelled else {"prompts": str(world / "prompts.txt")},
        "lora": {"rank": 2, "targets": "ddpo-pytorch"} if name == "ddpo" else {},
    }  # fmt: skip


def by_path(tree):
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def write(file, state):
    """All of a state, whole."""
    found = by_path(sharding.whole(state._replace(key=jax.random.key_data(state.key))))
    if jax.process_index() == 0:
        np.savez(file, **found)


def work(world, folder, axes, job):
    """Two steps, or what was kept after them, and a third; writes what there was before it, its batch, and what came of it."""
    session, start = loop.set_up(ml_collections.ConfigDict(settings(world, job) | {"sharding": axes}))
    workdir, metrics = world / job, []

    def one_step(state, batch):
        state, found = loop.one_step(session, state, batch)
        metrics.append({k: float(v) for k, v in found.items()})
        return state

    state = loop.resume(workdir, session, start) if "keep" in job else start
    resumed = state is not start
    for _ in range(0 if resumed else 2):
        state = one_step(state, next(session.run.source))
    if "keep" in job and not resumed:
        loop.save(workdir, Checkpointer(workdir), session, state)
    write(folder / f"{job} before.npz", state)
    cut = {k: x.size // x.addressable_shards[0].data.size for k, x in by_path((state, session.frozen["params"])).items() if "'unet'" in k}
    position, batch = session.run.source.get_state(), next(session.run.source)
    write(folder / f"{job} after.npz", one_step(state, batch))
    facts = {"resumed": resumed, "position": position, "batch": jax.tree.map(lambda x: np.asarray(x).tolist(), batch), "cut": cut}
    (folder / f"{job} {jax.process_index()}.json").write_text(json.dumps(facts | {"metrics": metrics}))


@pytest.fixture(scope="module")
def did(tmp_path_factory):
    """did(layout, job) -> what it wrote; JOBS are done once, each line by processes of its own, after what they go on from."""
    world = tmp_path_factory.mktemp("world")
    tiny_sd.write("sd15", world / "sd15")
    tiny_sd.write("sd15", world / "shallow", **tiny_sd.SHALLOW)
    texts = [f"{CAPTIONS[i % 4]} {i}" for i in range(16)]
    np.savez(world / "labels.npz", images=np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8), prompts=np.array(texts))
    (world / "prompts.txt").write_text("\n".join(texts))

    @cache
    def processes(kind, jobs):
        for job in jobs.split(", "):
            if KEPT_BY.get(job, kind) != kind:
                did(KEPT_BY[job], job)
        devices, count, axes = LAYOUTS[kind]
        folder = tmp_path_factory.mktemp("did")
        command = [__file__, str(world), str(folder), json.dumps(axes), jobs]
        # optimised least; and a gradient is compiled once, whatever the optimiser
        env = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
               "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(world / "cache"))}  # fmt: skip
        codes, said = several.ended(several.start([command] * count, devices, **env), timeout=3600)
        assert set(codes) == {0}, "\n".join(text[-2000:] for text in said)
        return {job: read(folder, count, job) for job in jobs.split(", ")}

    def did(kind, job):
        return processes(kind, next(jobs for jobs in JOBS[kind] if job in jobs))[job]

    return did


def read(folder, count, job):
    """What the processes of a job wrote; the rows of its batch are theirs one after the other."""
    facts = [json.loads((folder / f"{job} {i}.json").read_text()) for i in range(count)]
    batch = {k: sum((f["batch"][k] for f in facts), []) for k in facts[0]["batch"]}
    return facts[0] | {"batch": batch} | {k: dict(np.load(folder / f"{job} {k}.npz")) for k in ("before", "after")}


def pieces(found):
    """{tree: {n: how many arrays of the UNet lie in n pieces there}}, the trees being the parameters, Adam's, the copies, ..."""
    out = defaultdict(Counter)
    for path, n in found["cut"].items():
        out[path.split("['unet']")[0]][n] += 1
    return {tree: dict(counts) for tree, counts in out.items()}


def apart(a, b):
    """The largest difference of trained parameters."""
    return np.max([np.abs(x - b[path]).max() for path, x in a.items() if path.startswith(".trained")])


CUT = ("data, fsdp and tensor", "tensor", "fsdp")
OTHERS = ("one", "four devices", "data, fsdp and tensor", "two processes")


@pytest.mark.parametrize(("kind", "what"), [
    (CUT[0], "shallow"), *(pytest.param(kind, what, marks=pytest.mark.slow) for kind in CUT for what in ("sft", "ddpo")),
])  # fmt: skip
def test_a_unet_that_is_cut_trains_as_on_one_device(did, kind, what):
    """Plain steps of 0.05 move parameters by thousandths, and what is rounded differently by less than a millionth."""
    one, cut = did("one", f"train {what}"), did(kind, f"train {what}")
    whole, found = pieces(one), pieces(cut)
    if what == "ddpo":  # it trains factors, which are cut over fsdp alone
        assert (whole.pop("[0].trained"), found.pop("[0].trained")) == ({1: 64}, {LAYOUTS[kind][2].get("fsdp", 1): 64})
    assert list(whole.values()) == [in_pieces("one", what)] and list(found.values()) == [in_pieces(kind, what)]
    most = [path for path, n in cut["cut"].items() if n == max(cut["cut"].values())]
    names = Counter(re.search(r"(to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|\w+)'\]\['\w+'\]$", path)[1] for path in most)
    assert names == BY_TENSOR or kind == "fsdp"
    for a, b in zip(one["metrics"], cut["metrics"], strict=True):
        assert what != "ddpo" or a["ratio/deviation_max"] == b["ratio/deviation_max"] == 0.0
        np.testing.assert_allclose([b[k] for k in ("loss", "grad_norm")], [a[k] for k in ("loss", "grad_norm")], rtol=1e-4, atol=1e-6)
    assert apart(one["before"], one["after"]) > 1e-3
    assert apart(one["after"], cut["after"]) <= 1e-5


@pytest.mark.parametrize(("kind", "what"), [("one", "shallow"), *(pytest.param(kind, "dpok", marks=pytest.mark.slow) for kind in OTHERS)])
def test_a_run_goes_on_with_other_devices_as_if_nothing_had_happened(did, kind, what):
    kept, found = did(KEPT_BY[f"keep {what}"], f"keep {what}"), did(kind, f"keep {what}")
    assert found["resumed"] and not kept["resumed"]
    a, b = kept["before"], found["before"]
    fields = {re.match(r"\.(\w+)", path)[1] for path in a}
    assert fields == set(TrainState._fields) - ({"copies", "own", "extra"} if what == "shallow" else set())
    assert list(a) == list(b)
    assert [path for path in a if a[path].tobytes() != b[path].tobytes()] == []
    assert found["position"] == kept["position"] and found["batch"] == kept["batch"]
    assert all(counts == in_pieces(kind, what) for counts in pieces(found).values())
    assert apart(a, kept["after"]) > 5e-5
    assert apart(kept["after"], found["after"]) <= 1e-5


if __name__ == "__main__":
    distributed.start()
    sharding.SMALL = 1
    for job in sys.argv[4].split(", "):
        work(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), job)
