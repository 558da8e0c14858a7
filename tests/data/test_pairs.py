"""Preference pairs from every form become the same records and the same kind of batch, with clear errors for the rest."""

import csv
import hashlib
import io
import json
import sys

import ml_collections
import numpy as np
import pytest
from PIL import Image

from alignment_jax.data import critters as world
from alignment_jax.data import pairs_dataset
from alignment_jax.data.pairs import ArrayPairs, PairRecord, pair_records, picture
from alignment_jax.data.pairs_dataset import pair_data
from alignment_jax.data.prompts import folder as labelled_folder
from alignment_jax.data.prompts import load_pairs
from alignment_jax.data.sources import pair_source
from alignment_jax.models import critters
from alignment_jax.training import stream


def encoded(colour, size=(24, 16), mode="RGB", form="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, format=form)
    return buffer.getvalue()


RED, BLUE, GREEN = encoded((255, 0, 0)), encoded((0, 0, 255), form="JPEG"), encoded((0, 255, 0))


def pictures_in(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in zip(names, (RED, BLUE, GREEN)):
        (folder / name).write_bytes(data)


def parquet(path, rows):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def seen(source):
    return [(r.prompt, r.p_a, round(r.weight, 4), r.annotator, r.split) for r in pair_records(str(source))]


def fake_tokens(prompts):
    return np.array([[len(p), sum(map(ord, p))] for p in prompts], np.int32)


# the public sets


def test_pick_a_pic_keeps_ties_and_annotators_and_drops_unlabelled_rows(tmp_path):
    row = {"caption": "a cat", "jpg_0": RED, "jpg_1": BLUE, "label_0": 1.0, "label_1": 0.0, "has_label": True, "user_id": 7,
           "num_example_per_prompt": 4, "ranking_id": 11, "model_0": "x"}  # fmt: skip
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet",
            [row, {**row, "label_0": 0.5, "label_1": 0.5}, {**row, "has_label": False, "jpg_0": None}])  # fmt: skip
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [{**row, "label_0": 0.0, "label_1": 1.0, "user_id": None}])
    parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", [{**row, "caption": "a dog"}])
    assert seen(f"pick_a_pic:{tmp_path}") == [("a cat", 1.0, 0.25, "7", "train"), ("a cat", 0.5, 0.25, "7", "train"),
                                             ("a cat", 0.0, 0.25, "", "train")]  # fmt: skip
    assert seen(f"pick_a_pic:{tmp_path}/data/validation-*.parquet") == [("a dog", 1.0, 0.25, "7", "validation")]
    first = next(pair_records(f"pick_a_pic:{tmp_path}"))
    assert (first.image_a, first.image_b, first.source) == (RED, BLUE, "pick_a_pic")

    parquet(tmp_path / "bad.parquet", [{**row, "label_1": 1.0}])
    with pytest.raises(ValueError, match=r"bad.parquet, row 1 \(ranking_id 11\): label_0 and label_1 must be 1 and 0"):
        seen(f"pick_a_pic:{tmp_path / 'bad.parquet'}")
    parquet(tmp_path / "bad.parquet", [{k: v for k, v in row.items() if not k.startswith("jpg")}])
    with pytest.raises(ValueError, match="lacks jpg_0, jpg_1; it has caption, label_0"):
        seen(f"pick_a_pic:{tmp_path / 'bad.parquet'}")
    parquet(tmp_path / "bad.parquet", [{**row, "has_label": False}])
    with pytest.raises(ValueError, match="holds no labelled pairs"):
        seen(f"pick_a_pic:{tmp_path / 'bad.parquet'}")


