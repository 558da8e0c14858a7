"""python -m alignment_jax {train, train-reward, plan, preflight, sample, evaluate, score, label, export, convert, list, selfcheck}."""

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
    """Runs one command; a mistake of the user ends with one message and exit code 2, a process that others waited for in vain with 1, and
    neither with a traceback."""
    argv = list(sys.argv if argv is None else argv)
    commands = {"train": (_loop_flags, train), "train-reward": (_train_flags, train_reward),
                "plan": (_plan_flags, plan), "preflight": (_train_flags, preflight), "sample": (_sample_flags, sample),
                "evaluate": (_evaluate_flags, evaluate), "score": (_score_flags, score), "label": (_label_flags, label),
                "export": (_export_flags, export), "convert": (_convert_flags, convert), "list": (_list_flags, list_),
                "selfcheck": (_selfcheck_flags, selfcheck)}  # fmt: skip
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
            said = str(error).strip('"').strip("'").replace("\\'", "'").replace("\\n", "\n")
            raise ValueError("the config has no field " + ". ".join(said.split("\n"))) from error
        if argv[1] not in ("train", "preflight"):
            _alone(argv[1])
        run(rest)
    except flags.Error as error:
        _fail(str(error))
    except (ValueError, FileNotFoundError, AttributeError, KeyError, FloatingPointError, OSError, ImportError,
            MemoryError) as error:  # fmt: skip
        if os.environ.get("ALIGNMENT_JAX_DEBUG"):
            raise
        again = isinstance(error, (TimeoutError, ConnectionError))  # it may go well next time, which a launcher sees by the code
        _fail(str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error), 1 if again else 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str, code: int = 2) -> None:
    print(f"error: {message}\n(ALIGNMENT_JAX_DEBUG=1 shows where)", file=sys.stderr)
    if code != 2:  # what waits for other processes may hang still
        from .training.distributed import leave_stuck

        leave_stuck(code)
    sys.exit(code)


def _alone(command: str) -> None:
    """Raises ValueError where this is one of several processes, each of which would do all of the work."""
    from .training.distributed import place

    me = place()
    if me is not None and me.processes > 1:
        raise ValueError(f"{command} is the work of one process, and this is process {me.number} of {me.processes}: each would do all of "
                         "it and write the same files. Start it on one host, without a launcher")  # fmt: skip


