"""Steer the critters model while it draws: test-time methods, a proxy that they follow, a gold judge that they never see.

  python -m alignment_jax evaluate --methods=best_of_n,fk,das,svdd,reno --nfe=400 --out=runs/test_time
  python -m alignment_jax evaluate --methods=all --nfe=32,106,320 --out=tests/curves/test_time

Each argument is a method; the setting into which its budget goes is left out here: it is found for each --nfe.
"""

from typing import Any

from ml_collections import ConfigDict

STILL = {"sampling": {"eta": 0.0}}
# what each argument changes: the method's settings and the sampler
CHANGES: dict[str, dict[str, Any]] = {
    "best_of_n": {},
    "best_of_n_still": {"method": {"name": "best_of_n"}, **STILL},  # what those that need a chain without noise are held against
    "zero_order": {"method": {"n": 2, "strength": 0.5}, **STILL},
    "path_search": {"method": {"rounds": 2, "children": 2, "forward": 1, "back": 3}},
    "beam": {"method": {"children": 2, "lookahead": 1}},
    "fk": {"method": {"window": (0.25, 1.0), "every": 1, "choose": "best"}},
    "das": {"method": {"strength": 0.3, "choose": "best"}},
    "svdd": {},
    "classifier_guidance": {},
    "dps": {},
    "universal_guidance": {"method": {"alpha": float("inf"), "backward": 1, "rate": 0.3}},
    "freedom": {"method": {"window": (0.0, 1.0), "travel": (0.3, 0.6)}},
    "reno": {"method": {"learning_rate": 1.0}, **STILL},
    "dno": {"method": {"learning_rate": 0.05, "permutations": 4}},
    "prompt_embedding": {"method": {"learning_rate": 0.05}},
    "reneg": {"method": {"learning_rate": 0.05}},
    "date": {"method": {"every": 2}},
    "noise_stability": STILL,
    "zigzag": STILL,
    "attend_and_excite": {"method": {"refinements": 2}},
    # over-optimisation on purpose: a proxy that knows clean pictures only, climbed through all noises
    "dno_hacked": {"method": {"name": "dno", "learning_rate": 0.2, "alpha": 0.0, "permutations": 0}, "reward": "critters_fragile"},
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
    c.sampling = ConfigDict({"num_steps": 8, "eta": 1.0, "guidance_scale": 2.0, **CHANGES[method].get("sampling", {})})
    c.reward = CHANGES[method].get("reward", "critters_proxy")
    c.judge = "critters_gold"
    c.prompts = "critters:held_out"
    c.num_prompts = 64
    c.samples = 2  # of each prompt
    return c
