"""A model of nine numbers that draws 512 x 512: what surrounds a model can be tried without compiling one."""

import jax.numpy as jnp
import numpy as np

from alignment_jax.diffusion import scaled_linear
from alignment_jax.models.bundle import ModelBundle


def toy(side: int = 512) -> ModelBundle:
    """Latents [8, 8, 3], enlarged to pictures; the network is one matrix, the prompt its length."""
    k = side // 8

    def denoise(params, x, t, cond):
        return x @ params["unet"]["kernel"] + 0.01 * cond["length"][:, None, None]

    def decode(params, z):
        return jnp.clip(0.5 + 0.2 * z.repeat(k, 1).repeat(k, 2), 0.0, 1.0)

    return ModelBundle(
        name="toy", init=lambda key: {"unet": {"kernel": 0.5 * jnp.eye(3)}}, denoise=denoise,
        encode_text=lambda params, tokens: {"length": tokens.astype(jnp.float32)}, decode=decode,
        encode=lambda params, y: (y[:, ::k, ::k] - 0.5) / 0.2, tokenize=lambda prompts: np.array([[len(p)] for p in prompts], np.int32),
        schedule=scaled_linear(), prediction="eps", sample_shape=(8, 8, 3),
        sampling={"scheduler": "ddim", "num_steps": 3, "guidance_scale": 1.0},
    )  # fmt: skip