def _compilation_cache() -> None:
    """Compiled programs are kept between runs, under the user's cache unless JAX is told another place."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/alignment_jax/jax").expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# -- train ---------------------------------------------------------------------------------------------------------


def _config_flag() -> None:
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "FILE.py:ARGUMENT, an ml_collections config.", lock_config=True)


def _train_flags() -> None:
    _config_flag()
    flags.DEFINE_string("workdir", None, "Folder of the run; one that holds checkpoints is resumed.")
    flags.mark_flags_as_required(["config", "workdir"])


def _loop_flags() -> None:
    _train_flags()
    flags.DEFINE_string("profile", "", "FIRST:LAST, steps of which WORKDIR/profile gets a trace for XProf and the metrics the seconds "
                        "of each part.")  # fmt: skip


def train(rest: Sequence[str]) -> None:
    """Trains what --config describes into --workdir; goes on where an earlier run stopped."""
    _no_more(rest)
    from .training import distributed

    config = FLAGS.config
    if config.get("kind") == "reward":
        raise ValueError(f"{config.name} describes a reward model; use: python -m alignment_jax train-reward with the same flags")
    if config.get("kind") == "recogniser":
        from .training import recogniser

        _alone("training a recogniser")
        _compilation_cache()
        recogniser.train(config, FLAGS.workdir)
        return
    distributed.start()
    _compilation_cache()
    import jax

    from .training import loop, plan

    try:
        loop.train(config, FLAGS.workdir, _steps(FLAGS.profile) if FLAGS.profile else None)
    except (jax.errors.JaxRuntimeError, ValueError, OSError) as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise MemoryError(plan.out_of_memory(config, str(error))) from error
        if distributed.broken(str(error)):
            _fail(distributed.lost(str(error)), 1)
        raise
    report = Path(FLAGS.workdir) / "report.html"
    if report.exists() and jax.process_index() == 0:
        print(f"report: {report}")


def _steps(text: str) -> tuple[int, int]:
    """(first, last) of FIRST:LAST; "steps=" before it is left out."""
    first, _, last = text.removeprefix("steps=").partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ValueError(f"--profile {text!r} is not FIRST:LAST, two numbers of steps counted from 1, such as 10:15")
    return int(first), int(last)


def train_reward(rest: Sequence[str]) -> None:
    """Trains a reward model on preference pairs into --workdir; a run then takes it as {"name": "trained", "folder": WORKDIR}."""
    _no_more(rest)
    _compilation_cache()
    from .training import reward_model

    if reward_model.train(FLAGS.config, FLAGS.workdir):
        print(f"reward: --config.reward='{{\"name\": \"trained\", \"folder\": \"{FLAGS.workdir}\"}}'")


# -- plan ----------------------------------------------------------------------------------------------------------


def _plan_flags() -> None:
    _config_flag()
    flags.DEFINE_string("topology", "", "A TPU slice such as v5e:4x4, which need not be there; without it, the devices at hand.")
    flags.DEFINE_bool("json", False, "One JSON object.")
    flags.DEFINE_bool("fresh", False, "Compile anew what an earlier plan has kept.")
    flags.mark_flags_as_required(["config"])


def plan(rest: Sequence[str]) -> None:
    """Compiles one step of --config ahead of time: does it fit, what does it cost; needs no weights and, with --topology, no TPU."""
    _no_more(rest)
    if FLAGS.topology:
        import jax

        jax.config.update("jax_platforms", "cpu")  # libtpu only compiles here
    else:
        _compilation_cache()
    from .training import plan as plans

    found = plans.plan(FLAGS.config, FLAGS.topology, fresh=FLAGS.fresh, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(found, indent=1) if FLAGS.json else plans.text(found))


# -- preflight -----------------------------------------------------------------------------------------------------


def preflight(rest: Sequence[str]) -> None:
    """Whether all hosts of a run are there, alike and well, with the same --config and --workdir as train; it takes a minute at most."""
    _no_more(rest)
    from .training import distributed

    distributed.start()
    import jax

    from .training import preflight as hosts
    from .training import workdir

    found = hosts.preflight(hosts.facts(FLAGS.config, workdir.folder(FLAGS.workdir)))
    if jax.process_index() == 0:
        print(hosts.text(found), flush=True)


# -- sample --------------------------------------------------------------------------------------------------------


def _sample_flags() -> None:
    flags.DEFINE_string("model", "critters", "A name (list models), a folder as diffusers writes it, a hub id, or module:factory.")
    flags.DEFINE_string("weights", "shipped", "A .safetensors file of the whole model instead of its own weights.")
    flags.DEFINE_string("run", None, "Workdir of a run: its tuned parameters are used.")
    flags.DEFINE_float("scale", None, "How much of the run's change is used: 0 the base, 1 all; default as it was judged.")
    flags.DEFINE_multi_string("lora", [], "A LoRA's .safetensors file, as diffusers, PEFT or kohya's tools write it; may be repeated.")
    flags.DEFINE_multi_float("lora_scale", [], "How much of each LoRA is used; 1 unless given.")
    flags.DEFINE_string("prompts", None, "A prompt, or a txt, jsonl or csv file of prompts.")
    flags.DEFINE_string("negative_prompt", "", "What guidance leads away from.")
    flags.DEFINE_string("negative_run", "", "Workdir of a run on swapped labels (method.negative): guidance leads away from its network. "
                        "base: the model without the change of --run and --lora.")  # fmt: skip
    flags.DEFINE_float("negative_merge", 0.0, "The share of the pictures' own model mixed into it, 0 to 1; more for high guidance.")
    flags.DEFINE_bool("autoguidance", False, "The network of --negative_run, a less trained one or the base, sees the picture's own prompt "
                      "in place of the negative one.")  # fmt: skip
    flags.DEFINE_string("method", None, "A test-time method (list test_time), or module:factory; without one, plain sampling.")
    flags.DEFINE_multi_string("option", [], "NAME=VALUE for the method, such as particles=8; may be repeated.")
    flags.DEFINE_string("reward", "", "What the method follows: as config.reward, such as critters_proxy or \"{'name': ..., ...}\".")
    flags.DEFINE_string("out", None, "Folder for the pictures.")
    flags.DEFINE_string("scheduler", None, "ddim, ddpm, euler, euler_ancestral, dpmsolver++, sde-dpmsolver++ or lcm.")
    flags.DEFINE_string("spacing", None, "Where its times lie: leading, trailing or linspace.")
    flags.DEFINE_integer("height", None, "Of the pictures, in pixels.", lower_bound=8)
    flags.DEFINE_integer("width", None, "Of the pictures, in pixels.", lower_bound=8)
    flags.DEFINE_string("dtype", None, "What networks compute in: float32 or bfloat16.")
    flags.DEFINE_string("variant", None, "Of the weights' files, such as fp16.")
    flags.DEFINE_integer("num_steps", None, "Network calls a picture.", lower_bound=1)
    flags.DEFINE_float("guidance_scale", None, "Classifier-free guidance.")
    flags.DEFINE_float("guidance_rescale", None, "The share of guidance's gain in contrast that is taken back, 0 to 1.")
    flags.DEFINE_list("guidance_interval", None, "LOW,HIGH: guidance between these noise levels alone, 0 clean, 1 noise; such as 0.2,0.8.")
    flags.DEFINE_float("eta", None, "DDIM's noise, 0 to 1.")
    flags.DEFINE_integer("seed", 0, "Seed of the noise.")
    flags.DEFINE_integer("samples", 1, "Pictures a prompt.", lower_bound=1)
    flags.DEFINE_integer("batch", None, "Prompts at once: 64, or 8 with a method, whose particles come on top.", lower_bound=1)
    flags.DEFINE_string("noise", None, "An .npy of the initial noise, unit variance, [N,h,w,c] or diffusers' latents [N,c,h,w].")
    flags.DEFINE_bool("save_arrays", False, "Also write images.npy, float32 in [0, 1], [N,H,W,C].")
    flags.DEFINE_bool("save_attention", False, "Also write 0000_attention.png, ...: where each word of the prompt is looked at.")
    flags.mark_flags_as_required(["prompts", "out"])


def sample(rest: Sequence[str]) -> None:
    """Pictures of prompts, from a shipped model or a tuned one."""
    _no_more(rest)
    _compilation_cache()
    from .training.generate import generate

    settings = _given("num_steps", "guidance_scale", "guidance_rescale", "guidance_interval", "eta", "scheduler", "spacing")
    files, scales = FLAGS.lora, FLAGS.lora_scale or [1.0] * len(FLAGS.lora)
    if len(scales) != len(files):
        raise ValueError(f"{len(files)} --lora and {len(scales)} --lora_scale; give a scale for each file, or none")
    written = generate(model=FLAGS.model, weights_file=FLAGS.weights, run=FLAGS.run, scale=FLAGS.scale, prompts=FLAGS.prompts,
                       out=FLAGS.out, seed=FLAGS.seed, samples=FLAGS.samples, noise=FLAGS.noise,
                       save_arrays=FLAGS.save_arrays, attention=FLAGS.save_attention, settings=settings, negative=FLAGS.negative_prompt,
                       batch=FLAGS.batch or (8 if FLAGS.method else 64), method=_method(), reward=FLAGS.reward,
                       options=_given("height", "width", "dtype", "variant"), loras=list(zip(files, scales)),
                       negative_run=FLAGS.negative_run, negative_merge=FLAGS.negative_merge,
                       autoguidance=FLAGS.autoguidance)  # fmt: skip
    print(f"{len(written)} pictures in {FLAGS.out}")


# -- evaluate ------------------------------------------------------------------------------------------------------


def _evaluate_flags() -> None:
    flags.DEFINE_string("run", None, "Workdir of a run.")
    flags.DEFINE_string("against", "base", "What it is compared with: base.")
    flags.DEFINE_list("methods", [], "Test-time methods to compare instead, as the config's arguments name them; 'all' for all.")
    flags.DEFINE_list("nfe", [], "Network calls a sample that each method may spend, a backward pass counted as two; several give a curve.")
    flags.DEFINE_string("config", "configs/critters_test_time.py", "With --methods: what is drawn and judged, a get_config(NAME).")
    flags.DEFINE_integer("num_prompts", None, "With --methods: prompts instead of the config's number.", lower_bound=2)
    flags.DEFINE_integer("samples", None, "With --methods: samples a prompt instead of the config's number.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "With --methods: of the noise.")
    flags.DEFINE_string("out", None, "With --methods: folder of the results, one .json a method, the table and the figure; it is added to.")


def evaluate(rest: Sequence[str]) -> None:
    """Judges a run's tuned model beside its base anew; or compares test-time methods at equal numbers of network calls."""
    _no_more(rest)
    _compilation_cache()
    if FLAGS.methods:
        from .training.compare import compare

        if not FLAGS.nfe or not FLAGS.out:
            raise ValueError("--methods needs --nfe, the network calls a sample may cost, such as --nfe=100,400, and --out")
        wrong = [text for text in FLAGS.nfe if not text.isdigit() or int(text) < 1]
        if wrong:
            raise ValueError(f"--nfe={wrong[0]} is not a positive whole number")
        print(compare(FLAGS.config, FLAGS.methods, [int(n) for n in FLAGS.nfe], FLAGS.out, seed=FLAGS.seed, run=FLAGS.run or "",
                      sizes=_given("num_prompts", "samples")))  # fmt: skip
        return
    if not FLAGS.run:
        raise ValueError("evaluate what? Give --run=WORKDIR, or --methods=best_of_n,... --nfe=100 --out=FOLDER")
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
    flags.DEFINE_multi_string("annotator", ["critters_annotator"], "Who compares: an annotator, a reward (list rewards), "
                              "module:factory of either, or \"{'name': ..., ...}\"; given several times, all answer.")  # fmt: skip
    flags.DEFINE_bool("both_orders", False, "Each comparison is asked twice, with the pictures swapped: no side is favoured.")
    flags.DEFINE_float("temperature", None, "Of a reward's answers: the difference of scores that wins 73 % of them; 1 unless given.")
    flags.DEFINE_float("tie", None, "Scores of a reward that differ by less are a tie.")
    flags.DEFINE_float("noise", None, "The share of a reward's answers that are given at random.")
    flags.DEFINE_bool("soft", None, "A reward's answers are probabilities, not choices.")
    flags.DEFINE_integer("pairs", 4096, "Pairs, or lists, to make.", lower_bound=1)
    flags.DEFINE_integer("list", 0, "Write lists of that many pictures with their scores instead of pairs.", lower_bound=0)
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

    made = make(model=FLAGS.model, run=FLAGS.run, prompts=FLAGS.prompts, annotator=FLAGS.annotator, out=FLAGS.out, seed=FLAGS.seed,
                pairs=FLAGS.pairs, size=FLAGS.list, swap=FLAGS.both_orders, settings=_given("num_steps", "guidance_scale"),
                options=_given("temperature", "tie", "noise", "soft"))  # fmt: skip
    if FLAGS.list:
        print(f"{made['lists']} lists of {made['size']} in {FLAGS.out}")
        return
    print(f"{made.pop('pairs')} pairs, {made.pop('ties')} of them ties, in {FLAGS.out}")
    for who, found in made.items():
        print(f"{who} agree on {found['agreement']:.3f} of {found['n']} pairs, kappa {found['kappa']:.3f}")


