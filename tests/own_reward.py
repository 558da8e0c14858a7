"""A reward of a user's own, named in configs as own_reward:brightness."""

import numpy as np


def brightness(images, prompts, metadata):
    """Mean brightness of a picture."""
    return images.astype(np.float32).mean((1, 2, 3)) / 255.0, {"dark": (images < 64).mean((1, 2, 3))}
