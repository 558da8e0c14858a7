"""Devices that are set apart for scoring: the same parameters and the same judgement, and the reward's parameters lie there alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_config

from alignment_jax.training import build, loop, sharding

TESTS = Path(__file__).parents[1]
SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
import own_reward, toy_config
from alignment_jax.rewards.base import Reward
from alignment_jax.training import build, loop
from alignment_jax.training.evaluate import Evaluator

weight = jnp.asarray([1.0, 0.5, -1.0])
build.reward = lambda config: Reward("tint", lambda w, images, condition: (images * w).mean((1, 2, 3)), params=weight)
out = {}
for scorers in (0, 2):
    config = toy_config.get_config("2")
    config.sharding.scorers = scorers
    config.early_stop, config.evaluation.chunk = False, 3
    session, state = loop.set_up(config)
    for _ in range(2):
        state, metrics = loop.one_step(session, state, next(session.run.source))
    judged = Evaluator(config, session).quick(state)
    trained = [np.asarray(x).ravel().tolist() for x in jax.tree.leaves(state.trained)]
    out[scorers] = [trained, float(metrics["reward/mean"]), judged["proxy"], session.frozen["reward"] is None]
print(json.dumps(out))
"""


def test_scores_of_other_devices_train_the_same():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    with_all, apart = json.loads(done.stdout.strip().splitlines()[-1]).values()
    for a, b in zip(with_all[0], apart[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(with_all[1:3], apart[1:3], atol=1e-5)
    assert not with_all[3] and apart[3]


def test_what_cannot_be_set_apart_is_refused():
    config = toy_config.get_config("plain1")
    config.sharding.scorers = 1
    with pytest.raises(ValueError, match="at most 0 of these 1"):
        loop.set_up(config)
    config.sharding.scorers, config.reward = 0, "own_reward:warmth"
    config.method = {"name": "draft", "k": 1}
    with pytest.raises(ValueError, match="score finished pictures.*draft with warmth has none"):
        build.build_run(config, sharding.Layout(sharding.make_mesh(), scorers=sharding.make_mesh()))
