"""python -m alignment_jax {train, sample, evaluate, label, list, selfcheck, export}."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

FLAGS = flags.FLAGS


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; a mistake of the user ends with one message and exit code 2, not with a traceback."""
    argv = list(sys.argv if argv is None else argv)
    commands = {"train": (_train_flags, train), "sample": (_sample_flags, sample), "evaluate": (_evaluate_flags, evaluate),
                "label": (_label_flags, label), "list": (_list_flags, list_), "selfcheck": (_selfcheck_flags, selfcheck),
                "export": (_export_flags, export)}  # fmt: skip
    if len(argv) < 2 or argv[1] not in commands:
        asked = f"{argv[1]!r} is not a command. " if len(argv) > 1 and not argv[1].startswith("-") else ""
        print(f"{asked}usage: python -m alignment_jax {{{','.join(commands)}}} [flags]; COMMAND --help tells the flags",
              file=sys.stderr)  # fmt: skip
        sys.exit(0 if argv[1:2] in (["--help"], ["-h"]) else 2)
    define, run = commands[argv[1]]
    define()
    logging.set_verbosity(logging.WARNING)
    logging.use_absl_handler()
    try:
        try:
            rest = FLAGS([f"{argv[0]} {argv[1]}", *argv[2:]])[1:]
        except AttributeError as error:  # how ml_collections says that an override names no field
            raise ValueError("the config has no field " + str(error).replace("\n", ". ")) from error
        run(rest)
    except flags.Error as error:
        _fail(str(error))
    except (ValueError, FileNotFoundError, AttributeError, KeyError, FloatingPointError, OSError, ImportError) as error:
        if os.environ.get("ALIGNMENT_JAX_DEBUG"):
            raise
        _fail(str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error))
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str, code: int = 2) -> None:
    print(f"error: {message}\n(ALIGNMENT_JAX_DEBUG=1 shows where)", file=sys.stderr)
    sys.exit(code)


def _compilation_cache() -> None:
    """Compiled programs are kept between runs, under the user's cache unless JAX is told another place."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/alignment_jax/jax").expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# -- train ---------------------------------------------------------------------------------------------------------


def _train_flags() -> None:
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "FILE.py:ARGUMENT, an ml_collections config.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder of the run; one that holds checkpoints is resumed.")
    flags.mark_flags_as_required(["config", "workdir"])


def train(rest: Sequence[str]) -> None:
    """Trains what --config describes into --workdir; goes on where an earlier run stopped."""
    _no_more(rest)
    _compilation_cache()
    config = FLAGS.config
    if config.get("kind") == "recogniser":
        from .training import recogniser

        recogniser.train(config, FLAGS.workdir)
        return
    from .training import loop

    loop.train(config, FLAGS.workdir)
    report = Path(FLAGS.workdir) / "report.html"
    if report.exists():
        print(f"report: {report}")


# -- sample --------------------------------------------------------------------------------------------------------


def _sample_flags() -> None:
    flags.DEFINE_string("model", "critters", "A model's name (list models), or module:factory.")
    flags.DEFINE_string("weights", "shipped", "A .safetensors file of the whole model instead of the shipped weights.")
    flags.DEFINE_string("run", None, "Workdir of a run: its tuned parameters are used.")
    flags.DEFINE_float("scale", None, "How much of the run's change is used: 0 the base, 1 all; default as it was judged.")
    flags.DEFINE_string("prompts", None, "A prompt, or a txt, jsonl or csv file of prompts.")
    flags.DEFINE_string("out", None, "Folder for the pictures.")
    flags.DEFINE_integer("num_steps", None, "Network calls a picture.", lower_bound=1)
    flags.DEFINE_float("guidance_scale", None, "Classifier-free guidance.")
    flags.DEFINE_float("eta", None, "DDIM's noise, 0 to 1.")
    flags.DEFINE_integer("seed", 0, "Seed of the noise.")
    flags.DEFINE_integer("samples", 1, "Pictures a prompt.", lower_bound=1)
    flags.DEFINE_string("noise", None, "An .npy of the initial noise [N, ...], unit variance, instead of the seed's.")
    flags.DEFINE_bool("save_arrays", False, "Also write images.npy, float32 in [0, 1], [N,H,W,C].")
    flags.mark_flags_as_required(["prompts", "out"])


def sample(rest: Sequence[str]) -> None:
    """Pictures of prompts, from a shipped model or a tuned one."""
    _no_more(rest)
    _compilation_cache()
    from .training.generate import generate

    settings = {k: FLAGS[k].value for k in ("num_steps", "guidance_scale", "eta") if FLAGS[k].value is not None}
    files = generate(model=FLAGS.model, weights_file=FLAGS.weights, run=FLAGS.run, scale=FLAGS.scale, prompts=FLAGS.prompts,
                     out=FLAGS.out, seed=FLAGS.seed, samples=FLAGS.samples, noise=FLAGS.noise,
                     save_arrays=FLAGS.save_arrays, settings=settings)  # fmt: skip
    print(f"{len(files)} pictures in {FLAGS.out}")


# -- evaluate ------------------------------------------------------------------------------------------------------


def _evaluate_flags() -> None:
    flags.DEFINE_string("run", None, "Workdir of a run.")
    flags.DEFINE_string("against", "base", "What it is compared with: base.")
    flags.mark_flags_as_required(["run"])


def evaluate(rest: Sequence[str]) -> None:
    """Judges a run's tuned model beside its base anew; rewrites report.html and summary.json."""
    _no_more(rest)
    _compilation_cache()
    if FLAGS.against != "base":
        raise ValueError(f"--against={FLAGS.against} is not known; allowed: base")
    from .training.loop import evaluate_run

    summary = evaluate_run(FLAGS.run)
    print(json.dumps(summary, indent=1))


