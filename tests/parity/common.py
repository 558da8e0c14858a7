"""Random weights that a torch script and a test make alike from nothing but names and shapes. numpy only."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """{name: float32 array} in PyTorch's names and layouts: matrices and kernels of unit gain, vectors near 1 or 0.

    Each tensor has a generator of its own, seeded by its name: the order of names does not matter.
    """
    return {name: _tensor(name, tuple(shape), seed) for name, shape in shapes.items()}


def _tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = rng.standard_normal(shape)
    if len(shape) >= 2:
        return (values * (0.02 if "embedding" in name else np.prod(shape[1:]) ** -0.5)).astype(np.float32)
    return (0.1 * values + (1.0 if name.endswith("weight") else 0.0)).astype(np.float32)


def _case(name: str, num_steps: int, spacing: str, *, prediction: str = "eps", eta: float = 0.0, steps_offset: int = 1,
          set_alpha_to_one: bool = False, zero_snr: bool = False) -> dict[str, Any]:  # fmt: skip
    return locals()


SCHEDULER_CASES: dict[str, dict[str, Any]] = {
    "ddim_leading": _case("ddim", 20, "leading"),
    "ddim_eta": _case("ddim", 10, "leading", eta=0.7, set_alpha_to_one=True),
    "ddim_trailing_v_zero_snr": _case("ddim", 10, "trailing", prediction="v", steps_offset=0, zero_snr=True),
    "ddpm_leading": _case("ddpm", 10, "leading"),
    "ddpm_trailing_v": _case("ddpm", 20, "trailing", prediction="v", steps_offset=0),
    "euler_leading": _case("euler", 20, "leading"),
    "euler_linspace": _case("euler", 7, "linspace", steps_offset=0),
    "euler_trailing_v": _case("euler", 4, "trailing", prediction="v", steps_offset=0),
    "euler_trailing_v_zero_snr": _case("euler", 10, "trailing", prediction="v", steps_offset=0, zero_snr=True),
    "euler_ancestral_leading": _case("euler_ancestral", 20, "leading"),
    "euler_ancestral_trailing": _case("euler_ancestral", 1, "trailing", steps_offset=0),
    "dpmsolver_leading": _case("dpmsolver++", 20, "leading"),
    "dpmsolver_linspace": _case("dpmsolver++", 10, "linspace", steps_offset=0),
    "dpmsolver_trailing_v": _case("dpmsolver++", 25, "trailing", prediction="v", steps_offset=0),
    "sde_dpmsolver_linspace": _case("sde-dpmsolver++", 20, "linspace", steps_offset=0),
    "lcm": _case("lcm", 4, "leading", steps_offset=0),
    "lcm_8": _case("lcm", 8, "leading", steps_offset=0),
}


def toy_network(x: Any, t: Any, prediction: str, library: Any = np) -> Any:
    """A smooth stand-in for a network's output at x and the time t; library: numpy, or one with its names."""
    tilt = 0.9 if prediction == "eps" else 0.3
    return (tilt * x + 0.2 * library.sin(3.0 * x + t / 300.0)).astype("float32")


def _pipeline(kind: str, *, num_steps: int = 4, guidance_scale: float = 5.0, guidance_rescale: float = 0.0, height: int = 16,
              width: int = 16, negative: str | None = None, scheduler: str = "") -> dict[str, Any]:  # fmt: skip
    return {**locals(), "prompts": ["a red house", "a cat on the moon, the sea"]}


PIPELINE_CASES: dict[str, dict[str, Any]] = {
    "sd15": _pipeline("sd15"),
    "sd15_negative": _pipeline("sd15", negative="a blue house", height=16, width=24, guidance_rescale=0.7),
    "sd15_dpmsolver": _pipeline("sd15", scheduler="dpmsolver++", num_steps=6),
    "sd15_unguided": _pipeline("sd15", guidance_scale=1.0),
    "sd21": _pipeline("sd21", height=24, width=16),
    "sd21_trailing": _pipeline("sd21", scheduler="ddim_trailing", guidance_rescale=0.7),
    "sdxl": _pipeline("sdxl", height=16, width=24),
    "sdxl_negative": _pipeline("sdxl", negative="a blue house", scheduler="euler"),
}


def pipeline_latents(case: dict[str, Any]) -> np.ndarray:
    """Unit noise [N,4,h,w] for a case."""
    return np.random.default_rng(5).standard_normal((2, 4, case["height"] // 2, case["width"] // 2)).astype(np.float32)


ATTENTION = r"(to_q|to_k|to_v|to_out\.0|q_proj|k_proj|v_proj|out_proj)/kernel$"
# runs whose LoRA leaves as files: the family, and what is tuned
EXPORT_CASES: dict[str, dict[str, Any]] = {
    "sd15": {**_pipeline("sd15"), "targets": "draft"},
    "sd15_text": {**_pipeline("sd15"), "targets": rf"^(unet|text_encoder)/.*{ATTENTION}"},
    "sdxl": {**_pipeline("sdxl"), "targets": "unet"},
    "sdxl_text": {**_pipeline("sdxl"), "targets": rf"^(unet|text_encoder|text_encoder_2)/.*{ATTENTION}"},
}
EXPORT_FORMATS = ("peft", "kohya", "diffusers")
SINGLE_FILES = ("sd15", "sd21", "sdxl")
