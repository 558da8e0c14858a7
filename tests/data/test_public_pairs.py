"""Rows shaped as the released files of the public preference sets are, names and types, become records."""

import json
from datetime import datetime

import pytest

from alignment_jax.data.pairs import pair_records

# a picture's bytes are not looked at before it is drawn
PICTURES = [b"first", b"second", b"third", b"fourth"]


def parquet(path, rows, schema=None):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema(pa) if schema else None), path)


def seen(source):
    return [(r.prompt, r.image_a, r.image_b, r.p_a, round(r.weight, 4), r.annotator, r.split) for r in pair_records(str(source))]


def pick_a_pic_schema(pa):
    """As the data set's card states it, for both versions."""
    strings = ("best_image_uid", "caption", "image_0_uid", "image_0_url", "image_1_uid", "image_1_url", "model_0", "model_1")
    numbers = ("ranking_id", "user_id", "num_example_per_prompt", "__index_level_0__")
    fields = {**dict.fromkeys(strings, pa.string()), **dict.fromkeys(numbers, pa.int64()), "are_different": pa.bool_(),
              "has_label": pa.bool_(), "created_at": pa.timestamp("ns"), "jpg_0": pa.binary(), "jpg_1": pa.binary(),
              "label_0": pa.float64(), "label_1": pa.float64()}  # fmt: skip
    return pa.schema(list(fields.items()))


def test_pick_a_pic_v2(tmp_path):
    row = {"are_different": True, "best_image_uid": "u0", "caption": "a lamp in the fog", "created_at": datetime(2023, 5, 1),
           "has_label": True, "image_0_uid": "u0", "image_0_url": "https://x/0", "image_1_uid": "u1", "image_1_url": "https://x/1",
           "jpg_0": PICTURES[0], "jpg_1": PICTURES[1], "label_0": 1.0, "label_1": 0.0, "model_0": "m", "model_1": "n",
           "ranking_id": 5, "user_id": 31, "num_example_per_prompt": 2, "__index_level_0__": 9}  # fmt: skip
    tie = {**row, "best_image_uid": "tie", "label_0": 0.5, "label_1": 0.5, "user_id": 32}
    without = {**row, "has_label": False, "are_different": False, "best_image_uid": None, "label_0": None, "label_1": None}
    parquet(tmp_path / "data" / "train-00000-of-00645-b66ac786bf6fb553.parquet", [row, tie, without], pick_a_pic_schema)
    for other in ("validation", "validation_unique", "test", "test_unique"):
        parquet(tmp_path / "data" / f"{other}-00000-of-00001-ab.parquet", [{**row, "caption": other}], pick_a_pic_schema)
    first, second = PICTURES[:2]
    assert seen(f"pick_a_pic:{tmp_path}") == [("a lamp in the fog", first, second, 1.0, 0.5, "31", "train"),
                                             ("a lamp in the fog", first, second, 0.5, 0.5, "32", "train")]  # fmt: skip
    held_out = next(pair_records(f"pick_a_pic:{tmp_path}/data/validation_unique-*.parquet"))
    assert (held_out.prompt, held_out.split) == ("validation_unique", "validation_unique")


