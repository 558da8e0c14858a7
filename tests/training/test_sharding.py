"""One device, eight, cut in every way, two processes, and pmap: the same parameters after five steps of every method."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import several
import worlds
from jax.sharding import AbstractMesh

from alignment_jax.algorithms import ALGORITHMS
from alignment_jax.training import fit, sharding

TESTS = Path(__file__).parents[1]
FORMS = list({entry.family: name for name, entry in reversed(ALGORITHMS.items())}.values())
FEW = ["ddpo", "diffusion_dpo"]  # two processes compile everything twice
TO_THE_FROZEN = ("d3po", "spo", "lpo")  # their ratio is to the base, whose program is another: 1 to rounding, once
LAYOUTS = {"data": {}, "fsdp": {"fsdp": 8, "data": 1}, "data, fsdp and tensor": {"data": 2, "fsdp": 2, "tensor": 2},
           "pmap": {"backend": "pmap"}, "two processes, fsdp": {"fsdp": 4, "data": 2},
           "two processes, dcn and fsdp": {"dcn": 2, "data": 2, "fsdp": 2}}  # fmt: skip
SCRIPT = """
import sys; sys.path.insert(0, {tests!r})
from alignment_jax.training import distributed, sharding
distributed.start()
import json, jax, numpy as np, worlds
assert jax.device_count() == 8
sharding.SMALL = 1
settings = {settings!r}
if "tensor" in settings:
    settings["rules"] = [("dense_1/kernel$", (None, "tensor")), ("out/kernel$", ("tensor", None))]
on = sharding.layout(settings)
if "dcn" in settings:  # each process is a slice
    assert [{{d.process_index for d in part.ravel()}} for part in on.mesh.devices] == [{{0}}, {{1}}]
on = on._replace(rules=on.rules[:2])
run, data = worlds.mixture_run, worlds.mixture_data
worlds.build = lambda parts: sharding.programs(on, parts)
worlds.mixture_data = lambda *a, **k: sharding.spread(on, data(*a, **k))

def placed(*a, **k):
    parts, programs, state, frozen, sampler = run(*a, **k)
    return parts, programs, state, sharding.place(on, frozen), sampler

worlds.mixture_run = placed
out = {{}}
for name in {names!r}:
    *_, state, _, _, log = worlds.run_steps(name, 5, n=64)
    first = log[0].get("ratio/deviation_max", 0.0)
    cut = sum(not x.is_fully_replicated for x in jax.tree.leaves((state.trained, state.opt_state)))
    out[name] = [first, cut, [x.ravel().tolist() for x in jax.tree.leaves(sharding.whole(state.trained))]]
if jax.process_index() == 0:
    open({found!r}, "w").write(json.dumps(out))
