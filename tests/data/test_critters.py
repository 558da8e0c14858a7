"""The critters world: exact captions, a fixed split, deterministic pictures, resumable data."""

import numpy as np
import pytest

from alignment_jax.data import critters, prompts
from alignment_jax.data.critters_dataset import batches, data_source, load_arrays
from alignment_jax.data.sources import Source, prompt_source


def test_captions_are_exact_and_distinct():
    every = np.indices(critters.SIZES).reshape(6, -1).T
    captions = [critters.caption(a) for a in every]
    assert len(set(captions)) == len(every) == 38880
    np.testing.assert_array_equal(np.stack([critters.parse(c) for c in captions]), every)
    assert critters.caption([4, 3, 1, 1, 0, 0]) == (
        "a green bell monster with horns, one big eye and a smile on a blue background"
    )
    assert critters.parse("a monster with horns").tolist() == [-1, -1, 1, -1, -1, -1]


def test_a_fifth_of_the_combinations_is_held_out_and_never_in_training():
    train, held = critters.combinations("train"), critters.combinations("held_out")
    assert len(train) + len(held) == 38880 and 0.19 < len(held) / 38880 < 0.21
    keys = lambda rows: {tuple(r[1:5]) for r in rows}  # noqa: E731
    assert not keys(train) & keys(held)
    assert not set(critters.prompts("train", 500, 0)) & set(critters.prompts("held_out", 500, 0))
    # golden: whoever judges these pictures with other judges needs the same split
    four = np.indices(critters.SIZES[1:5]).reshape(4, -1).T
    held = critters.held_out(np.pad(four, ((0, 0), (1, 1))))
    assert held.sum() == 213 and np.flatnonzero(held)[:8].tolist() == [3, 11, 12, 13, 16, 21, 26, 29]
    h = [(7919 * s + 104729 * t + 1299709 * e + 15485863 * m + 12345) * 2654435761 % 2**32 >> 16 for s, t, e, m in four.tolist()]
    np.testing.assert_array_equal(held, np.array(h) % 5 == 0)  # in integers that cannot overflow


def test_caption_noise_has_the_declared_rates():
    rng, n = np.random.default_rng(0), 4000
    a = np.array([1, 2, 3, 4, 5, 0])
    parsed = np.stack([critters.parse(critters.noisy_caption(a, rng)) for _ in range(n)])
    told = parsed >= 0
    wrong = (parsed != a) & told
    but_top = [0, 1, 3, 4, 5]  # a missing top reads as "none" in an otherwise full caption
    np.testing.assert_allclose((wrong.sum(0) / told.sum(0))[but_top], [0.06, 0.10, 0.15, 0.15, 0.06], atol=0.02)
    np.testing.assert_allclose(1 - told[:, but_top].mean(0), 0.10, atol=0.02)


def test_pictures_are_deterministic_and_every_attribute_shows():
    one, again = critters.draw("train", 3), critters.draw("train", 3)
    np.testing.assert_array_equal(one["image"], again["image"])
    assert one["caption"] == again["caption"] and one["image"].shape == (32, 32, 3)
    for column in range(6):
        other = one["attributes"].copy()
        other[column] = (other[column] + 1) % critters.SIZES[column]
        assert np.abs(critters.render(other, one["nuisances"]).astype(int) - one["image"]).max() > 30, column


def test_the_builder_writes_and_reads_without_tensorflow(tmp_path):
    import sys

    arrays = load_arrays("train", str(tmp_path), "tiny")
    assert arrays["images"].shape == (48, 32, 32, 3) and len(arrays["captions"]) == 48
    drawn = [critters.draw("train", i)["image"].tobytes() for i in range(48)]
    assert [im.tobytes() for im in arrays["images"]] == drawn
    assert not critters.held_out(arrays["attributes"]).any()
    assert critters.held_out(load_arrays("held_out", str(tmp_path), "tiny")["attributes"]).all()
    assert "tensorflow" not in sys.modules and "torch" not in sys.modules
    with pytest.raises(ValueError, match="no critters split"):
        load_arrays("test", str(tmp_path), "tiny")

    # from memory or from the file: the same batches, and both resume exactly
    taken = []
    for data in (arrays, data_source("train", str(tmp_path), "tiny")):
        stream = batches(data, 10, seed=3)
        for _ in range(6):  # into the second pass
            next(stream)
        state = stream.get_state()
        ahead = [next(stream) for _ in range(3)]
        other = batches(data, 10, seed=3)
        other.set_state(state)
        for want in ahead:
            got = next(other)
            np.testing.assert_array_equal(got["images"], want["images"])
            assert got["captions"] == want["captions"]
            np.testing.assert_array_equal(got["nuisances"]["shift_x"], want["nuisances"]["shift_x"])
        taken.append(np.concatenate([b["attributes"] for b in ahead]))
    np.testing.assert_array_equal(*taken)


def test_a_source_resumes_exactly_where_it_was():
    make = lambda i, chance: (i.tolist(), chance.random(1).item())  # noqa: E731
    source = Source(50, 8, 3, make)
    for _ in range(9):  # into the second pass
        next(source)
    state = source.get_state()
    ahead = [next(source) for _ in range(5)]
    other = Source(50, 8, 3, make)
    other.set_state(state)
    assert [next(other) for _ in range(5)] == ahead


def test_groups_of_a_prompt_stand_side_by_side():
    source = prompt_source(["a", "b", "c"], lambda p: np.zeros((len(p), 2)), None, prompts_per_batch=2, group=3, seed=0)
    batch = next(source)
    assert len(batch["prompts"]) == 6 and len(set(batch["prompts"][:3])) == 1
    assert batch["prompt_id"][0] == batch["prompt_id"][2]


@pytest.mark.parametrize("name, content, message", [
    ("empty.txt", b"\n\n", "holds no prompts"), ("binary.txt", b"\xff\xfe\x00\x01", "not text"),
    ("zero.txt", b"a\x00b", "not text"), ("bad.jsonl", b'{"text": "x"}\n', 'needs a field "prompt"'),
    ("bad.csv", b"text\nx\n", 'needs a field "prompt"'),
])  # fmt: skip
def test_bad_prompt_files_are_refused_with_one_message(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prompts.load(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="no prompts at"):
        prompts.load(str(tmp_path / "absent.txt"))


def test_prompts_come_from_txt_jsonl_and_csv(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    (tmp_path / "a.csv").write_text("prompt,x\none,1\ntwo,2\n")
    assert all(prompts.load(str(tmp_path / f"a.{end}")) == ["one", "two"] for end in ("txt", "jsonl", "csv"))
