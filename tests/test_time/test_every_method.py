"""One table of properties that every test-time method has, on the 2-D mixture."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from steered import ETA, NO_REWARD, OFF, SCALE, SETTINGS

from alignment_jax.diffusion import Sampler, draw, guided, sampling_grid
from alignment_jax.rewards.base import Reward
from alignment_jax.test_time import TEST_TIME
from alignment_jax.training import steering
from alignment_jax.training.programs import Guidance

NAMES = sorted(TEST_TIME)
FAMILIES = sorted({TEST_TIME[n].family: n for n in NAMES}.values())


def maps(params, x, t, cond):
    """Attention of one position to the two tokens of a label: the nearer a mode, the more it is looked at."""
    nearness = jnp.stack([-jnp.square(x - worlds.CENTRES[i]).sum(-1) for i in (3, 0)], -1)
    return jax.nn.softmax(nearness, -1)[:, None, None, :]


def world(name: str, reward=worlds.near, **settings):
    """(draw(keys, p) -> (x0, info), the plain chain's draw(keys), sampler) of a method with these settings; p: the reward's params."""
    bundle = worlds.mixture_bundle()._replace(attention=maps)
    params = bundle.init(jax.random.key(0))
    sampler = Sampler(bundle.schedule, sampling_grid(bundle.schedule, 6), "x0", eta=ETA.get(name, 0.0))
    guidance, null, judge = Guidance(SCALE.get(name, 1.0)), {"label": jnp.zeros((1, 2))}, Reward("near", reward)
    method = steering.method(name, settings, bundle, sampler, guidance, judge)
    policy = guided(partial(bundle.denoise, params), null, guidance.scale)
    networks = partial(steering.networks, bundle, params, policy, null, guidance, judge)

    def data(keys):
        return {"cond": {"label": jnp.ones((len(keys), 2))}, "condition": {}, "null": null,
                "subjects": jnp.broadcast_to(jnp.array([True, False]), (len(keys), 2))}  # fmt: skip

    steered = jax.jit(lambda keys, p=None: method.draw(keys, networks(p), data(keys)))
    plain = jax.jit(lambda keys: draw(keys, policy, data(keys)["cond"], sampler, (2,))[0])
    return steered, plain, sampler


def keys(n: int = 64):
    return jax.random.split(jax.random.key(5), n)


def test_the_table_knows_every_method():
    assert set(SETTINGS) == set(OFF) == set(NAMES)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NO_REWARD])
def test_raises_the_reward(name):
    steered, plain, _ = world(name, **SETTINGS[name])
    x0, info = steered(keys())
    before, after = (worlds.near(None, x, None) for x in (plain(keys()), x0))
    assert after.mean() > before.mean() + 0.2, (before.mean(), after.mean())
    assert all(v.shape == (64,) for v in info.values()), jax.tree.map(jnp.shape, info)
    if "reward" in info:
        np.testing.assert_allclose(info["reward"], after, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_off_is_the_plain_chain_bit_for_bit(name):
    steered, plain, _ = world(name, **OFF[name])
    np.testing.assert_array_equal(steered(keys(8))[0], plain(keys(8)))


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch_and_is_compiled_once(name):
    steered, *_ = world(name, **SETTINGS[name])
    x0, _ = steered(keys())
    np.testing.assert_array_equal(x0, steered(keys())[0])
    np.testing.assert_allclose(steered(jnp.roll(keys()[::-1], 3))[0], jnp.roll(x0[::-1], 3, 0), atol=1e-5)  # others beside it
    assert steered._cache_size() == 1
    np.testing.assert_allclose(steered(keys()[2:5])[0], x0[2:5], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_odd_rewards_give_finite_samples(name):
    """All equal, some failed, all failed, all impossible."""
    odd = lambda kind, x, c: jnp.stack([jnp.zeros(len(x)), jnp.where(x[:, 0] > 0.9, jnp.nan, x[:, 0]), jnp.full(len(x), jnp.nan),
                                        jnp.full(len(x), -jnp.inf)])[kind]  # fmt: skip
    steered, *_ = world(name, odd, **SETTINGS[name])
    for kind in range(4):
        assert np.isfinite(steered(keys(8), jnp.int32(kind))[0]).all(), kind


@pytest.mark.parametrize("name", [n for n in NAMES if TEST_TIME[n].budget])
def test_the_budget_setting_buys_network_calls(name):
    sampler, budget = world(name, **SETTINGS[name])[2], TEST_TIME[name].budget
    spent = [steering.cost(name, SETTINGS[name] | {budget: n}, sampler, SCALE.get(name, 1.0)) for n in (2, 4)]
    assert spent[0]["network"] < spent[1]["network"], spent


@pytest.mark.parametrize("names", [FAMILIES, pytest.param(NAMES, marks=pytest.mark.slow)], ids=["one of each family", "all"])
def test_one_device_equals_eight(names):
    """Samples and particles spread over eight fake devices against this one."""
    here = Path(__file__).parent
    script = f"""
import sys; sys.path[:0] = [{str(here.parent)!r}, {str(here)!r}]
import json, jax, numpy as np, test_every_method as table
from alignment_jax.training import sharding
assert jax.device_count() == 8
on = sharding.Layout(sharding.make_mesh())
out = {{}}
for name in {names!r}:
    spread = jax.random.wrap_key_data(sharding.shard(on, jax.random.key_data(table.keys(16))))
    out[name] = np.asarray(table.world(name, **table.SETTINGS[name])[0](spread)[0]).tolist()
print(json.dumps(out))
"""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, cwd=here.parent.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    eight = json.loads(done.stdout.strip().splitlines()[-1])
    for name in names:
        np.testing.assert_allclose(world(name, **SETTINGS[name])[0](keys(16))[0], eight[name], atol=1e-4, err_msg=name)
