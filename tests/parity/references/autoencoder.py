"""What diffusers' autoencoders compute on random weights: python tests/parity/references/autoencoder.py [OUT_DIR]."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import FIXTURES, random_weights

KL = dict(block_out_channels=[16, 32], down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=8,
          up_block_types=["UpDecoderBlock2D"] * 2)  # fmt: skip
CONFIGS = {
    "kl": dict(KL, layers_per_block=2),
    "kl_without_quant": dict(KL, layers_per_block=1, latent_channels=6, use_quant_conv=False,
                             use_post_quant_conv=False),
    "tiny": dict(encoder_block_out_channels=[16] * 3, decoder_block_out_channels=[16] * 3, num_encoder_blocks=[1, 2, 1],
                 num_decoder_blocks=[2, 1, 1]),
}  # fmt: skip
# weights of convolutions and linear layers are scaled by this: small activations show a wrong epsilon in a norm
GAIN = {"kl": 1.0, "kl_without_quant": 0.03, "tiny": 1.0}


def weights(name: str, shapes: dict) -> dict:
    """Random weights of a case."""
    return {k: v if "norm" in k else np.float32(GAIN[name]) * v for k, v in random_weights(shapes).items()}


def main(out: Path) -> None:
    # not needed here, and where it was built for another torch, importing diffusers would fail on it
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    import diffusers
    import torch

    torch.set_num_threads(1)
    for number, (name, config) in enumerate(CONFIGS.items()):
        tiny = name == "tiny"
        net = (diffusers.AutoencoderTiny if tiny else diffusers.AutoencoderKL)(**config).eval()
        tensors = weights(name, {k: tuple(v.shape) for k, v in net.state_dict().items()})
        net.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})
        rng = np.random.default_rng(number)
        pixels = rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
        z = (2 * rng.standard_normal((2, 5, 8, config.get("latent_channels", 4)))).astype(np.float32)
        nhwc = lambda x: x.permute(0, 2, 3, 1).numpy()
        nchw = lambda x: torch.from_numpy(x).permute(0, 3, 1, 2)
        with torch.no_grad():
            decoded = nhwc(net.decode(nchw(z)).sample)
            if tiny:
                encoded = {"latents": nhwc(net.encode(nchw(pixels)).latents)}
            else:
                posterior = net.encode(nchw(pixels)).latent_dist
                encoded = {"mean": nhwc(posterior.mean), "logvar": nhwc(posterior.logvar)}
        versions = np.array([f"torch {torch.__version__}", f"diffusers {diffusers.__version__}"])
        np.savez_compressed(out / f"autoencoder_{name}.npz", pixels=pixels, z=z, decoded=decoded,
                            config=net.to_json_string(), versions=versions, **encoded)  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FIXTURES)
