"""One table of properties that every registered algorithm has, on the 2-D mixture."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from alignment_jax.algorithms import ALGORITHMS
from alignment_jax.evaluation.metrics import describe
from alignment_jax.training.checkpoint import Checkpointer

SIZE = 32  # of a microbatch in all tests: a method's programs compile once for the table
NAMES = sorted(ALGORITHMS)
WITH_LORA = ("adjoint_matching", "ddpo", "diffusion_dpo", "diffusion_nft", "draft", "sft")  # one of a kind; the others are slow
KEPT_ALIKE = ("alignprop", "awm", "dance_grpo", "diffusion_kto", "drtune", "flow_grpo", "guidance_distillation", "lee", "lpo", "mapo",
              "rank_dpo", "refl", "spo", "srpo")  # these keep nothing between steps that another does not: resumed in the slow tier
VALUE = sorted(n for n, e in ALGORITHMS.items() if e.reward == "value")


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def uncommitted(tree):
    """The same arrays, not tied to a device: no program is compiled anew for them."""
    one = lambda x: jnp.asarray(np.asarray(x))
    typed = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jax.random.wrap_key_data(one(jax.random.key_data(x))) if typed(x) else one(x), tree)


@pytest.mark.parametrize("name", NAMES)
def test_learns_and_compiles_each_program_once(name):
    """Also: every number that a method reports is in the catalogue of metrics."""
    parts, programs, start, frozen, sampler = worlds.mixture_run(name)
    before = worlds.mean_reward(parts, start.trained, frozen, sampler)
    ran = programs.gradient._cache_size() > 0  # in another test: only programs that have not run yet tell how often they compile
    _, programs, state, _, _, log = worlds.run_steps(name, 60, size=SIZE, fresh=ran)
    assert all(describe(metric) for metric in log[0])
    sizes = {k: f._cache_size() for k, f in programs._asdict().items()}
    assert all(size <= 1 for size in sizes.values()), sizes
    assert sizes["gradient"] == 1 and sizes["apply"] == 1
    if name == "guidance_distillation":  # it has a teacher to match, not a reward to raise
        assert log[-1]["loss"] < 0.2 * log[0]["loss"], (log[0], log[-1])
        return
    after = worlds.mean_reward(parts, state.trained, frozen, sampler)
    assert after > before + 0.4, (before, after)


@pytest.mark.parametrize(("name", "lora"), [
    *((name, False) for name in NAMES),
    *(pytest.param(name, True, marks=() if name in WITH_LORA else pytest.mark.slow) for name in NAMES),
])  # fmt: skip
def test_gradient_reaches_every_trained_leaf_and_no_frozen_one(name, lora):
    parts, programs, start, frozen, _ = worlds.mixture_run(name, lora=lora)
    data = worlds.mixture_data(parts.algorithm.needs.data, jax.random.key(3))
    before, frozen_before = jax.tree.map(np.array, start.trained), jax.tree.map(np.array, frozen["params"])
    state = start
    for number in range(3):  # LoRA's a moves only once b has left zero
        state, _ = worlds.one_step(parts, programs, state, frozen, data, number, SIZE)
    moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), state.trained, before)
    assert all(jax.tree.leaves(moved)), moved
    assert same(frozen["params"], frozen_before)


@pytest.mark.parametrize("name", NAMES)
def test_accumulated_equals_full_batch(name):
    """Microbatches of 32 and of 12 (with padding) give the same parameters of 32 rows; padding must weigh nothing."""
    whole, parts = (worlds.run_steps(name, 2, n=SIZE, size=size)[2].trained for size in (SIZE, 12))
    for a, b in zip(leaves(whole), leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in KEPT_ALIKE else ()) for n in NAMES])
def test_deterministic_and_resumed_equals_uninterrupted_bit_for_bit(name, tmp_path):
    straight = worlds.run_steps(name, 4, size=SIZE)[2]
    assert same(straight, worlds.run_steps(name, 4, size=SIZE)[2])
    half = worlds.run_steps(name, 2, size=SIZE)[2]
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(half, {"position": 2})
    blank = worlds.mixture_run(name)[2]
    restored, position = checkpoints.restore(blank)
    checkpoints.close()
    assert position == {"position": 2} and int(restored.step) == 2
    resumed = worlds.run_steps(name, 2, start=uncommitted(restored), first=2, size=SIZE)[2]
    assert same(straight, resumed)


REWARDS = {
    "constant": lambda p, x, c: jnp.zeros(len(x)),
    "huge": lambda p, x, c: 1e30 * x[:, 0],
    "equal": lambda p, x, c: jnp.full(len(x), 0.1),
    "failed": lambda p, x, c: jnp.where(jnp.arange(len(x)) % 3 == 0, jnp.nan, x[:, 0]),
    "all failed": lambda p, x, c: jnp.full(len(x), jnp.nan),
}


@pytest.mark.parametrize("name", VALUE)
@pytest.mark.parametrize("kind", REWARDS)
def test_no_nan_under_odd_rewards(name, kind):
    state = worlds.run_steps(name, 2, size=SIZE, reward=REWARDS[kind])[2]
    assert all(np.isfinite(x).all() for x in leaves(state.trained))
