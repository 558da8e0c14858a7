"""Searches over prompts with a model and a reward: what is judged, on which noises, and endpoints that fail."""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment_jax import weights
from alignment_jax.diffusion import Sampler, cosine, sampling_grid
from alignment_jax.models.bundle import ModelBundle
from alignment_jax.models.critters import ASSETS, critters
from alignment_jax.rewards.base import Reward
from alignment_jax.training import catalogue, prompt_search
from alignment_jax.training.generate import generate

ROOT = Path(__file__).parents[2]
LEVEL = {"a": 0.0, "cat": 0.1, "bright": 0.4, "dark": -0.4, "cheat": -0.1, "wild": 0.0, "big": 0.05}  # what a word adds
LENGTH = 8


def tokenize(prompts):
    """[BOS], the words, padding; at most seven words."""
    out = np.zeros((len(prompts), LENGTH), np.int32)
    for row, prompt in zip(out, prompts, strict=True):
        ids = [1, *(2 + list(LEVEL).index(w) for w in prompt.replace(",", " ").split())]
        if len(ids) > LENGTH:
            raise ValueError(f"prompt has {len(ids) - 1} words, the text tower reads {LENGTH - 1}: {prompt!r}")
        row[: len(ids)] = ids
    return out


def world() -> ModelBundle:
    """A grey picture whose level is the sum of its words' levels, plus a little of its noise: much of it for "wild"."""
    def encode_text(params, tokens):
        values = jnp.array([0.0, 0.0, *LEVEL.values()])[tokens]
        wild = (tokens == 2 + list(LEVEL).index("wild")).any(1)
        return {"states": jnp.stack([values, jnp.ones_like(values)], -1), "mask": tokens > 0, "wild": wild}

    def denoise(params, x, t, cond):
        level = params["gain"] * (cond["states"][..., 0] * cond["mask"]).sum(1)
        share = jnp.where(cond["wild"], 0.5, 0.1)
        return jnp.broadcast_to(level[:, None, None, None] + share[:, None, None, None] * x.mean((1, 2, 3), keepdims=True), x.shape)

    return ModelBundle("words", lambda key: {"gain": jnp.float32(1.0)}, denoise, encode_text, lambda p, x: 0.5 + 0.25 * x,
                       lambda p, y: (y - 0.5) / 0.25, tokenize, cosine(), "x0", (1, 1, 3), {"num_steps": 2})  # fmt: skip


encoded: list[str] = []


def level() -> Reward:
    """How bright the picture is; and far more for a prompt with the word "cheat" in it."""
    def encode(prompts):
        encoded.extend(prompts)
        return {"bonus": np.array([100.0 if "cheat" in p else 0.0 for p in prompts], np.float32)}

    return Reward("level", lambda params, y, condition: y.mean((1, 2, 3)) + condition["bonus"], encode=encode)


def of_host(images, prompts, metadata):
    """The same on the host."""
    encoded.extend(prompts)
    return images.mean((1, 2, 3)) / 255.0 + np.array([100.0 if "cheat" in p else 0.0 for p in prompts]), {}


def failing(images, prompts, metadata):
    """A reward that is out of order."""
    raise RuntimeError("out of order")


def echo(prompt, history):
    """A rewriter: the best so far, brighter."""
    return [f"{history[-1][0]} bright", f"{history[-1][0]} dark"]


HERE = __name__.rpartition(".")[2]
BANDIT = {"name": "prompt_bandit", "suffixes": ["bright", "dark", "cheat"], "budget": 12, "noises": 2, "held_out": 3}


def sample(tmp_path, method=None, prompts="a cat", reward=f"{HERE}:level", **more):
    """generate() on the small world, and what it wrote."""
    given = {"model": f"{HERE}:world", "weights_file": "init", "run": None, "scale": None, "prompts": prompts, "out": str(tmp_path),
             "seed": 3, "samples": 2, "noise": None, "save_arrays": True, "settings": {}, "batch": 8, "method": method, "reward": reward}
    files = generate(**{**given, **more})
    read = lambda name: json.loads((tmp_path / name).read_text()) if (tmp_path / name).is_file() else None
    return files, np.load(tmp_path / "images.npy"), read("history.json"), read("info.json")


def parts(noises=2, held_out=3, method=BANDIT):
    """(plan, paint) on the small world."""
    bundle = world()
    params = bundle.init(None)
    sampler = Sampler(bundle.schedule, sampling_grid(bundle.schedule, 2), "x0")
    lead = lambda params, away: lambda x, t, cond: bundle.denoise(params, x, t, cond)
    plan = prompt_search.planned({**method, "noises": noises, "held_out": held_out}, bundle, level(), ["a cat"])
    return plan, prompt_search.painter(bundle, params, None, lead, sampler, 8)