# -- list ----------------------------------------------------------------------------------------------------------


def _list_flags() -> None:
    flags.DEFINE_bool("json", False, "One JSON list of objects.")


def list_(rest: Sequence[str]) -> None:
    """What there is: algorithms, test_time, rewards, models, configs or metrics."""
    from .training import catalogue

    tables: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "algorithms": catalogue.algorithms, "test_time": catalogue.test_time, "rewards": catalogue.rewards,
        "models": catalogue.models, "configs": catalogue.configs, "metrics": catalogue.metrics,
    }  # fmt: skip
    if len(rest) != 1 or rest[0] not in tables:
        raise ValueError(f"list what? Choose one of {', '.join(tables)}; got {' '.join(rest) or 'nothing'}")
    rows = tables[rest[0]]()
    if FLAGS.json:
        print(json.dumps(rows, indent=1))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        facts = [row["paper"]] if row["paper"] else []
        if "licence" in row:
            facts += [f"{row['range'][0]:g} to {row['range'][1]:g}", row["licence"]]
        print(f"{row['name']:{width}}  {row['summary']}" + (f"  [{'; '.join(facts)}]" if facts else ""))


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
    flags.DEFINE_string("out", None, "A .safetensors file for merged; a folder for the others.")
    flags.DEFINE_string("format", "merged", "merged (one file for sample --weights), diffusers (a folder), peft or kohya (the LoRA).")
    flags.DEFINE_float("scale", None, "How much of the run's change is kept; default as it was judged.")
    flags.DEFINE_string("dtype", None, "What is written: float32, float16 or bfloat16; default as it is.")
    flags.mark_flags_as_required(["run", "out"])


