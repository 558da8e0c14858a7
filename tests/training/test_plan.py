"""What a plan predicts is what the compiler says of the programs that are called; its reader of HLO counts what is written."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from alignment_jax import cli
from alignment_jax.training import hlo, loop, plan, sharding

TESTS = Path(__file__).parents[1]
KEYS = {"fits", "topology", "chips", "hbm_per_chip_bytes", "flops_per_chip", "bytes_accessed_per_chip", "collectives", "roofline_seconds",
        "effective_batch", "advice"}  # fmt: skip
PARTS = ("parameters", "reward", "optimizer", "ema", "copies", "other", "code", "arguments", "held", "temporaries")
LOOP = """
%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %x = bf16[8,4] get-tuple-element(%p), index=1
  %g = bf16[16,4]{1,0} all-gather(%x), channel_id=2, replica_groups={{0,1}}, dimensions={0}
  %cut = bf16[8,4] slice(%g), slice={[0:8], [0:4]}
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], bf16[8,4]) tuple(%next, %cut)
}

%condition (q: (s32[], bf16[8,4])) -> pred[] {
  %q = (s32[], bf16[8,4]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %end = s32[] constant(12)
  ROOT %lt = pred[] compare(%j, %end), direction=LT
}

ENTRY %main (a: bf16[8,4], b: f32[4,4], /*index=2*/c: f32[8,4]) -> bf16[8,4] {
  %a = bf16[8,4] parameter(0)
  %b = f32[4,4] parameter(1)
  %c = f32[8,4] parameter(2)
  %from = s32[] constant(START)
  %start = (s32[], bf16[8,4]) tuple(%from, %a)
  %loop = (s32[], bf16[8,4]) while(%start), condition=%condition, body=%bodyKNOWN
  %dot = f32[8,4] dot(%c, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = bf16[8,4] get-tuple-element(%loop), index=1
}
"""


def read(text):
    module = hlo.parse(text)
    runs = hlo.loops(module)
    return module, runs, hlo.collectives(module, runs)


@pytest.mark.parametrize("line, expected", [
    ("%r = f32[8,4]{1,0} all-reduce(%a), channel_id=1, to_apply=%add", ("all-reduce", 128, 128)),
    ("%r = f32[8,4] all-reduce-start(%a), channel_id=1, to_apply=%add", ("all-reduce", 128, 128)),
    ("%r = (f32[8,4]{1,0:T(8,128)}, bf16[6]) all-reduce(%a, %b), to_apply=%add", ("all-reduce", 140, 128)),
    ("%r = f32[2,4] reduce-scatter(%a), dimensions={0}, to_apply=%add", ("reduce-scatter", 128, 32)),
    ("%r = f32[32,4] all-gather(%a), dimensions={0}", ("all-gather", 512, 512)),
    ("%r = (f32[8,4], f32[32,4]{1,0}) all-gather-start(%a), dimensions={0}", ("all-gather", 512, 512)),
    ("%r = f32[8,4] all-to-all(%a), dimensions={0}", ("all-to-all", 128, 128)),
    ("%r = (f32[8,4], f32[8,4], u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1}}",
     ("collective-permute", 128, 128)),
    ("%r = f32[8,4] all-gather-done(%a)", None),
])  # fmt: skip
def test_bytes_of_a_collective_are_those_of_the_whole_array(line, expected):
    text = f"ENTRY %m (a: f32[8,4], b: bf16[6]) -> f32[] {{\n  %a = f32[8,4] parameter(0)\n  %b = bf16[6] parameter(1)\n  ROOT {line}\n}}"
    assert [(c.kind, c.bytes, c.largest) for c in read(text)[2]] == ([] if expected is None else [expected])


def test_a_collective_in_pieces_counts_once():
    """libtpu runs a gather beside convolutions: pieces of it lie in fusions, each written as the whole gather, of one channel."""
    piece = """%fused_computation.{i} (p.{i}: bf16[4,4]) -> bf16[16,4] {{
  %p.{i} = bf16[4,4] parameter(0)
  ROOT %g.{i} = bf16[16,4] all-gather(%p.{i}), channel_id={channel}, dimensions={{0}}
}}
"""
    call = "  %f.{i} = bf16[16,4] fusion(%a), kind=kCustom, calls=%fused_computation.{i}\n"
    text = "".join(piece.format(i=i, channel=7 + i // 3) for i in range(5)) + "ENTRY %m (a: bf16[4,4]) -> bf16[16,4] {\n"
    text += "  %a = bf16[4,4] parameter(0)\n" + "".join(call.format(i=i) for i in range(5))
    text += "  %b = bf16[16,4] all-gather(%a), channel_id=7, dimensions={0}\n  ROOT %c = bf16[16,4] copy(%b)\n}\n"
    assert [(c.kind, c.bytes, c.times) for c in read(text)[2]] == [("all-gather", 128, 1)] * 3, "two in pieces, of channels 7 and 8, and %b"


@pytest.mark.parametrize("start, known, rounds, unknown", [
    ("0", "", 12, 0), ("2", "", 10, 0), ("0", ', backend_config={"known_trip_count":{"n":"7"}}', 7, 0),
])  # fmt: skip
def test_what_is_in_a_loop_counts_as_often_as_it_goes_round(start, known, rounds, unknown):
    module, runs, found = read(LOOP.replace("START", start).replace("KNOWN", known))
    assert (found[0].bytes, found[0].times, runs.times["body"], runs.once["body"], runs.unknown) == (128, rounds, rounds, 1, unknown)
    flops, moved = hlo.repeated(module, runs)
    inside, outside = 64 + 128 + 128 + 64 + 12, 128 + 64 + 128  # gather, slice and counter; the dot
    condition = 4 + 4 + 1
    assert flops == 1.0 and moved == pytest.approx((rounds * (inside + condition) + outside) / (inside + condition + outside))


def test_a_loop_that_tells_no_rounds_counts_once_and_is_reported():
    module, runs, found = read(LOOP.replace("constant(START)", "add(%a, %a)").replace("KNOWN", ""))
    assert (found[0].times, runs.unknown) == (1, 1)


def test_flops_of_products_and_convolutions_are_counted():
    kinds = {"x": "f32[2,8,8,3]", "k": "f32[3,3,3,16]", "a": "f32[8,5]", "b": "f32[5,7]"}
    op = lambda kind, opcode, operands, attributes: hlo.Instruction("y", kind, opcode, operands, attributes)
    assert hlo._flops(op("f32[8,7]", "dot", ("a", "b"), "lhs_contracting_dims={1}"), kinds) == 2 * 8 * 7 * 5
    convolution = op("f32[2,8,8,16]", "convolution", ("x", "k"), "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f")
    assert hlo._flops(convolution, kinds) == 2 * (2 * 8 * 8 * 16) * 27


START = """
import json, sys; sys.path.insert(0, {tests!r})
import jax, numpy as np
count = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
"""
SD = """
import runpy, tiny_sd
from pathlib import Path
from alignment_jax.training import abstract, build, hlo, plan, sharding
sharding.SMALL = 1
folder = Path({folder!r})
for name, value in tiny_sd.configs("sd15").items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))
(folder / "tokenizer" / "merges.txt").write_text("\\n".join(["#version: 0.2", *tiny_sd.fixture("scores")["merges"].tolist()]))
c = runpy.run_path("configs/sd15.py")["get_config"]("sft")
c.model, c.reward = str(folder), ""
c.model_options.update(dtype="float32", remat=False)
c.batch.update(prompts=16, group=1, microbatch=8)
"""
BY_CHIPS = """
import optax
_, params, _ = build.described(c)
trees = {"parameters": params, "optimizer": jax.eval_shape(optax.adamw(1e-4).init, params["unet"])}
out = {n: {k: plan.size(abstract._fixed(sharding.layout({"data": 1, "fsdp": n}, jax.devices()[:n]), v)) for k, v in trees.items()}
       for n in (1, 2, 4, 8)}
