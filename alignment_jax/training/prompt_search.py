"""Searches over prompts with a model and a reward: what `sample --method=prompt_...` draws with."""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import jax
import jax.numpy as jnp
import numpy as np

from ..diffusion import Denoise, Sampler, fold_in, initial
from ..diffusion import sample as sample_chain
from ..models.bundle import ModelBundle
from ..models.subjects import FUNCTION_WORDS, WORD
from ..models.subjects import words as words_of
from ..rewards.base import Reward
from ..rewards.check import score_host, to_uint8
from ..test_time import PROMPT_METHODS
from ..test_time.prompts import Found, Rewrite, Score, Search
from .names import call, named
from .steering import one_score

Tree = Any
Paint = Callable[[list[str], jax.Array], np.ndarray]
WEIGHT = re.compile(r"\(([^():]+):(-?\d+(?:\.\d*)?|-?\.\d+)\)")
SEARCH, FRESH = (1 << 24) + 1, (1 << 24) + 2  # pictures' own keys are numbered from 0
ANSWER = 1 << 20  # bytes of an endpoint's answer that are read


class Plan(NamedTuple):
    """A search, the reward that it follows, and on how many noises candidates and the final prompt are scored."""

    method: dict[str, Any]
    search: Search
    reward: Reward
    tokenize: Callable[[Sequence[str]], np.ndarray]
    noises: int
    held_out: int


def planned(method: Mapping[str, Any], bundle: ModelBundle, reward: Reward | None, texts: Sequence[str], x_T: Any = None) -> Plan:
    """The search of {"name", **settings}; settings beside those of test_time/prompts.py:

    noises: pictures a scored prompt, of the same noises for every candidate. held_out: fresh noises on which the best prompt
    and the original are scored in the end. rewriter: "module:function", or the URL of an endpoint, then also n, timeout and
    retries of `http_rewriter`. Raises ValueError for what does not fit, also prompts that tokenizer or reward cannot read, and
    ConnectionError when nobody answers at the URL.
    """
    name, settings = method["name"], {k: v for k, v in method.items() if k != "name"}
    reward = one_score(name, reward)
    if x_T is not None:
        raise ValueError("--noise fixes the start of the plain chain, and a search draws on noises of its own; leave one out")
    numbers = {"noises": settings.pop("noises", 8), "held_out": settings.pop("held_out", 16)}
    for key, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"method {name}: {key} must be a whole number, at least 1; got {value!r}")
    if isinstance(rewriter := settings.get("rewriter"), str):
        settings["rewriter"] = _rewriter(rewriter, {k: settings.pop(k) for k in ("n", "timeout", "retries") if k in settings})
    search = call(PROMPT_METHODS[name].factory, settings, f"method {name!r}", unweighted=FUNCTION_WORDS)
    originals = list(dict.fromkeys(plain(t) for t in texts))
    bundle.tokenize(originals)
    if reward.encode:
        reward.encode(originals)
    if settings.get("weights") or list(texts) != [plain(t) for t in texts]:
        cond = jax.eval_shape(lambda key: bundle.encode_text(bundle.init(key), jnp.asarray(bundle.tokenize([""]))), jax.random.key(0))
        if not isinstance(cond, Mapping) or "states" not in cond:
            raise ValueError(f"weights such as (word:1.3) act on the text's states, and the condition of model {bundle.name} has none; "
                             "leave weights out")  # fmt: skip
    return Plan(dict(method), search, reward, bundle.tokenize, **numbers)


