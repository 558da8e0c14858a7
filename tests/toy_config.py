"""A run of the toy model for the command line: a second to compile, every part of the loop in it."""

from ml_collections import ConfigDict


def get_config(argument: str = "5") -> ConfigDict:
    """argument: the number of steps; "plain5": of a run that is not judged."""
    steps, judged = argument.removeprefix("plain"), not argument.startswith("plain")
    c = ConfigDict({
        "name": "toy", "file": "tests/toy_config.py", "seed": 0, "steps": int(steps), "checkpoint_every": 2, "evaluate_every": 5,
        "early_stop": False, "model": "toy_model:toy", "model_options": {"side": 64}, "weights": "init", "reward": "own_reward:brightness",
        "reward_errors": "raise", "trainable": "unet", "lora": {}, "sampling": {"num_steps": 3, "eta": 1.0, "guidance_scale": 1.0},
        "method": {"name": "ddpo", "advantage": "group"}, "optimizer": {"learning_rate": 1e-2, "ema": 0.9},
        "batch": {"prompts": 4, "group": 4, "microbatch": 8}, "data": {"prompts": ("a", "bb", "ccc", "dd", "e", "fff")},
        "sharding": {"dcn": 1, "data": -1, "fsdp": 1, "tensor": 1, "backend": "jit", "rules": (), "scorers": 0},
        "evaluation": {"judge": "jpeg_incompressibility", "prompts": ("a", "bb", "cccc", "d"), "num_prompts": 2, "samples": 2,
                       "quick_prompts": 2, "blend": (0.5,), "blend_prompts": 2, "chunk": 2, "scale": 1.0, "seed": 1},
    })  # fmt: skip
    if not judged:
        del c.evaluation
    return c
