"""What an algorithm is: five pure functions over denoisers, and what it needs from the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Tree = Any
Networks = Mapping[str, Callable[..., Array]]
Info = dict[str, Array]


class Own(NamedTuple):
    """A network of the algorithm's own, trained beside the policy: a critic, a surrogate of the reward.

    init: init(key, cond) -> params, with cond of one sample. apply: apply(params, ...), found as networks[name](...).
    learning_rate: of its Adam.
    """

    init: Callable[[Array, Tree], Tree]
    apply: Callable[..., Array]
    learning_rate: float = 1e-4


class Needs(NamedTuple):
    """What the loop must provide.

    data: "prompts" {"cond", "prompt_id", "condition"}, "labels" (also "x0"), "desirable" (also "x0" and "desirable"
      [B], the probability that it is good), "pairs" (also "winner" and "loser"; "preference" and "weight" [B]), "lists" (also
      "list" [B, K, ...] and "score" [B, K] or [B, K, M]).
    reward: None; "value": scores [B] of the rollout; "gradient": networks["reward"](keys, x0, condition) -> [B], to be
      differentiated; "step": networks["reward"](x, x0, t, cond, condition) -> [B], the value of a state inside the rollout,
      for rewards on the device; "state": the same for rewards that score the state x itself (`noisy`), no clean prediction.
    copies: other networks by name and how each follows the policy: "frozen", ("ema", decay), ("every", steps).
      Always there: "policy", with the sampler's guidance, and "unguided", the policy without it.
    guidance: guidance scales by network name where they are not the sampler's.
    own: networks of the algorithm's own by name. columns: names of a reward's columns that the method reads itself.
    """

    data: str = "prompts"
    reward: str | None = None
    copies: Mapping[str, Any] = {}
    guidance: Mapping[str, float] = {}
    own: Mapping[str, Own] = {}
    columns: tuple[str, ...] = ()


class Algorithm(NamedTuple):
    """A method. Every leading axis is B samples, or N items; keys [B] are one a sample, so batches can be cut freely.

    init: init(key) -> extra: what the method remembers between steps, one tree.
    rollout: rollout(keys [B], extra, networks, data) -> rollout, a dict with at least "cond", and "x0" [B,...] where rewards
      are wanted.
    prepare: prepare(key, extra, rollout, rewards [B] or None) -> (items, extra, info): light, global, no network; items
      is a dict of arrays [N, ...]. With "row" [N], the sample of the rollout that an item belongs to, anchor and loss find
      that sample's items["cond"], which is never stored once an item.
    anchor: anchor(keys [N], networks, items) -> items with what is fixed at the starting parameters.
    loss: loss(keys [N], networks, items) -> (losses [N], info of [N]); the loop takes their mean over all items.
      anchor and loss get the same keys; items["first"] [N] is true while the parameters are still the anchor's.
      Entries of info whose name ends in "_max" are reduced by maximum.
    """

    needs: Needs
    loss: Callable[[Array, Networks, Tree], tuple[Array, Info]]
    init: Callable[[Array], Tree] = lambda key: {}
    rollout: Callable[[Array, Tree, Networks, Tree], Tree] = lambda keys, extra, networks, data: data
    prepare: Callable[[Array, Tree, Tree, Any], tuple[Tree, Tree, Info]] = (
        lambda key, extra, rollout, rewards: (rollout, extra, {})
    )
    anchor: Callable[[Array, Networks, Tree], Tree] = lambda keys, networks, items: items


def reward_gradient(networks: Networks, keys: Array, x: Array, condition: Tree) -> tuple[Array, Array]:
    """The reward [B] of x [B, ...] and its gradient [B, ...]."""

    def total(x: Array) -> tuple[Array, Array]:
        reward = networks["reward"](keys, x, condition)
        return reward.sum(), reward

    gradient, reward = jax.grad(total, has_aux=True)(x)
    return reward, gradient


def uniform(keys: Array) -> Array:
    """One uniform number in [0, 1) for each key: [B]."""
    return jax.vmap(lambda k: jax.random.uniform(k))(keys)


def mean_square(x: Array) -> Array:
    """Mean of squares over all but the first axis, float32: [B]."""
    return jnp.square(x.astype(jnp.float32)).mean(tuple(range(1, x.ndim)))
