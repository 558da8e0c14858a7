"""Train the critters model from nothing: tokenizer, text tower and UNet on noisy captions, then guidance distillation.

The three stages, each from the exported result of the one before (19, 4 and 2 minutes on two cores when nothing else runs):
  python -m alignment_jax train --config=configs/critters_base.py:base --workdir=runs/base
  python -m alignment_jax export --run=runs/base --out=runs/base/model.safetensors
  python -m alignment_jax train --config=configs/critters_base.py:more --workdir=runs/more
  python -m alignment_jax export --run=runs/more --out=runs/more/model.safetensors
  python -m alignment_jax train --config=configs/critters_base.py:distilled --workdir=runs/distilled
Gold all-right rate on 64 held-out prompts x 4, 8 steps: base .29 / .32 at guidance 3 / 5; more .47 / .59; distilled .43 at 1
and .60 at 2 (128 prompts). Going on to 4000 steps in `more` gives .72 / .80: the shipped model is stopped earlier, so that
there is something to align. The pictures (22 000) are drawn on first use, about two minutes on two cores; the
tokenizer is that of the world's words.
"""

from ml_collections import ConfigDict

ARGUMENTS = ("base", "more", "distilled")


def get_config(stage: str = "base") -> ConfigDict:
    if stage not in ARGUMENTS:
        raise ValueError(f"configs/critters_base.py has no {stage!r}; choose one of {', '.join(ARGUMENTS)}")
    c = ConfigDict()
    c.name = f"critters_base:{stage}"
    c.file = f"configs/critters_base.py:{stage}"
    c.seed = 0 if stage == "base" else 1
    c.steps = {"base": 7500, "more": 1600, "distilled": 240}[stage]
    c.checkpoint_every = 1000
    c.evaluate_every = 0
    c.model = "critters"
    c.weights = {"base": "init", "more": "runs/base/model.safetensors", "distilled": "runs/more/model.safetensors"}[stage]
    c.reward = ""
    c.trainable = "unet" if stage == "distilled" else ".*"
    c.method = ConfigDict({"name": "guidance_distillation", "teacher_scale": 4.0} if stage == "distilled" else {"name": "sft"})
    c.optimizer = ConfigDict({
        "name": "adam", "learning_rate": {"base": 1.2e-3, "more": 8e-4, "distilled": 5e-4}[stage], "schedule": "cosine",
        "warmup_steps": 10 if stage == "distilled" else 100, "clip_norm": 1.0, "ema": 0.99 if stage == "distilled" else 0.999,
    })  # fmt: skip
    c.batch = ConfigDict({"prompts": 48 if stage == "distilled" else 32, "group": 1})
    c.sampling = ConfigDict({"num_steps": 8})
    c.data = ConfigDict({"labels": "critters", "drop": 0.0 if stage == "distilled" else 0.1})
    c.lora = None
    return c