def painter(bundle: ModelBundle, params: Tree, away: Tree, lead: Callable[[Tree, Tree], Denoise], sampler: Sampler, batch: int) -> Paint:
    """paint(prompts [N], keys [N]) -> pictures [N,H,W,C] in [0, 1], as plain sampling draws them; "(word:1.3)" is a weight.

    lead(params, away) -> the guided denoiser. Prompts are drawn up to `batch` at once, padded to a power of two.
    """
    empty = bundle.tokenize([""])

    @jax.jit
    def chunk(params: Tree, away: Tree, keys: jax.Array, tokens: jax.Array, weights: jax.Array | None) -> jax.Array:
        cond = bundle.encode_text(params, tokens)
        if weights is not None:
            cond = emphasised(cond, bundle.encode_text(params, jnp.asarray(empty)), weights)
        x_T = initial(fold_in(keys, 0), sampler, (len(keys), *bundle.sample_shape))
        return bundle.decode(params, sample_chain(fold_in(keys, 1), lead(params, away), cond, sampler, x_T)[0])

    def paint(prompts: list[str], keys: jax.Array) -> np.ndarray:
        texts, weights, out = [plain(p) for p in prompts], None, []
        if texts != prompts:
            rows = {p: token_weights(bundle, p) for p in dict.fromkeys(prompts)}
            weights = np.stack([rows[p] for p in prompts])
        tokens, n = bundle.tokenize(texts), len(texts)
        size = min(batch, 1 << (n - 1).bit_length())
        for i in range(0, n, size):
            at = np.minimum(np.arange(i, i + size), n - 1)
            out.append(np.asarray(chunk(params, away, keys[at], tokens[at], None if weights is None else weights[at])))
        return np.concatenate(out)[:n]

    return paint