def test_hpdv2_pairs_and_every_annotators_ranks(tmp_path):
    pictures_in(tmp_path / "train", "a.jpg", "b.jpg")
    pictures_in(tmp_path / "test", "0.jpg", "1.jpg", "2.jpg")
    train = [{"prompt": "a cat", "human_preference": [0, 1], "file_path": ["a.jpg", "b.jpg"]}]
    (tmp_path / "train.json").write_text(json.dumps(train))
    assert seen(f"hpdv2:{tmp_path}") == [("a cat", 0.0, 1.0, "", "train")]
    group = {"prompt": "a dog", "image_path": ["0.jpg", "1.jpg", "2.jpg"], "rank": [1.5, 1.5, 3]}
    raw = [{"rank": [1, 2, 3], "user_hash": "u"}, {"rank": [2, 1, 3], "user_hash": "v"}]
    (tmp_path / "test.json").write_text(json.dumps([group, {**group, "raw_annotations": raw}]))
    got = seen(f"hpdv2:{tmp_path / 'test.json'}")
    assert [r[1] for r in got[:3]] == [0.5, 1.0, 1.0] and {r[2] for r in got[:3]} == {0.3333}
    assert [(r[1], r[3]) for r in got[3:]] == [(1, "u"), (1, "u"), (1, "u"), (0, "v"), (1, "v"), (1, "v")]
    assert {r[2] for r in got[3:]} == {0.1667}  # a prompt counts as one, however many judge it

    for change, message in (({"human_preference": [1, 1]}, "human_preference must be 1 and 0"),
                            ({"file_path": ["a.jpg", "c.jpg"]}, "row 1: no image at .*c.jpg nor in .*train"),
                            ({"prompt": None}, "prompt must be text")):  # fmt: skip
        (tmp_path / "train.json").write_text(json.dumps([{**train[0], **change}]))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            seen(f"hpdv2:{tmp_path}")
    (tmp_path / "train.json").write_text(json.dumps([{"prompt": "x"}]))
    with pytest.raises(ValueError, match="lacks image_path, rank; it has prompt. Wanted: human_preference and file_path, or"):
        seen(f"hpdv2:{tmp_path}")


def test_image_reward_db_ranks_become_all_pairs(tmp_path):
    pictures_in(tmp_path, "0.png", "1.png", "2.png")
    row = {"id": "x", "prompt": "a cat", "generations": ["0.png", "1.png", "2.png"], "ranking": [2, 1, 2]}
    (tmp_path / "test.json").write_text(json.dumps([row]))
    want = [("a cat", 0.0, 0.3333, "", "test"), ("a cat", 0.5, 0.3333, "", "test"), ("a cat", 1.0, 0.3333, "", "test")]
    assert seen(f"image_reward_db:{tmp_path / 'test.json'}") == want
    image = [{"bytes": data, "path": "x.png"} for data in (RED, BLUE, GREEN)]
    rows = [{"prompt_id": "x", "prompt": "a cat", "image": im, "rank": r} for im, r in zip(image, [2, 1, 2])]
    parquet(tmp_path / "test-0.parquet", rows)
    parquet(tmp_path / "lists" / "test-0.parquet", [{"prompt_id": "x", "prompt": "a cat", "image": image, "rank": [2, 1, 2]}])
    for place in ("test-0.parquet", "lists"):
        assert seen(f"image_reward_db:{tmp_path / place}") == want
        assert [r.image_b for r in pair_records(f"image_reward_db:{tmp_path / place}")] == [BLUE, GREEN, GREEN]
    parquet(tmp_path / "test-0.parquet", [rows[0], rows[1], {**rows[0], "prompt_id": "y"}, {**rows[1], "prompt_id": "y"}, rows[2]])
    with pytest.raises(ValueError, match="sort the file by prompt_id"):
        seen(f"image_reward_db:{tmp_path / 'test-0.parquet'}")
    (tmp_path / "test.json").write_text(json.dumps([{**row, "ranking": [1, 2]}]))
    with pytest.raises(ValueError, match="got 3 images, ranks"):
        seen(f"image_reward_db:{tmp_path / 'test.json'}")


# a user's own


def test_own_tables_of_every_kind_give_the_same_records(tmp_path):
    pictures_in(tmp_path, "0.png", "1.jpg")
    base = {"prompt": "a cat", "image_a": "0.png", "image_b": "1.jpg"}
    rows = [{**base, "preferred": "a"}, {**base, "preferred": "b", "annotator": "u"}, {**base, "preferred": "tie", "weight": 2.0},
            {**base, "p_a": 0.7}]  # fmt: skip
    lines(tmp_path / "pairs.jsonl", rows)
    columns = [*base, "preferred", "p_a", "weight", "annotator"]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    parquet(tmp_path / "x.parquet", [dict.fromkeys(columns) | row | {"image_a": RED, "image_b": BLUE} for row in rows])
    want = [("a cat", 1.0, 1.0, "", ""), ("a cat", 0.0, 1.0, "u", ""), ("a cat", 0.5, 2.0, "", ""), ("a cat", 0.7, 1.0, "", "")]
    for source in (tmp_path, tmp_path / "pairs.jsonl", tmp_path / "x.csv", tmp_path / "x.parquet"):
        assert seen(source) == want
        assert {(r.image_a, r.image_b) for r in pair_records(str(source))} == {(RED, BLUE)}