"""
ONE_GRADIENT = """
program = abstract.one_step(c, on=sharding.layout({"data": 1, "fsdp": 4}, jax.devices()[:4]))["gradient"]
module = hlo.parse(program.function.lower(*program.arguments).compile().as_text())
trained = program.arguments[0]
cut = [x for x in jax.tree.leaves(program.arguments[:3]) if not x.sharding.is_fully_replicated]
out = {"found": [list(one) for one in hlo.collectives(module, hlo.loops(module))], "trained": count(trained), "cut": count(cut),
       "largest": max(count(x) for x in jax.tree.leaves(trained)),
       "picture": 4 * int(np.prod(program.arguments[4]["x0"].shape[1:]))}
"""
CALLED = """
import toy_config
from alignment_jax.training import loop, plan
c = toy_config.get_config("plain5")
c.batch.update({batch!r})
predicted = plan.plan(c, kept={kept!r})
session, state = loop.set_up(c)
called, measured = {{}}, {{}}
on_one = lambda x: int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize  # keys have no bytes of their own to be asked for
alive = lambda: sum(on_one(x) for x in jax.live_arrays() if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key))
before = alive() - sum(on_one(x) for x in jax.tree.leaves((session.frozen, state)) if x.dtype != state.key.dtype)

def watched(name, function):
    needs = {{}}

    def call(*arguments):
        if not needs:
            memory = function.lower(*arguments).compile().memory_analysis()
            called[name] = [memory.argument_size_in_bytes, memory.temp_size_in_bytes]
            needs["more"] = memory.temp_size_in_bytes + max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
        measured[name] = max(measured.get(name, 0), alive() - before + needs["more"])
        return function(*arguments)
    return call

