"""Align Stable Diffusion XL, which draws 1024 x 1024.

  python -m alignment_jax train --config=configs/sdxl.py:draft_pickscore --workdir=runs/sdxl_draft --config.model=FOLDER
FOLDER, the aesthetic head's file, rewards with arguments and what was checked: see the top of configs/sd15.py. The
autoencoder computes in float32, as its config asks, whatever model_options.dtype says.
What to expect, by the papers: Diffusion-DPO wins about 70 % of human comparisons with the base on PartiPrompts (arXiv
2311.12908). LoRA keeps the frozen parameters in bfloat16, 7 GB; all of the UNet trains in float32: parameters, reference and
gradients are 10 GB each.
"""

from typing import Any

from ml_collections import ConfigDict, FieldReference

CLIP_L = "openai/clip-vit-large-patch14"
AESTHETIC = {"name": "aesthetic", "version": "v2", "head": "data_cache/aesthetic_v2.safetensors", "weights": CLIP_L}
PICK = {"name": "pick_score", "weights": "yuvalkirstain/PickScore_v1"}
CLIP = {"name": "clip_score", "weights": CLIP_L}
CHANGES: dict[str, dict[str, Any]] = {
    # DRaFT+ (github NVIDIA/NeMo-Aligner): DRaFT-1 (arXiv 2309.17400) with a hold on the base of weight 1, DDIM, rank 32, 1e-4, batch 4,
    # clip 10, PickScore. Ours: the hold is on the end of the chain, there on each step's prediction; weight decay, steps
    "draft_pickscore": {
        "method": {"name": "draft", "k": 1, "lv": 1, "anchor_weight": 1.0}, "steps": 1000,
        "batch": {"prompts": 4, "group": 1, "microbatch": 1}, "optimizer.learning_rate": 1e-4, "optimizer.weight_decay": 1e-2,
        "optimizer.clip_norm": 10.0, "lora": {"rank": 32, "targets": "draft", "file": ""}, "model_options.remat": True,
    },
    # Diffusion-DPO (arXiv 2311.12908), github SalesforceAIResearch/DiffusionDPO launchers/sdxl.sh and train.py: beta 5000,
    # --learning_rate=1e-8 --scale_lr at batch 2048, Adafactor, 200 warm-up steps, 2000 steps, a fifth of the prompts empty
    "diffusion_dpo": {
        "method": {"name": "diffusion_dpo", "beta": 5000.0}, "steps": 2000,
        "batch": {"prompts": 2048, "group": 1, "microbatch": 1}, "optimizer.name": "adafactor",
        "optimizer.learning_rate": 1e-8 * 2048, "optimizer.warmup_steps": 200, "lora": {}, "model_options.remat": True,
        "model_options.param_dtype": "float32",
        # Pick-a-Pic v2's parquet files (hub yuvalkirstain/pickapic_v2); or latents, a folder of training/precompute.py
        "data": {"pairs": "pick_a_pic:data_cache/pickapic_v2", "data_dir": "data_cache", "latents": "", "drop": 0.2},
    },
    # DDPO (arXiv 2305.13301), github kvablack/ddpo-pytorch config/dgx.py aesthetic, for SD 1; ours: 64 samples a step for 256, and
    # half the times, for 1600 transitions of 0.8 MB are kept
    "ddpo_aesthetic": {
        "method": {"name": "ddpo", "advantage": "prompt", "num_prompts": 0, "buffer": 32, "min_count": 16, "clip_range": 1e-4,
                   "adv_clip": 5.0, "timestep_fraction": 0.5},
        "reward": AESTHETIC, "judge": PICK, "steps": 200, "checkpoint_every": 20, "evaluate_every": 20,
        "batch": {"prompts": 64, "group": 1, "microbatch": 2, "updates": 2}, "optimizer.learning_rate": 3e-4,
        "optimizer.weight_decay": 1e-4, "sampling.eta": 1.0, "lora": {"rank": 4, "targets": "ddpo-pytorch", "file": ""},
    },
    # diffusers' examples/text_to_image/train_text_to_image_lora_sdxl.py as its README calls it: rank 4, 1e-4. Ours: the batch and
    # the steps, min-SNR weights (arXiv 2303.09556), a tenth of the captions empty
    "sft": {
        "method": {"name": "sft", "snr_gamma": 5.0}, "steps": 2000, "batch": {"prompts": 16, "group": 1, "microbatch": 1},
        "optimizer.learning_rate": 1e-4, "optimizer.weight_decay": 1e-2, "lora": {"rank": 4, "targets": "diffusers", "file": ""},
        # a folder with pictures of 1024 x 1024 and a captions.jsonl; or latents, a folder of training/precompute.py
        "data": {"labels": "folder", "path": "data_cache/pictures", "latents": "", "drop": 0.1}, "model_options.remat": True,
    },
    # DRTune (arXiv 2405.00760), no official code: 5 of 50 steps, early stop in the last 40 %, guidance 5. Ours: rank, 1e-4, batch, discount
    "drtune_pickscore": {
        "method": {"name": "drtune", "k": 5, "early_stop": 0.4, "discount": 0.98}, "steps": 1000,
        "batch": {"prompts": 16, "group": 1, "microbatch": 1}, "optimizer.learning_rate": 1e-4,
        "lora": {"rank": 32, "targets": "draft", "file": ""}, "model_options.remat": True,
    },
    # MaPO (arXiv 2406.06424), github mapo-t2i/mapo: 1e-5, 2000 steps, beta .1, 16 pairs a device; all else ours
    "mapo": {
        "method": {"name": "mapo", "beta": 0.1}, "steps": 2000, "batch": {"prompts": 64, "group": 1, "microbatch": 1},
        "optimizer.learning_rate": 1e-5, "lora": {"rank": 64, "targets": "diffusers", "file": ""}, "model_options.remat": True,
        "data": {"pairs": "pick_a_pic:data_cache/pickapic_v2", "data_dir": "data_cache", "latents": "", "drop": 0.2},
    },
    # SPO (arXiv 2406.04314), github RockeyCoss/SPO: 20 steps, eta 1, guidance 5, 2 candidates, threshold .4, 1e-5, rank 64. Ours:
    # PickScore of the clean prediction for its step-aware preference model, 16 prompts a step
    "spo": {
        "method": {"name": "spo", "k": 2, "beta": 10.0, "clip_range": 0.1, "threshold": 0.4}, "steps": 1000,
        "batch": {"prompts": 16, "group": 1, "microbatch": 1}, "optimizer.learning_rate": 1e-5, "sampling.num_steps": 20,
        "sampling.eta": 1.0, "lora": {"rank": 64, "targets": "diffusers", "file": ""},
    },
    # RankDPO (arXiv 2410.18013): lists of four pictures by four models, ranked by five rewards; steps and rate as Diffusion-DPO here
    "rank_dpo": {
        "method": {"name": "rank_dpo", "beta": 2500.0}, "steps": 2000, "batch": {"prompts": 512, "group": 1, "microbatch": 1},
        "optimizer.name": "adafactor", "optimizer.learning_rate": 1e-8 * 2048, "optimizer.warmup_steps": 200, "lora": {},
        "model_options.remat": True, "model_options.param_dtype": "float32",
        # what `label --list 4` writes
        "data": {"lists": "data_cache/lists.npz", "length": 4, "drop": 0.2},
    },
}  # fmt: skip
ARGUMENTS = tuple(CHANGES)


