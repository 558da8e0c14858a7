"""Pictures that diffusers makes of what a run exports: references/export.py OUT_DIR FOLDERS_DIR EXPORTS_DIR.

FOLDERS_DIR holds sd15, sd21 and sdxl as tests/tiny_sd.py writes them; EXPORTS_DIR holds CASE/FORMAT as `export` writes them
and KIND.safetensors as `convert` does. `python tests/parity/test_export.py DIR` makes DIR/folders and DIR/exports.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import EXPORT_CASES, EXPORT_FORMATS, PIPELINE_CASES, SINGLE_FILES, pipeline_latents

sys.modules["torchvision"] = None  # not needed, and of another build in some environments


def pipeline(kind: str):
    import diffusers

    return diffusers.StableDiffusionXLPipeline if kind == "sdxl" else diffusers.StableDiffusionPipeline


def keywords(kind: str) -> dict:
    return {"add_watermarker": False} if kind == "sdxl" else {}


def draw(pipe, case: dict) -> np.ndarray:
    import torch

    pipe.set_progress_bar_config(disable=True)
    return pipe(case["prompts"], height=case["height"], width=case["width"], num_inference_steps=case["num_steps"],
                guidance_scale=case["guidance_scale"], latents=torch.from_numpy(pipeline_latents(case)),
                output_type="np").images  # fmt: skip


def exported(folders: Path, exports: Path, name: str, form: str) -> np.ndarray:
    case = EXPORT_CASES[name]
    kind, place = case["kind"], exports / name / form
    if form == "diffusers":
        return draw(pipeline(kind).from_pretrained(place, **keywords(kind)), case)
    pipe = pipeline(kind).from_pretrained(folders / kind, **keywords(kind))
    pipe.load_lora_weights(place, weight_name="pytorch_lora_weights.safetensors")
    return draw(pipe, case)


def single(folders: Path, exports: Path, kind: str) -> np.ndarray:
    pipe = pipeline(kind).from_single_file(exports / f"{kind}.safetensors", config=str(folders / kind), local_files_only=True,
                                           **keywords(kind))  # fmt: skip
    return draw(pipe, PIPELINE_CASES[kind])


if __name__ == "__main__":
    out, folders, exports = map(Path, sys.argv[1:4])
    import diffusers
    import peft
    import torch
    import transformers

    torch.set_num_threads(1)  # networks this small are slower on more
    found = {f"{name}_{form}": exported(folders, exports, name, form) for name in EXPORT_CASES for form in EXPORT_FORMATS}
    found |= {f"{kind}_single": single(folders, exports, kind) for kind in SINGLE_FILES}
    versions = np.array([f"{m.__name__} {m.__version__}" for m in (torch, diffusers, transformers, peft)])
    np.savez_compressed(out / "export.npz", versions=versions, **found)
    print({k: (v.shape, float(v.mean()), float(v.std())) for k, v in found.items()})
