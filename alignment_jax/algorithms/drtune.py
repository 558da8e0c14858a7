"""DRTune: the reward's gradient at the end reaches early steps, because network inputs are cut off (arXiv 2405.00760).

Written as a payload: without Jacobians of the network the chain is linear in its outputs, so that the gradient at x_0
reaches step k by a known number. Departure: an optional discount, for early steps get more than their
exact share: 106 times it at the first of ten steps of the linear chain of the tests.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ..diffusion import Sampler, draw, fold_in, transition
from .base import Algorithm, Info, Needs, Networks, Tree, reward_gradient, uniform
from .losses import linear

Array = jax.Array


def responses(sampler: Sampler) -> np.ndarray:
    """d x0-hat_m / d output_k [T + 1, T] with every network input held fixed; row T: of the chain's end itself.

    x_{k-1} = a_k x_k + c_k output_k + s_k z, so row T is c_k prod_{j after k} a_j; row m < T ends in x0-hat at step m.
    """
    one, none = jnp.ones((1, 1)), jnp.zeros((1, 1))
    steps = sampler.num_steps
    by_x, by_output = ([transition(sampler, i, *inputs) for i in range(steps)] for inputs in ((one, none), (none, one)))
    a, c = (np.array([float(s.mean[0, 0]) for s in part]) for part in (by_x, by_output))
    a0, c0 = (np.array([float(s.x0[0, 0]) for s in part]) for part in (by_x, by_output))
    out = np.zeros((steps + 1, steps))
    for m in range(steps + 1):
        gain = 1.0 if m == steps else a0[m]
        if m < steps:
            out[m, m] = c0[m]
        for k in reversed(range(m)):
            out[m, k] = gain * c[k]
            gain *= a[k]
    return out.astype(np.float32)


def drtune(sampler: Sampler, shape: tuple[int, ...], *, k: int = 5, early_stop: float = 0.0, discount: float = 1.0) -> Algorithm:
    """Ascend r(x_0) with gradient in K equally spaced steps, at a random offset, of a chain whose network inputs are sg(x_k).

    L = -sum_k discount^(T - 1 - k) <w_k sg(grad r), output_k(sg x_k)>, w = `responses`. early_stop: for that share of the
    chain's end a random step m is drawn a sample, and r is taken at the clean prediction there (the paper: .4); 0: at x_0.
    K = 1 at the last step is DRaFT-1; a network that ignores its input gives DRaFT-T. Raises ValueError for a K outside
    1..T and for second-order solvers.
    """
    steps = sampler.num_steps
    if not 1 <= k <= steps:
        raise ValueError(f"k is the number of trained steps, 1 to {steps}; got {k}")
    if not 0 <= early_stop <= 1 or not 0 < discount <= 1:
        raise ValueError(f"early_stop is a share in [0, 1] and discount in (0, 1]; got {early_stop} and {discount}")
    weights = jnp.asarray(responses(sampler)) * discount ** jnp.arange(steps - 1, -1, -1)
    first, stride = steps - int(np.ceil(early_stop * steps)), steps // k

    def rollout(keys: Array, extra: Tree, networks: Networks, data: Tree) -> Tree:
        x0, path = draw(keys, networks["policy"], data["cond"], sampler, shape, keep=True)
        m = first + jnp.floor(uniform(fold_in(keys, 2)) * (steps - first + 1)).astype(jnp.int32)  # steps: no early stop
        clean = jnp.concatenate([path.x0, x0[None]])
        end = jax.vmap(lambda ends, j: ends[j], (1, 0))(clean, m)

        reward, gradient = reward_gradient(networks, fold_in(keys, 3), end, data["condition"])
        offset = jnp.floor(uniform(fold_in(keys, 4)) * stride).astype(jnp.int32)
        i = steps - 1 - (offset[:, None] + stride * jnp.arange(k))
        x = jax.vmap(lambda states, j: states[j], (1, 0))(path.x, i)
        return {"cond": data["cond"], "x": x, "i": i, "weight": weights[m[:, None], i], "gradient": gradient, "reward": reward}

    def prepare(key: Array, extra: Tree, rollout: Tree, rewards: Array | None) -> tuple[Tree, Tree, Info]:
        row = jnp.repeat(jnp.arange(len(rollout["reward"])), k)
        flat = {name: rollout[name].reshape(-1, *rollout[name].shape[2:]) for name in ("x", "i", "weight")}
        return {**flat, "row": row, "gradient": rollout["gradient"][row], "reward": rollout["reward"][row]}, extra, {}

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        output = networks["policy"](items["x"], jnp.asarray(sampler.grid.t)[items["i"]], items["cond"])
        # k times: the loop takes a mean over the (sample, step) items, the objective a sum over steps
        return -k * items["weight"] * linear(output, items["gradient"]), {"reward": items["reward"]}

    return Algorithm(Needs("prompts", "gradient"), loss, rollout=rollout, prepare=prepare)
