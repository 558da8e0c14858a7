"""Align Stable Diffusion 1.5 with the settings that papers and their official codes publish.

  python -m alignment_jax train --config=configs/sd15.py:ddpo_aesthetic --workdir=runs/sd15_ddpo --config.model=FOLDER
FOLDER is a model as diffusers writes it; without it the hub id is downloaded, and the scorers too. LAION's aesthetic head is
a pickle (github christophschuhmann/improved-aesthetic-predictor), to be turned once where torch is installed:
  python -c "import torch, safetensors.torch as s; s.save_file(torch.load('sac+logos+ava1-l14-linearMSE.pth',
    map_location='cpu', weights_only=True), 'data_cache/aesthetic_v2.safetensors')"
A reward's arguments are fields, --config.reward.weights=FOLDER; another reward without arguments is a word,
--config.reward=jpeg_compressibility. The judge is a reward that training does not see.
What to expect, by the papers: DDPO raises the aesthetic score of the 45 animals from about 5 to beyond 6 in 200 steps of 256
pictures; DRaFT and AlignProp go as high with a twentieth of the pictures, and lose diversity first: read gold and
diversity beside the proxy. Every argument is checked here by shapes at full size and trained at toy size; none was trained
by us at full size. `ours` marks what no source states. A step of DDPO keeps 12 800 transitions, 2.5 GB; where that does
not fit take fewer prompts or a timestep_fraction below 1. The prompts are the bare names of DDPO's 45 common animals, as
in ddpo-pytorch's simple_animals (its activity tasks put an article before them); those of the report are 24 other animals.
"""

from typing import Any

from ml_collections import ConfigDict, FieldReference

CLIP_L = "openai/clip-vit-large-patch14"
AESTHETIC = {"name": "aesthetic", "version": "v2", "head": "data_cache/aesthetic_v2.safetensors", "weights": CLIP_L}
PICK = {"name": "pick_score", "weights": "yuvalkirstain/PickScore_v1"}
CLIP = {"name": "clip_score", "weights": CLIP_L}
# DDPO (arXiv 2305.13301), github kvablack/ddpo-pytorch config/base.py and config/dgx.py: 256 samples an epoch, an epoch is a step
DDPO = {"name": "ddpo", "advantage": "prompt", "num_prompts": 0, "buffer": 16, "min_count": 16, "clip_range": 1e-4, "adv_clip": 5.0,
        "timestep_fraction": 1.0}  # fmt: skip