def export(rest: Sequence[str]) -> None:
    """Writes what a run trained: the whole model, or its LoRA for diffusers and ComfyUI."""
    _no_more(rest)
    from .training.export import export as write

    print(f"written: {write(FLAGS.run, FLAGS.out, FLAGS.format, FLAGS.scale, _dtype(FLAGS.dtype))}")


def _convert_flags() -> None:
    flags.DEFINE_string("source", None, "A single file in Stability's own names, or a folder as diffusers writes it.")
    flags.DEFINE_string("out", None, "The other of the two: a folder, or a .safetensors file.")
    flags.DEFINE_string("like", None, "For a single file: a folder of the same family, for configs and tokenizers.")
    flags.DEFINE_string("dtype", None, "What is written: float32, float16 or bfloat16; default as it is.")
    flags.mark_flags_as_required(["source", "out"])


def convert(rest: Sequence[str]) -> None:
    """Between a single-file checkpoint and a diffusers folder, both ways."""
    _no_more(rest)
    from .training.export import convert as write

    print(f"written: {write(FLAGS.source, FLAGS.out, FLAGS.like, _dtype(FLAGS.dtype))}")


# -- score ---------------------------------------------------------------------------------------------------------


def _score_flags() -> None:
    flags.DEFINE_string("reward", None, "A reward's name (list rewards), or module:name.")
    flags.DEFINE_string("weights", None, "Its weights: a folder, a .safetensors file or a hub id.")
    flags.DEFINE_multi_string("option", [], "NAME=VALUE for the reward's other arguments, such as mode=exact or scale=2.5.")
    flags.DEFINE_string("images", None, "A folder of pictures, or an .npy [N,H,W,C].")
    flags.DEFINE_string("prompts", None, "A file with one prompt a picture, or one prompt for all.")
    flags.DEFINE_string("out", None, "The .json to write.")
    flags.mark_flags_as_required(["reward", "images", "out"])