session = session._replace(programs=type(session.programs)(*[watched(n, f) for n, f in session.programs._asdict().items()]))
one = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
held = {{"parameters": one((session.frozen["params"], state.trained)), "optimizer": one((state.opt_state, state.own)),
         "ema": one(state.ema)}}
batch = next(session.run.source)
state, _ = loop.one_step(session, state, batch, int(c.batch.get("updates", 1)))
out = {{"plan": predicted, "held": held, "called": called, "measured": measured}}
"""
BATCHES = {"plain": {}, "two updates": {"updates": 2}, "filled up": {"prompts": 5, "group": 4, "microbatch": 8}}


def facts(script, devices):
    """What a script in a process of its own, with devices that are threads of this CPU, says of itself."""
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu",
           "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # fmt: skip
    script = f"{START.format(tests=str(TESTS))}{script}\nprint(json.dumps(out))"
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """The fixture below, by the name of its batch."""
    return lru_cache(lambda name: facts(CALLED.format(kept=str(tmp_path_factory.mktemp("plan") / "kept.json"), batch=BATCHES[name]), 4))


@pytest.fixture
def toy(toys):
    """A plan of the toy's step on four devices, what its arrays hold, and what the compiler says of the programs as they are called."""
    return toys("plain")


def test_a_plan_is_one_object_with_all_figures(toy):
    found = toy["plan"]
    assert KEYS <= found.keys() and found["fits"] is True and found["advice"] == []
    assert found["effective_batch"] == {"samples": 16, "prompts": 4, "group": 4, "microbatch_per_chip": 2.0, "updates": 1}
    hbm = found["hbm_per_chip_bytes"]
    assert hbm["total"] == sum(hbm[part] for part in PARTS) <= hbm["limit"]
    assert found["flops_per_chip"] == sum(p["calls"] * p["flops"] for p in found["programs"].values()) > 0
    assert found["roofline_seconds"] is None  # nothing is published of the devices at hand
    assert "fits" in plan.text(found) and hbm["peak"] in found["programs"]


def test_what_stays_on_a_chip_is_what_its_arrays_hold(toy):
    held, found = toy["held"], toy["plan"]["hbm_per_chip_bytes"]
    assert held == {k: found[k] for k in held}


def test_the_programs_of_a_plan_need_what_the_called_ones_need(toy):
    """Within 5 %: an array too small to matter may lie whole in the loop and cut in the plan.

    Trap: rows taken out of a sharded batch by their numbers lie whole on every device, and each then does all the work.
    """
    planned = {name: p["reads"] + p["temporaries"] for name, p in toy["plan"]["programs"].items()}
    assert planned == pytest.approx({name: sum(both) for name, both in toy["called"].items()}, rel=0.05, abs=256)