# -- what is judged ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [f"{HERE}:level", f"{HERE}:of_host"])
@pytest.mark.parametrize("method", [
    BANDIT,
    {"name": "prompt_evolution", "suffixes": ["bright", "dark", "cheat"], "budget": 8, "noises": 2, "held_out": 3},
    {"name": "prompt_rewriter", "rewriter": f"{HERE}:echo", "budget": 8, "noises": 2, "held_out": 3},
], ids=lambda m: m["name"])  # fmt: skip
def test_the_best_prompt_is_found_and_judged_by_the_original(tmp_path, method, reward):
    """The trap: a candidate that is judged by itself wins by what it asks for, here by the word "cheat"."""
    encoded.clear()
    files, array, history, info = sample(tmp_path, method, reward=reward)
    assert set(encoded) == {"a cat"}
    record = history["prompts"][0]
    assert "bright" in record["best"] and "cheat" not in record["best"] and "dark" not in record["best"]
    assert record["search"]["best"] > record["search"]["base"] and record["held_out"]["gain"] > 5 * record["held_out"]["standard_error"]
    assert record["scored"] == len(record["history"]) <= method["budget"] and record["history"][0][0] == "a cat"
    assert info["best"] == [record["best"]] * 2 and len(files) == 2
    np.testing.assert_allclose(info["reward"], array.mean((1, 2, 3)), atol=3e-3)  # a host reward sees 8 bits
    assert (tmp_path / "prompts.txt").read_text() == "a cat\na cat\n", "pictures lie beside what was asked for, as `score` reads it"


def test_candidates_meet_the_same_noises_and_the_next_draw_other_ones():
    plan, paint = parts()
    score = prompt_search.scorer(paint, plan, "a cat", jax.random.key(0))
    first, second = score(["a cat", "a cat bright"]), score(["a cat", "a cat bright"])
    np.testing.assert_allclose(np.diff(first), np.diff(second), atol=1e-6)  # noise is common to both, and falls out
    assert abs(first[0] - second[0]) > 1e-3
    again = prompt_search.scorer(paint, plan, "a cat", jax.random.key(0))
    np.testing.assert_array_equal(again(["a cat dark", "a cat"])[1], first[0])


def test_noises_are_averaged():
    plan, paint = parts(noises=5)
    key = jax.random.key(0)
    score = prompt_search.scorer(paint, plan, "a cat", key)(["a cat"])
    keys = jnp.stack([jax.random.fold_in(key, i) for i in range(5)])
    np.testing.assert_allclose(score, paint(["a cat"] * 5, keys).mean(), atol=1e-6)


def test_when_nothing_is_better_pictures_are_those_of_plain_sampling(tmp_path):
    _, plain, *_ = sample(tmp_path / "plain")
    _, array, history, _ = sample(tmp_path / "searched", {**BANDIT, "suffixes": ["dark"]})
    assert history["prompts"][0]["best"] == "a cat" and history["prompts"][0]["held_out"]["gain"] == 0
    np.testing.assert_array_equal(array, plain)


def test_a_prompt_does_not_depend_on_the_others_and_a_seed_gives_the_same(tmp_path):
    (tmp_path / "two.txt").write_text("a big cat\na cat\n")
    two, one, again = (sample(tmp_path / name, BANDIT, prompts)[2]["prompts"]
                       for name, prompts in (("2", str(tmp_path / "two.txt")), ("1", "a cat"), ("3", "a cat")))  # fmt: skip
    assert two[1] == one[0] == again[0]


def test_the_winner_is_scored_again_on_fresh_noises_which_flatter_nobody(tmp_path):
    """ "wild" multiplies the noise: it wins where the search's two noises are high, and is worth nothing on others."""
    gains = []
    plan, paint = parts(held_out=8, method={**BANDIT, "suffixes": ["wild"], "budget": 2})
    for seed in range(40):
        prompt_search.run(plan, paint, ["a cat"], jax.random.split(jax.random.key(seed), 1), seed, tmp_path)
        record = json.loads((tmp_path / "history.json").read_text())["prompts"][0]
        gains.append((record["search"]["best"] - record["search"]["base"], record["held_out"]["gain"]))
    by_search, fresh = np.array(gains).T
    chosen = by_search > 0
    assert 10 < chosen.sum() < 30, "a coin"
    error = fresh[chosen].std() / np.sqrt(chosen.sum())
    assert abs(fresh[chosen].mean()) < 3 * error and by_search[chosen].mean() > 3 * error


def test_a_candidate_that_the_tokenizer_refuses_has_no_score(tmp_path):
    long = " ".join(["bright"] * 7)
    record = sample(tmp_path, {**BANDIT, "suffixes": ["dark", long]})[2]["prompts"][0]
    assert record["best"] == "a cat" and [f"a cat {long}", None] in record["history"]