"""


@pytest.mark.parametrize(("kind", "names"), [
    *(pytest.param(kind, FEW if "processes" in kind else FORMS, id=f"{kind}-some") for kind in LAYOUTS if kind != "two processes, fsdp"),
    *(pytest.param(kind, list(ALGORITHMS), id=f"{kind}-all", marks=pytest.mark.slow) for kind in LAYOUTS),
])  # fmt: skip
def test_eight_devices_equal_one(kind, names, tmp_path):
    count, found = 2 if "processes" in kind else 1, tmp_path / "found.json"
    script = SCRIPT.format(tests=str(TESTS), settings=LAYOUTS[kind], names=names, found=str(found))
    codes, said = several.ended(several.start([["-c", script]] * count, devices=8 // count), timeout=3600)
    assert set(codes) == {0}, "\n".join(text[-2000:] for text in said)
    wrong = []
    for name, (ratio, cut, eight) in json.loads(found.read_text()).items():
        one = worlds.run_steps(name, 5, n=64)[2].trained
        apart = np.max([np.abs(np.ravel(a) - b).max() for a, b in zip(jax.tree.leaves(one), eight, strict=True)])
        if not (ratio <= 1e-6 * (name in TO_THE_FROZEN) and (cut > 4) == ("fsdp" in kind) and apart <= 1e-5):  # nan is none of it
            wrong.append(f"{name}: the ratio before the first update is off by {ratio}, {cut} arrays of the state are cut, "
                         f"parameters differ by {apart}")  # fmt: skip
    assert not wrong, "\n".join(wrong)


def on(rules=(), **sizes):
    """A layout of devices that are not there."""
    sizes = {"dcn": 1, "data": 1, "fsdp": 1, "tensor": 1, **sizes}
    return sharding.Layout(AbstractMesh(tuple(sizes.values()), tuple(sizes)), rules)


def tree(**shapes):
    return {"unet": {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}}


def specs(layout, **shapes):
    return {name: tuple(s.spec) for name, s in sharding.shardings(layout, tree(**shapes))["unet"].items()}


def test_fsdp_cuts_the_largest_dimension_that_divides_and_leaves_small_arrays_whole():
    found = specs(on(fsdp=8), wide=(320, 1280), tall=(49408, 768), odd=(77, 768), bias=(1280,), conv=(3, 3, 4, 640))
    assert found == {"wide": (None, "fsdp"), "tall": ("fsdp", None), "odd": (None, "fsdp"), "bias": (None,),
                     "conv": (None, None, None, "fsdp")}  # fmt: skip


def test_rules_name_the_last_dimensions_and_fsdp_takes_what_they_leave():
    found = specs(on(sharding.TENSOR, fsdp=2, tensor=4), **{"attn1.to_q/kernel": (320, 320), "attn1.to_out.0/kernel": (320, 320),
                                                           "ff.net.0.proj/kernel": (320, 2560), "conv1/kernel": (3, 3, 320, 320)})
    assert found == {"attn1.to_q/kernel": ("fsdp", "tensor"), "attn1.to_out.0/kernel": ("tensor", "fsdp"),
                     "ff.net.0.proj/kernel": ("fsdp", "tensor"), "conv1/kernel": (None, None, None, "fsdp")}


@pytest.mark.parametrize(("layout", "shapes", "says"), [
    (on(fsdp=7), {"big": (1024, 2048)}, r"no dimension of unet/big \(1024, 2048\) divides by fsdp 7"),
    (on((("big", (None, "tensor")),), tensor=3), {"big": (4, 8)}, "to be cut over tensor, and 8 does not divide by 3"),
    (on((("big", (None, None, "tensor")),), tensor=2), {"big": (4, 8)}, "names 3 dimensions"),
    (on((("nothing", ("fsdp",)),), fsdp=2), {"big": (4, 8)}, r"'nothing' .* matches no parameter; paths are like \['unet/big'\]"),
])  # fmt: skip
def test_what_cannot_be_cut_and_rules_without_a_parameter_are_errors(layout, shapes, says):
    with pytest.raises(ValueError, match=says):
        sharding.check(layout, tree(**shapes))


@pytest.mark.parametrize(("sizes", "says"), [
    ({"data": 3}, "does not fit 8 devices"), ({"fsdp": 16}, "divides by .1, 2, 4, 8"), ({"fsdp": -1}, "one of them may be -1"),
    ({"model": 2}, "has the axes dcn, data, fsdp, tensor; got model"), ({"data": 2, "tensor": 2}, "does not fit 8 devices"),
])  # fmt: skip
def test_a_mesh_that_does_not_divide_the_devices_is_refused(sizes, says):
    with pytest.raises(ValueError, match=says):
        sharding.make_mesh(sizes, [SimpleNamespace(process_index=0)] * 8)


def test_devices_of_several_slices_ask_for_the_axis_between_them():
    devices = [SimpleNamespace(slice_index=i // 4, process_index=i // 4) for i in range(8)]
    with pytest.raises(ValueError, match="on 2 slices, between which the network is slow; set sharding.dcn=2"):
        sharding.make_mesh({"data": -1}, devices)


def test_an_unknown_backend_and_pmap_with_cut_parameters_are_refused():
    with pytest.raises(ValueError, match="choose 'jit' or 'pmap'"):
        sharding.layout({"backend": "pjit"})
    with pytest.raises(ValueError, match="1 rules"):
        sharding.layout({"backend": "pmap", "rules": (("kernel", ("fsdp",)),)})


@pytest.mark.parametrize(("hosts", "tensor", "prompts", "group", "says"), [
    ([0, 1, 1, 0], 1, 2, 4, "cut a prompt's group in two.* nearest number of prompts is 4"), ([0, 1, 1, 0], 1, 4, 4, None),
    ([1, 1, 0, 0], 1, 2, 4, None), ([0, 1, 1, 0], 1, 2, 2, "cut a prompt's group"), ([0, 1, 1, 0], 1, 4, 1, None),
    ([0, 1, 0, 1], 2, 4, 1, r"tensor 2 lays one part of the batch on devices of the processes \[0, 1\]"),
    ([0, 0, 1, 1], 2, 3, 2, "batch.prompts 3 does not divide over 2 processes; the nearest is 4"), ([0] * 4, 1, 1, 4, None),
])  # fmt: skip
def test_hosts_that_a_mesh_interleaves_mix_no_groups(hosts, tensor, prompts, group, says):
    """The trap: on a v5e:4x4 the parts of process 0 are 0, 1, 6 and 15, and a half group would be standardised with other prompts."""
    devices = np.array([SimpleNamespace(process_index=i) for i in hosts])
    mesh = SimpleNamespace(devices=devices, size=4, shape={"dcn": 1, "data": 4 // tensor, "fsdp": 1, "tensor": tensor})
    config = ml_collections.ConfigDict({"batch": {"prompts": prompts, "group": group}})
    with pytest.raises(ValueError, match=says) if says else nullcontext():
        fit.processes(config, sharding.Layout(mesh))
