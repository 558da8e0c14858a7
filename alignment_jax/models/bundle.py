"""A diffusion model as a bundle of pure functions: what algorithms, samplers and the loop see of any model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ..diffusion import NoiseSchedule

Array = jax.Array


class ModelBundle(NamedTuple):
    """Everything a model is.

    Args:
      name: what it is called in configs.
      init: init(key) -> params.
      denoise: denoise(params, x [B,...], t [B], cond) -> output [B,...]; cond is a tree with leading axis B, either text
        states or {"tokens"}, which are then read inside (and the text tower has a gradient).
      encode_text: encode_text(params, tokens [B,L]) -> cond.
      decode: decode(params, x0 [B,...]) -> observation, pictures [B,H,W,C] in [0, 1]; its gradient is not cut by clamps.
      encode: encode(params, observation) -> x0.
      tokenize: tokenize(prompts) -> int32 [B,L], on the host; "" is the null condition.
      schedule, prediction: see diffusion. sample_shape: the shape of one x0.
      sampling: the sampler's settings that suit the model: num_steps, spacing, t_start, eta, guidance_scale.
      attention: attention(params, x, t, cond) -> [B,h,w,L], how much each position looks at each token, mean over heads and
        layers of one resolution (see attention_maps.py); None where the model has no such maps.
    """

    name: str
    init: Callable[[Array], Any]
    denoise: Callable[[Any, Array, Array, Any], Array]
    encode_text: Callable[[Any, Array], Any]
    decode: Callable[[Any, Array], Array]
    encode: Callable[[Any, Array], Array]
    tokenize: Callable[[Sequence[str]], np.ndarray]
    schedule: NoiseSchedule
    prediction: str
    sample_shape: tuple[int, ...]
    sampling: dict[str, Any]
    attention: Callable[[Any, Array, Array, Any], Array] | None = None