# DRaFT (arXiv 2309.17400), small scale, on SD 1.4: DDIM, guidance 7.5, rank 8, 4e-4, batch 4, 2000 steps, weight decay .1
DRAFT: dict[str, Any] = {
    "method": {"name": "draft", "k": 1, "lv": 1, "anchor_weight": 0.0}, "steps": 2000, "checkpoint_every": 200, "evaluate_every": 200,
    "batch": {"prompts": 4, "group": 1, "microbatch": 4}, "optimizer.learning_rate": 4e-4, "optimizer.weight_decay": 0.1,
    "sampling.eta": 0.0, "sampling.guidance_scale": 7.5, "lora": {"rank": 8, "targets": "draft", "file": ""}, "model_options.remat": True,
}  # fmt: skip
# what each argument changes in get_config's settings, which are ddpo-pytorch's
CHANGES: dict[str, dict[str, Any]] = {
    # dgx.py compressibility: 4 updates an epoch, 100 epochs; its prompts are 398 ImageNet animals, ours the 45 of aesthetic
    "ddpo_compressibility": {"reward": "jpeg_compressibility", "batch.updates": 4, "steps": 100},
    # dgx.py aesthetic: 2 updates an epoch, 200 epochs, buffer 32
    "ddpo_aesthetic": {"method": {**DDPO, "buffer": 32}},
    # DRaFT-1, and DRaFT-LV with n = 2
    "draft_aesthetic": DRAFT,
    "draft_lv_aesthetic": {**DRAFT, "method": {**DRAFT["method"], "lv": 2}},
    # AlignProp (arXiv 2310.03739), github mihirp1998/AlignProp config/align_prop.py: 1e-3, decay .1, guidance 7.5, batch 128;
    # clip 5 there is of a loss scaled by 0.01, which Adam does not see: 500 here. 25 steps: its curves end there
    "alignprop_aesthetic": {
        "method": {"name": "alignprop", "mean_k": 8.0, "std_k": 5.0}, "steps": 25, "checkpoint_every": 5, "evaluate_every": 5,
        "batch": {"prompts": 128, "group": 1, "microbatch": 4}, "optimizer.learning_rate": 1e-3, "optimizer.weight_decay": 0.1,
        "optimizer.clip_norm": 500.0, "sampling.guidance_scale": 7.5, "model_options.remat": True,
    },
    # ReFL (arXiv 2304.05977), github THUDM/ImageReward ReFL.py: SD 1.4, DDPM of 40 steps, the last quarter, weight 1e-3, 1e-5,
    # decay 1e-2, batch 64, 100 steps, all of the UNet. Ours: PickScore, for ImageReward is not there yet, hence no ceiling of
    # 2 standard deviations; and guidance, which there is taken only when sampling
    "refl": {
        "method": {"name": "refl", "window": 0.25, "weight": 1e-3}, "reward": PICK, "judge": CLIP, "steps": 100,
        "batch": {"prompts": 64, "group": 1, "microbatch": 4}, "optimizer.learning_rate": 1e-5, "optimizer.weight_decay": 1e-2,
        "sampling": {"scheduler": "ddpm", "num_steps": 40, "guidance_scale": 7.5}, "lora": {}, "model_options.remat": True,
    },
    # Diffusion-DPO (arXiv 2311.12908), github SalesforceAIResearch/DiffusionDPO launchers/sd15.sh and train.py: beta 5000,
    # --learning_rate=1e-8 --scale_lr at batch 2048, 500 warm-up steps, 2000 steps, decay 1e-2, a fifth of the prompts empty
    "diffusion_dpo": {
        "method": {"name": "diffusion_dpo", "beta": 5000.0}, "reward": PICK, "judge": CLIP, "steps": 2000, "checkpoint_every": 200,
        "evaluate_every": 200, "batch": {"prompts": 2048, "group": 1, "microbatch": 8}, "optimizer.learning_rate": 1e-8 * 2048,
        "optimizer.weight_decay": 1e-2, "optimizer.warmup_steps": 500, "sampling.eta": 0.0, "sampling.guidance_scale": 7.5, "lora": {},
        # Pick-a-Pic v2's parquet files (hub yuvalkirstain/pickapic_v2, or a copy); or latents, a folder of training/precompute.py
        "data": {"pairs": "pick_a_pic:data_cache/pickapic_v2", "data_dir": "data_cache", "latents": "", "drop": 0.2},
        "model_options.remat": True,
    },
    # diffusers' examples/text_to_image/train_text_to_image.py as its README calls it: 1e-5, 15 000 steps, EMA; batch 4 by
    # accumulation. Ours: min-SNR weights (arXiv 2303.09556) and a tenth of the captions empty, as in pre-training
    "sft": {
        "method": {"name": "sft", "snr_gamma": 5.0}, "reward": PICK, "judge": CLIP, "steps": 15_000, "checkpoint_every": 500,
        "evaluate_every": 1500, "batch": {"prompts": 4, "group": 1, "microbatch": 4}, "optimizer.learning_rate": 1e-5,
        "optimizer.weight_decay": 1e-2, "optimizer.ema": 0.9999, "sampling.eta": 0.0, "sampling.guidance_scale": 7.5, "lora": {},
        # a folder with pictures of 512 x 512 and a captions.jsonl; or latents, a folder of training/precompute.py
        "data": {"labels": "folder", "path": "data_cache/pictures", "latents": "", "drop": 0.1}, "model_options.remat": True,
    },
    # RAFT (arXiv 2304.06767) keeps the best of K = 8 to 32 of a prompt; all other numbers are ours
    "raft": {
        "method": {"name": "raft", "top": 1, "draws": 4}, "batch": {"prompts": 32, "group": 8, "microbatch": 8}, "steps": 100,
        "optimizer.learning_rate": 1e-4, "sampling.eta": 0.0,
    },
    # DPOK (arXiv 2305.16381), github google-research dpok: rank 4, 1e-5, clip 0.1, 50 steps, guidance 7.5, ratio clip 1e-4, critic 1e-4.
    # It draws 24 transitions of a buffer five times a step; ours: a tenth of the steps of 24 samples, and PickScore for ImageReward
    "dpok": {
        "method": {"name": "dpok", "kl_weight": 1e-3, "timestep_fraction": 0.1}, "reward": PICK, "judge": CLIP, "steps": 2000,
        "checkpoint_every": 200, "evaluate_every": 200, "batch": {"prompts": 24, "group": 1, "microbatch": 8},
        "optimizer.learning_rate": 1e-5, "optimizer.weight_decay": 0.0, "optimizer.clip_norm": 0.1, "sampling.guidance_scale": 7.5,
    },
    # DanceGRPO (arXiv 2505.07818), github XueZeyue/DanceGRPO, on SD 1.4: groups of 16, 512 samples an epoch, 300 epochs, 50 steps of
    # DDIM with eta 1, guidance 5, 1e-5, all of the UNet, 60 % of the steps. Ours: PickScore for HPSv2.1, 256 samples a step
    "dance_grpo": {
        "method": {"name": "dance_grpo", "timestep_fraction": 0.6}, "reward": PICK, "judge": CLIP, "steps": 300,
        "batch": {"prompts": 16, "group": 16, "microbatch": 8}, "optimizer.learning_rate": 1e-5, "lora": {},
        "model_options.remat": True,
    },
    # RWR as in DDPO's baseline (arXiv 2305.13301), github jannerm/ddpo: SD 1.4, 1e-5, all of the UNet, rewards times 0.2, ten rounds of
    # 10 240 samples seen five times. Ours: fresh samples every step, 256 of them, a round of 200 steps
    "rwr": {
        "method": {"name": "rwr", "lam": 0.2, "refresh": 200, "snr_gamma": None}, "steps": 2000, "checkpoint_every": 200,
        "evaluate_every": 200, "optimizer.learning_rate": 1e-5, "lora": {}, "model_options.remat": True, "batch.updates": 1,
    },
    # Lee et al. (arXiv 2302.12192): SD 1.5, 1e-5, beta about 1 (both from memory). Ours: CLIPScore, which lies in [0, 1], for their
    # reward model, and the pre-training loss on the base's own samples
    "lee": {
        "method": {"name": "lee", "beta": 1.0, "low": 0.0, "high": 1.0, "snr_gamma": None}, "reward": CLIP, "judge": PICK, "steps": 2000,
        "checkpoint_every": 200, "evaluate_every": 200, "batch": {"prompts": 64, "group": 1, "microbatch": 8},
        "optimizer.learning_rate": 1e-5, "sampling.eta": 0.0, "lora": {}, "model_options.remat": True,
    },
    # Adjoint Matching (arXiv 2409.08861), github microsoft/soc-fine-tuning-sd: lam 100, 3e-6, betas .9 and .95, 20 warm-up steps,
    # batch 125, 50 steps with 4 of them trained, guidance 7.5, all of the UNet in float32. Ours: PickScore for ImageReward, one loss
    # clip for its quantile mask, 120 samples a step
    "adjoint_matching": {
        "method": {"name": "adjoint_matching", "lam": 100.0, "timestep_fraction": 0.08, "loss_clip": 1.6}, "reward": PICK, "judge": CLIP,
        "steps": 1000, "checkpoint_every": 100, "evaluate_every": 100, "batch": {"prompts": 120, "group": 1, "microbatch": 4},
        "optimizer.learning_rate": 3e-6, "optimizer.b2": 0.95, "optimizer.warmup_steps": 20, "sampling.guidance_scale": 7.5,
        "lora": {}, "model_options.remat": True, "model_options.dtype": "float32",
    },
    # PRDP (arXiv 2402.08714), its small scale on SD 1.4: 32 prompts x 16 samples, 100 epochs, 50 steps, guidance 5, beta 10 for the
    # aesthetic score, all of the UNet. The learning rate is ours, that of DDPO there
    "prdp": {
        "method": {"name": "prdp", "beta": 10.0}, "steps": 100, "batch": {"prompts": 32, "group": 16, "microbatch": 2},
        "optimizer.learning_rate": 1e-5, "lora": {}, "model_options.remat": True,
    },
    # Diffusion-KTO (arXiv 2404.04465), github jacklishufan/diffusion-kto: beta 1000, 1e-7, 20 000 steps, batch 8 a device; ours: 64
    "diffusion_kto": {
        "method": {"name": "diffusion_kto", "beta": 1000.0}, "reward": PICK, "judge": CLIP, "steps": 20_000, "checkpoint_every": 1000,
        "evaluate_every": 2000, "batch": {"prompts": 64, "group": 1, "microbatch": 8}, "optimizer.learning_rate": 1e-7,
        "optimizer.weight_decay": 1e-2, "sampling.eta": 0.0, "sampling.guidance_scale": 7.5, "lora": {}, "model_options.remat": True,
        "data": {"pairs": "pick_a_pic:data_cache/pickapic_v2", "data_dir": "data_cache", "latents": "", "drop": 0.2},
    },
    # SPIN-Diffusion (arXiv 2402.10210): the winners of Pick-a-Pic, three iterations, beta 2000, 50 steps, guidance 7.5; its code
    # was not at hand: learning rate, batch and length of an iteration are ours
    "spin": {
        "method": {"name": "spin", "beta": 2000.0, "every": 500}, "reward": PICK, "judge": CLIP, "steps": 1500, "checkpoint_every": 100,
        "evaluate_every": 500, "batch": {"prompts": 64, "group": 1, "microbatch": 8}, "optimizer.learning_rate": 2e-5,
        "sampling.eta": 0.0, "sampling.guidance_scale": 7.5, "lora": {}, "model_options.remat": True,
        "data": {"labels": "folder", "path": "data_cache/pictures", "latents": "", "drop": 0.0},
    },
    # InPO (arXiv 2503.18454), github JaydenLyh/InPO: beta 2000 on SD 1.5, 400 steps of 1024 pairs, 200 warm-up steps, 1e-8 times the batch
    "inpo": {
        "method": {"name": "inpo", "beta": 2000.0, "steps": 10, "eta": 0.1}, "reward": PICK, "judge": CLIP, "steps": 400,
        "checkpoint_every": 50, "evaluate_every": 100, "batch": {"prompts": 1024, "group": 1, "microbatch": 8},
        "optimizer.learning_rate": 1e-8 * 1024, "optimizer.weight_decay": 1e-2, "optimizer.warmup_steps": 200, "sampling.eta": 0.0,
        "sampling.guidance_scale": 7.5, "lora": {}, "model_options.remat": True,
        "data": {"pairs": "pick_a_pic:data_cache/pickapic_v2", "data_dir": "data_cache", "latents": "", "drop": 0.2},
    },
    # D3PO (arXiv 2311.13231), github yk7333/d3po: 20 steps, eta 1, guidance 5, beta .1, ratio clip .1, 3e-5, LoRA. Ours: pairs by the
    # aesthetic score for people's choices, 64 samples a step
    "d3po": {
        "method": {"name": "d3po", "beta": 0.1, "clip_range": 0.1}, "steps": 400, "batch": {"prompts": 32, "group": 2, "microbatch": 8},
        "optimizer.learning_rate": 3e-5, "sampling.num_steps": 20,
    },
    # SPO (arXiv 2406.04314), github RockeyCoss/SPO: 20 steps, eta 1, guidance 5, 4 candidates, beta 10, threshold .3, 6e-5, rank 4.
    # Ours: PickScore of the clean prediction for its step-aware preference model, 40 prompts a step
    "spo": {
        "method": {"name": "spo", "k": 4, "beta": 10.0, "clip_range": 0.1, "threshold": 0.3}, "reward": PICK, "judge": CLIP, "steps": 1000,
        "checkpoint_every": 100, "evaluate_every": 100, "batch": {"prompts": 40, "group": 1, "microbatch": 4},
        "optimizer.learning_rate": 6e-5, "sampling.num_steps": 20,
    },
    # DiffusionNFT (arXiv 2509.16117; SD 3.5 there), github NVlabs/DiffusionNFT: rank 32, alpha 64, 3e-4, beta 1, reference 1e-4,
    # adv_clip 5, 48 groups of 24, EMA .9, no guidance. Ours: SD 1.5, PickScore, 20 steps for 10, 12 groups
    "diffusion_nft": {
        "method": {"name": "diffusion_nft", "beta": 1.0, "adv_clip": 5.0, "reference_weight": 1e-4, "old_decay": 0.5, "draws": 1},
        "reward": PICK, "judge": CLIP, "batch": {"prompts": 12, "group": 24, "microbatch": 8}, "steps": 300, "optimizer.ema": 0.9,
        "sampling": {"scheduler": "dpmsolver++", "num_steps": 20, "guidance_scale": 1.0},
        "lora": {"rank": 32, "alpha": 64.0, "targets": "diffusers", "file": ""},
    },
}  # fmt: skip
ARGUMENTS = tuple(CHANGES)


