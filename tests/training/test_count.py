"""Calls of a training step, counted at run time."""

import ml_collections
import pytest

from alignment_jax.training import count
from alignment_jax.training.calls import network_calls


@pytest.mark.parametrize("micro", [4, 3])
def test_a_ddpo_step_costs_a_rollout_an_anchor_and_a_gradient_of_every_noisy_step(micro):
    """Four samples of a chain of three steps, of which the last has no noise: 12 + 8 + 8 forward, 8 backward; padding is counted."""
    config = ml_collections.ConfigDict({
        "model": "toy_model:toy", "weights": "init", "seed": 0, "steps": 1, "reward": "jpeg_compressibility",
        "method": {"name": "ddpo"}, "sampling": {"eta": 1.0, "set_alpha_to_one": True}, "optimizer": {"learning_rate": 1e-3},
        "batch": {"prompts": 4, "microbatch": micro}, "data": {"prompts": "critters:train"},
    })  # fmt: skip
    padded = lambda n: -(-n // micro) * micro  # noqa: E731
    counts = count.one_step(config)
    assert counts == {"network": 3 * padded(4) + 2 * padded(8), "network backward": padded(8), "reward": 4, "decode": padded(4)}
    assert network_calls(counts) == counts["network"] + 2 * padded(8)
