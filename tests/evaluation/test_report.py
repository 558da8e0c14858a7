"""The report is one file that says all it should, whatever could be measured."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alignment_jax.evaluation import figures
from alignment_jax.evaluation.over_optimisation import alarm
from alignment_jax.evaluation.report import write_report
from alignment_jax.evaluation.statistics import flatten, interval, paired_bootstrap, rate, wilson
from alignment_jax.evaluation.summary import measurement, plain, summary

SECTIONS = "verdict pictures curves over-optimisation models attributes diversity trained next".split()
P, G = 6, 3


@pytest.fixture(scope="module")
def run() -> dict:
    rng = np.random.default_rng(0)
    images = {name: rng.random((P, G, 8, 8, 3)) for name in ("base", "aligned")}
    right = {"base": rng.random((P, G)) < 0.3, "aligned": np.ones((P, G), bool)}
    models = {
        name: measurement(
            right=right[name], attributes={"body": right[name], "eyes": right[name]}, proxy=rng.random((P, G)),
            images=images[name], features=rng.random((P, G, 5)), nuisances={"accent": rng.integers(0, 6, (P, G))},
            nuisance_classes={"accent": 6},
        )
        for name in images
    }  # fmt: skip
    best = {"gold": rate(right["aligned"][:, 0]), "attribute": {}, "proxy": interval(1, 1, 1, P), "diversity": {}}
    gold = [wilson(k, 128) for k in (60, 80, 110)]
    proxy = [interval(v, v - 0.1, v + 0.1, 128) for v in (0.0, 0.5, 1.0)]
    history = [{"step": i, "time": 2.0 * i, "reward/mean": i / 10, "loss": 1.0} for i in range(9)]
    for i in range(3):
        history[4 * i] |= {**flatten("gold/all", gold[i]), **flatten("proxy", proxy[i]), "kl/path": float(i)}
    return {
        "summary": summary(config="configs/critters.py:draft", method="draft", seed=3, trained_parameters=1234,
                           wall_seconds={"train": 200, "evaluate": 40, "total": 260}, base=models["base"],
                           aligned=models["aligned"], best_of_n=best, kl=2.0, alarm=alarm(proxy, gold)),
        "history": history, "prompts": [f"a green <bell> monster {i}" for i in range(P)], "images": images,
        "right": right, "blend": [{"lambda": w, "kl": 2 * w * w, "gold": wilson(60 + 40 * w, 128),
                                   "proxy": interval(w, w - 0.1, w + 0.1, 9)} for w in (0, 0.5, 1, 1.25)],
        "best_of_n": [{"n": n, "gold": wilson(60 + 5 * n, 128), "proxy": interval(n, n, n, 9)} for n in (1, 4, 8)],
        "gain": paired_bootstrap(right["aligned"].astype(float), right["base"].astype(float)),
        "costs": {"base": {"network_calls": 8, "seconds": 0.01}, "best_of_n": {"network_calls": 64, "seconds": 0.09}},
        "trained": {"Adapted": "LoRA, rank 16"}, "config_text": "steps: 251", "notes": ["128 prompts."],
        "commands": {"Sample from it": "python -m alignment_jax sample --run runs/x"},
    }  # fmt: skip


def words(text: str) -> str:
    """The page without its pictures, whose base64 may spell anything."""
    return re.sub(r"data:image/(?:png|jpeg);base64,[A-Za-z0-9+/=]+", "", text)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.sources += [v for k, v in attrs if k in ("src", "srcset", "href") and v]
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"<{tag}> closed out of order"


def test_report_is_one_file_with_all_sections(run: dict, tmp_path: Path) -> None:
    path = write_report(tmp_path, **run)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert [i for i in page.ids if i in SECTIONS] == SECTIONS
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert not re.search(r"https?:|//cdn|@import|url\(|<script", words(text))
    assert {p.name for p in tmp_path.iterdir()} == {"report.html"}


def test_report_holds_the_numbers_the_costs_and_the_commands(run: dict, tmp_path: Path) -> None:
    text = words(write_report(tmp_path, **run).read_text(encoding="utf-8"))
    gold = run["summary"]["aligned"]["gold"]
    for said in ("Gold rose from", "100.0\u00a0%", f"{100 * gold['low']:.1f}–100.0", run["summary"]["alarm"]["reason"],
                 "the alarm is silent", "Best of 8", "64", "× 8", "LoRA, rank 16", "steps: 251", "seed 3", "1,234",
                 "python -m alignment_jax sample --run runs/x", "of accent", "paired by prompt"):  # fmt: skip
        assert said in text, said
    assert "&lt;bell&gt;" in text and "<bell>" not in text


def test_pictures_are_the_given_ones_with_golds_verdict(run: dict, tmp_path: Path) -> None:
    text = write_report(tmp_path, **run).read_text(encoding="utf-8")
    shots = re.findall(r'<img class="shot ([a-z]*)" src="data:image/png;base64,([^"]+)"', text)
    assert len(shots) == 2 * P + 2 * 3 * G
    verdict, data = shots[1]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(pixels, np.round(run["images"]["aligned"][0, 0] * 255).astype(np.uint8))
    assert verdict == "right"
    assert (shots[0][0] == "right") == bool(run["right"]["base"][0, 0])


def test_the_peak_of_gold_is_named_where_the_blend_has_one(run: dict, tmp_path: Path) -> None:
    hump = [{**p, "gold": wilson(round(64 + 40 * d - 60 * d * d), 128)} for p, d in
            zip(run["blend"], (0, 0.5, 1, 1.25), strict=True)]  # fmt: skip
    said = [write_report(tmp_path, **{**run, "blend": b}).read_text(encoding="utf-8") for b in (hump, run["blend"])]
    assert "peaks at √KL = 0." in said[0] and "no peak among them" in said[1]


def test_a_fired_alarm_and_a_fall_stand_at_the_top(run: dict, tmp_path: Path) -> None:
    s = dict(run["summary"])
    s["base"], s["aligned"] = s["aligned"], s["base"]
    s["alarm"] = {"fired": True, "reason": "Over-optimised: the proxy rose while gold fell."}
    text = write_report(tmp_path, **{**run, "summary": s}).read_text(encoding="utf-8")
    headline = re.search(r"<h1>(.*?)</h1>", text).group(1)
    assert "Gold fell from" in headline and "alarm fired" in headline
    assert 'class="alarm fired"' in text


def test_a_smoke_run_that_measured_next_to_nothing_still_has_a_report(run: dict, tmp_path: Path) -> None:
    one = measurement(right=[[True]], attributes={}, proxy=[[0.5]], images=np.zeros((1, 1, 8, 8, 3)))
    s = summary(config="c", method="m", seed=0, wall_seconds={"train": 1, "evaluate": 1, "total": 2}, kl=float("nan"),
                trained_parameters=1, base=one, aligned=one, best_of_n={**one, "proxy": interval(0, 0, 0, 0)},
                alarm={"fired": False, "reason": "Nothing measured."})  # fmt: skip
    small = {"base": np.zeros((1, 1, 8, 8, 3)), "aligned": np.zeros((1, 1, 8, 8, 3))}
    text = write_report(tmp_path / "new", summary=s, history=[], prompts=["a"], images=small,
                        right={"base": [[True]], "aligned": [[True]]}).read_text(encoding="utf-8")  # fmt: skip
    assert "did not change beyond the noise" in text and "was not measured" in text and "nan" not in words(text)
    assert [i for i in Page(text).ids if i in SECTIONS] == SECTIONS


def test_a_score_as_gold_is_no_rate_and_large_pictures_are_shrunk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.random((4, 2, 288, 272, 3), np.float32)
    models = {name: measurement(right=rng.random((4, 2)), attributes={}, proxy=rng.random((4, 2)), images=images)
              for name in ("base", "aligned")}  # fmt: skip
    s = summary(config="c", method="m", seed=0, wall_seconds={"train": 1, "evaluate": 1, "total": 2}, kl=1.0, trained_parameters=1,
                best_of_n=models["base"], alarm={"fired": False, "reason": "Silent."}, **models)  # fmt: skip
    point = {"lambda": 0.5, "kl": 1.0, **{k: models["aligned"][k] for k in ("gold", "proxy", "diversity")}}
    text = write_report(tmp_path, summary=s, history=[], prompts=["a"] * 4, images={"base": images, "aligned": images}, rate=False,
                        right=dict.fromkeys(("base", "aligned"), np.ones((4, 2), bool)), blend=[point], pairs=2,
                        groups=1).read_text(encoding="utf-8")  # fmt: skip
    said = words(text)
    assert "Pixel distance within a prompt" in said and "nan" not in said
    assert not re.search("all right|right samples|Real renders|finds all", said)
    shots = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    assert len(shots) == 2 * 2 + 2 * 2 and Image.open(io.BytesIO(base64.b64decode(shots[0]))).size == (242, 256)
    assert figures.frame(images[0], None, 96, 4).shape == (2, 104, 99, 3)


def test_pictures_that_do_not_belong_together_are_refused(run: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one shape"):
        write_report(tmp_path, **{**run, "images": {**run["images"], "aligned": np.zeros((P, G, 4, 4, 3))}})
    with pytest.raises(ValueError, match=r"right\['base'\] must be \[P, G\]"):
        write_report(tmp_path, **{**run, "right": {**run["right"], "base": np.zeros((P, G + 1), bool)}})
    with pytest.raises(ValueError, match=r"P=5"):
        write_report(tmp_path, **{**run, "prompts": run["prompts"][:5]})
    assert not list(tmp_path.iterdir())


def test_summary_is_strict_json_with_the_agreed_keys(run: dict) -> None:
    s = json.loads(json.dumps(run["summary"], allow_nan=False))
    assert set(s) == {"config", "method", "seed", "wall_seconds", "trained_parameters", "base", "aligned", "best_of_n",
                      "kl", "alarm"}  # fmt: skip
    for model in ("base", "aligned"):
        assert set(s[model]) == {"gold", "attribute", "proxy", "diversity"}
        assert set(s[model]["gold"]) == {"mean", "low", "high", "n"} and s[model]["gold"]["n"] == P * G
    assert plain({"a": np.float32("nan"), "b": np.arange(2), "c": (np.True_,)}) == {"a": None, "b": [0, 1], "c": [True]}


def test_summary_refuses_a_missing_part(run: dict) -> None:
    with pytest.raises(ValueError, match=r"wall_seconds lacks \['total'\]"):
        summary(**{**run["summary"], "wall_seconds": {"train": 1, "evaluate": 1}})


def test_enlarging_repeats_pixels_and_frames_show_the_verdict() -> None:
    images = np.random.default_rng(0).random((2, 4, 4, 3))
    big = figures.enlarge(images, 18)
    assert big.shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(big[:, ::4, ::4], np.round(images * 255).astype(np.uint8))
    framed = figures.frame(images, [True, False], 16, 2)
    assert framed.shape == (2, 20, 20, 3)
    assert framed[0, 0, 0, 1] > framed[0, 0, 0, 0] and framed[1, 0, 0, 0] > framed[1, 0, 0, 1]
    np.testing.assert_array_equal(framed[:, 2:-2, 2:-2], figures.enlarge(images, 16))


def test_grid_is_a_png_with_every_pair() -> None:
    images = np.random.default_rng(0).random((5, 4, 4, 3))
    narrow, wide = (Image.open(io.BytesIO(figures.grid(images[:n], images[:n], [True] * n, [False] * n, ["a b"] * n,
                                                       columns=4))) for n in (4, 5))  # fmt: skip
    assert narrow.format == "PNG" and wide.height > 1.8 * narrow.height
    red = np.array([0xD6, 0x45, 0x45])
    assert (np.abs(np.asarray(wide.convert("RGB")).astype(int) - red).max(-1) < 3).sum() > 500
