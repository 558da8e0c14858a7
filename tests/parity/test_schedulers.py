"""Our sampler against diffusers' schedulers: the same noise, the same states, over whole trajectories."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from common import FIXTURES, SCHEDULER_CASES, toy_network

from alignment_jax import diffusion as d
from alignment_jax.algorithms.ddpo import ddpo

KEY = jax.random.key(0)
REFERENCE = Path(__file__).parent / "references" / "schedulers.py"


def walk(case, x, noises):
    """The states [T, ...] after every step."""
    schedule = d.zero_terminal_snr() if case["zero_snr"] else d.scaled_linear()
    settings = {k: case[k] for k in ("prediction", "spacing", "steps_offset", "eta", "set_alpha_to_one")}
    sampler = d.scheduler(case["name"], schedule, case["num_steps"], **settings)
    network = lambda x, t, c: toy_network(x, d.expand(t, x), case["prediction"], jnp)  # noqa: E731
    noise = lambda key, i, step: step.mean + d.expand(step.std, step.mean) * jnp.asarray(noises)[i]  # noqa: E731
    _, path = d.sample(KEY, network, None, sampler, sampler.initial_scale * x, noise=noise, keep=True)
    return np.asarray(path.x[1:])


@pytest.mark.parametrize("name", SCHEDULER_CASES)
def test_states_are_those_of_diffusers(name):
    stored = np.load(FIXTURES / "schedulers.npz")
    got, want = walk(SCHEDULER_CASES[name], stored["x"], stored["noises"]), stored[name]
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parity
def test_the_fixture_is_what_diffusers_gives(parity_python, tmp_path):
    subprocess.run([parity_python, REFERENCE, tmp_path], check=True)
    fresh, stored = np.load(tmp_path / "schedulers.npz"), np.load(FIXTURES / "schedulers.npz")
    for name in SCHEDULER_CASES:
        np.testing.assert_allclose(fresh[name], stored[name], rtol=1e-5, atol=1e-5)


def test_euler_is_ddim_and_its_ancestral_form_is_ddim_with_eta_1():
    """One family, not ten classes: the same grid gives the same transition."""
    schedule, x, out = d.scaled_linear(), jax.random.normal(KEY, (3, 5)), jax.random.normal(jax.random.key(1), (3, 5))
    for a, b in (("euler", 0.0), ("euler_ancestral", 1.0)):
        one, other = d.scheduler(a, schedule, 10, steps_offset=1), d.scheduler("ddim", schedule, 10, steps_offset=1, eta=b)
        for i in range(10):
            np.testing.assert_allclose(d.transition(one, i, x, out).mean, d.transition(other, i, x, out).mean, atol=1e-5)
            np.testing.assert_allclose(d.transition(one, i, x, out).std, d.transition(other, i, x, out).std, atol=1e-6)


def test_what_does_not_go_together_is_refused():
    schedule = d.scaled_linear()
    for call, message in (
        (lambda: d.scheduler("dimm", schedule, 10), "scheduler 'dimm' is not known"),
        (lambda: d.scheduler("ddim", schedule, 10, spacing="even"), "spacing 'even' is not known"),
        (lambda: d.scheduler("euler", schedule, 10, eta=0.5), "eta=0.5 is a setting of the scheduler ddim"),
        (lambda: d.scheduler("lcm", schedule, 60), "from the 50 of its distillation"),
        (lambda: d.scheduler("ddim", d.cosine(), 10), "this schedule is continuous"),
        (lambda: d.scheduler("ddim", schedule, 0), "num_steps must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_solver_with_memory_says_that_it_cannot_train():
    sampler = d.scheduler("sde-dpmsolver++", d.scaled_linear(), 6)
    algorithm = ddpo(sampler, (2,))
    items = {"x": jnp.zeros((2, 2)), "i": jnp.zeros(2, jnp.int32), "x_prev": jnp.zeros((2, 2)), "cond": {}}
    with pytest.raises(ValueError, match="for training choose solver 'ddim'"):
        algorithm.anchor(jax.random.split(KEY, 2), {"policy": lambda x, t, c: x}, items)


def test_guidance_rescale_brings_back_the_conditional_spread():
    """arXiv 2305.08891: at 1 the guided output has the conditional one's spread, at 0 nothing changes."""
    x, t = jax.random.normal(KEY, (4, 8, 8, 3)), jnp.ones(4)
    net = lambda x, t, c: x * c["w"].reshape(-1, 1, 1, 1)  # noqa: E731
    cond, null = {"w": jnp.arange(1.0, 5.0)}, {"w": jnp.full(1, 0.3)}
    whole = d.guided(net, null, 7.0, rescale=1.0)(x, t, cond)
    np.testing.assert_allclose(whole.std((1, 2, 3)), net(x, t, cond).std((1, 2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(d.guided(net, null, 7.0, rescale=0.0)(x, t, cond), d.guided(net, null, 7.0)(x, t, cond))
