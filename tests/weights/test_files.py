"""Components on disk: read strictly, written back bit for bit, refused with a message that helps."""

import json
import os
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from alignment_jax import weights
from alignment_jax.weights import files, torch_names

RNG = np.random.default_rng(0)
TREE = {
    "blocks.0": {"conv": {"kernel": RNG.standard_normal((3, 1, 4, 6)), "bias": RNG.standard_normal(6)},
                 "norm": {"scale": RNG.standard_normal(6), "bias": RNG.standard_normal(6)}},
    "proj": {"kernel": RNG.standard_normal((6, 5))},
    "tokens": {"embedding": RNG.standard_normal((7, 3))},
    "logit_scale": np.asarray(0.3),
}  # fmt: skip
TREE = jax.tree.map(lambda x: np.asarray(x, np.float32), TREE)


def same(a, b):
    flat, other = flatten_dict(a, sep="/"), flatten_dict(b, sep="/")
    return flat.keys() == other.keys() and all(
        np.array_equal(flat[k], other[k]) and flat[k].dtype == other[k].dtype and flat[k].shape == other[k].shape
        for k in flat)  # fmt: skip


@pytest.mark.parametrize("limit", [None, 100])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_saved_component_comes_back_bit_for_bit(tmp_path, dtype, limit):
    tree = jax.tree.map(lambda x: x.astype(dtype), TREE)
    files.save_component(tmp_path, tree, stem="net", config={"width": 6}, max_shard_bytes=limit)
    back = files.load_component(tmp_path, tree, stem="net", dtype=None)
    assert same(back, tree) and json.loads((tmp_path / "config.json").read_text()) == {"width": 6}
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(back))
    stored = {}
    for path in tmp_path.glob("*.safetensors"):
        stored |= load_file(path)
    assert stored.keys() == torch_names.names(tree).keys() and stored["blocks.0.conv.weight"].shape == (6, 4, 3, 1)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if limit is None else len(list(tmp_path.glob("net-*"))))


def test_floating_parameters_are_cast_and_integers_are_not(tmp_path):
    tree = {"a": {"kernel": np.ones((2, 2), np.float16)}, "count": np.arange(3)}
    files.save_component(tmp_path, tree, dtype=ml_dtypes.bfloat16)
    back = files.load_component(tmp_path, tree, dtype=jnp.float32)
    assert back["a"]["kernel"].dtype == jnp.float32 and jnp.issubdtype(back["count"].dtype, jnp.integer)