# -- label -------------------------------------------------------------------------------------------------------------


def _label_flags() -> None:
    flags.DEFINE_string("model", "critters", "A model's name (list models), or module:factory.")
    flags.DEFINE_string("run", None, "Workdir of a run: its tuned parameters are used.")
    flags.DEFINE_string("prompts", "critters:train", "A txt, jsonl or csv file of prompts, or critters:train.")
    flags.DEFINE_string("annotator", "critters_annotator", "Who compares: a name, or module:factory.")
    flags.DEFINE_integer("pairs", 4096, "Pairs to make.", lower_bound=1)
    flags.DEFINE_float("guidance_scale", None, "Classifier-free guidance.")
    flags.DEFINE_integer("num_steps", None, "Network calls a picture.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the noise and of the annotator.")
    flags.DEFINE_string("out", None, "The .npz to write.")
    flags.mark_flags_as_required(["out"])


def label(rest: Sequence[str]) -> None:
    """Preference pairs from a model and an annotator, for the methods that learn from them."""
    _no_more(rest)
    _compilation_cache()
    from .training.label import label as make

    settings = {k: FLAGS[k].value for k in ("num_steps", "guidance_scale") if FLAGS[k].value is not None}
    made = make(model=FLAGS.model, run=FLAGS.run, prompts=FLAGS.prompts, annotator=FLAGS.annotator, out=FLAGS.out,
                seed=FLAGS.seed, pairs=FLAGS.pairs, settings=settings)  # fmt: skip
    print(f"{made['pairs']} pairs, {made['ties']} of them ties, in {FLAGS.out}")


# -- list ----------------------------------------------------------------------------------------------------------


def _list_flags() -> None:
    flags.DEFINE_bool("json", False, "One JSON list of objects.")


def list_(rest: Sequence[str]) -> None:
    """What there is: algorithms, rewards, models, configs or metrics."""
    from .training import catalogue

    tables: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "algorithms": catalogue.algorithms, "rewards": catalogue.rewards, "models": catalogue.models,
        "configs": catalogue.configs, "metrics": catalogue.metrics,
    }  # fmt: skip
    if len(rest) != 1 or rest[0] not in tables:
        raise ValueError(f"list what? Choose one of {', '.join(tables)}; got {' '.join(rest) or 'nothing'}")
    rows = tables[rest[0]]()
    if FLAGS.json:
        print(json.dumps(rows, indent=1))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(f"{row['name']:{width}}  {row['summary']}" + (f"  [{row['paper']}]" if row["paper"] else ""))


# -- selfcheck, export -----------------------------------------------------------------------------------------------


def _selfcheck_flags() -> None:
    pass


def selfcheck(rest: Sequence[str]) -> None:
    """Tries devices, the ratio before the first update, gradients and resuming on a tiny run; under two minutes."""
    _no_more(rest)
    from .training.selfcheck import run

    failed = [name for name, good, _ in run() if not good]
    if failed:
        _fail(f"failed: {', '.join(failed)}", 1)


def _export_flags() -> None:
    flags.DEFINE_string("run", None, "Workdir of a run.")
    flags.DEFINE_string("out", None, "A .safetensors file for the whole tuned model.")
    flags.DEFINE_float("scale", None, "How much of the run's change is kept; default as it was judged.")
    flags.mark_flags_as_required(["run", "out"])


def export(rest: Sequence[str]) -> None:
    """Writes a run's tuned model as one safetensors file, adapters merged."""
    _no_more(rest)
    from .training.generate import load_run
    from .weights import save

    _, params, _ = load_run(FLAGS.run, FLAGS.scale)
    save(FLAGS.out, params)
    print(f"written: {FLAGS.out}; use it with sample --weights={FLAGS.out}")


def _no_more(rest: Sequence[str]) -> None:
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; flags are written --name=value")