@pytest.mark.parametrize("paths, rank", [("file_path", "rank"), ("image_path", "annotation")])
def test_hpdv2_by_its_description_and_by_its_released_names(paths, rank, tmp_path):
    """The trap: the description says file_path and raw rank; readers of the released files find image_path and annotation."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i in range(3):
            (tmp_path / split / f"0000000{i}.jpg").write_bytes(PICTURES[i])
    pair = {"human_preference": [0, 1], "prompt": "a boat of paper", paths: ["00000000.jpg", "00000001.jpg"]}
    again = {**pair, "human_preference": [1, 0], "user_hash": "h"}
    (tmp_path / "train.json").write_text(json.dumps([pair, again]))
    first, second, third = PICTURES[:3]
    assert seen(f"hpdv2:{tmp_path}") == [("a boat of paper", first, second, 0.0, 0.5, "", "train"),
                                        ("a boat of paper", first, second, 1.0, 0.5, "h", "train")]  # fmt: skip
    row = {"prompt": "a boat of stone", "image_path": ["00000000.jpg", "00000001.jpg", "00000002.jpg"], "rank": [1, 0, 2],
           "raw_annotations": [{rank: [1, 2, 3], "user_hash": "u"}, {rank: [3, 1, 2], "user_hash": "v"}]}  # fmt: skip
    (tmp_path / "test.json").write_text(json.dumps([row]))
    got = seen(f"hpdv2:{tmp_path / 'test.json'}")
    assert [(r[3], r[5]) for r in got] == [(1, "u"), (1, "u"), (1, "u"), (0, "v"), (0, "v"), (1, "v")]
    assert {r[4] for r in got} == {round(1 / 6, 4)} and {r[1] for r in got} == {first, second} and got[2][2] == third


def rated(path, prompt_id, rank, total):
    """A picture's row of ImageRewardDB on the hub."""
    return {"image_path": path, "prompt_id": prompt_id, "prompt": f"prompt {prompt_id}", "classification": "Animals",
            "image_amount_in_total": total, "rank": rank, "overall_rating": 8 - rank, "image_text_alignment_rating": 5,
            "fidelity_rating": 6}  # fmt: skip


def test_image_reward_db_as_it_lies_on_the_hub(tmp_path):
    """Parts of about 500 prompts, each unpacked beside its JSON; paths in it begin at the data set's root."""
    place = "images/train/train_1"
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / "images" / "validation" / "validation_1").mkdir(parents=True)
    for i, data in enumerate(PICTURES):
        (tmp_path / place / f"{i}.webp").write_bytes(data)
    rows = [rated(f"{place}/0.webp", "000864-0061", 2, 2), rated(f"{place}/1.webp", "000864-0061", 1, 2),
            rated(f"{place}/2.webp", "000864-0062", 3, 2), rated(f"{place}/3.webp", "000864-0062", 3, 2)]  # fmt: skip
    (tmp_path / place / "train_1.json").write_text(json.dumps(rows))
    (tmp_path / "images" / "validation" / "validation_1" / "validation_1.json").write_text("[]")
    want = [("prompt 000864-0061", PICTURES[0], PICTURES[1], 0.0, 1.0, "", "train"),
            ("prompt 000864-0062", PICTURES[2], PICTURES[3], 0.5, 1.0, "", "train")]  # fmt: skip
    assert seen(f"image_reward_db:{tmp_path}") == want
    assert seen(f"image_reward_db:{tmp_path / place / 'train_1.json'}") == want
    parquet(tmp_path / "metadata-train.parquet", rows)
    assert seen(f"image_reward_db:{tmp_path / 'metadata-train.parquet'}") == want
    (tmp_path / place / "train_1.json").unlink()
    parquet(tmp_path / "metadata-test.parquet", [{**rows[0], "image_path": "gone.webp"}, rows[1]])
    assert seen(f"image_reward_db:{tmp_path}") == want  # the test split is left out
    with pytest.raises(FileNotFoundError, match=r"metadata-test.parquet, row 1 \(prompt_id 000864-0061\): no image at .*gone.webp"):
        seen(f"image_reward_db:{tmp_path / 'metadata-test.parquet'}")
    (tmp_path / "part.json").write_text(json.dumps([{"prompt": "x", "rank": 1}]))
    with pytest.raises(ValueError, match="lacks prompt_id; it has prompt, rank. Wanted: prompt and generations, or prompt_id"):
        seen(f"image_reward_db:{tmp_path / 'part.json'}")


def test_image_reward_db_of_github(tmp_path):
    """data/test.json: a row a prompt, ranks 1 to 5 with ties, prompts that repeat have ids of their own."""
    names = [f"part-005658/images/0040/{i}.webp" for i in range(4)]
    for name, data in zip(names, PICTURES, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    row = {"id": "005658-0040", "prompt": "a door in a wood", "generations": names, "ranking": [1, 2, 5, 2]}
    (tmp_path / "test.json").write_text(json.dumps([row, {**row, "id": "005664-0153"}]))
    got = seen(f"image_reward_db:{tmp_path / 'test.json'}")
    assert [r[3] for r in got] == [1, 1, 1, 1, 0.5, 0] * 2 and {r[4] for r in got} == {round(1 / 6, 4)}
