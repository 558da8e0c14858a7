"""One device, eight, cut in every way, and pmap: the same parameters after five steps of every method."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import worlds

from alignment_jax.algorithms import ALGORITHMS

TESTS = Path(__file__).parents[1]
FORMS = list({entry.family: name for name, entry in reversed(ALGORITHMS.items())}.values())
LAYOUTS = {"data": {}, "fsdp": {"fsdp": 8, "data": 1}, "data, fsdp and tensor": {"data": 2, "fsdp": 2, "tensor": 2},
           "pmap": {"backend": "pmap"}}  # fmt: skip
SCRIPT = """
import sys; sys.path.insert(0, {tests!r})
import json, jax, numpy as np, worlds
from functools import partial
from alignment_jax.training import sharding
assert jax.device_count() == 8
sharding.SMALL = 1
settings = {settings!r}
if "tensor" in settings:
    settings["rules"] = [("dense_1/kernel$", (None, "tensor")), ("out/kernel$", ("tensor", None))]
on = sharding.layout(settings)
on = on._replace(rules=on.rules[:2])
build, run, data = worlds.build, worlds.mixture_run, worlds.mixture_data
worlds.build = lambda parts: build(parts, partial(sharding.kept, on))
worlds.mixture_data = lambda *a, **k: sharding.shard(on, data(*a, **k))

def placed(*a, **k):
    parts, programs, state, frozen, sampler = run(*a, **k)
    programs = sharding.pmapped(on, programs) if on.backend == "pmap" else programs
    return parts, programs, state, sharding.place(on, frozen), sampler

worlds.mixture_run = placed
out = {{}}
for name in {names!r}:
    *_, state, _, _, log = worlds.run_steps(name, 5, n=64)
    first = log[0].get("ratio/deviation_max", 0.0)
    cut = sum(not x.is_fully_replicated for x in jax.tree.leaves((state.trained, state.opt_state)))
    out[name] = [first, cut, [np.asarray(x).ravel().tolist() for x in jax.tree.leaves(state.trained)]]
print(json.dumps(out))
"""


@pytest.mark.parametrize("names", [FORMS, pytest.param(list(ALGORITHMS), marks=pytest.mark.slow)], ids=["one of each loss form", "all"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_eight_devices_equal_one(kind, names):
    script = SCRIPT.format(tests=str(TESTS), settings=LAYOUTS[kind], names=names)
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, (ratio, cut, eight) in json.loads(done.stdout.strip().splitlines()[-1]).items():
        assert ratio == 0.0, f"{name}: the ratio before the first update is off by {ratio}"
        assert (cut > 4) == ("fsdp" in kind), f"{name}: {cut} arrays of the state are cut"
        for a, b in zip(jax.tree.leaves(worlds.run_steps(name, 5, n=64)[2].trained), eight, strict=True):
            np.testing.assert_allclose(np.ravel(a), b, atol=1e-5, err_msg=name)
