"""From noise to sample: the whole chain as one scan, with three hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..platform import platform, recomputes
from .guidance import Denoise
from .parameterization import predict
from .schedule import expand
from .transition import Sampler, Transition, transition

Array = jax.Array
Control = Callable[[Array, Array, Array], Array]
Noise = Callable[[Array, Array, Transition], Array]
Select = Callable[[Array, Array, Any], Any]


class Trajectory(NamedTuple):
    """The states of a walk: x [T+1, B, ...] with x[0] noise and x[T] the sample; x0 [T, B, ...] the predictions."""

    x: Array
    x0: Array


class State(NamedTuple):
    """What `select` sees and may re-index: x [B, ...], its prediction x0 [B, ...], carry (the caller's tree), cond."""

    x: Array
    x0: Array
    carry: Any
    cond: Any


def normal(key: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal [B, ...] from one key, or from keys [B], one a sample: then no sample depends on its batch."""
    if key.ndim == 0:
        return jax.random.normal(key, shape)
    return jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(key)


def initial(key: Array, sampler: Sampler, shape: tuple[int, ...]) -> Array:
    """Where a chain starts [B, ...]: unit noise times the sampler's initial_scale; key: one, or keys [B]."""
    noise = normal(key, shape)
    return noise if sampler.initial_scale == 1.0 else sampler.initial_scale * noise


def fold_in(key: Array, data: Array | int) -> Array:
    """`jax.random.fold_in` for one key or for keys [B]."""
    return jax.random.fold_in(key, data) if key.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None))(key, data)


def gaussian_noise(key: Array, i: Array, step: Transition) -> Array:
    """The default noise hook: x_prev = mean + std z."""
    del i
    return step.mean + expand(step.std, step.mean) * normal(key, step.mean.shape)


def recomputed(f: Callable[..., Any], remat: bool | None = None) -> Callable[..., Any]:
    """f, made again in the backward pass of a chain, so that a step keeps its state alone; remat None: except on CPU."""
    return jax.checkpoint(f) if recomputes() and (remat or (remat is None and platform() != "cpu")) else f


def sample(key: Array, denoise: Denoise, cond: Any, sampler: Sampler, x_T: Array, *, start: int = 0,
           stop: int | None = None, control: Control | None = None, noise: Noise = gaussian_noise,
           select: Select | None = None, carry: Any = None, keep: bool = False, noise_scale: Array | None = None
           ) -> tuple[Array, Trajectory | Any]:  # fmt: skip
    """Walks the chain from x_T [B, ...] at step `start` to step `stop` (default: the end); one `lax.scan`.

    Args:
      key: one key, or keys [B], one a sample.
      denoise: denoise(x [B, ...], t [B], cond) -> output [B, ...].
      x_T: the state at step `start`: noise, or a re-noised sample when start > 0.
      control: control(i, x, output) -> output: guidance, blends, reward gradients.
      noise: noise(key, i, transition) -> x_prev: optimised or shared noise, noise inside a window only.
      select: select(key, i, State) -> State, after every step: resampling, branching, keeping known entries. Whoever
        permutes x must permute every array of the State with it.
      noise_scale: what each step's noise [T] is multiplied by, with the mean that belongs to it; 0: a step of the ODE.
      keep: return the Trajectory; otherwise the second result is the final carry.

    Returns (x0 [B, ...], Trajectory) with keep, else (x0 [B, ...], carry).
    """
    stop = sampler.num_steps if stop is None else stop
    if not 0 <= start < stop <= sampler.num_steps:
        raise ValueError(f"steps {start}..{stop} do not lie in a chain of {sampler.num_steps} steps")
    if noise_scale is not None and sampler.solver == "lcm":
        raise ValueError("solver 'lcm' is all noise or none: it has no step without; for noise_scale choose solver 'ddim'")
    times = jnp.asarray(sampler.grid.t)
    if sampler.deterministic and noise is gaussian_noise:  # noise times a traced zero would still be drawn
        noise = lambda key, i, step: step.mean  # noqa: E731

    def step(state: State, i: Array) -> tuple[State, tuple[Array, Array] | None]:
        noise_key, select_key = fold_in(key, 2 * i), fold_in(key, 2 * i + 1)
        x = state.x
        output = denoise(x, jnp.broadcast_to(times[i], x.shape[:1]), state.cond)
        if control is not None:
            output = control(i, x, output)
        previous = state.x0
        if start and sampler.solver == "dpmsolver++":  # begun in the middle: no prediction was made before, so of first order
            own, _ = predict(sampler.prediction, output, x, jnp.asarray(sampler.grid.alpha)[i], jnp.asarray(sampler.grid.sigma)[i])
            previous = jnp.where(i == start, own, previous)
        step_ = transition(sampler, i, x, output, previous=previous, noise_scale=1.0 if noise_scale is None else noise_scale[i])
        state = State(noise(noise_key, i, step_), step_.x0, state.carry, state.cond)
        if select is not None:
            state = select(select_key, i, state)
        return state, ((x, step_.x0) if keep else None)

    x_T = jnp.asarray(x_T, jnp.float32)
    state, kept = jax.lax.scan(step, State(x_T, x_T, carry, cond), jnp.arange(start, stop))
    if kept is None:
        return state.x, state.carry
    return state.x, Trajectory(jnp.concatenate([kept[0], state.x[None]]), kept[1])


def draw(key: Array, denoise: Denoise, cond: Any, sampler: Sampler, shape: tuple[int, ...], *, keep: bool = False) -> Any:
    """Samples [B, *shape] from fresh noise, one for each key [B], as `sample` returns them."""
    x_T = initial(fold_in(key, 0), sampler, (len(key), *shape))
    return sample(fold_in(key, 1), denoise, cond, sampler, x_T, keep=keep)
