"""Steer the critters model while it draws: test-time methods, a proxy that they follow, a gold judge that they never see.

  python -m alignment_jax evaluate --methods=best_of_n,fk,das,svdd,reno --nfe=400 --out=runs/test_time
  python -m alignment_jax evaluate --methods=all --nfe=32,106,320 --out=tests/curves/test_time

Each argument is a method; the setting into which its budget goes is left out here: it is found for each --nfe.
"""

from ml_collections import ConfigDict

# what each argument changes: the method's settings and the sampler
CHANGES = {
    "best_of_n": {},
}  # fmt: skip
ARGUMENTS = tuple(CHANGES)


def get_config(method: str = "best_of_n") -> ConfigDict:
    if method not in ARGUMENTS:
        raise ValueError(f"configs/critters_test_time.py has no {method!r}; choose one of {', '.join(ARGUMENTS)}")
    c = ConfigDict()
    c.name = f"critters_test_time:{method}"
    c.model = "critters"
    c.weights = "shipped"
    c.model_options = ConfigDict({"dtype": "float32"})
    c.method = ConfigDict({"name": method, **CHANGES[method].get("method", {})})
    c.sampling = ConfigDict({"num_steps": 8, "eta": 0.0, "guidance_scale": 2.0, **CHANGES[method].get("sampling", {})})
    c.reward = "critters_proxy"
    c.judge = "critters_gold"
    c.prompts = "critters:held_out"
    c.num_prompts = 64
    c.samples = 4  # of each prompt
    return c