def get_config(method: str = "draft_pickscore") -> ConfigDict:
    if method not in ARGUMENTS:
        raise ValueError(f"configs/sdxl.py has no {method!r}; choose one of {', '.join(ARGUMENTS)}")
    changes = dict(CHANGES[method])
    c = ConfigDict()
    c.name = f"sdxl:{method}"
    c.file = f"configs/sdxl.py:{method}"
    c.seed = 0
    c.steps = 1000
    c.checkpoint_every = 200
    c.evaluate_every = 200  # 0: never
    c.early_stop = False  # True: stop once gold has fallen from its best, and go back there
    c.model = "stabilityai/stable-diffusion-xl-base-1.0"  # a hub id, or a folder as diffusers writes it
    # as in configs/sd15.py
    c.model_options = ConfigDict({"dtype": "bfloat16", "param_dtype": "bfloat16", "variant": "", "remat": False, "height": 0, "width": 0})
    c.weights = "shipped"
    c.reward = either(changes.pop("reward", PICK))
    c.reward_errors = "raise"  # "mask": go on without the pictures on which a host reward fails
    c.aggregate = ""  # how a reward of several columns becomes one number, such as "{'how': 'maxmin'}"
    c.rollout = ""  # a test-time method whose samples are learned from, such as "{'name': 'fk', 'particles': 4}"
    c.method = ConfigDict()
    c.optimizer = ConfigDict({"name": "adamw", "learning_rate": 1e-4, "b1": 0.9, "b2": 0.999, "weight_decay": 1e-2, "clip_norm": 1.0,
                              "schedule": "constant", "warmup_steps": 0, "ema": 0.0})  # fmt: skip
    c.batch = ConfigDict()
    # guidance 5 is what the pipeline of the base suggests
    c.sampling = ConfigDict({"scheduler": "ddim", "num_steps": 50, "eta": 0.0, "guidance_scale": 5.0})
    c.lora = ConfigDict()  # {}: what `trainable` matches is trained itself
    c.trainable = "^unet/"
    # sizes of the mesh's axes (-1: what is left), "jit" or "pmap", rules of one's own for parameters, devices that score and do nothing
    # else: see training/sharding.py
    c.sharding = ConfigDict({"dcn": 1, "data": -1, "fsdp": 1, "tensor": 1, "backend": "jit", "rules": (), "scorers": 0})
    c.data = ConfigDict({"prompts": "configs/prompts/animals.txt"})
    judge = either(changes.pop("judge", CLIP))
    for field, value in changes.items():
        if isinstance(value, dict):
            c[field] = ConfigDict(value)
        else:
            c.update_from_flattened_dict({field: value})
    c.evaluation = ConfigDict({
        "judge": judge, "prompts": "configs/prompts/animals_held_out.txt", "num_prompts": 16, "samples": 2,
        "quick_prompts": 4, "blend": (0.5, 1.0), "blend_prompts": 4, "chunk": 1, "scale": 1.0,
        "base_guidance_scale": c.sampling.guidance_scale, "seed": 1234,
    })  # fmt: skip
    return c


def either(reward: Any) -> Any:
    """A field that takes a reward's name as well as a dictionary of its name and arguments."""
    return FieldReference(ConfigDict(reward) if isinstance(reward, dict) else reward, field_type=object)
