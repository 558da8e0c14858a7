"""What a test-time method is: one pure function from noise and a condition to a sample, and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..diffusion import Denoise, Sampler, fold_in, initial, transition

Array = jax.Array
Tree = Any
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
    more = [fold_in(keys, (1 << 24) + j) for j in range(1, n)]
    return jnp.stack([keys, *more], 1).reshape(-1)


def repeat(tree: Tree, n: int) -> Tree:
    """A tree with leading axis B as one with B n, each entry n times in a row."""
    return jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), tree)


def grouped(x: Array, n: int) -> Array:
    """[B n, ...] as [B, n, ...]."""
    return x.reshape(-1, n, *x.shape[1:])


def take(tree: Tree, index: Array) -> Tree:
    """Of every array [B, n, ...] the entries index [B] or [B, m]."""
    return jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, index), tree)


def known(scores: Array) -> Array:
    """Scores with what is not a number counted as worst, -inf."""
    return jnp.where(jnp.isnan(scores), -jnp.inf, scores)


def pick(samples: Array, scores: Array) -> tuple[Array, Array]:
    """The best of samples [B, n, ...] by scores [B, n], NaN counted as worst: ([B, ...], [B])."""
    best = jnp.argmax(known(scores), axis=1)
    return take(samples, best), take(scores, best)


def start(keys: Array, sampler: Sampler, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """(x_T [B, *shape], the keys of the chain's steps [B]), as `diffusion.draw` has them."""
    return initial(fold_in(keys, 0), sampler, (len(keys), *shape)), fold_in(keys, 1)


def clean(sampler: Sampler, i: Array | int, denoise: Denoise, x: Array, cond: Tree) -> tuple[Array, Array]:
    """(x0 [B, ...], output [B, ...]): the clean prediction from the states x [B, ...] of step i, and the network's output."""
    output = denoise(x, jnp.broadcast_to(jnp.asarray(sampler.grid.t)[i], x.shape[:1]), cond)
    return transition(sampler, i, x, output, previous=jnp.zeros_like(x)).x0, output


def ascent(value: Callable[[Array], tuple[Array, Any]], x: Array) -> tuple[Array, Array, Any]:
    """(value [B], gradient [B, ...], more) of value(x [B, ...]) -> ([B], more); a gradient that is not finite counts as 0."""

    def total(x: Array) -> tuple[Array, tuple[Array, Any]]:
        values, more = value(x)
        return jnp.where(jnp.isfinite(values), values, 0.0).sum(), (values, more)

    gradient, (values, more) = jax.grad(total, has_aux=True)(x)
    return values, jnp.where(jnp.isfinite(gradient), gradient, 0.0), more


def unrolled() -> bool:
    """Whether a loop with a convolution's backward in it is to be unrolled: on CPU, where scanned it is tens of times slower."""
    return jax.default_backend() == "cpu"
