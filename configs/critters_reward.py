"""Train a reward model on preference pairs of critters, and learn how far it can be believed.

  python -m alignment_jax label --guidance_scale=2 --pairs=4096 --out=data_cache/critters_pairs.npz
  python -m alignment_jax train-reward --config=configs/critters_reward.py:picture --workdir=runs/reward
  python -m alignment_jax train --config=configs/critters.py:default --workdir=runs/by_reward \
      --config.reward='{"name": "trained", "folder": "runs/reward"}'

picture: a score of pictures, its network started from the recogniser of the proxy reward. noisy: a score of the chain's states
for methods that judge steps (lpo). people: a score for each annotator, for pairs that name several.
Of 603 pairs of held-out prompts [95 %]; in 59 % of them gold finds as much right in both pictures, so that answers are coins:
  picture  .619 [.579, .656] of the answers, ECE .031; gold's order, where it has one, .842 [.791, .882], the annotator .887
  noisy    .544 [.504, .583] (trunk_rate 0, 120 steps; .527 with .2, 150 steps of 32), gold's order .644 [.582, .701]: 3 500 yes
           or no are too little to learn pictures under noise from
  noisy, on the same pairs with soft labels by the picture model: gold's order .777 [.721, .825], its teacher .842; of the
           teacher's choices .677 at time .1, .635 at .5, .544 at .9; of those that it is sure of (.8 to 1) 95 %
Two busy cores: 4 to 9 minutes each. Scores of neighbouring states differ by about .1, so spo and lpo want a temperature of that size.
"""

from ml_collections import ConfigDict

ARGUMENTS = ("picture", "noisy", "people")


def get_config(which: str = "picture") -> ConfigDict:
    if which not in ARGUMENTS:
        raise ValueError(f"configs/critters_reward.py has no {which!r}; choose one of {', '.join(ARGUMENTS)}")
    c = ConfigDict()
    c.kind = "reward"  # for `train-reward`
    c.name = f"critters_reward:{which}"
    c.seed = 0
    c.steps = 250 if which == "noisy" else 200
    c.batch = 64  # pairs
    c.learning_rate = 3e-3 if which == "noisy" else 1e-3
    c.checkpoint_every = 100
    c.pairs = "data_cache/critters_pairs.npz"  # an .npz of `label`, or whatever data.pairs of a run may be
    c.data_dir = "data_cache"
    c.held_out = 0.15  # of the prompts
    c.reads = "noisy" if which == "noisy" else "picture"
    c.trunk = "proxy"  # or "none": a picture network from nothing
    # a reward of pictures whose odds are learned instead of the answers; "": the answers
    c.teacher = "{'name': 'trained', 'folder': 'runs/reward'}" if which == "noisy" else ""
    c.trunk_rate = 0.0 if which == "noisy" else 0.1  # of the learning rate, for the network under the head; 0: it stays as it is
    c.model = "critters"  # of a noisy reward: whose states, a name or a folder as diffusers writes it
    c.layers = "^(down|mid)"  # and which of its layers are read
    c.width = 128
    c.augment = True  # pictures are changed at random while it is trained
    c.ties = "half"  # a tie is half a win each; "davidson": an answer of its own; "drop"
    c.own = which == "people"  # a score for each annotator
    c.temperature = False  # how unsure each annotator is
    c.offset = False  # how much each annotator likes the picture shown first
    c.judge = "critters_gold"  # whose order the model's is compared with; "" for nobody's
    return c
