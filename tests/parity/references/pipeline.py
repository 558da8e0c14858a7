"""Pictures of diffusers' whole pipelines on toy folders, from given latents: references/pipeline.py OUT_DIR FOLDERS_DIR.

FOLDERS_DIR holds sd15, sd21 and sdxl as `python tests/tiny_sd.py KIND FOLDERS_DIR/KIND` writes them.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import PIPELINE_CASES, pipeline_latents

sys.modules["torchvision"] = None  # not needed, and of another build in some environments


def pictures(folder: Path, case: dict) -> np.ndarray:
    import diffusers
    import torch

    kind = diffusers.StableDiffusionXLPipeline if case["kind"] == "sdxl" else diffusers.StableDiffusionPipeline
    keywords = {"add_watermarker": False} if case["kind"] == "sdxl" else {}
    pipe = kind.from_pretrained(folder / case["kind"], **keywords)
    pipe.set_progress_bar_config(disable=True)
    if case["scheduler"]:
        name, more = {"dpmsolver++": ("DPMSolverMultistepScheduler", {}),
                      "euler": ("EulerDiscreteScheduler", {}),
                      "ddim_trailing": ("DDIMScheduler", {"timestep_spacing": "trailing",
                                                          "steps_offset": 0})}[case["scheduler"]]  # fmt: skip
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **more)
    latents = torch.from_numpy(pipeline_latents(case))
    prompts, height, width = case["prompts"], case["height"], case["width"]
    negative = [case["negative"]] * len(prompts) if case["negative"] is not None else None
    out = pipe(prompts, height=height, width=width, num_inference_steps=case["num_steps"], guidance_scale=case["guidance_scale"],
               guidance_rescale=case["guidance_rescale"], negative_prompt=negative, latents=latents, output_type="np")  # fmt: skip
    return out.images


if __name__ == "__main__":
    out, folder = Path(sys.argv[1]), Path(sys.argv[2])
    import diffusers
    import torch
    import transformers

    found = {name: pictures(folder, case) for name, case in PIPELINE_CASES.items()}
    versions = np.array([f"{m.__name__} {m.__version__}" for m in (torch, diffusers, transformers)])
    np.savez_compressed(out / "pipeline.npz", versions=versions, **found)
    print({k: (v.shape, float(v.mean()), float(v.std())) for k, v in found.items()})
