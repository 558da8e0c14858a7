"""What a user can get wrong is said in one clear message before anything compiles, and nothing is lost."""

import json

import ml_collections
import numpy as np
import pytest

from alignment_jax import weights
from alignment_jax.models import ASSETS, critters
from alignment_jax.rewards.base import Reward
from alignment_jax.rewards.check import probe, score_host
from alignment_jax.training import loop, recogniser, reward_model, stream, workdir
from alignment_jax.training.selfcheck import tiny_config


def changed(**changes):
    config = tiny_config()
    for key, value in changes.items():
        if isinstance(value, dict):
            config[key] = ml_collections.ConfigDict(value)
        else:
            config[key] = value
    return config


@pytest.mark.parametrize("changes, message", [
    ({"method": {"name": "dpo"}}, "method 'dpo' is not known.* Did you mean"),
    ({"method": {"name": "ddpo", "clip_rang": 0.1}}, "method has no field 'clip_rang'. Did you mean 'clip_range'"),
    ({"optimizer": {"learning_rte": 1e-4, "learning_rate": 1e-4}}, "optimizer has no field 'learning_rte'"),
    ({"optimizer": {"name": "adamm", "learning_rate": 1e-4}}, "optimizer 'adamm' is not known"),
    ({"reward": "critters_prox"}, "Did you mean 'critters_proxy'"),
    ({"reward": "nowhere_module:score"}, "No module named 'nowhere_module'"),
    ({"reward": ""}, "method ddpo needs a reward"),
    ({"reward": "jpeg_compressibility", "method": {"name": "draft"}}, "takes gradients of the reward"),
    ({"model": "critter"}, "Did you mean 'critters'"),
    ({"weights": "absent.safetensors"}, "no weights at absent.safetensors"),
    ({"sampling": {"num_steps": 3, "eta": 0.0}}, "DDPO needs a sampler with noise"),
    ({"sampling": {"num_steps": 3, "eta": 2.0}}, "eta must be in"),
    ({"sampling": {"num_stps": 3}}, "sampling has no field 'num_stps'. Did you mean 'num_steps'"),
    ({"batch": {"prompts": 0}}, "batch sizes must be at least 1"),
    ({"method": {"name": "ddpo", "advantage": "group"}}, "batch.group must be 2 or more"),
    ({"lora": {"rank": 2, "targets": "nowhere"}}, "match no kernel"),
    ({"data": {"prompts": "critters:train", "promts": 3}}, "does not read: promts"),
])  # fmt: skip
def test_a_bad_config_is_refused_before_compiling(changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        loop.set_up(changed(**changes))


def test_pictures_of_another_size_or_kind_are_refused(tmp_path):
    def write(**arrays):
        np.savez(tmp_path / "pairs.npz", **{"winner": np.zeros((4, 32, 32, 3), np.uint8), "loser": np.zeros((4, 32, 32, 3), np.uint8),
                                            "prompts": np.array(["a green monster"] * 4), **arrays})  # fmt: skip

    config = changed(method={"name": "diffusion_dpo"}, data={"pairs": str(tmp_path / "pairs.npz")})
    write(loser=np.zeros((4, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match=r"pairs, loser: pictures must be uint8 \[N, 32, 32, 3\].*got uint8 \[4, 16, 16, 3\]"):
        loop.set_up(config)
    write(winner=np.zeros((4, 32, 32, 3), np.float32))
    with pytest.raises(ValueError, match="winner must be uint8"):
        loop.set_up(config)
    np.savez(tmp_path / "pairs.npz", winner=np.zeros((4, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="lacks loser, prompts"):
        loop.set_up(config)


def test_a_workdir_in_a_bucket_is_refused_and_not_made_a_local_folder():
    for train in (loop.train, reward_model.train, recogniser.train):
        with pytest.raises(ValueError, match="gs://bucket/run is an address, and a folder is needed"):
            train(changed(), "gs://bucket/run")


def test_a_batch_that_does_not_divide_names_the_nearest():
    with pytest.raises(ValueError, match="does not divide over 8 parts .* the nearest microbatch is 16"):
        stream.batch_sizes(ml_collections.ConfigDict({"batch": {"prompts": 12, "group": 1}}), 8)


def test_prompts_too_long_for_the_text_tower_are_named():
    with pytest.raises(ValueError, match="prompt 1 has 40 words, the text tower reads 23"):
        critters().tokenize(["a green monster", "very " * 40])


def reward(score, **kwargs):
    return Reward("mine", score, device=False, differentiable=False, **kwargs)


@pytest.mark.parametrize("score, message", [
    (lambda i, p, m: (np.zeros((len(i), 2)), {}), "must return one score a picture"),
    (lambda i, p, m: (np.full(len(i), np.nan), {}), "gave nan on a probe batch.*'a'"),
    (lambda i, p, m: (i.astype(float).mean((1, 2, 3)), {}), None),
    (lambda i, p, m: 1 / 0, "failed on batch 0, picture 0, prompt 'a': ZeroDivisionError"),
])  # fmt: skip
def test_rewards_are_tried_on_a_probe_batch(score, message):
    if message is None:
        assert probe(reward(score), (8, 8, 3), ["a", "b"]) is None
        with pytest.raises(ValueError, match="declares the range"):
            probe(reward(score, range=(0.0, 1.0)), (8, 8, 3), ["a", "b"])
        return
    with pytest.raises(ValueError, match=message):
        probe(reward(score), (8, 8, 3), ["a", "b"])


def test_a_constant_reward_is_a_warning():
    assert "nothing can be learned" in probe(reward(lambda i, p, m: (np.ones(len(i)), {})), (8, 8, 3), ["a", "b"])


def test_failing_pictures_are_masked_when_asked():
    def score(images, prompts, metadata):
        if "bad" in prompts:
            raise RuntimeError("no")
        return np.ones(len(images)), {}

    images, prompts = np.zeros((3, 8, 8, 3), np.uint8), ["good", "bad", "good"]
    scores, _ = score_host(reward(score), images, prompts, {}, batch_index=4, on_error="mask")
    np.testing.assert_array_equal(np.isnan(scores), [False, True, False])
    with pytest.raises(ValueError, match="batch 4, picture 1, prompt 'bad'.*reward_errors"):
        score_host(reward(score), images, prompts, {}, batch_index=4)


def test_a_workdir_of_another_config_is_refused_and_left_alone(tmp_path):
    workdir.claim(tmp_path, tiny_config())
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match="config.seed: there 0, here 5"):
        loop.train(tiny_config(seed=5), tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    json.loads(before)


def test_damaged_and_foreign_weights_are_refused_by_name(tmp_path):
    whole = (ASSETS / "proxy.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        weights.load(tmp_path / "half.safetensors")
    weights.save(tmp_path / "a.safetensors", {"net": {"kernel": np.ones((2, 3)), "bais": np.ones(3)}})
    with pytest.raises(ValueError, match=r"missing 1: net/bias \(nearest: net/bais\)"):
        weights.load(tmp_path / "a.safetensors", {"net": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}})
    with pytest.raises(ValueError, match=r"wrong shape 1: net/kernel: \(2, 3\), wanted \(3, 3\)"):
        weights.load(tmp_path / "a.safetensors", {"net": {"kernel": np.ones((3, 3)), "bais": np.ones(3)}})


def test_a_run_may_go_on_on_other_devices_with_the_microbatch_that_they_need_and_no_other_batch(tmp_path):
    config = ml_collections.ConfigDict({"batch": {"prompts": 16, "microbatch": 8}, "sharding": {"data": 8}})
    workdir.claim(tmp_path, config)
    workdir.whose(tmp_path, ml_collections.ConfigDict({"batch": {"prompts": 16, "microbatch": 16}, "sharding": {"data": 16}}))
    with pytest.raises(ValueError, match=r"config.batch.prompts: there 16, here 32"):
        workdir.whose(tmp_path, ml_collections.ConfigDict({"batch": {"prompts": 32, "microbatch": 8}, "sharding": {"data": 8}}))