# -- token weights -------------------------------------------------------------------------------------------------------


def test_weights_fall_on_the_tokens_of_their_words():
    bundle = critters()
    prompt = "a (green:1.3) bell monster with horns, (one big eye:0.5) and a smile"
    assert prompt_search.plain(prompt) == "a green bell monster with horns, one big eye and a smile"
    expected = np.ones(24)
    expected[2], expected[7:10] = 1.3, 0.5  # [BOS] a green bell monster with horns one big eye
    np.testing.assert_allclose(prompt_search.token_weights(bundle, prompt), expected, rtol=1e-6)
    two = bundle._replace(tokenize=lambda p: np.stack([bundle.tokenize(p)] * 2, 1))  # SDXL's two tokenizers
    np.testing.assert_allclose(prompt_search.token_weights(two, prompt), expected, rtol=1e-6)
    assert prompt_search.plain("(a cat) at 5:30 (really: yes)") == "(a cat) at 5:30 (really: yes)"


def test_a_weight_scales_a_token_away_from_the_empty_prompt():
    bundle = critters()
    params = weights.load(ASSETS / "base.safetensors", jax.eval_shape(bundle.init, jax.random.key(0)))
    cond, empty = (bundle.encode_text(params, jnp.asarray(bundle.tokenize([t]))) for t in ("a green bell monster", ""))
    same = prompt_search.emphasised(cond, empty, jnp.ones((1, 24)))
    np.testing.assert_array_equal(same["states"], cond["states"])  # 1 changes no bit
    scale = jnp.ones((1, 24)).at[0, 2].set(1.5).at[0, 3].set(0.0)
    states, none = prompt_search.emphasised(cond, empty, scale)["states"], empty["states"][0, 0]  # of its only token
    np.testing.assert_allclose(states[0, 2], none + 1.5 * (cond["states"][0, 2] - none), atol=1e-5)
    np.testing.assert_allclose(states[0, 3], none, atol=1e-6)
    np.testing.assert_array_equal(states[0, 4:], cond["states"][0, 4:])
    no_mask = prompt_search.emphasised({"states": cond["states"]}, {"states": empty["states"]}, jnp.zeros((1, 24)))
    np.testing.assert_allclose(no_mask["states"], empty["states"], atol=1e-6)  # CLIP: place by place


def test_weights_reach_the_picture_and_are_searched(tmp_path):
    plan, paint = parts()
    keys = jax.random.split(jax.random.key(1), 1)
    heights = [float(paint([p], keys).mean()) for p in ("a (bright:0)", "a", "a bright", "a (bright:2)")]
    np.testing.assert_allclose(heights[0], heights[1], atol=1e-6)
    np.testing.assert_allclose(heights[3] - heights[2], heights[2] - heights[1], atol=1e-6)
    assert heights[2] - heights[1] > 0.09
    record = sample(tmp_path, {"name": "prompt_evolution", "weights": [0, 2], "budget": 20, "noises": 1}, "a bright cat dark")[2]
    assert record["prompts"][0]["best"] == "a (bright:2) (cat:2) (dark:0)"


# -- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, said", [
    ({"reward": ""}, "needs a reward"),
    ({"method": {**BANDIT, "suffixes": []}}, "suffixes is empty"),
    ({"method": {**BANDIT, "noises": 0}}, "noises must be a whole number"),
    ({"method": {**BANDIT, "held_out": 2.5}}, "held_out must be a whole number"),
    ({"method": {**BANDIT, "sufixes": []}}, "no field 'sufixes'. Did you mean 'suffixes'"),
    ({"prompts": "a big big big big bright bright cat"}, "8 words, the text tower reads 7"),
    ({"method": {"name": "prompt_rewriter"}}, "needs a rewriter"),
    ({"method": {"name": "prompt_rewriter", "rewriter": "echo"}}, "must be module:function or a URL"),
    ({"method": {"name": "prompt_rewriter", "rewriter": f"{HERE}:nobody"}}, "nobody"),
    ({"method": {"name": "prompt_rewriter", "rewriter": f"{HERE}:BANDIT"}}, "is no function"),
    ({"method": {"name": "prompt_rewriter", "rewriter": f"{HERE}:echo", "timeout": 3}}, "timeout are for an endpoint"),
    ({"method": {"name": "prompt_rewriter", "rewriter": "ftp://x/y"}}, "is no URL such as http"),
    ({"reward": "{'name': 'several', 'rewards': ['critters_proxy', 'critters_fragile']}", "prompts": "a cat"}, "needs one score"),
    ({"method": {"name": "prompt_evolution", "weights": [2]}, "model": "toy_model:toy"}, "condition of model toy has none"),
])  # fmt: skip
def test_bad_input_is_named_before_weights_are_read(tmp_path, change, said):
    nowhere = {"weights_file": str(tmp_path / "no.safetensors")}
    with pytest.raises(ValueError, match=said):
        sample(tmp_path, **{"method": BANDIT, **nowhere, **change})


