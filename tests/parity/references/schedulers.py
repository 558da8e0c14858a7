"""Trajectories of diffusers' schedulers on a toy network, from the same noise.

  python schedulers.py [OUT_DIR]       (in an environment with torch and diffusers)
"""

import sys
from pathlib import Path

import diffusers
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import FIXTURES, SCHEDULER_CASES, toy_network

CLASSES = {
    "ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler", "dpmsolver++": "DPMSolverMultistepScheduler",
    "sde-dpmsolver++": "DPMSolverMultistepScheduler", "lcm": "LCMScheduler",
}  # fmt: skip
KINDS = {"eps": "epsilon", "v": "v_prediction"}


def trajectory(case: dict, x: np.ndarray, noises: np.ndarray) -> np.ndarray:
    """The states [T, ...] after every step, in the variables of the VP chain."""
    name, steps = case["name"], case["num_steps"]
    settings = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=KINDS[case["prediction"]],
                    timestep_spacing=case["spacing"])  # fmt: skip
    if name != "lcm":
        settings["steps_offset"] = case["steps_offset"]
    if name in ("ddim", "ddpm", "lcm"):
        settings |= {"clip_sample": False}
    if name in ("ddim", "lcm"):
        settings["set_alpha_to_one"] = case["set_alpha_to_one"]
    if name.endswith("dpmsolver++"):
        settings["algorithm_type"] = name
    if case["zero_snr"]:
        settings["rescale_betas_zero_snr"] = True
    scheduler = getattr(diffusers, CLASSES[name])(**settings)
    scheduler.set_timesteps(steps)
    state = torch.from_numpy(x) * scheduler.init_noise_sigma
    out = []
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(state, t)
        output = torch.from_numpy(toy_network(scaled.numpy(), float(t), case["prediction"]))
        draw = lambda *args, i=i, **kwargs: torch.from_numpy(noises[i])  # noqa: E731
        module = sys.modules[type(scheduler).__module__]
        module.randn_tensor = draw
        keywords = {"eta": case["eta"]} if name == "ddim" else {}
        state = scheduler.step(output, t, state, **keywords).prev_sample
        sigma = scheduler.sigmas[i + 1] if name.startswith("euler") else torch.tensor(0.0)
        out.append((state / torch.sqrt(1 + sigma**2)).numpy())
    return np.stack(out)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FIXTURES
    rng = np.random.default_rng(0)
    x, noises = rng.standard_normal((2, 3, 4)).astype(np.float32), rng.standard_normal((25, 2, 3, 4)).astype(np.float32)
    found = {name: trajectory(case, x, noises) for name, case in SCHEDULER_CASES.items()}
    versions = np.array([f"torch {torch.__version__}", f"diffusers {diffusers.__version__}"])
    np.savez_compressed(folder / "schedulers.npz", x=x, noises=noises, versions=versions, **found)
    print({name: float(np.abs(value).max()) for name, value in found.items()})