def score(rest: Sequence[str]) -> None:
    """Scores pictures from files with any reward."""
    _no_more(rest)
    _compilation_cache()
    from .training.score import score as run

    options = _options() | _given("weights")
    result = run(reward=FLAGS.reward, options=options, images=FLAGS.images, prompts=FLAGS.prompts, out=FLAGS.out)
    print(f"{result['reward']}: mean {result['mean']:.4f}, std {result['std']:.4f} of {len(result['scores'])} pictures; {FLAGS.out}")


def _given(*names: str) -> dict[str, Any]:
    """The flags of these names that were given."""
    return {k: FLAGS[k].value for k in names if FLAGS[k].value is not None}


def _options() -> dict[str, Any]:
    """What --option says."""
    wrong = [text for text in FLAGS.option if "=" not in text]
    if wrong:
        raise ValueError(f"--option={wrong[0]} must be NAME=VALUE")
    return {k: _value(v) for k, v in (text.split("=", 1) for text in FLAGS.option)}


def _method() -> dict[str, Any] | None:
    """The test-time method that --method and --option say."""
    if FLAGS.option and not FLAGS.method:
        raise ValueError(f"--option={FLAGS.option[0]} is for a test-time method; name one with --method (see: list test_time)")
    return {"name": FLAGS.method, **_options()} if FLAGS.method else None


def _value(text: str) -> Any:
    """A number, true, false or another JSON value, or else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _dtype(name: str | None) -> Any:
    import jax.numpy as jnp

    allowed = ("float32", "float16", "bfloat16")
    if name is not None and name not in allowed:
        raise ValueError(f"--dtype={name} is not known; choose one of {', '.join(allowed)}")
    return None if name is None else jnp.dtype(name)


def _no_more(rest: Sequence[str]) -> None:
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; flags are written --name=value")
