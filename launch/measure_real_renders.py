"""Writes alignment_jax/assets/critters/real.json: how real renders of held-out prompts measure, for reports to compare with.

  python launch/measure_real_renders.py        (needs the extra `critters`; half a minute)
"""

import json

import numpy as np

from alignment_jax.data import critters
from alignment_jax.evaluation.summary import measurement, plain
from alignment_jax.models import ASSETS
from alignment_jax.rewards import critters as judges

PROMPTS, SAMPLES = 128, 8

path = ASSETS / "real.json"
if not path.exists():
    path.write_text(json.dumps({"diversity": {}, "nuisances": None}))
judge = judges.critters_gold()
prompts = critters.prompts("held_out", PROMPTS, seed=0)
rng = np.random.default_rng(0)
attributes = judge.targets(prompts)
images = np.stack([[critters.render(a, critters.draw_nuisances(a, rng)) for _ in range(SAMPLES)] for a in attributes]) / 255.0
seen = judge.look(images.reshape(-1, 32, 32, 3).astype(np.float32), attributes.repeat(SAMPLES, 0))
shaped = {k: np.asarray(seen[k]).reshape(PROMPTS, SAMPLES, *np.shape(seen[k])[1:]) for k in ("right", "features", "attributes")}
nuisances = {k: v.reshape(PROMPTS, SAMPLES) for k, v in seen["nuisances"].items()}
m = measurement(right=shaped["right"], attributes={}, proxy=np.zeros((PROMPTS, SAMPLES)), images=images,
                features=shaped["features"])  # fmt: skip
path.write_text(json.dumps(plain({"gold": m["gold"], "diversity": m["diversity"], "nuisances": nuisances})))
print(json.dumps(plain({"gold": m["gold"], **m["diversity"]}), indent=1))
