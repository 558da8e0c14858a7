"""A reward of several columns and the method under it fit together, or that is said before anything compiles."""

import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment_jax.rewards import columns
from alignment_jax.rewards.base import Reward
from alignment_jax.rewards.check import probe, score_host
from alignment_jax.rewards.combine import several
from alignment_jax.training import build

BOTH = "{'name': 'several', 'rewards': ['critters_proxy', 'critters_fragile']}"


def planned(argument, **changes):
    config = runpy.run_path("configs/critters.py")["get_config"](argument)
    for field, value in changes.items():
        config[field] = value
    bundle, shapes, _ = build.described(config)
    return build.planned(config, bundle, shapes, build.reward(config)).parts


def test_columns_and_their_aggregation_belong_together():
    parts = planned("draft", reward=BOTH, aggregate="{'how': 'maxmin'}")
    assert columns(parts.reward) == ("critters_proxy", "critters_fragile")
    assert parts.algorithm.init(jax.random.key(0))["rewards"].state.shape == (2,)
    for changes, said in (
        ({"reward": BOTH}, r"gives 2 scores a picture \(critters_proxy, critters_fragile\)"),
        ({"aggregate": "{'how': 'maxmin'}"}, "needs a reward of several columns"),
        ({"reward": BOTH, "aggregate": "{'how': 'maxmin', 'stp': 1}"}, "Did you mean 'step'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            planned("draft", **changes)
    assert columns(planned("ddpo", reward=BOTH, aggregate="{'how': 'advantages'}").reward)  # the group comes from the batch
    members = planned("draft", reward="{'name': 'ensemble', 'how': 'min', 'rewards': ['critters_proxy', 'critters_fragile']}")
    assert columns(members.reward) == () and members.reward.differentiable


def test_probe_and_host_take_as_many_columns_as_there_are():
    fine = several([Reward(n, lambda p, x, c: x.mean((1, 2, 3)), range=(0.0, 1.0)) for n in "ab"])
    assert probe(fine, (4, 4, 3), ["x"] * 4) is None
    lost = several([Reward("a", lambda p, x, c: x.mean((1, 2, 3))), Reward("b", lambda p, x, c: jnp.full(len(x), jnp.nan))])
    with pytest.raises(ValueError, match=r"nan\] on a probe batch"):
        probe(lost, (4, 4, 3), ["first", "second"])

    def fails(images, prompts, metadata):
        if len(images) > 1 or images.max() > 200:
            raise RuntimeError("too bright")
        return images.mean((1, 2, 3)), {}

    host = several([Reward("a", fails, device=False), Reward("b", fails, device=False)])
    images = np.stack([np.full((2, 2, 3), v, np.uint8) for v in (10, 250)])
    scores, _ = score_host(host, images, ["x", "y"], {}, batch_index=0, on_error="mask")
    np.testing.assert_array_equal(scores, [[10, 10], [np.nan, np.nan]])


def test_a_score_of_noisy_states_is_for_methods_that_judge_steps(monkeypatch):
    noisy = Reward("latent", lambda p, x, c: x.mean((1, 2, 3)), noisy=True)
    monkeypatch.setitem(build.REWARDS, "latent", noisy)
    with pytest.raises(ValueError, match="scores noisy states; method draft asks for scores of pictures"):
        planned("draft", reward="latent")
    assert planned("spo", reward="latent", method={"name": "lpo"}).algorithm.needs.reward == "state"
    assert planned("spo", reward="latent").reward is noisy


@pytest.mark.parametrize("reward, said", [("critters_proxy", "lpo judges the noisy states.*'critters_proxy' scores pictures"),
                                          ("jpeg_compressibility", "lpo judges the noisy states"), ("", "lpo needs a reward")])  # fmt: skip
def test_lpo_without_a_score_of_noisy_states_says_where_one_comes_from(reward, said):
    """With a score of pictures it would be SPO with LPO's settings, decoding at every step, and nothing would say so."""
    with pytest.raises(ValueError, match=said + ".*reads='noisy'.*spo judges steps by pictures"):
        planned("spo", reward=reward, method={"name": "lpo"})


def test_srpo_reads_both_columns_of_a_relative_reward_and_other_methods_do_not():
    words = "{'name': 'relative', 'reward': 'critters_proxy', 'positive': 'green', 'negative': 'blue'}"
    parts = planned("draft", reward=words, method={"name": "srpo"})
    assert columns(parts.reward) == parts.algorithm.needs.columns == ("wanted", "unwanted")
    with pytest.raises(ValueError, match="gives 2 scores a picture"):
        planned("draft", reward=words)
