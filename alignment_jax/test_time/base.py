"""What a test-time method is: one pure function from noise and a condition to a sample, and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..diffusion import Denoise, Sampler, expand, fold_in, gaussian_noise, initial, recomputed, sample, transition

Array = jax.Array
Tree = Any
Noise = Callable[..., Array]
Networks = Mapping[str, Callable[..., Any]]
Info = dict[str, Array]


class Needs(NamedTuple):
    """What a method must be given.

    reward: None; "value": scores alone; "gradient": a reward on the device that can be differentiated.
    noise: the sampler must put noise back (eta > 0, or a flow's SDE). still: it must not.
    attention: the network's cross-attention maps, and data["subjects"] [B, L], the tokens that a prompt is about.
    guidance: classifier-free guidance above 1, because the method acts through it.
    """

    reward: str | None = None
    noise: bool = False
    still: bool = False
    attention: bool = False
    guidance: bool = False


class Method(NamedTuple):
    """A way of sampling. One call draws one sample for each key; no sample depends on the others of its batch.

    draw: draw(keys [B], networks, data) -> (x0 [B, ...], info {name: [B]}).
    networks: "policy"(x, t, cond), guided as the sampler says; "unguided"; "guide"(scale, null=None) -> a denoiser with other
      guidance or another negative condition (leading axis 1 or B); "reward"(keys, x0, condition) -> [B]: the score of the
      decoded sample; "augmented": the same under the reward's random augmentation, for gradients to go through;
      "attention"(x, t, cond) -> maps [B, h, w, L], where needed.
    data: "cond" and "condition", trees with leading axis B; "null", the empty or negative prompt's condition, leading axis 1;
      "subjects" [B, L], where needed.
    With one particle, no strength or no iterations a method draws exactly what `diffusion.draw` does.
    """

    needs: Needs
    draw: Callable[[Array, Networks, Tree], tuple[Array, Info]]


def spread(keys: Array, n: int) -> Array:
    """n keys for each of keys [B], the first of them the key itself: [B n]."""
    more = jax.vmap(fold_in, (None, 0), 1)(keys, (1 << 24) + jnp.arange(1, n))
    return jnp.concatenate([keys[:, None], more], 1).reshape(-1)


def repeat(tree: Tree, n: int) -> Tree:
    """A tree with leading axis B as one with B n, each entry n times in a row."""
    return jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), tree)


def grouped(x: Array, n: int) -> Array:
    """[B n, ...] as [B, n, ...]."""
    return x.reshape(-1, n, *x.shape[1:])


def take(tree: Tree, index: Array) -> Tree:
    """Of every array [B, n, ...] the entries index [B] or [B, m]."""
    return jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, index), tree)


def fan(x: Array, n: int, children: int) -> Array:
    """[B n, ...] as [B n children, ...]: the first child of each of a sample's n, in their order, then the second of each."""
    return jnp.concatenate([grouped(x, n)] * children, axis=1).reshape(-1, *x.shape[1:])


def known(scores: Array) -> Array:
    """Scores with what is not a number counted as worst, -inf."""
    return jnp.where(jnp.isnan(scores), -jnp.inf, scores)


def pick(samples: Array, scores: Array) -> tuple[Array, Array]:
    """The best of samples [B, n, ...] by scores [B, n], NaN counted as worst: ([B, ...], [B])."""
    best = jnp.argmax(known(scores), axis=1)
    return take(samples, best), take(scores, best)


def top(scores: Array, m: int) -> Array:
    """The places [B, m], ascending, of the m best of scores [B, n]: NaN counts as worst, and ties go to the lower place."""
    return jnp.sort(jnp.argsort(-known(scores), axis=1, stable=True)[:, :m], axis=1)


def start(keys: Array, sampler: Sampler, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """(x_T [B, *shape], the keys of the chain's steps [B]), as `diffusion.draw` has them."""
    return initial(fold_in(keys, 0), sampler, (len(keys), *shape)), fold_in(keys, 1)


def clean(sampler: Sampler, i: Array | int, denoise: Denoise, x: Array, cond: Tree) -> tuple[Array, Array]:
    """(x0 [B, ...], output [B, ...]): the clean prediction from the states x [B, ...] of step i, and the network's output."""
    output = denoise(x, jnp.broadcast_to(jnp.asarray(sampler.grid.t)[i], x.shape[:1]), cond)
    return transition(sampler, i, x, output, previous=jnp.zeros_like(x)).x0, output


def ascent(value: Callable[[Tree], tuple[Array, Any]], x: Tree) -> tuple[Array, Tree, Any]:
    """(value [B], gradient [B, ...], more) of value(x) -> ([B], more), x [B, ...] or a tree; a gradient that is not finite is 0."""

    def total(x: Tree) -> tuple[Array, tuple[Array, Any]]:
        values, more = value(x)
        return jnp.where(jnp.isfinite(values), values, 0.0).sum(), (values, more)

    gradient, (values, more) = jax.grad(total, has_aux=True)(x)
    return values, jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), gradient), more


def walk(keys: Array, denoise: Denoise, cond: Tree, sampler: Sampler, x_T: Array, *, noise: Noise = gaussian_noise,
         remat: bool | None = None) -> Array:  # fmt: skip
    """The end [B, ...] of the chain from x_T, to be differentiated: as `diffusion.sample`, with memory that hardly grows by a step.

    remat: of network calls, see `recomputed`.
    """
    call = lambda x, t, _: denoise(x, t, cond)  # noqa: E731 (a cond in the carry would be kept once a step)
    return sample(keys, recomputed(call, remat), None, sampler, x_T, noise=noise)[0]


def climb(value: Callable[[Array | int, Tree], tuple[Array, tuple[Array, Info]]], z: Tree, optimizer: optax.GradientTransformation,
          iterations: int) -> tuple[Array, Info]:  # fmt: skip
    """The best by reward of a gradient ascent's iterations + 1 points, z the first: (x0 [B, ...], info of that point).

    value(i, z) -> (what to raise [B], (x0 [B, ...], info with "reward" [B])), z a tree of [B, ...]. The optimiser is each
    sample's own, its norms and clips too. A reward that is not a number is never the best. info also holds "gain", the
    reward's over the first point's, and "iteration", which point it is. One scan: compile time does not grow with iterations.
    """

    def better(best: Tree, i: Array | int, now: Tree) -> Tree:
        x0, info, first = best
        first = jnp.where(i == 0, now[1]["reward"], first)
        won = (i == 0) | (known(now[1]["reward"]) > known(info["reward"]))
        now = (now[0], {**now[1], "iteration": jnp.full(first.shape, i, jnp.float32)})
        x0, info = jax.tree.map(lambda new, old: jnp.where(expand(won, new), new, old), now, (x0, info))
        return x0, info, first

    def step(carry: Tree, i: Array) -> tuple[Tree, None]:
        z, state, best = carry
        _, gradient, now = ascent(partial(value, i), z)
        change, state = jax.vmap(optimizer.update)(jax.tree.map(jnp.negative, gradient), state, z)
        return (optax.apply_updates(z, change), state, better(best, i, now)), None

    _, (x0, info) = jax.eval_shape(lambda z: value(0, z), z)
    best = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (x0, {**info, "iteration": info["reward"]}, info["reward"]))
    if iterations:
        (z, _, best), _ = jax.lax.scan(step, (z, jax.vmap(optimizer.init)(z), best), jnp.arange(iterations))
    x0, info, first = better(best, iterations, value(iterations, z)[1])
    return x0, {**info, "gain": info["reward"] - first}
