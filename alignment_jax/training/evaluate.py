"""A tuned model beside its base: samples from the same noise, a judge, the reward-KL curve, the report."""

from __future__ import annotations

import dataclasses
import math
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ..data import prompts as prompt_files
from ..diffusion import Denoise, blended, fold_in, guided, initial, sample
from ..evaluation import figures, over_optimisation
from ..evaluation.diversity import pixel_diversity_ratio
from ..evaluation.kl import best_of_n_kl, policy_kl
from ..evaluation.report import write_report
from ..evaluation.statistics import Interval, flatten, mean_interval, paired_bootstrap, unflatten
from ..evaluation.summary import counted, gold, measurement, summary
from ..rewards import JUDGES, columns
from ..rewards.check import score_host, to_uint8
from ..rewards.judge import by_reward
from . import build, sharding
from .checkpoint import save_json
from .state import TrainState

if TYPE_CHECKING:
    from .loop import Session

Tree = Any


class Evaluator:
    """Measures a run on prompts that training never saw.

    config.evaluation: judge (a name in JUDGES, or a reward as in config.reward: gold is then its mean), prompts,
    num_prompts, samples (per prompt), quick_prompts (others, watched while training: what is stopped or chosen by them is
    judged on prompts that had no part in it), blend (lambdas), scale (how much of the tuning is kept in the model that is
    judged, 1: all), base_guidance_scale (the base's best), seed, chunk (samples at once).
    """

    def __init__(self, config: Any, session: Session):
        self.config, self.session, self.settings = config, session, config.evaluation
        run, e = session.run, config.evaluation
        wanted = e.num_prompts + e.quick_prompts
        self.prompts = prompt_files.load(e.prompts)[:wanted]
        if len(self.prompts) < wanted:
            raise ValueError(f"evaluation wants {e.num_prompts} + {e.quick_prompts} prompts and {e.prompts} has {len(self.prompts)}; "
                             "lower evaluation.num_prompts or evaluation.quick_prompts")  # fmt: skip
        self.cond = sharding.whole(session.programs.encode(session.frozen, run.parts.bundle.tokenize(self.prompts)))
        self.judge = JUDGES[e.judge]() if isinstance(e.judge, str) and e.judge in JUDGES else by_reward(build.one_reward(e.judge))
        self.chunk = int(e.get("chunk", 256))
        self.columns = columns(run.parts.reward) if run.parts.reward else ()
        self.targets = self.judge.targets(self.prompts)
        # the stochastic twin of a deterministic sampler, whose path has a KL
        self.noisy = run.sampler if run.sampler.stochastic().any() else dataclasses.replace(run.sampler, solver="ddim", eta=1.0)
        # the base is compared at its own best guidance: a gain over a badly guided base is none
        self.base_guidance = float(e.get("base_guidance_scale", run.parts.guidance.scale))
        compiled = partial(jax.jit, compiler_options=sharding.options(session.layout))
        self._sample, self._guided = compiled(self._sample_chunk), compiled(self._guided_chunk)
        self._kl, self._decode = compiled(self._kl_chunk), compiled(run.parts.bundle.decode)
        self._combine, self._noisy, self._score = jax.jit(self._combined), compiled(self._noisy_score), compiled(self._scored)

    # -- programs ------------------------------------------------------------------------------------------------

    def _denoise(self, params: Tree, scale: float | None = None) -> Denoise:
        parts = self.session.run.parts
        scale = parts.guidance.scale if scale is None else scale
        denoise = partial(parts.bundle.denoise, params)
        return guided(denoise, self.session.frozen["null"], scale, rescale=parts.guidance.rescale, interval=parts.guidance.interval)

    def _network(self, params: Tree, base: Tree, lam: jax.Array | None) -> Denoise:
        tuned = self._denoise(params)
        return tuned if lam is None else blended(tuned, self._denoise(base), lam)

    def _sample_chunk(self, params: Tree, base: Tree, lam: Any, keys: jax.Array, cond: Tree) -> jax.Array:
        run = self.session.run
        x_T = initial(fold_in(keys, 0), run.sampler, (len(keys), *run.parts.bundle.sample_shape))
        return sample(fold_in(keys, 1), self._network(params, base, lam), cond, run.sampler, x_T)[0]

    def _guided_chunk(self, params: Tree, base: Tree, lam: Any, keys: jax.Array, cond: Tree) -> jax.Array:
        run = self.session.run
        x_T = initial(fold_in(keys, 0), run.sampler, (len(keys), *run.parts.bundle.sample_shape))
        return sample(fold_in(keys, 1), self._denoise(params, self.base_guidance), cond, run.sampler, x_T)[0]

    def _kl_chunk(self, params: Tree, base: Tree, lam: Any, keys: jax.Array, cond: Tree) -> jax.Array:
        x_T = initial(fold_in(keys, 0), self.noisy, (len(keys), *self.session.run.parts.bundle.sample_shape))
        return policy_kl(fold_in(keys, 1), self._network(params, base, lam), self._denoise(base), cond, self.noisy, x_T)

    def _combined(self, trained: Tree, frozen: Tree, base: Tree, scale: Any) -> Tree:
        params = self.session.run.parts.partition.merge(trained, frozen["params"])
        return jax.tree.map(lambda b, p: b + scale * (p - b), base, params)

    def _noisy_score(self, params: Tree, reward_params: Tree, images: jax.Array, cond: Tree) -> jax.Array:
        parts = self.session.run.parts
        assert parts.reward is not None
        t = jnp.full(len(images), parts.bundle.schedule.t_min)
        score: jax.Array = parts.reward.score(reward_params, parts.bundle.encode(params, images), {"t": t, "cond": cond})
        return score

    def _scored(self, reward_params: Tree, images: jax.Array, condition: Tree) -> jax.Array:
        assert self.session.run.parts.reward is not None
        score: jax.Array = self.session.run.parts.reward.score(reward_params, images, condition)
        return score

    def tuned(self, state: TrainState) -> Tree:
        """The parameters that are judged: averaged if averages are kept, and scaled towards the base."""
        trained = state.trained if state.ema is None else state.ema
        return self._combine(trained, self.session.frozen, self.session.run.params, float(self.settings.get("scale", 1.0)))

    def _rows(self, num_prompts: int, samples: int, first: int = 0) -> tuple[jax.Array, np.ndarray]:
        """(keys [P G], prompt of each [P G]): the noise of sample g of prompt p is the same in every evaluation."""
        keys = jax.random.split(jax.random.key(int(self.settings.get("seed", 1234))), (len(self.prompts), 64))
        return keys[first : first + num_prompts, :samples].reshape(-1), np.repeat(np.arange(first, first + num_prompts), samples)

    def _over(self, program: Any, tree: Tree, label: str = "", clock: list[float] | None = None) -> np.ndarray:
        """program(part) over chunks of a tree [N, ...] that every process holds whole; each is cut over the devices."""
        from tqdm import tqdm

        on, n, out = self.session.layout, len(jax.tree.leaves(tree)[0]), []
        shards = math.lcm(sharding.shards(on.mesh), on.scorers.size if on.scorers else 1)
        size = -(-min(self.chunk, n) // shards) * shards
        for i in tqdm(range(0, n, size), desc=label, unit="chunk", disable=not label or jax.process_index() > 0, leave=False):
            rows = np.minimum(np.arange(i, i + size), n - 1)  # the last ones are repeated, so that the devices share alike
            part = sharding.spread(on, jax.tree.map(lambda x, r=rows: x[r], tree))
            began = time.perf_counter()
            out.append(sharding.whole(program(part)))
            if clock is not None:
                clock.append((time.perf_counter() - began) / size)
        return np.concatenate(out)[:n]

    def _mapped(self, program: Any, params: Tree, lam: Any, num_prompts: int, samples: int, first: int = 0,
                label: str = "", clock: list[float] | None = None) -> np.ndarray:  # fmt: skip
        keys, rows = self._rows(num_prompts, samples, first)
        drawn = (keys, jax.tree.map(lambda x: x[rows], self.cond))
        return self._over(lambda part: program(params, self.session.run.params, lam, *part), drawn, label, clock)

    # -- measurements --------------------------------------------------------------------------------------------

    def measure(self, params: Tree, num_prompts: int, samples: int, lam: Any = None, label: str = "",
                program: Any = None, first: int = 0) -> dict[str, Any]:  # fmt: skip
        """Samples of the prompts from `first` on and everything judged about them, [P, G, ...]."""
        clock: list[float] = []
        x0 = self._mapped(program or self._sample, params, lam, num_prompts, samples, first, label, clock)
        rows = self._rows(num_prompts, samples, first)[1]
        seconds = float(np.mean(clock[1:] or clock))  # the first chunk may have waited for a compilation
        return self.judged(x0, rows, (num_prompts, samples)) | {"seconds": seconds}

    def judged(self, x0: np.ndarray, rows: np.ndarray, shape: tuple[int, int]) -> dict[str, Any]:
        """The judge's and the reward's opinion of samples x0 [N,...] for the prompts `rows` [N], as [P, G, ...]."""
        images = self._over(partial(self._decode, self.session.run.params), x0)
        verdict = self.judge.look(images, self.targets[rows])
        scores = self.proxy(images, rows)
        out = {"images": images, "proxy": scores.mean(-1) if scores.ndim == 2 else scores, "scores": scores, **verdict}
        return jax.tree.map(lambda v: np.asarray(v).reshape(*shape, *np.shape(v)[1:]), out)

    def proxy(self, images: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The training reward of pictures [N,H,W,C]; zeros where the method has none."""
        reward = self.session.run.parts.reward
        if reward is None:
            return np.zeros(len(images))
        texts, params = [self.prompts[i] for i in rows], self.session.frozen["reward"]
        if not reward.device:
            return score_host(reward, to_uint8(jnp.asarray(images)), texts, {}, batch_index=0, on_error="mask")[0]
        if reward.noisy:  # its own kind of sample, at the clean end of the chain
            cond = jax.tree.map(lambda c: c[rows], self.cond)
            return self._over(lambda part: self._noisy(self.session.run.params, params, *part), (images, cond))
        condition = reward.encode(texts) if reward.encode else {}
        return self._over(lambda part: (self.session.apart or partial(self._score, params))(*part), (images, condition))

    def numbers(self, m: dict[str, Any]) -> dict[str, Any]:
        """One model's entry of summary.json."""
        attributes = {name: m["attributes"][..., i] for i, name in enumerate(self.judge.attributes)}
        whole = m["images"].shape[1] > 1
        return measurement(right=m["right"], attributes=attributes, proxy=m["proxy"],
                           images=m["images"] if whole else None, features=m["features"] if whole else None,
                           nuisances=m["nuisances"] if whole and m["nuisances"] else None, nuisance_classes=self.judge.nuisances,
                           real_nuisances=self.judge.real.get("nuisances"),
                           columns={name: m["scores"][..., i] for i, name in enumerate(self.columns)})  # fmt: skip

    def kl(self, params: Tree, num_prompts: int, samples: int, lam: Any = None, first: int = 0) -> Interval:
        """Path KL to the base along samples of the stochastic sampler, in nats."""
        return mean_interval(self._mapped(self._kl, params, lam, num_prompts, samples, first))

    def quick(self, state: TrainState, base: bool = False) -> dict[str, float]:
        """The gold panel while training: few samples, always of the same noise, of prompts that the report does not use."""
        first, p, g = int(self.settings.num_prompts), int(self.settings.quick_prompts), 4
        params = self.session.run.params if base else self.tuned(state)
        m = self.measure(params, p, g, first=first)
        numbers = self.numbers(m)
        out = {**flatten("gold/all", numbers["gold"]), **flatten("proxy", numbers["proxy"]),
               **flatten("diversity/pixel_right", numbers["diversity"]["pixel_right"])}  # fmt: skip
        out["kl/path"] = 0.0 if base else self.kl(params, p, 1, first=first)["mean"]
        return {k: float(v) for k, v in out.items()}

    # -- the report ----------------------------------------------------------------------------------------------

    def report(self, workdir: Path, state: TrainState, history: list[dict[str, Any]], clock: dict[str, float],
               note: str = "") -> dict[str, Any]:  # fmt: skip
        """Judges base, tuned model and best-of-n on fresh samples; writes summary.json and report.html."""
        began = time.time()
        e, run = self.settings, self.session.run
        p, g = int(e.num_prompts), int(e.samples)
        params = self.tuned(state)
        base = self.measure(run.params, p, g, label="samples of the base", program=self._guided)
        aligned = self.measure(params, p, g, label="samples of the tuned model")
        best = np.argmax(np.nan_to_num(base["proxy"], nan=-np.inf), axis=1)
        chosen = jax.tree.map(lambda v: v[np.arange(p), best][:, None], {k: v for k, v in base.items() if k != "seconds"})
        models = {"base": self.numbers(base), "aligned": self.numbers(aligned), "best_of_n": self.numbers(chosen)}
        blend = []
        pb, gb = min(int(e.get("blend_prompts", 64)), p), 4
        for lam in e.get("blend", ()):
            m = self.measure(params, pb, gb, lam=jnp.float32(lam), label=f"blend {lam:g}")
            numbers = self.numbers(m)
            blend.append({"lambda": float(lam), "kl": self.kl(params, pb, 1, lam=jnp.float32(lam))["mean"],
                          "gold": numbers["gold"], "proxy": numbers["proxy"],
                          "diversity": numbers["diversity"]["pixel_right"]})  # fmt: skip
        kl = self.kl(params, pb, 2)["mean"]
        alarm = _alarm([models["base"], models["aligned"]], history, int(state.step) // int(self.config.batch.get("updates", 1)))
        curve = []
        for n in [k for k in (1, 2, 4, 8, 16) if k <= g]:
            pick = np.argmax(np.nan_to_num(base["proxy"][:, :n], nan=-np.inf), axis=1)
            curve.append({"n": n, "kl": best_of_n_kl(n), "gold": gold(base["right"][np.arange(p), pick]),
                          "proxy": mean_interval(base["proxy"][np.arange(p), pick])})  # fmt: skip
        wall = {"train": clock["train"], "evaluate": time.time() - began, "total": time.time() - clock["since"]}
        trained = sum(x.size for x in jax.tree.leaves(state.trained))
        whole = summary(config=self.config.get("name", self.config.method.name), method=self.config.method.name,
                        seed=int(self.config.seed), wall_seconds=wall, trained_parameters=trained, **models, kl=kl,
                        alarm=alarm)  # fmt: skip
        if jax.process_index() > 0:
            return whole
        save_json(workdir / "summary.json", whole)
        scales = (run.parts.guidance.scale, self.base_guidance)
        low, high = run.parts.guidance.interval or (-np.inf, np.inf)
        twice = int(sum(low <= t <= high for t in run.sampler.grid.t[:-1]))
        calls = {scale: run.sampler.num_steps + (0 if scale == 1 else twice) for scale in scales}
        costs = {"base": {"network_calls": calls[scales[1]], "reward_calls": 0, "seconds": base["seconds"]},
                 "aligned": {"network_calls": calls[scales[0]], "reward_calls": 0, "seconds": aligned["seconds"]},
                 "best_of_n": {"network_calls": calls[scales[1]] * g, "reward_calls": g, "seconds": base["seconds"] * g}}  # fmt: skip
        # a score has no right and wrong: above the base's mean stands for it in the frames of pictures
        bar = base["right"].mean()
        framed = {name: m["right"] if counted(m["right"]) is not None else m["right"] > bar
                  for name, m in (("base", base), ("aligned", aligned), ("best_of_n", chosen))}  # fmt: skip
        before, after = ((m["images"][:16, 0], framed[n][:16, 0]) for n, m in (("base", base), ("aligned", aligned)))
        (workdir / "before_after.png").write_bytes(figures.grid(before[0], after[0], before[1], after[1], self.prompts[:16]))
        write_report(
            workdir, summary=whole, history=history, prompts=self.prompts[:p],
            images={"base": base["images"], "aligned": aligned["images"], "best_of_n": chosen["images"]},
            right=framed,
            blend=blend, best_of_n=curve, selected_from=g,
            gain=paired_bootstrap(aligned["right"].mean(1), base["right"].mean(1)),
            diversity_ratio=pixel_diversity_ratio(aligned["images"], counted(aligned["right"]), base["images"],
                                                  counted(base["right"])),
            real=self.judge.real.get("diversity"), costs=costs, trained=self._trained(trained),
            config_text=(workdir / "config.json").read_text(),
            commands=self._commands(workdir), rate=counted(base["right"]) is not None,
            notes=[f"The base is sampled at guidance {self.base_guidance:g}, the tuned model at {run.parts.guidance.scale:g}.",
                   *([note] if note else [])],
        )  # fmt: skip
        return whole

    def _trained(self, trained: int) -> dict[str, str]:
        total = sum(x.size for x in jax.tree.leaves(self.session.run.params))
        reward = self.session.run.parts.reward
        return {"model": f"{self.config.model}, {total:,} parameters", "share": f"{trained / total:.1%} of them trained"
                + (f", LoRA of rank {self.config.lora.rank}" if self.config.get("lora") else ""),
                "reward": reward.name if reward else "none",
                "kept in the judged model": f"{self.settings.get('scale', 1.0):g} of the change"}  # fmt: skip

    def _commands(self, workdir: Path) -> dict[str, str]:
        place = workdir.relative_to(Path.cwd()) if workdir.is_relative_to(Path.cwd()) else workdir
        prompt = self.prompts[0]
        return {
            "sample": f'python -m alignment_jax sample --model {self.config.model} --run {place} --prompts "{prompt}" --out samples',
            "resume": f"python -m alignment_jax train --config={self.config.get('file', 'THE_CONFIG.py')} --workdir={place}",
            "export": f"python -m alignment_jax export --run {place} --out {Path(self.config.model).name}_aligned.safetensors",
        }


def _alarm(points: list[dict[str, Any]], history: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """The alarm on the report's prompts, or else on those watched up to `step`: means of different prompts do not compare.

    Each is at half the level, so that noise alone fires one of the two in at most 5 % of the runs.
    """
    alarm = partial(over_optimisation.alarm, level=0.975)
    judged = alarm([m["proxy"] for m in points], [m["gold"] for m in points], [m["diversity"]["pixel_right"] for m in points])
    watched = [row for row in history if row["step"] <= step and row.get("proxy") is not None and row.get("gold/all") is not None]
    if judged["fired"] or len(watched) < 2 or watched[0]["step"] > 0:
        return judged
    while_training = alarm(unflatten(watched, "proxy"), unflatten(watched, "gold/all"))
    if not while_training["fired"]:
        return judged
    return {"fired": True, "reason": f"On the prompts watched while training: {while_training['reason']}"}