def test_what_an_earlier_save_left_is_not_read_again(tmp_path):
    files.save_component(tmp_path, TREE, max_shard_bytes=100)
    (tmp_path / "model.fp16.safetensors").write_bytes(b"another variant")
    changed = jax.tree.map(lambda x: x + 1, TREE)
    files.save_component(tmp_path, changed)
    assert same(files.load_component(tmp_path, TREE), changed)
    files.save_component(tmp_path, TREE, max_shard_bytes=100)
    assert same(files.load_component(tmp_path, TREE), TREE)
    assert (tmp_path / "model.fp16.safetensors").exists() and not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "model.safetensors.index.json").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("index", ["model.fp16.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_a_variant_in_shards_is_found_under_both_names(tmp_path, index):
    files.save_component(tmp_path, TREE, max_shard_bytes=100)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / index)
    assert same(files.load_component(tmp_path, TREE, variant="fp16"), TREE)


def test_parameters_are_placed_on_the_sharding(tmp_path):
    files.save_component(tmp_path, TREE)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    everywhere = files.load_component(tmp_path, TREE, sharding=where)
    each = files.load_component(tmp_path, TREE, sharding=jax.tree.map(lambda _: where, TREE))
    assert all(x.sharding == where for x in jax.tree.leaves((everywhere, each)))


def test_buffers_that_are_no_parameters_are_ignored(tmp_path):
    tensors = torch_names.export_torch(TREE) | {
        "embeddings.position_ids": np.arange(7), "attn_mask": np.zeros((2, 2)), "bn.num_batches_tracked": np.array(3)}
    save_file({k: np.asarray(v, order="C") for k, v in tensors.items()}, tmp_path / "model.safetensors")
    assert same(files.load_component(tmp_path / "model.safetensors", TREE), TREE)


def test_tensors_are_read_once_and_one_at_a_time(tmp_path, monkeypatch):
    files.save_component(tmp_path, TREE)
    read, names = files.Tensors.read, []
    monkeypatch.setattr(files.Tensors, "read", lambda self, name: names.append(name) or read(self, name))
    files.load_component(tmp_path, TREE)
    assert sorted(names) == sorted(torch_names.names(TREE))


def test_missing_unexpected_and_misshapen_tensors_are_all_listed_with_the_nearest_names(tmp_path):
    tensors = torch_names.export_torch(TREE)
    tensors["blocks.0.norm.wieght"] = tensors.pop("blocks.0.norm.weight")
    tensors["proj.weight"] = tensors["proj.weight"].T
    save_file({k: np.asarray(v, order="C") for k, v in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        files.load_component(tmp_path, TREE)
    for words in ("missing 1: blocks.0.norm.weight (nearest: blocks.0.norm.wieght)", "unexpected 1: blocks.0.norm.wieght",
                  "wrong shape 1: proj.weight: (6, 5), wanted (5, 6)", str(tmp_path)):  # fmt: skip
        assert words in str(caught.value)


def _nothing(folder):
    (folder / "config.json").write_text("{}")


def _other_variant(folder):
    files.save_component(folder, TREE)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")


def _absent_shard(folder):
    files.save_component(folder, TREE, max_shard_bytes=100)
    next(folder.glob("model-00002*")).unlink()


def _cut_shard(folder):
    files.save_component(folder, TREE, max_shard_bytes=100)
    path = next(folder.glob("model-00002*"))
    path.write_bytes(path.read_bytes()[:-7])


def _pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")


def _pickle(folder):
    (folder / "model.bin").write_bytes(b"\x80\x02.")


def _not_finite(folder):
    tree = jax.tree.map(np.array, TREE)
    tree["blocks.0"]["conv"]["bias"][1] = np.nan
    files.save_component(folder, tree, dtype=ml_dtypes.bfloat16)


def _mixed_shards(folder):
    files.save_component(folder, TREE, max_shard_bytes=100)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["proj.weight"] = index["weight_map"]["tokens.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _no_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')


@pytest.mark.parametrize("damage, error, words", [
    (_nothing, FileNotFoundError, ["no model.safetensors", "config.json"]),
    (_other_variant, FileNotFoundError, ["model.fp16.safetensors", "set variant"]),
    (_absent_shard, FileNotFoundError, ["model.safetensors.index.json lists", "model-00002-of"]),
    (_cut_shard, ValueError, ["model-00002-of", "bytes", "Fetch it again"]),
    (_pointer, ValueError, ["git lfs pull"]),
    (_pickle, ValueError, ["model.bin", "pickle", "save_file", "'model.safetensors'"]),
    (_not_finite, ValueError, ["blocks.0.conv.bias has 1 of 6"]),
    (_mixed_shards, ValueError, ["different saves", "proj.weight"]),
    (_no_index, ValueError, ["no index of shards"]),
])  # fmt: skip
def test_a_folder_that_cannot_be_read_says_why(tmp_path, damage, error, words):
    damage(tmp_path)
    with pytest.raises(error) as caught:
        files.load_component(tmp_path, TREE)
    assert all(w in str(caught.value) for w in words), str(caught.value)


def test_the_converting_command_of_the_message_is_valid_python(tmp_path):
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x02.")
    with pytest.raises(ValueError) as caught:
        files.open_component(tmp_path / "old.ckpt")
    compile(str(caught.value).split('python -c "')[1].rstrip('"'), "command", "exec")


def test_a_source_is_a_folder_or_a_hub_id_and_says_so(tmp_path, monkeypatch):
    assert files.resolve(str(tmp_path)) == tmp_path
    with pytest.raises(FileNotFoundError, match="no hub id"):
        files.resolve(tmp_path / "nowhere")
    import huggingface_hub

    asked = []

    def offline(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="hf download someone/some-model --local-dir some-model"):
        files.resolve("someone/some-model", allow=["unet/*"])
    assert asked == [("someone/some-model", ["unet/*"])]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, allow_patterns: str(tmp_path))
    assert files.resolve("someone/some-model") == tmp_path


def test_shipped_weights_keep_scalars_and_bfloat16(tmp_path):
    tree = {"a": np.asarray(2.0, np.float32), "b": {"kernel": np.ones((2, 2), ml_dtypes.bfloat16)}}
    weights.save(tmp_path / "w.safetensors", tree)
    back = weights.load(tmp_path / "w.safetensors", like=tree)
    assert back["a"].shape == () and back["b"]["kernel"].dtype == np.float32


def test_host_memory_stays_near_one_tensor_above_the_result(tmp_path):
    size, count = 1 << 20, 12
    tree = unflatten_dict({f"l.{i}/kernel": np.zeros((256, size // 1024), np.float32) for i in range(count)}, sep="/")
    files.save_component(tmp_path, tree)
    files.load_component(tmp_path, tree)
    tracemalloc.start()
    kept = files.load_component(tmp_path, tree)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(kept) == count and peak < (count + 4) * size