def test_a_reward_that_always_fails_is_named(tmp_path):
    with pytest.raises(ValueError, match="failing.*gave no number for any of 4 candidates of 'a cat'"):
        sample(tmp_path, BANDIT, reward=f"{HERE}:failing")


def test_list_shows_the_searches_beside_the_other_methods():
    rows = {row["name"]: row for row in catalogue.test_time()}
    for name in ("prompt_bandit", "prompt_evolution", "prompt_rewriter"):
        assert (rows[name]["family"], rows[name]["reward"], rows[name]["budget"]) == ("prompt", "value", "budget")
    assert "best_of_n" in rows


def test_from_the_command_line(tmp_path):
    arguments = ["sample", f"--model={HERE}:world", "--weights=init", "--prompts=a cat", "--method=prompt_bandit", f"--reward={HERE}:level",
                 '--option=suffixes=["bright","dark"]', "--option=budget=6", f"--out={tmp_path / 'o'}"]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "alignment_jax", *arguments], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 of 1 prompts changed; level +" in done.stdout and "fresh" in done.stdout
    assert (tmp_path / "o" / "0000.png").is_file() and (tmp_path / "o" / "history.json").is_file()


# -- an endpoint ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint(monkeypatch):
    """serve(answers) -> URL of a server that gives them in turn, the last one for ever, and the requests that it got.

    An answer is (status, body) or a number of seconds to sleep.
    """
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def serve(*answers):
        got = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                answer = answers[min(len(got), len(answers)) - 1]
                if not isinstance(answer, tuple):
                    time.sleep(answer)
                    answer = (200, b"{}")
                try:
                    self.send_response(answer[0])
                    self.end_headers()
                    self.wfile.write(answer[1])
                except OSError:
                    pass  # who asked has gone

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/rewrite", got

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


GOOD = (200, json.dumps({"prompts": ["a cat bright", "a cat dark"]}).encode())


def test_an_endpoint_rewrites(tmp_path, endpoint):
    url, got = endpoint(GOOD)
    record = sample(tmp_path, {"name": "prompt_rewriter", "rewriter": url, "n": 7, "budget": 9})[2]["prompts"][0]
    assert record["best"] == "a cat bright" and record["scored"] == 3
    assert [g["n"] for g in got] == [7] * 4  # once with news, and three times in vain
    assert got[0]["prompt"] == "a cat" and got[0]["history"] == [record["history"][0]]
    assert [p for p, _ in got[1]["history"]] == ["a cat dark", "a cat", "a cat bright"]  # worst first


def test_an_endpoint_is_asked_again(endpoint):
    url, got = endpoint((500, b"busy"), (200, b"<html>"), GOOD)
    assert prompt_search.http_rewriter(url, retries=2, pause=0)("a cat", [("a cat", 0.5)]) == ["a cat bright", "a cat dark"]
    assert len(got) == 3 and got[0] == {"prompt": "a cat", "history": [["a cat", 0.5]], "n": 5}


@pytest.mark.parametrize("answer, said", [
    ((500, b"busy"), "500"), ((204, b""), "status 204"), ((404, b""), "404"), ((200, b"<html>"), "is not JSON: b'<html>'"),
    ((200, b"\xff\xfe"), "is not JSON"), ((200, b"[1]"), 'no list of texts "prompts"'), ((200, b'{"prompts": "a"}'), "no list of texts"),
    ((200, b'{"prompts": [1]}'), "no list of texts"), ((200, b'{"prompts": []}'), "is empty"), ((200, b'{"prompts": [" "]}'), "is empty"),
    (5.0, "timed out"),
])  # fmt: skip
def test_an_endpoint_that_fails_is_one_clear_error(endpoint, answer, said):
    url, got = endpoint(answer)
    with pytest.raises(ConnectionError, match="failed 2 times") as error:
        prompt_search.http_rewriter(url, retries=1, timeout=0.3, pause=0)("a cat", [])
    assert url in str(error.value) and said in str(error.value) and len(got) == 2


def test_an_endpoint_that_is_not_there_is_named_before_weights_are_read(tmp_path, endpoint):
    url, _ = endpoint(GOOD)
    closed = url.replace(url.split(":")[2].split("/")[0], "9")  # the discard port: nobody listens
    with pytest.raises(ConnectionError, match=f"rewriter {closed} cannot be reached"):
        sample(tmp_path, {"name": "prompt_rewriter", "rewriter": closed}, weights_file=str(tmp_path / "no.safetensors"))