@pytest.mark.parametrize("batch", ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in list(BATCHES)[1:])])
def test_what_a_plan_says_of_each_program_is_what_lies_on_a_device_when_it_is_called(toys, batch):
    """Measured: all arrays that live on the device at the call, and what the compiler says that the called program takes besides."""
    toy = toys(batch)
    found = toy["plan"]
    hbm = found["hbm_per_chip_bytes"]
    stay = sum(hbm[k] for k in ("parameters", "reward", "optimizer", "ema", "copies", "other"))
    predicted = {k: stay + p["arguments"] + p["held"] + p["temporaries"] + p["outputs"] for k, p in found["programs"].items()}
    assert predicted == pytest.approx({k: toy["measured"][k] for k in predicted}, rel=0.05, abs=1500)


def test_fsdp_divides_parameters_and_optimiser_by_the_chips(tmp_path):
    found = facts(SD.format(folder=str(tmp_path)) + BY_CHIPS, 8)
    for n in (2, 4, 8):
        for part, whole in found["1"].items():
            assert found[str(n)][part] == pytest.approx(whole / n, rel=0.1)


@pytest.mark.slow
def test_an_fsdp_gradient_gathers_parameters_one_by_one_reduces_each_about_once_and_sends_nothing_else(tmp_path):
    """Trap: left to itself, the compiler cuts what a convolution gives by its channels, as fsdp cuts the kernel, and sends pictures."""
    script = SD.format(folder=str(tmp_path)) + "c.model_options.update(height=SIDE, width=SIDE)\n" + ONE_GRADIENT
    small, large = (facts(script.replace("SIDE", side), 4) for side in ("64", "128"))  # where what layers give is larger than kernels
    sent = lambda found, *kinds: sum(c[1] * c[3] for c in found["found"] if c[0] in kinds)
    for found in small, large:
        gathered = [c for c in found["found"] if c[0] == "all-gather"]
        assert gathered and max(c[2] for c in gathered) <= found["largest"]
        assert {c[0] for c in found["found"]} <= {"all-gather", "all-reduce", "reduce-scatter"}
        times = sent(found, "all-gather") / found["cut"]
        assert 0.9 < times < 2.2, "once for the forward pass, and at most once more for the backward one"
        assert 0.5 * found["trained"] < sent(found, "all-reduce", "reduce-scatter") < 2 * found["trained"]
    assert large["picture"] == 4 * small["picture"] and sent(large, "all-gather") == sent(small, "all-gather")


def config(**changes):
    c = ml_collections.ConfigDict(runpy.run_path(str(TESTS / "toy_config.py"))["get_config"]("plain5"))
    c.update(changes)
    return c