@pytest.mark.parametrize("change, message", [
    ({"image_b": "2.png"}, r"pairs.jsonl, row 1, image_b: no image at .*2.png"),
    ({"p_a": 1.5}, r"p_a must be a number in \[0, 1\]; got 1.5"),
    ({"p_a": "nan"}, "got 'nan'"), ({"p_a": None, "preferred": "c"}, "preferred must be a, b or tie; got 'c'"),
    ({"weight": -1}, "weight must be a number"), ({"image_a": 3}, "must be a path or the bytes"), ({"prompt": 3}, "prompt must be text"),
])  # fmt: skip
def test_a_bad_row_is_named(tmp_path, change, message):
    pictures_in(tmp_path, "0.png", "1.png")
    lines(tmp_path / "pairs.jsonl", [{"prompt": "a", "image_a": "0.png", "image_b": "1.png", "p_a": 1} | change])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        seen(tmp_path)


def test_bad_sources_are_refused_with_one_message(tmp_path, monkeypatch):
    for source, message in ((tmp_path / "absent.csv", "no preference pairs at .*absent.csv; give an .npz, .jsonl"),
                            (tmp_path, "the folder has no pairs.jsonl"), ("pick_a_pick:x", "or pick_a_pic:, hpdv2:"),
                            (f"hpdv2:{tmp_path}", "the folder has no train.json")):  # fmt: skip
        with pytest.raises(FileNotFoundError, match=message):
            pair_data(str(source), tmp_path / "cache")
    (tmp_path / "x.txt").write_text("a")
    for name, content, message in (("x.txt", "a", "x.txt is of no kind"), ("x.jsonl", "", "holds no labelled pairs"),
                                   ("x.jsonl", "{", "x.jsonl, row 1 is not a JSON object"), ("x.jsonl", "3", "must be an object"),
                                   ("x.csv", "prompt,image_a\na,b\n", "lacks image_b; it has prompt, image_a"),
                                   ("x.jsonl", '{"prompt": "", "image_a": "", "image_b": ""}', "row 1 lacks p_a or preferred; it has"),
                                   ("x.parquet", "no", "not a whole parquet file")):  # fmt: skip
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            seen(tmp_path / name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        seen(tmp_path / "x.parquet")


# pictures


def test_pictures_become_upright_rgb_of_the_models_size():
    assert picture(encoded(90, mode="L"), (8, 8)).tolist() == np.full((8, 8, 3), 90).tolist()
    assert picture(encoded((0, 0, 0, 0), mode="RGBA"), (8, 4)).tolist() == np.full((8, 4, 3), 255).tolist()  # clear is white
    assert picture(encoded(90 * 257, mode="I;16"), (8, 8)).tolist() == np.full((8, 8, 3), 90).tolist()  # not clipped
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, :10], wide[:, 10:20], wide[:, 20:] = 50, 100, 200
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, format="PNG")
    middle = picture(buffer.getvalue(), (20, 20))
    assert (middle[:, 6:-6] == 100).all() and np.abs(middle.astype(int) - 100).max() < 30  # the sides are gone
    np.testing.assert_array_equal(picture(buffer.getvalue(), (10, 30)), wide)  # the right size is not touched
    turned = Image.fromarray(wide)
    exif = turned.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, format="PNG", exif=exif)
    assert picture(buffer.getvalue(), (30, 10))[0, 0, 0] == 50 and picture(buffer.getvalue(), (30, 10))[-1, 0, 0] == 200
    for broken in (b"no picture", RED[:40], BLUE[:200]):
        with pytest.raises(ValueError, match="pair 3 is not a picture"):
            picture(broken, (8, 8), "pair 3")


# the stored set and its batches


