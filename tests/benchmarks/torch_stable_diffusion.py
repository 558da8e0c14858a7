"""Networks of diffusers and transformers in torch eager: peers to measure against. Speaks through .npz files.

  python torch_stable_diffusion.py CORE INPUTS.npz OUTPUTS.npz {contiguous,channels_last} REPEATS
INPUTS: what (unet, vae or clip), config (JSON), and x [B,h,w,c], states, null [B,L,D], steps, scale; z [B,h,w,c]; pixels
[B,n,n,3]. OUTPUTS: y, channels last, seconds [REPEATS] of CPU time, versions. Weights follow from names alone.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

os.sched_setaffinity(0, {int(sys.argv[1])})
sys.modules["torchvision"] = None  # not needed, and of another build in some environments
sys.path.insert(0, str(Path(__file__).parents[1]))
import diffusers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from parity.common import random_weights  # noqa: E402

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
             "clip_sample": False, "set_alpha_to_one": False}  # fmt: skip


def build(kind, config, memory_format):
    """The module with random weights, in a layout."""
    if kind == "clip":
        net = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**config))
    else:
        net = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[kind](**config)
    values = random_weights({k: tuple(v.shape) for k, v in net.state_dict().items()})
    net.load_state_dict({k: torch.from_numpy(v) for k, v in values.items()})
    return net.eval().to(memory_format=memory_format)


def guided_ddim(net, x, states, null, steps, scale):
    """Guided sampling as a pipeline of diffusers does it: both halves in one batch."""
    scheduler = diffusers.DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    both = torch.cat([null, states])
    for t in scheduler.timesteps:
        without, with_text = net(torch.cat([x, x]), t, both, return_dict=False)[0].chunk(2)
        x = scheduler.step(without + scale * (with_text - without), t, x, eta=0.0, return_dict=False)[0]
    return x


@torch.inference_mode()
def main(inputs, outputs, layout, repeats):
    data = np.load(inputs)
    kind, config = str(data["what"]), json.loads(str(data["config"]))
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    net = build(kind, config, memory_format)
    channels_first = lambda a: torch.from_numpy(a).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)  # noqa: E731
    if kind == "unet":
        x, states, null = channels_first(data["x"]), torch.from_numpy(data["states"]), torch.from_numpy(data["null"])
        run = lambda steps=int(data["steps"]): guided_ddim(net, x, states, null, steps, float(data["scale"]))  # noqa: E731
        run(1)
    elif kind == "vae":
        z = channels_first(data["z"])
        run = lambda: net.decode(z, return_dict=False)[0]  # noqa: E731
    else:
        pixels = channels_first(data["pixels"])
        run = lambda: net(pixels).image_embeds  # noqa: E731
    if kind != "unet":
        run()
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        y = run()
        seconds.append(time.process_time() - began)
    y = y.permute(0, 2, 3, 1) if y.ndim == 4 else y
    versions = [f"torch {torch.__version__}", f"diffusers {diffusers.__version__}", f"transformers {transformers.__version__}"]
    np.savez(outputs, y=y.numpy(), seconds=seconds, versions=versions)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[2:5], int(sys.argv[5]))
