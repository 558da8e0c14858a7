"""A reward of a user's own, named in configs as own_reward:brightness."""

import numpy as np


def brightness(images, prompts, metadata):
    """Mean brightness of a picture."""
    return images.astype(np.float32).mean((1, 2, 3)) / 255.0, {"dark": (images < 64).mean((1, 2, 3))}


def warmth():
    """How much redder than blue a picture is: a differentiable reward on the device."""
    from alignment_jax.rewards.base import Reward

    return Reward("warmth", lambda params, images, condition: (images[..., 0] - images[..., 2]).mean((1, 2)), range=(-1.0, 1.0))


def dark():
    """How dark a picture is, ten times, on the device."""
    from alignment_jax.rewards.base import Reward

    return Reward("dark", lambda params, images, condition: -10 * images.mean((1, 2, 3)), range=(-10.0, 0.0))


def latent_level():
    """The mean of a noisy state: a reward that needs no picture."""
    from alignment_jax.rewards.base import Reward

    return Reward("latent_level", lambda params, x, condition: x.mean((1, 2, 3)), noisy=True)
