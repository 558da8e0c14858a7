"""What diffusers' UNet2DConditionModel computes on random weights: python tests/parity/references/unet.py [OUT_DIR]."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import FIXTURES, random_weights

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
CONFIGS = {
    "sd1": dict(  # convolutions around the transformers, one number of heads
        block_out_channels=[32, 64], down_block_types=[CROSS_DOWN, "DownBlock2D"],
        up_block_types=["UpBlock2D", CROSS_UP], layers_per_block=2, attention_head_dim=4,
        cross_attention_dim=24, norm_num_groups=8,
    ),
    "sd2": dict(  # linear projections, heads per block, scores in float32, odd latents
        block_out_channels=[32, 64, 48], down_block_types=[CROSS_DOWN, CROSS_DOWN, "DownBlock2D"],
        up_block_types=["UpBlock2D", CROSS_UP, CROSS_UP], layers_per_block=1, attention_head_dim=[2, 4, 6],
        cross_attention_dim=24, norm_num_groups=8, use_linear_projection=True, upcast_attention=True,
    ),
    "sdxl": dict(  # pooled text and sizes, transformers of several layers, none at the finest level
        block_out_channels=[32, 64], down_block_types=["DownBlock2D", CROSS_DOWN],
        up_block_types=[CROSS_UP, "UpBlock2D"], layers_per_block=1, attention_head_dim=[2, 4],
        transformer_layers_per_block=[1, 2], cross_attention_dim=24, norm_num_groups=16, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
    ),
    "lcm": dict(  # a guidance embedding, other channels, sine first, shifted frequencies
        in_channels=9, out_channels=8, block_out_channels=[32], down_block_types=[CROSS_DOWN],
        up_block_types=[CROSS_UP], layers_per_block=1, attention_head_dim=4, cross_attention_dim=24,
        norm_num_groups=8, norm_eps=1e-4, time_cond_proj_dim=12, flip_sin_to_cos=False, freq_shift=1,
    ),
}  # fmt: skip
# weights outside the transformers' blocks are scaled by this: small activations show a wrong epsilon in a norm
GAIN = {"sd1": 1.0, "sd2": 1.0, "sdxl": 1.0, "lcm": 0.03}
SIZES = {"sd1": (16, 24), "sd2": (13, 10), "sdxl": (8, 12), "lcm": (8, 8)}


def weights(name: str, shapes: dict) -> dict:
    """Random weights of a case; those of the embeddings are linear layers here, not tables, and get the gain of one."""

    def gain(key: str) -> float:
        if "embedding" in key and key.endswith("weight"):
            return 8.0
        return 1.0 if "norm" in key or "transformer_blocks" in key else GAIN[name]

    return {k: np.float32(gain(k)) * v for k, v in random_weights(shapes).items()}


def _inputs(rng: np.random.Generator, size: tuple[int, int], config: dict) -> dict:
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    inputs = {"x": normal(2, *size, config.get("in_channels", 4)), "t": np.array([981.0, 17.0], np.float32),
              "states": normal(2, 7, 24)}  # fmt: skip
    if "addition_embed_type" in config:
        inputs |= {"pooled": normal(2, 16), "time_ids": np.array([[512, 768, 0, 8, 512, 768]] * 2, np.float32)}
    if "time_cond_proj_dim" in config:
        inputs |= {"timestep_cond": normal(2, config["time_cond_proj_dim"])}
    return inputs


def main(out: Path) -> None:
    # not needed here, and where it was built for another torch, importing diffusers would fail on it
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    import diffusers
    import torch

    torch.set_num_threads(1)
    for number, (name, config) in enumerate(CONFIGS.items()):
        net = diffusers.UNet2DConditionModel(**config).eval()
        tensors = weights(name, {k: tuple(v.shape) for k, v in net.state_dict().items()})
        net.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})
        inputs = _inputs(np.random.default_rng(number), SIZES[name], config)
        extra = {}
        if "addition_embed_type" in config:
            extra = {"added_cond_kwargs": {"text_embeds": torch.from_numpy(inputs["pooled"]),
                                           "time_ids": torch.from_numpy(inputs["time_ids"])}}  # fmt: skip
        if "time_cond_proj_dim" in config:
            extra = {"timestep_cond": torch.from_numpy(inputs["timestep_cond"])}
        x, t, states = (torch.from_numpy(inputs[k]) for k in ("x", "t", "states"))
        with torch.no_grad():
            y = net(x.permute(0, 3, 1, 2), t, states, **extra).sample.permute(0, 2, 3, 1).numpy()
        versions = np.array([f"torch {torch.__version__}", f"diffusers {diffusers.__version__}"])
        np.savez_compressed(out / f"unet_{name}.npz", y=y, config=net.to_json_string(), versions=versions, **inputs)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FIXTURES)
