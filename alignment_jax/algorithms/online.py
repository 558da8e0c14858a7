"""Online, iterative and semi-online preference optimisation: a driver round any pair method (arXiv 2312.11456, 2402.04792, 2412.05095).

A step draws samples, makes pairs of them, and takes the pair method's own loss on these. `generator` and `reference` are rules of
Needs.copies. OAIF (arXiv 2402.04792): neither given. Iterated DPO (2312.11456), in rounds of n steps: generator=("every", n), and
with reference=("every", n) every round starts from the last one's end. Measured by the closed form on a Gaussian: a reference that
stays bounds what is gained, one that follows adds the same again each round: it is the knob of strength.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..diffusion import Sampler, draw
from .base import Algorithm, Info, Needs, Networks, Tree
from .dpo import diffusion_dpo
from .pairs import check, choose, shares

Array = jax.Array
Make = Callable[[Array, Tree, Array | None], tuple[Tree, Info]]
OLDEST = -(2**30)


def online(sampler: Sampler, shape: tuple[int, ...], *, group: int = 4, loss: Callable[[Sampler], Algorithm] = diffusion_dpo,
           pairs: str = "best_worst", drawn: bool = False, temperature: float = 1.0, sure: float = 0.6, tie: float = 0.0,
           generator: Any = None, reference: Any = "frozen", buffer: int = 0, max_age: int = 1,
           cond: Tree = None) -> Algorithm:  # fmt: skip
    """The loss of a pair method on pairs of samples of the policy: best against worst of the group, all, or two at random.

    Labels are Bradley-Terry's p = sigma((r_w - r_l) / temperature), 1 above `sure` (.5: all hard, 1: all soft), a tie 1/2 within
    `tie`; drawn: one answer of an annotator with that law. generator: None draws from the policy, ("every", n) or ("ema", d)
    from such a copy. reference: "frozen", ("every", n), ("ema", d). buffer: how many earlier pairs are learned from again, while
    they are less than max_age steps old; it holds their conditions, of which `cond` gives the shapes (one sample's tree).
    """
    check(pairs, group, temperature, sure, tie)

    def make(key: Array, rollout: Tree, rewards: Array | None) -> tuple[Tree, Info]:
        assert rewards is not None
        chosen = choose(key, rewards, group, kind=pairs, temperature=temperature, sure=sure, tie=tie, drawn=drawn)
        x0, ties = rollout["x0"], (chosen.preference == 0.5).astype(jnp.float32)
        made = {"winner": x0[chosen.winner], "loser": x0[chosen.loser], "preference": chosen.preference,
                "counts": chosen.counts, "row": chosen.winner}  # fmt: skip
        gap = rewards[chosen.winner] - rewards[chosen.loser]
        return made, {"pairs/ties": (ties * shares(chosen.counts)).mean(),
                      "pairs/gap": (jnp.where(chosen.counts > 0, gap, 0.0) * shares(chosen.counts)).mean()}  # fmt: skip

    return _driver(sampler, shape, loss, Needs("prompts", "value"), make, generator, reference, buffer, max_age, cond)


def semi_online(sampler: Sampler, shape: tuple[int, ...], *, loss: Callable[[Sampler], Algorithm] = diffusion_dpo,
                below: float | None = None, generator: Any = None, reference: Any = "frozen") -> Algorithm:  # fmt: skip
    """SoPo: the winner from the data, the loser drawn by the policy for the same prompt (arXiv 2412.05095).

    below: a loser counts only if its reward is less; None asks for no reward, and once samples are like the data nothing is learned.
    Departure: one sample a prompt, where the paper takes the worst of several.
    """

    def make(key: Array, rollout: Tree, rewards: Array | None) -> tuple[Tree, Info]:
        counts = jnp.ones(len(rollout["x0"])) if below is None or rewards is None else (rewards < below).astype(jnp.float32)
        return {"winner": rollout["winner"], "loser": rollout["x0"], "preference": jnp.ones(len(counts)), "counts": counts,
                "row": jnp.arange(len(counts))}, {}  # fmt: skip

    needs = Needs("labels", None if below is None else "value")
    return _driver(sampler, shape, loss, needs, make, generator, reference, 0, 1, None)


def _driver(sampler: Sampler, shape: tuple[int, ...], loss_: Callable[[Sampler], Algorithm], needs: Needs, make: Make, generator: Any,
            reference: Any, buffer: int, max_age: int, cond: Tree) -> Algorithm:  # fmt: skip
    """The pair method loss_(sampler) on the pairs that `make` makes of a rollout: {"winner", "loser", "preference", "counts", "row"}."""
    inner = loss_(sampler)
    plain = Algorithm._field_defaults
    if inner.needs.data != "pairs" or inner.needs.reward or inner.rollout is not plain["rollout"]:
        more = f" and a reward ({inner.needs.reward})" if inner.needs.reward else " and has a rollout of its own"
        raise ValueError("the driver's loss must be a method that learns from given pairs alone, such as diffusion_dpo or mapo; "
                         f"got one that needs {inner.needs.data}{more if inner.needs.data == 'pairs' else ''}")  # fmt: skip
    if reference != "frozen" and "reference" not in inner.needs.copies:
        raise ValueError(f"reference={reference!r}, and the driver's loss has no reference network")
    if buffer and (cond is None or max_age < 2):
        raise ValueError("a buffer of earlier pairs needs max_age of 2 steps or more and cond, the shapes of one sample's condition; "
                         f"got buffer={buffer}, max_age={max_age}, cond={cond}")  # fmt: skip
    copies = dict(inner.needs.copies) | ({"reference": reference} if "reference" in inner.needs.copies else {})
    copies |= {} if generator is None else {"generator": generator}
    for name, rule in copies.items():
        if rule != "frozen" and not (isinstance(rule, tuple | list) and len(rule) == 2 and rule[0] in ("ema", "every")):
            raise ValueError(f"{name} follows the policy by 'frozen', ('ema', decay) or ('every', n); got {rule!r}")
    source = "policy" if generator is None else "generator"
    # samples are drawn with the sampler's guidance; a loss that wants the policy without it gets "unguided" under that name
    bare = inner.needs.guidance.get("policy") == 1.0
    guidance = {k: v for k, v in inner.needs.guidance.items() if not (bare and k == "policy")}

    def seen(networks: Networks) -> Networks:
        return {**networks, "policy": networks["unguided"]} if bare else networks

    def init(key: Array) -> Tree:
        extra = {"loss": inner.init(key)}
        if not buffer:
            return extra
        empty = {"winner": jnp.zeros((buffer, *shape)), "loser": jnp.zeros((buffer, *shape)), "preference": jnp.ones(buffer),
                 "counts": jnp.zeros(buffer), "born": jnp.full(buffer, OLDEST, jnp.int32),
                 "cond": jax.tree.map(lambda c: jnp.zeros((buffer, *c.shape[1:]), c.dtype), cond)}  # fmt: skip
        return {**extra, "buffer": empty, "step": jnp.zeros((), jnp.int32)}

    def rollout(keys: Array, extra: Tree, networks: Networks, data: Tree) -> Tree:
        x0, _ = draw(keys, networks[source], data["cond"], sampler, shape)
        return {**data, "x0": x0} | ({"winner": data["x0"]} if "x0" in data else {})

    def prepare(key: Array, extra: Tree, rollout: Tree, rewards: Any) -> tuple[Tree, Tree, Info]:
        items, info = make(jax.random.fold_in(key, 0), rollout, rewards)
        info["pairs/counted"] = items["counts"].mean()
        if buffer or inner.prepare is not plain["prepare"]:
            row = items.pop("row")
            items["cond"] = jax.tree.map(lambda c: c[row], rollout["cond"])
        if buffer:
            now = extra["step"]
            fresh = {**items, "born": jnp.full(len(items["counts"]), now)}
            both = jax.tree.map(lambda new, old: jnp.concatenate([new, old]), fresh, extra["buffer"])  # the newest first
            extra = {**extra, "buffer": jax.tree.map(lambda x: x[:buffer], both), "step": now + 1}
            age = now - both.pop("born")
            items = {**both, "counts": both["counts"] * (age < max_age)}
            info["pairs/age"] = (age * shares(items["counts"])).mean()
        if inner.prepare is not plain["prepare"]:
            counts, conditions = items["counts"], items["cond"]
            items, of_loss, more = inner.prepare(jax.random.fold_in(key, 1), extra["loss"], items, None)
            extra, info = {**extra, "loss": of_loss}, {**info, **more}
            if "row" in items:  # the pair that an item belongs to
                items = {**items, "counts": counts[items["row"]], "cond": jax.tree.map(lambda c: c[items["row"]], conditions)}
                del items["row"]
        weight = shares(items.pop("counts"))
        return {**items, "of_driver": weight}, extra, info

    def anchor(keys: Array, networks: Networks, items: Tree) -> Tree:
        return inner.anchor(keys, seen(networks), items)

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        value, info = inner.loss(keys, seen(networks), items)
        weight = items["of_driver"]
        return weight * value, {k: v if k.endswith("_max") else weight * v for k, v in info.items()}

    return Algorithm(needs._replace(copies=copies, guidance=guidance, own=inner.needs.own), loss, init, rollout, prepare, anchor)