def run(plan: Plan, paint: Paint, texts: list[str], keys: jax.Array, seed: int, folder: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(pictures [N,H,W,C] of the best prompt found for each text, {"reward" [N], "best" [N], the prompts}).

    Pictures are judged by the ORIGINAL prompt, whatever candidate they were drawn from. Every prompt is searched by itself,
    on the same noises. Writes history.json into `folder`: for each prompt the scores that the search chose by, those of
    the same two prompts on fresh noises (the best of many is flattered by what it was chosen by), and all candidates.
    """
    from tqdm import tqdm

    judge, records, best, gained = judged(plan.reward), [], dict[str, str](), []
    search_key, fresh_key = (jax.random.fold_in(jax.random.key(seed), number) for number in (SEARCH, FRESH))
    for text in tqdm(list(dict.fromkeys(texts)), desc="search", unit="prompt", disable=len(set(texts)) == 1):
        found: Found = plan.search(scorer(paint, plan, plain(text), search_key), text, seed)
        if not np.isfinite(found.score):
            raise ValueError(f"reward {plan.reward.name!r} gave no number for any of {len(found.history)} candidates of {text!r}")
        fresh = {p: judge(paint([p] * plan.held_out, _numbered(fresh_key, range(plan.held_out))), plain(text))
                 for p in dict.fromkeys([text, found.prompt])}  # fmt: skip
        gains = fresh[found.prompt] - fresh[text]
        error = np.nanstd(gains, ddof=1) / np.sqrt(np.isfinite(gains).sum()) if np.isfinite(gains).sum() > 1 else np.nan
        held_out = {"base": _mean(fresh[text]), "best": _mean(fresh[found.prompt]), "gain": _mean(gains), "standard_error": error}
        best[text] = found.prompt
        records.append({
            "prompt": text, "best": found.prompt, "search": {"base": _number(found.base), "best": _number(found.score)},
            "held_out": {k: _number(v) for k, v in held_out.items()}, "scored": len(found.history),
            "history": [[p, _number(s)] for p, s in found.history],
        })  # fmt: skip
        gained.append((found.score - found.base, held_out["gain"]))
    about = {"method": plan.method, "reward": plan.reward.name, "noises": plan.noises, "held_out": plan.held_out, "seed": seed,
             "prompts": records}  # fmt: skip
    (folder / "history.json").write_text(json.dumps(about, indent=1) + "\n")
    changed, (chosen_by, fresh_gain) = sum(t != p for t, p in best.items()), (_mean(np.array(g)) for g in zip(*gained))
    print(f"{changed} of {len(best)} prompts changed; {plan.reward.name} {chosen_by:+.4f} on the noises that they were chosen by, "
          f"{fresh_gain:+.4f} on {plan.held_out} fresh ones; see {folder / 'history.json'}")  # fmt: skip
    chosen = [best[t] for t in texts]
    array = paint(chosen, keys)
    reward = np.array([judge(picture[None], plain(text))[0] for picture, text in zip(array, texts, strict=True)])
    return array, {"reward": reward, "best": np.array(chosen)}


def scorer(paint: Paint, plan: Plan, original: str, key: jax.Array) -> Score:
    """score(candidates) -> [N]: the mean reward, for the original prompt, of `noises` pictures of each candidate.

    A candidate's pictures come from the same noises as every other's; the next time it is asked for, from the next ones, and so
    on. NaN for one that the tokenizer refuses, and where no picture could be judged.
    """
    asked, judge = Counter[str](), judged(plan.reward)

    def readable(prompt: str) -> bool:
        try:
            plan.tokenize([plain(prompt)])
        except ValueError:
            return False
        return True

    def score(prompts: list[str]) -> np.ndarray:
        out = np.full(len(prompts), np.nan)
        fits = [i for i, p in enumerate(prompts) if readable(p)]
        if fits:
            numbers = [plan.noises * asked[prompts[i]] + j for i in fits for j in range(plan.noises)]
            array = paint([prompts[i] for i in fits for _ in range(plan.noises)], _numbered(key, numbers))
            out[fits] = [_mean(row) for row in judge(array, original).reshape(-1, plan.noises)]
        asked.update(prompts)
        return out

    return score


def judged(reward: Reward) -> Callable[[np.ndarray, str], np.ndarray]:
    """judge(pictures [N,H,W,C], prompt) -> scores [N]; NaN where a host reward fails."""
    of_device = jax.jit(reward.score) if reward.device else None

    def judge(array: np.ndarray, prompt: str) -> np.ndarray:
        if of_device is None:
            return score_host(reward, to_uint8(jnp.asarray(array)), [prompt] * len(array), {}, batch_index=0, on_error="mask")[0]
        condition = jax.tree.map(lambda x: np.repeat(x, len(array), axis=0), reward.encode([prompt])) if reward.encode else {}
        return np.asarray(of_device(reward.params, jnp.asarray(array), condition))

    return judge


def plain(prompt: str) -> str:
    """The prompt without its weights: "(horns:1.3)" is "horns"."""
    return WEIGHT.sub(r"\1", prompt)


def token_weights(bundle: ModelBundle, prompt: str) -> np.ndarray:
    """float32 [L]: what a prompt's "(word:1.3)", or "(two words:0.8)", says of each token of `plain(prompt)`; 1 elsewhere."""
    scale, at = list[float](), 0
    for match in WEIGHT.finditer(prompt):
        before, inside = prompt[at : match.start()], match.group(1)
        scale += [1.0] * len(WORD.findall(before)) + [float(match.group(2))] * len(WORD.findall(inside))
        at = match.end()
    out = np.ones(bundle.tokenize([""]).shape[-1], np.float32)
    for value, (_, first, end) in zip(scale, words_of(bundle.tokenize, plain(prompt))):
        out[first:end] = value
    return out


def emphasised(cond: Tree, empty: Tree, weights: jax.Array) -> Tree:
    """The condition with text states e_l + w_l (c_l - e_l), weights [B, L], e the states [1, L, D] of the empty prompt.

    Where a model masks what a prompt does not have, e_l is the mean of the states that the empty prompt does have. A weight of 1
    changes no bit; other parts of the condition, such as a pooled state, stay as they are. Weights that a token keeps over all
    steps; arXiv 2404.04095 also learns at which steps they act.
    """
    states, none = cond["states"], empty["states"]
    if "mask" in empty:
        there = empty["mask"][..., None]
        none = jnp.where(there, none, (none * there).sum(1, keepdims=True) / there.sum(1, keepdims=True))
    w = weights[..., None].astype(states.dtype)
    return {**cond, "states": jnp.where(w == 1, states, none + w * (states - none))}


def http_rewriter(url: str, *, n: int = 5, timeout: float = 60.0, retries: int = 2, pause: float = 1.0) -> Rewrite:
    """A rewriter that asks an endpoint: POST {"prompt", "history": [[prompt, score], ...], "n"} -> {"prompts": [...]}.

    Asked again up to `retries` times, `pause` seconds apart; then ConnectionError tells the URL and the last failure: no
    connection, no answer in `timeout` seconds, a status other than 200, no JSON, no or empty prompts.
    """
    parts = urlsplit(url)
    if parts.scheme.lower() not in ("http", "https") or not parts.hostname:
        raise ValueError(f"rewriter {url!r} is no URL such as http://localhost:8000/rewrite")
    if not (n >= 1 and timeout > 0 and retries >= 0):
        raise ValueError(f"a rewriter's endpoint needs n >= 1, timeout > 0 and retries >= 0; got {n}, {timeout} and {retries}")

    def rewrite(prompt: str, history: list[tuple[str, float]]) -> list[str]:
        body = json.dumps({"prompt": prompt, "history": [list(h) for h in history], "n": n}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        for attempt in range(retries + 1):
            time.sleep(pause if attempt else 0.0)
            try:
                with urllib.request.urlopen(request, timeout=timeout) as response:
                    return _answer(response.status, response.read(ANSWER))
            except (OSError, http.client.HTTPException, ValueError) as error:
                failure = str(error) or type(error).__name__
        raise ConnectionError(f"rewriter {url} failed {retries + 1} times, at last with: {failure}. It is sent a POST of "
                              '{"prompt", "history": [[prompt, score], ...], "n"} and must answer {"prompts": [...]}')  # fmt: skip

    return rewrite


def _answer(status: int, body: bytes) -> list[str]:
    if status != 200:
        raise ValueError(f"status {status}")
    try:
        answer = json.loads(body)
    except ValueError as error:
        raise ValueError(f"its answer is not JSON: {body[:80]!r}") from error
    prompts = answer.get("prompts") if isinstance(answer, dict) else None
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f'its answer has no list of texts "prompts": {body[:80]!r}')
    if not any(p.strip() for p in prompts):
        raise ValueError("its list of prompts is empty")
    return prompts


def _rewriter(source: str, settings: dict[str, Any]) -> Rewrite:
    """The rewriter "module:function", or the endpoint at a URL, which must answer to anything at all."""
    if "://" in source:
        made = call(http_rewriter, settings, "rewriter", url=source)
        try:
            urllib.request.urlopen(urllib.request.Request(source, method="HEAD"), timeout=settings.get("timeout", 10.0)).close()
        except urllib.error.HTTPError:
            pass  # somebody is there
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(f"rewriter {source} cannot be reached: {error}. Is it running?") from error
        return made
    if settings:
        raise ValueError(f"{', '.join(settings)} are for an endpoint, and rewriter={source!r} is no URL; leave them out")
    if ":" not in source:
        raise ValueError(f"rewriter {source!r} must be module:function or a URL such as http://localhost:8000/rewrite")
    made = named(source, {}, "rewriter")
    if not callable(made):
        raise ValueError(f"rewriter {source!r} is no function; it must be rewrite(prompt, history) -> list of prompts")
    return made


def _numbered(key: jax.Array, numbers: Sequence[int]) -> jax.Array:
    """One key for each of the numbers: the same number, the same noise."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(numbers, jnp.uint32))


def _mean(values: np.ndarray) -> float:
    """The mean of what is a number; NaN where nothing is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _number(value: float) -> float | None:
    """As JSON has it."""
    return float(value) if np.isfinite(value) else None