def get_config(method: str = "ddpo_aesthetic") -> ConfigDict:
    if method not in ARGUMENTS:
        raise ValueError(f"configs/sd15.py has no {method!r}; choose one of {', '.join(ARGUMENTS)}")
    changes = dict(CHANGES[method])
    c = ConfigDict()
    c.name = f"sd15:{method}"
    c.file = f"configs/sd15.py:{method}"
    c.seed = 0
    c.steps = 200
    c.checkpoint_every = 20
    c.evaluate_every = 20  # 0: never
    c.early_stop = False  # True: stop once gold has fallen from its best, and go back there
    c.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # a hub id, or a folder as diffusers writes it
    # dtype: what networks compute in; param_dtype: what parameters are kept in; variant: of the files, such as "fp16"; remat:
    # compute again in the backward pass what does not fit; height, width: 0 for what the UNet was trained on
    c.model_options = ConfigDict({"dtype": "bfloat16", "param_dtype": "float32", "variant": "", "remat": False, "height": 0, "width": 0})
    c.weights = "shipped"
    c.reward = either(changes.pop("reward", AESTHETIC))
    c.reward_errors = "raise"  # "mask": go on without the pictures on which a host reward fails
    c.aggregate = ""  # how a reward of several columns becomes one number, such as "{'how': 'maxmin'}"
    c.rollout = ""  # a test-time method whose samples are learned from, such as "{'name': 'fk', 'particles': 4}"
    c.method = ConfigDict(DDPO)
    # ddpo-pytorch config/base.py
    c.optimizer = ConfigDict({"name": "adamw", "learning_rate": 3e-4, "b1": 0.9, "b2": 0.999, "weight_decay": 1e-4, "clip_norm": 1.0,
                              "schedule": "constant", "warmup_steps": 0, "ema": 0.0})  # fmt: skip
    c.batch = ConfigDict({"prompts": 256, "group": 1, "microbatch": 8, "updates": 2})
    c.sampling = ConfigDict({"scheduler": "ddim", "num_steps": 50, "eta": 1.0, "guidance_scale": 5.0})
    # file: a LoRA to start from; {}: what `trainable` matches is trained itself
    c.lora = ConfigDict({"rank": 4, "targets": "ddpo-pytorch", "file": ""})
    c.trainable = "^unet/"
    # sizes of the mesh's axes (-1: what is left), "jit" or "pmap", rules of one's own for parameters, devices that score and do nothing
    # else: see training/sharding.py
    c.sharding = ConfigDict({"dcn": 1, "data": -1, "fsdp": 1, "tensor": 1, "backend": "jit", "rules": (), "scorers": 0})
    c.data = ConfigDict({"prompts": "configs/prompts/animals.txt"})
    judge = either(changes.pop("judge", PICK))
    for field, value in changes.items():
        if isinstance(value, dict):
            c[field] = ConfigDict(value)
        else:
            c.update_from_flattened_dict({field: value})
    c.evaluation = ConfigDict({
        "judge": judge, "prompts": "configs/prompts/animals_held_out.txt", "num_prompts": 16, "samples": 2,
        "quick_prompts": 4, "blend": (0.5, 1.0), "blend_prompts": 4, "chunk": 4, "scale": 1.0,
        "base_guidance_scale": max(c.sampling.guidance_scale, 5.0), "seed": 1234,
    })  # fmt: skip
    return c


def either(reward: Any) -> Any:
    """A field that takes a reward's name as well as a dictionary of its name and arguments."""
    return FieldReference(ConfigDict(reward) if isinstance(reward, dict) else reward, field_type=object)