def test_out_of_memory_says_what_to_change_with_the_figures_of_the_plan(tmp_path, monkeypatch):
    """The error that jax raises at a step, from the command to what a user reads; first without a plan, then with one."""
    config = runpy.run_path(str(TESTS / "toy_config.py"))["get_config"]("plain5")

    def train(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nand much more")

    monkeypatch.setattr(cli, "FLAGS", SimpleNamespace(config=config, workdir=str(tmp_path / "run"), profile=""))
    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(plan, "CACHE", str(tmp_path))
    says = r"ran out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\n"
    with pytest.raises(MemoryError, match=says + r".* alignment_jax plan with this --config .*\nTry:\n  a smaller batch.microbatch"):
        cli.train([])
    found = plan.plan(config)
    total = plan.amount(found["hbm_per_chip_bytes"]["total"])
    with pytest.raises(MemoryError, match=says + f"its plan: {total} a device.*\nTry:\n  batch.microbatch=1, one sample a chip at a time"):
        cli.train([])


def test_an_unknown_topology_names_the_nearest():
    with pytest.raises(ValueError, match=r"topology 'v5e:4x5' is not known. Did you mean 'v5e:4x(4|8)'\? Known: .*v6e:2x2.*2xv5e:4x4"):
        plan.plan(config(), "v5e:4x5")
    with pytest.raises(ValueError, match="topology '0xv5e:4x4' is not known"):
        plan.plan(config(), "0xv5e:4x4")
    assert (plan.chips("v5e:4x8"), plan.chips("3xv5p:2x2x2")) == (32, 24)


def test_what_goes_to_other_slices_takes_as_long_as_their_network_does():
    """An all-reduce over slices, as libtpu writes it: what this chip's host sends, once its own slice has shared the work."""
    text = """ENTRY %m (a: f32[256,8]) -> f32[] {
  %a = f32[256,8] parameter(0)
  %t = token[] after-all()
  %send = (f32[256,8], u32[], token[]) send(%a, %t), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %r = f32[512,8] all-gather(%a), dimensions={0}
}"""  # noqa: E501
    found = read(text)[2]
    assert [(c.kind, c.bytes) for c in found] == [("dcn all-reduce", 8192), ("all-gather", 16384)]
    program = {"calls": 3, "arguments": 0, "held": 0, "temporaries": 0, "outputs": 0, "reads": 0, "flops": 1.0, "bytes": 1.0,
               "collectives": [{"kind": c.kind, "bytes": c.bytes, "count": 1} for c in found]}  # fmt: skip
    done = {"programs": {"gradient": program}, "stays": dict.fromkeys(PARTS, 0), "fsdp": [1]}
    on = SimpleNamespace(mesh=SimpleNamespace(devices=np.array(jax.devices()), size=1, shape={"dcn": 1, "data": 1, "fsdp": 1, "tensor": 1}))
    out = plan.result(config(), "2xv5e:2x2", plan.CHIPS["v5e"], on, (4, 4, 4), done)
    assert out["roofline_seconds"] == pytest.approx(3 * 8192 / 3.125e9)  # 25 Gbit/s a chip; the links would take 3 * 16384 / 200e9
    assert {one["kind"]: one["bytes"] for one in out["collectives"]} == {"dcn all-reduce": 3 * 8192, "all-gather": 3 * 16384}


@pytest.mark.parametrize(("shape", "able"), [((1024, 2048), [1, 2, 4, 8]), ((1025, 3 * 2**12), [1, 2, 4, 8]), ((1026, 1026), [1, 2]),
                                             ((33, 33), [1, 2, 4, 8])])  # fmt: skip
def test_fsdp_is_advised_only_as_far_as_every_large_array_can_be_cut(shape, able):
    """2 x 513 divides by no 4, and a small array stays whole. Trap: advice that the next command refuses."""
    on = sharding.Layout(AbstractMesh((1, 4, 2, 1), sharding.AXES))
    assert plan.sizes_of_fsdp(on, {"big": jax.ShapeDtypeStruct(shape, jnp.float32)}) == able


def test_without_libtpu_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "jax\[tpu\]".*Linux only.*devices at hand'):
        plan.plan(config(), "v5e:2x2")


def test_pmap_and_batches_that_do_not_divide_are_refused_before_anything_compiles():
    with pytest.raises(ValueError, match="only the jit backend"):
        plan.plan(config(sharding={"backend": "pmap"}))
    with pytest.raises(ValueError, match="batch sizes must be at least 1"):
        plan.plan(config(batch={"prompts": 0}))


def test_advice_names_what_is_largest_first():
    hbm = dict.fromkeys(PARTS, 0) | {"parameters": 8 * 2**30, "optimizer": 16 * 2**30, "temporaries": 6 * 2**30, "reward": 7 * 2**30,
                                     "total": 37 * 2**30, "peak": "gradient"}  # fmt: skip
    found = {"hbm_per_chip_bytes": hbm, "mesh": {"dcn": 1, "data": 8, "fsdp": 1, "tensor": 1}, "chips": 8,
             "effective_batch": {"microbatch_per_chip": 2.0}, "fsdp_sizes": [1, 2, 4, 8]}  # fmt: skip
    c = ml_collections.ConfigDict({"model_options": {"remat": False, "param_dtype": "float32", "dtype": "bfloat16"}, "lora": {"rank": 4},
                                   "reward": {"name": "pick_score", "weights": "x"}})
    lines = plan.advice(c, found)
    assert [line.split(":")[0].split("=")[0] for line in lines] == ["sharding.fsdp", "model_options.remat", "model_options.param_dtype",
                                                                    "a reward with 'dtype'", "batch.microbatch"]  # fmt: skip
    assert "24.00 GiB a chip, become about 3.00 GiB" in lines[0] and "7.00 GiB a chip become about half" in lines[3]
    c.reward.dtype = "bfloat16"
    assert len(plan.advice(c, found)) == 4
    assert plan.advice(c, found | {"fsdp_sizes": [1, 2]})[0].startswith("sharding.fsdp=2 and data=4: ")


def needs_libtpu():
    spec = importlib.util.find_spec("libtpu")
    assert spec is not None and spec.origin, 'this test compiles for TPUs: pip install "jax[tpu]", or put libtpu on PYTHONPATH'


@pytest.mark.slow
def test_a_toy_is_planned_for_a_tpu_that_is_not_here(tmp_path):
    needs_libtpu()
    found = facts(SD.format(folder=str(tmp_path)) + f"out = plan.plan(c, 'v5e:2x2', kept={str(tmp_path / 'kept.json')!r})", 1)
    assert found["fits"] and found["chips"] == 4 and found["roofline_seconds"] > 0 and found["unknown_loops"] == 0
    assert found["hbm_per_chip_bytes"]["limit"] == pytest.approx(15.75 * 2**30)
    assert any(one["kind"] == "all-reduce" for one in found["collectives"])


@pytest.mark.slow
def test_a_kernel_that_many_chips_share_is_gathered_before_it_is_used(tmp_path):
    """Trap: a loop over the pieces of a kernel, which TPU's partitioner makes from 8 on, does twice the work of an autoencoder's layers."""
    needs_libtpu()
    script = """
from alignment_jax.platform import assumed
devices, out = plan.described("v5e:4x4")[0], {}
c.batch.microbatch = 16
for axes in {"data": 16}, {"data": 1, "fsdp": 16}:
    with assumed("tpu"):
        program = abstract.one_step(c, on=sharding.layout(axes, devices))["to_samples"]
    made = program.function.lower(*program.arguments).compile()
    module = hlo.parse(made.as_text())
    out[list(axes)[-1]] = {"loops": sum(op.opcode == "while" for body in module.computations.values() for op in body),
                           "gathers": sum(one.kind == "all-gather" for one in hlo.collectives(module, hlo.loops(module))),
                           "flops": made.cost_analysis()["flops"]}
"""
    found = facts(SD.format(folder=str(tmp_path)) + script, 1)
    assert found["data"]["loops"] == found["data"]["gathers"] == found["fsdp"]["loops"] == 0 < found["fsdp"]["gathers"]
    assert found["fsdp"]["flops"] == pytest.approx(found["data"]["flops"], rel=0.05)


@pytest.mark.slow
def test_a_plan_for_two_slices_has_what_goes_between_them(tmp_path):
    """A slice gathers its parameters by itself; gradients alone are added over the network, of each microbatch once."""
    needs_libtpu()
    script = f"""
devices = plan.described("2xv5e:2x2")[0]
mesh = sharding.make_mesh({{"dcn": 2, "data": 1, "fsdp": 4}}, devices)
c.sharding.update(dcn=2, data=1, fsdp=4)
found = plan.plan(c, "2xv5e:2x2", kept={str(tmp_path / "kept.json")!r})
out = {{"slices": [[d.slice_index for d in part.ravel()] for part in mesh.devices], "plan": found,
        "trained": count(build.described(c)[1]["unet"])}}
"""
    found = facts(SD.format(folder=str(tmp_path)) + script, 1)
    assert found["slices"] == [[0] * 4, [1] * 4] and found["plan"]["chips"] == 8
    between = {one["kind"]: one["bytes"] for one in found["plan"]["collectives"] if one["kind"].startswith("dcn ")}
    assert max(between, key=between.__getitem__) == "dcn all-reduce" and sum(between.values()) < 1.1 * between["dcn all-reduce"]
    calls = found["plan"]["programs"]["gradient"]["calls"]  # each chip sends its quarter of an array, or all of one that is small
    assert calls * found["trained"] / 4 <= between["dcn all-reduce"] <= 1.2 * calls * found["trained"]