@pytest.fixture(scope="module")
def own_set(tmp_path_factory):
    """A folder with 12 pairs: picture a of pair i is of brightness 10 i, b 10 i + 5; every third is a tie."""
    folder = tmp_path_factory.mktemp("own")
    rows = []
    for i in range(12):
        (folder / f"{i}a.png").write_bytes(encoded(10 * i, mode="L"))
        (folder / f"{i}b.png").write_bytes(encoded((10 * i + 5,) * 3, size=(16, 40)))
        rows.append({"prompt": f"picture {i}", "image_a": f"{i}a.png", "image_b": f"{i}b.png", "p_a": [0.5, 1.0, 0.2][i % 3],
                     "weight": 1 + i, "annotator": f"u{i}"})  # fmt: skip
    lines(folder / "pairs.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs_dataset, "ROWS_A_FILE", 5)
        return folder, pair_data(str(folder), folder / "cache")


def test_a_source_is_stored_once_and_read_without_its_pictures(own_set, monkeypatch):
    folder, data = own_set
    assert len(list((folder / "cache").rglob("*.array_record-*"))) == 3
    got = [data[i] for i in range(len(data))]
    assert got == [r._replace(p_a=float(np.float32(r.p_a))) for r in pair_records(str(folder))]
    assert isinstance(got[0], PairRecord) and isinstance(got[0].image_a, bytes)
    monkeypatch.setattr(pairs_dataset, "pair_records", lambda source: 1 / 0)
    again = pair_data(str(folder), folder / "cache")
    assert [again[i] for i in range(12)] == [data[i] for i in range(12)]
    with (folder / "pairs.jsonl").open("a") as file:  # another table: prepared anew
        file.write("\n")
    with pytest.raises(ZeroDivisionError):
        pair_data(str(folder), folder / "cache")
    assert "tensorflow" not in sys.modules and "torch" not in sys.modules


def test_batches_turn_the_better_picture_to_the_winner_and_keep_ties(own_set):
    batch = next(pair_source(own_set[1], fake_tokens, (8, 8), batch=12, seed=0))
    assert batch["winner"].shape == batch["loser"].shape == (12, 8, 8, 3) and batch["winner"].dtype == np.uint8
    number = batch["weight"].astype(int) - 1  # which pair it is
    assert sorted(number) == list(range(12)) and batch["weight"].dtype == batch["preference"].dtype == np.float32
    np.testing.assert_array_equal(batch["tokens"], fake_tokens([f"picture {i}" for i in number]))
    np.testing.assert_allclose(batch["preference"], np.array([0.5, 1.0, 0.8])[number % 3])
    swapped = number % 3 == 2
    np.testing.assert_array_equal(batch["winner"][:, 4, 4, 0], 10 * number + 5 * swapped)
    np.testing.assert_array_equal(batch["loser"][:, 4, 4, 0], 10 * number + 5 * ~swapped)


def test_batches_resume_exactly_and_processes_make_the_rows_of_one_batch(own_set):
    make = lambda shard=(0, 1), batch=3: pair_source(own_set[1], fake_tokens, (8, 8), batch=batch, seed=5, shard=shard,  # noqa: E731
                                                     drop=0.5)  # fmt: skip
    source, other = make(), make()
    for _ in range(6):  # into the second pass
        next(source)
    state = source.get_state()
    ahead = [next(source) for _ in range(3)]
    other.set_state(state)
    for want in ahead:
        got = next(other)
        assert got.keys() == want.keys() and all(np.array_equal(got[k], want[k]) for k in want)
    one, halves = make(batch=6), [make((0, 2)), make((1, 2))]
    halves[0].set_state(one.get_state())  # a position counts batches, whoever makes them
    for _ in range(3):
        want, parts = next(one), [next(half) for half in halves]
        assert all(np.array_equal(np.concatenate([part[k] for part in parts]), want[k]) for k in want)


def test_a_config_names_any_source_and_a_failed_one_leaves_nothing_behind(tmp_path):
    pictures_in(tmp_path, "0.png")
    row = {"prompt": "a green monster", "image_a": "0.png", "image_b": "1.png", "preferred": "b"}
    lines(tmp_path / "pairs.jsonl", [row] * 4)
    data = {"pairs": str(tmp_path), "data_dir": str(tmp_path / "cache")}
    config = ml_collections.ConfigDict({"seed": 0, "batch": {"prompts": 4}, "data": data})
    with pytest.raises(FileNotFoundError, match="pairs.jsonl, row 1, image_b: no image at"):
        stream.source(config, "pairs", critters(), None, (32, 32, 3))
    pictures_in(tmp_path, "0.png", "1.png")
    batch = next(stream.source(config, "pairs", critters(), None, (32, 32, 3)))
    assert batch["winner"].shape == (4, 32, 32, 3) and batch["winner"][0, 0, 0].argmax() == 2  # b, the blue one
    assert set(batch) == {"winner", "loser", "tokens", "preference", "weight", "prompt_id"}
    config.data = {"pairs": str(tmp_path), "data_dri": "x"}
    with pytest.raises(ValueError, match="does not read: data_dri"):
        stream.source(config, "pairs", critters(), None, (32, 32, 3))
    config.data = {}
    with pytest.raises(ValueError, match="set config.data.pairs to an .npz"):
        stream.source(config, "pairs", critters(), None, (32, 32, 3))


def test_a_labelled_folder_reads_back_and_names_its_bad_rows(tmp_path):
    for name, data in (("0.png", RED), ("1.png", encoded(90, mode="L")), ("2.png", encoded(90, size=(8, 8), mode="L"))):
        (tmp_path / name).write_bytes(data)
    rows = [{"file": "0.png", "prompt": "red"}, {"file": "1.png", "prompt": "grey"}]
    lines(tmp_path / "captions.jsonl", rows)
    images, captions = labelled_folder(str(tmp_path))
    assert captions == ["red", "grey"] and images[:, 0, 0].tolist() == [[255, 0, 0], [90, 90, 90]]
    for bad, message in (({"file": "3.png", "prompt": ""}, "row 3: no image at .*3.png"), ({"file": "0.png"}, "row 3 lacks prompt"),
                         ({"file": "2.png", "prompt": ""}, r"of one size; got \(8, 8, 3\) after \(16, 24, 3\)")):  # fmt: skip
        lines(tmp_path / "captions.jsonl", [*rows, bad])
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            labelled_folder(str(tmp_path))
    (tmp_path / "captions.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no rows"):
        labelled_folder(str(tmp_path))


def test_a_broken_picture_names_its_pair(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    lines(tmp_path / "pairs.jsonl", [{"prompt": "a cat", "image_a": "a.png", "image_b": "a.png", "preferred": "a"}] * 2)
    source = pair_source(pair_data(str(tmp_path), tmp_path / "cache"), fake_tokens, (8, 8), batch=2, seed=0)
    with pytest.raises(ValueError, match=r"pair [01] \(.*pairs.jsonl, prompt 'a cat'\), image_a is not a picture"):
        next(source)


def test_arrays_give_the_batches_they_always_gave(tmp_path):
    rng, n = np.random.default_rng(7), 23
    both = {name: rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for name in ("winner", "loser")}
    preference = rng.choice([0.5, 0.7, 0.9, 1.0], n)
    file = tmp_path / "pairs.npz"
    np.savez(file, **both, prompts=np.array(world.prompts("train", n, seed=0)), preference=preference)
    source = pair_source(ArrayPairs(load_pairs(str(file))), critters().tokenize, (32, 32), batch=8, seed=3)
    digest = hashlib.sha256()
    for _ in range(5):
        batch = next(source)
        for name in ("winner", "loser", "tokens", "preference", "prompt_id"):
            digest.update(f"{name} {batch[name].dtype} {batch[name].shape}".encode())
            digest.update(np.ascontiguousarray(batch[name]).tobytes())
    assert digest.hexdigest() == "3443a6df8ea71574a283076bef7890b91d05a551555aca049ac73b2e9d383ba8" and (batch["weight"] == 1).all()
    for change, message in (({"preference": preference + 0.6}, r"row 1: preference must be in \[0, 1\]"),
                            ({"preference": preference[:4]}, "equally long")):  # fmt: skip
        np.savez(file, **both | {"prompts": ["a"] * n, "preference": preference} | change)
        with pytest.raises(ValueError, match=message):
            load_pairs(str(file))
