"""Settings of every test-time method for tests: what acts within a moment, and what makes it the plain chain."""

SETTINGS: dict[str, dict] = {
    "attend_and_excite": {"strength": 1.0, "share": 1.0, "refinements": 3, "sharpness": 3.0},
    "beam": {"beams": 2, "lookahead": 2}, "best_of_n": {"n": 4}, "classifier_guidance": {}, "das": {},
    "date": {"every": 1, "rho": 10.0}, "dno": {"iterations": 20, "learning_rate": 0.1, "block": 2, "permutations": 2}, "dps": {},
    "fk": {"window": (0.0, 1.0)}, "freedom": {"share": 4.0, "repeats": 2}, "noise_stability": {},
    "path_search": {"rounds": 3, "forward": 1, "back": 2}, "prompt_embedding": {"iterations": 20, "learning_rate": 2.0},
    "reneg": {"iterations": 20, "learning_rate": 2.0}, "reno": {"iterations": 10, "learning_rate": 1.0}, "svdd": {},
    "universal_guidance": {"alpha": 1.0, "backward": 2, "recurrences": 2}, "zero_order": {"n": 4, "iterations": 3, "strength": 1.0},
    "zigzag": {},
}  # fmt: skip
OFF: dict[str, dict] = {
    "attend_and_excite": {"strength": 0.0}, "beam": {"beams": 1, "children": 1}, "best_of_n": {"n": 1},
    "classifier_guidance": {"alpha": float("inf")}, "das": {"particles": 1, "strength": 0.0}, "date": {"rho": 0.0},
    "dno": {"iterations": 0, "block": 2}, "dps": {"zeta": 0.0}, "fk": {"particles": 1}, "freedom": {"share": 0.0},
    "noise_stability": {"n": 1}, "path_search": {"n": 1, "rounds": 0}, "prompt_embedding": {"iterations": 0},
    "reneg": {"iterations": 0}, "reno": {"iterations": 0}, "svdd": {"children": 1}, "universal_guidance": {"alpha": float("inf")},
    "zero_order": {"iterations": 0}, "zigzag": {"zigzags": 0},
}  # fmt: skip
ETA: dict[str, float] = {"dno": 1.0, "beam": 1.0, "fk": 1.0, "das": 1.0, "svdd": 1.0}  # of the sampler, 0 unless given
SCALE: dict[str, float] = {"reneg": 2.0, "freedom": 2.0, "zigzag": 2.0}  # of guidance, 1 unless given
NO_REWARD: set[str] = {"noise_stability", "zigzag"}  # methods that follow no reward: theirs is a property of their own
