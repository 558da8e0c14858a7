"""Reward guidance: at every step the gradient of r(x0_hat(x_t)) pushes the chain; one block, and four papers' ways to push."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..diffusion import Sampler, draw, expand, fold_in, gaussian_noise, predict, renoise, target, transition
from .base import Info, Method, Needs, Networks, Tree, ascent, clean, grouped, repeat, spread, start

Array = jax.Array
Pair = tuple[float, float]


class Look(NamedTuple):
    """What is known at a state x [B, ...] = alpha x0 + sigma eps: the prediction x0 [B, ...], its reward [B], the gradient
    [B, ...] of that by x, rise(x0) -> [B, ...] (the gradient by x0), strength() [B, 1, ...] of classifier-free guidance."""

    alpha: Array
    sigma: Array
    x0: Array
    reward: Array
    gradient: Array
    rise: Callable[[Array], Array]
    strength: Callable[[], Array]


Push = Callable[[Look], tuple[Array | float, Array | float]]


def reward_guidance(sampler: Sampler, shape: tuple[int, ...], push: Push, *, on: bool, window: Pair, repeats: int, travel: Pair,
                    through_network: bool, views: int, guidance: float | None = None) -> Method:  # fmt: skip
    """The block: push(Look) -> (what is added to the clean prediction, what is added to the next state), [B, ...] or 0.

    window: the share of the steps, counted from noise, in which it pushes; outside it is the plain chain. repeats: how often
    the steps in `travel` are taken, the state put back to their noise in between (time travel, arXiv 2303.09833):
    x_i = a x_{i+1} + sqrt(sigma_i^2 - a^2 sigma_{i+1}^2) z, a = alpha_i / alpha_{i+1}. through_network: the gradient goes through
    the network; False: no backward of it, and d x0_hat / d x_t = alpha / (alpha^2 + sigma^2), that of data of unit variance.
    views: how many of the reward's random augmentations the gradient is a mean of. on: False for no strength at all.
    guidance: the scale of classifier-free guidance, for a push that asks for its strength.
    """
    for name, (low, high) in {"window": window, "travel": travel}.items():
        if not 0 <= low < high <= 1:
            raise ValueError(f"{name} is two shares of the steps, 0 <= low < high <= 1, 0 at noise; got {low:g}, {high:g}")
    if repeats < 1 or views < 1:
        raise ValueError(f"repeats and views must be at least 1; got repeats={repeats}, views={views}")
    if repeats > 1 and sampler.solver == "dpmsolver++":
        raise ValueError(f"solver 'dpmsolver++' looks back to steps that time travel undoes; take each step once instead of {repeats} "
                         "times, or choose scheduler ddim, ddpm or euler")  # fmt: skip
    steps, (times, alphas, sigmas) = sampler.num_steps, (jnp.asarray(v) for v in sampler.grid)
    pushed = [window[0] <= i / steps < window[1] for i in range(steps)]
    often = [repeats if pushed[i] and travel[0] <= i / steps < travel[1] else 1 for i in range(steps)]
    walk = np.array([(i, j, j + 1 < often[i]) for i in range(steps) for j in range(often[i])])
    place = walk[:, 0] / steps
    parts = ((False, place < window[0]), (True, (window[0] <= place) & (place < window[1])), (False, place >= window[1]))

    def draw_(keys: Array, networks: Networks, data: Tree) -> tuple[Array, Info]:
        cond, condition = data["cond"], repeat(data["condition"], views)
        x_T, step_keys = start(keys, sampler, shape)

        def looked(i: Array, number: Array, x: Array) -> tuple[Look, Array]:
            look_keys = spread(fold_in(fold_in(keys, 2), number), views)

            def reward(x0: Array) -> Array:
                return grouped(networks["augmented"](look_keys, repeat(x0, views), condition), views).mean(1)

            def predicted(x: Array) -> tuple[Array, tuple[Array, Array]]:
                x0, output = clean(sampler, i, networks["policy"], x, cond)
                return reward(x0), (x0, output)

            rise = partial(ascent, lambda x0: (reward(x0), ()))
            if through_network:
                rewards, gradient, (x0, output) = ascent(predicted, x)
            else:
                x0, output = clean(sampler, i, networks["policy"], x, cond)
                rewards, gradient, _ = rise(x0)
                gradient = alphas[i] / (alphas[i] ** 2 + sigmas[i] ** 2) * gradient

            def strength() -> Array:
                assert guidance is not None
                alone = networks["unguided"](x, jnp.broadcast_to(times[i], x.shape[:1]), cond)
                eps = [predict(sampler.prediction, o, x, alphas[i], sigmas[i])[1] for o in (output, alone)]
                return guidance / (guidance - 1) * rms(eps[0] - eps[1])

            return Look(alphas[i], sigmas[i], x0, rewards, gradient, lambda x0: rise(x0)[1], strength), output

        def step(pushes: bool, carry: tuple[Array, Array], entry: Array) -> tuple[tuple[Array, Array], None]:
            (x, previous), (i, j, again) = carry, entry
            number = 2 * (i + steps * j)
            shift: Array | float = 0.0
            if pushes:
                look, output = looked(i, number, x)
                delta, shift = push(look)
                change = jnp.broadcast_to(delta, x.shape)
                output = output + target(sampler.prediction, change, -look.alpha / look.sigma * change, look.alpha, look.sigma)
            else:
                output = networks["policy"](x, jnp.broadcast_to(times[i], x.shape[:1]), cond)
            moved = transition(sampler, i, x, output, previous=previous)
            x = (moved.mean if sampler.deterministic else gaussian_noise(fold_in(step_keys, number), i, moved)) + shift
            noise_key = fold_in(step_keys, number + 1)
            x = jax.lax.cond(again == 1, lambda: renoise(noise_key, sampler, x, i + 1, i), lambda: x)
            return (x, moved.x0), None

        if on and any(pushed):
            carry = (x_T, x_T)
            for pushes, part in parts:
                carry = jax.lax.scan(partial(step, pushes), carry, walk[part])[0] if part.any() else carry
            x0 = carry[0]
        else:
            x0, _ = draw(keys, networks["policy"], cond, sampler, shape)
        return x0, {"reward": networks["reward"](keys, x0, data["condition"])}

    return Method(Needs("gradient", guidance=guidance is not None), draw_)


def rms(x: Array) -> Array:
    """Root mean square of each sample [B, 1, ...]; the official FreeDoM takes one number for the batch."""
    return jnp.sqrt(jnp.mean(jnp.square(x), tuple(range(1, x.ndim)), keepdims=True))


def tilt(look: Look) -> Array:
    """What sigma^2 gradient on the score does to the clean prediction: sigma^2 / alpha gradient, 0 where all is noise."""
    return jnp.where(look.alpha > 1e-3, look.sigma**2 / look.alpha, 0.0) * look.gradient


def positive(name: str, value: float) -> None:
    """Raises ValueError for a value that is not above 0."""
    if not value > 0:
        raise ValueError(f"{name} must be above 0; got {value:g}")


def classifier_guidance(sampler: Sampler, shape: tuple[int, ...], *, alpha: float = 1.0, window: Pair = (0.0, 1.0), repeats: int = 1,
                        through_network: bool = True, views: int = 1) -> Method:  # fmt: skip
    """eps' = eps - sigma grad_x r(x0_hat) / alpha: classifier guidance (arXiv 2105.05233) with r as the log-likelihood.

    alpha: the temperature in reward units, target p(x0) exp(r / alpha); infinite: off. Exact for a linear reward of Gaussian
    data; a concave one is over-guided, a quadratic one by (alpha + V_t) / alpha, V_t the variance of x0 given x_t. Departure:
    the reward sees x0_hat, where the paper's classifier is trained on noisy states. Near noise sigma^2 / alpha_t enlarges what a
    real network's gradient gets wrong: with a small alpha begin later (window) or set through_network=False.
    """
    positive("alpha", alpha)
    return reward_guidance(sampler, shape, lambda look: (tilt(look) / alpha, 0.0), on=alpha < math.inf, window=window,
                           repeats=repeats, travel=window, through_network=through_network, views=views)  # fmt: skip


def dps(sampler: Sampler, shape: tuple[int, ...], *, zeta: float = 1.0, ceiling: float = 0.0, window: Pair = (0.0, 1.0),
        repeats: int = 1, through_network: bool = True, views: int = 1) -> Method:  # fmt: skip
    """x_{t-1} += zeta grad_x r / |residual|: diffusion posterior sampling (arXiv 2209.14687), r = ceiling - |residual|^2.

    ceiling: what the reward is at most, 0 for a log-probability; samples that are there are left alone. zeta: 0.3 to 1 in the
    paper; 0: off.
    """
    if zeta < 0:
        raise ValueError(f"zeta must be at least 0; got {zeta:g}")

    def push(look: Look) -> tuple[float, Array]:
        residual = expand(jnp.sqrt(jnp.maximum(ceiling - look.reward, 0.0)), look.x0)
        return 0.0, jnp.where(residual > 0, zeta * look.gradient / residual, 0.0)

    return reward_guidance(sampler, shape, push, on=zeta > 0, window=window, repeats=repeats, travel=window,
                           through_network=through_network, views=views)  # fmt: skip


def universal_guidance(sampler: Sampler, shape: tuple[int, ...], *, alpha: float = 0.2, backward: int = 0, rate: float = 0.1,
                       recurrences: int = 5, window: Pair = (0.0, 1.0), through_network: bool = True,
                       views: int = 1) -> Method:  # fmt: skip
    """Universal guidance (arXiv 2302.07121): forward as in `classifier_guidance`, then backward, each step taken k times.

    Backward: `backward` steps of ascent from x0_hat, Delta += rate grad r(x0_hat + Delta), and eps' = eps - alpha_t / sigma_t Delta.
    alpha: the temperature in reward units, one over the paper's weight, 2 to 5 for CLIP with k = 5 to 10; infinite with no
    backward: off. recurrences: its k. Departure: the state that the last recurrence would put back to noise is not.
    """
    positive("alpha", alpha)
    positive("rate", rate)
    if backward < 0:
        raise ValueError(f"backward, the number of ascent steps, must be at least 0; got {backward}")

    def push(look: Look) -> tuple[Array, float]:
        climb = lambda delta, _: (delta + rate * look.rise(look.x0 + delta), None)  # noqa: E731
        delta, _ = jax.lax.scan(climb, jnp.zeros_like(look.x0), None, backward)
        return delta + tilt(look) / alpha, 0.0

    return reward_guidance(sampler, shape, push, on=alpha < math.inf or backward > 0, window=window, repeats=recurrences, travel=window,
                           through_network=through_network and alpha < math.inf, views=views)  # fmt: skip


def freedom(sampler: Sampler, shape: tuple[int, ...], *, guidance: float, share: float = 0.2, repeats: int = 3,
            window: Pair = (0.3, 0.7), travel: Pair = (0.3, 0.6), through_network: bool = True, views: int = 1) -> Method:  # fmt: skip
    """FreeDoM (arXiv 2303.09833): x_{t-1} += share w rms(eps_cond - eps_null) g / rms(g), g = grad_x r(x0_hat), with time travel.

    w: the scale of classifier-free guidance, which must be above 1; rms over each sample. share, window, travel and repeats are
    those of its code for Stable Diffusion, 100 steps with eta = 1; share 0: off.
    """
    if share < 0:
        raise ValueError(f"share must be at least 0; got {share:g}")

    def push(look: Look) -> tuple[float, Array]:
        return 0.0, share * look.strength() * look.gradient / jnp.maximum(rms(look.gradient), 1e-20)

    return reward_guidance(sampler, shape, push, on=share > 0, window=window, repeats=repeats, travel=travel,
                           through_network=through_network, views=views, guidance=guidance)  # fmt: skip
