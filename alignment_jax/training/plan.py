"""What a config costs before it runs: one step compiled ahead of time, for a TPU topology that is not here or for the devices at hand."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from ..models import stable_diffusion
from ..platform import assumed
from ..weights import files
from . import abstract, hlo, preflight, sharding, stream
from .checkpoint import save_json
from .names import nearest

Tree = Any
CACHE = "~/.cache/alignment_jax/plans"
SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")


class Chip(NamedTuple):
    """What is published of a chip: FLOP/s in bfloat16, bytes/s of its memory, of its links, both ways, and of its share of the network
    between slices; and the topologies it comes in.

    hbm: bytes that its compiler lets a program have, which says so when a program has more (libtpu 0.0.50).
    """

    flops: float
    bandwidth: float
    links: float
    network: float
    hbm: float
    shapes: tuple[str, ...]


SOURCE = "docs.cloud.google.com/tpu/docs, v5e, v5p-training and v6e: peak bfloat16, HBM, bidirectional ICI and DCN bandwidth of a chip"
CHIPS = {
    "v5e": Chip(197e12, 819e9, 400e9, 6.4e12 / 8 / 256, 15.75 * 2**30, SQUARES),
    "v5p": Chip(459e12, 2765e9, 1200e9, 50e9 / 8, 95.73 * 2**30, CUBES),
    "v6e": Chip(918e12, 1640e9, 800e9, 25.6e12 / 8 / 256, 31.24 * 2**30, SQUARES),
}


def plan(config: Any, topology: str = "", *, fresh: bool = False, say: Callable[[str], None] = lambda line: None,
         kept: str | Path | None = None) -> dict[str, Any]:  # fmt: skip
    """One step of a config on a topology such as "v5e:4x4", or two of them, "2xv5e:4x4", or on the devices at hand: does it fit, what
    does it cost.

    No weights are read: a model's and a scorer's config files are enough. Every program of `abstract.one_step` is compiled for
    the mesh that config.sharding makes of the devices. Figures are of one chip and, but for memory, of one whole step.

    hbm_per_chip_bytes. What stays: parameters (frozen and trained), reward, optimizer, ema, copies, other (the empty prompt, the
    algorithm's memory, the key) and code (of every program). What comes and goes with a program: arguments (its own, such as a
    batch), held (what of the step waits meanwhile: rollouts, items, gradients summed so far) and temporaries (of
    memory_analysis(), with those outputs that take no argument's place). total: what stays and the largest of these sums, that of the
    program `peak`. Buffers are counted as the chip lays them out, with their padding. Not counted: copies for a moment while
    microbatches are joined, the evaluation, setting up. A program that the compiler refuses has for temporaries what it says that
    all takes, less what stays and its arguments: at least.

    flops_per_chip, bytes_accessed_per_chip: cost_analysis() counts the body of a loop once, on TPU too; it is multiplied by the
    ratio of our own counts of the optimised HLO with and without loops (`hlo.repeated`), and by a step's calls.
    collectives: bytes of the whole arrays that they work on; "dcn ...": of what each chip sends to other slices. roofline_seconds: for
    each program the longest of FLOPs, memory, links and network, by published figures; no step is faster. Links: bytes of collectives
    over half the bidirectional bandwidth. Devices that are set apart for scoring are not planned.

    kept: the file that holds what is compiled so far; by default one in ~/.cache/alignment_jax/plans, by config, topology,
    versions and this package's source. fresh: compile all of it anew. say: told of each program.
    """
    devices, chip = described(topology)
    on = sharding.layout(config.get("sharding", {}), devices)
    if on.backend != "jit":
        raise ValueError("only the jit backend can be compiled ahead of time; set sharding.backend to 'jit'")
    sizes = stream.batch_sizes(config, sharding.shards(on.mesh))
    path = Path(kept or Path(CACHE).expanduser() / f"{key(config, topology, devices)}.json")
    done = json.loads(path.read_text()) if path.exists() and not fresh else {"programs": {}}
    if done.get("names") != list(done["programs"]):
        with assumed(devices[0].platform), files.shapes_only():
            say("tracing")
            programs = abstract.one_step(local(config), on=on)
            programs.pop("init")
            state, frozen = programs["apply"].arguments[0], programs["rollout"].arguments[1]
            there = {id(x) for x in jax.tree.leaves((state, frozen))}
            done |= {"names": list(programs), "stays": stays(state, frozen), "fsdp": sizes_of_fsdp(on, (state.trained, frozen["params"]))}
            for i, (name, program) in enumerate(programs.items(), 1):
                if name not in done["programs"]:
                    say(f"compiling {name} ({i} of {len(programs)})")
                    done["programs"][name] = compiled(program, there)
                    say(f"  {done['programs'][name]['seconds']:.0f} s")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    save_json(path, done)
    return result(config, topology, chip, on, sizes, done)


def described(topology: str) -> tuple[list[Any], Chip | None]:
    """The devices of a topology, which need not exist, or those at hand; and what is published of them, None for other kinds.

    Raises ValueError for an unknown topology, ImportError where libtpu is not installed.
    """
    if not topology:
        return jax.devices(), None
    slices, one = _slices(topology)
    names = [f"{name}:{shape}" for name, chip in CHIPS.items() for shape in chip.shapes]
    if one not in names or slices < 1:
        raise ValueError(f"topology {topology!r} is not known." + nearest(one, names) + "; N slices of one: 2xv5e:4x4")
    found = importlib.util.find_spec("libtpu")
    if found is None or found.origin is None:
        raise ImportError('--topology compiles with libtpu, which is not installed: pip install "jax[tpu]" (or libtpu; on Linux only, no '
                          "TPU needed). Without --topology the plan is for the devices at hand.")  # fmt: skip
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu asks the cloud for minutes where it is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is touched: several plans, or a plan beside a run
    from jax.experimental import topologies

    more = {"num_slices": slices} if slices > 1 else {}
    return list(topologies.get_topology_desc(platform="tpu", topology_name=one, **more).devices), CHIPS[one.split(":")[0]]


def _slices(topology: str) -> tuple[int, str]:
    """(number of slices, the topology of one)."""
    several = re.match(r"(\d+)x(?=[a-z])(.*)", topology)
    return (int(several[1]), several[2]) if several else (1, topology)


def chips(topology: str) -> int:
    """The number of chips of a topology such as "v5e:4x4" or "2xv5e:4x4"."""
    slices, one = _slices(topology)
    return slices * math.prod(int(n) for n in one.split(":")[1].split("x"))


def key(config: Any, topology: str, devices: list[Any]) -> str:
    """By what a plan is kept: config, topology or devices, versions, and the text of this package."""
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")]
    versions += [importlib.metadata.version("libtpu")] if topology else []
    facts = [*preflight.fingerprints(config).values(), topology or f"{len(devices)} {devices[0].device_kind}", *versions]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:24]


def local(config: Any) -> Any:
    """The config with a folder for its model: of a hub id only the config files and tokenizers are fetched."""
    source = config.model
    if "/" not in source or ":" in source or Path(source).expanduser().exists():
        return config
    config = config.copy_and_resolve_references()
    with config.unlocked(), files.shapes_only():
        config.model = str(files.resolve(source, allow=stable_diffusion.wanted()))
    return config


def stays(state: Any, frozen: Tree) -> dict[str, int]:
    """Bytes of each kind of array that lies on a chip all the time."""
    parts = {"parameters": (frozen["params"], state.trained), "reward": frozen["reward"], "optimizer": (state.opt_state, state.own),
             "ema": state.ema, "copies": state.copies, "other": (frozen["null"], state.extra, state.step, state.key)}  # fmt: skip
    return {name: size(tree) for name, tree in parts.items()}


def sizes_of_fsdp(on: sharding.Layout, tree: Tree) -> list[int]:
    """Over how many of the devices that one part of the batch does not need the arrays could be cut."""
    most, able = on.mesh.shape["data"] * on.mesh.shape["fsdp"], []
    for fsdp in (n for n in range(1, most + 1) if most % n == 0):
        axes = dict(on.mesh.shape) | {"data": most // fsdp, "fsdp": fsdp}
        with contextlib.suppress(ValueError):
            mesh: Any = AbstractMesh(tuple(axes.values()), tuple(axes))
            sharding.shardings(sharding.Layout(mesh, on.rules), tree)
            able.append(fsdp)
    return able


def size(tree: Tree) -> int:
    """Bytes of a tree of placed shapes on one chip, as its compiler lays them out."""
    if not jax.tree.leaves(tree):
        return 0
    memory = jax.jit(lambda *_: 0, keep_unused=True).lower(*jax.tree.leaves(tree)).compile().memory_analysis()
    assert memory is not None
    return int(memory.argument_size_in_bytes)


def compiled(program: abstract.Program, there: set[int]) -> dict[str, Any]:
    """What one call of a program needs and does on a chip; there: ids of the shapes that stay, and are no arguments of its own.

    Where it does not fit, `needs` is what the compiler said that it would take, and nothing else is known of it.
    """
    began = time.time()
    own = [x for x in jax.tree.leaves(program.arguments) if id(x) not in there]
    out: dict[str, Any] = {"calls": program.calls, "arguments": size(own), "held": size(program.held)}
    try:
        made = program.function.lower(*program.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        needs = re.search(r"\(([\d.]+)([KMGT])\) exceeds available", str(error))
        if needs is None:
            raise
        return out | {"needs": int(float(needs[1]) * 2 ** (10 * (1 + "KMGT".index(needs[2])))), "seconds": time.time() - began}
    memory, cost, module = made.memory_analysis(), made.cost_analysis() or {}, hlo.parse(made.as_text())
    runs = hlo.loops(module)
    flops, moved = hlo.repeated(module, runs)
    found: dict[str, dict[str, Any]] = {}
    for one in hlo.collectives(module, runs):
        kind = found.setdefault(one.kind, {"kind": one.kind, "bytes": 0, "count": 0, "largest": 0})
        kind["bytes"] += one.bytes * one.times
        kind["count"] += one.times
        kind["largest"] = max(kind["largest"], one.largest)
    return out | {
        "reads": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
        "outputs": max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
        "code": memory.generated_code_size_in_bytes, "flops": flops * cost.get("flops", 0.0),
        "bytes": moved * cost.get("bytes accessed", 0.0), "collectives": list(found.values()), "unknown_loops": runs.unknown,
        "seconds": time.time() - began,
    }  # fmt: skip


def result(config: Any, topology: str, chip: Chip | None, on: sharding.Layout, sizes: tuple[int, int, int],
           done: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    """The plan from what was measured of each program; figures are null where a program that does not fit hides them."""
    programs, resident, devices = done["programs"], done["stays"], on.mesh.devices.ravel()
    resident = resident | {"code": sum(p.get("code", 0) for p in programs.values())}
    stay = sum(resident.values())
    passing = {name: {"arguments": p["arguments"], "held": p["held"], "temporaries": max(p["needs"] - stay - p["arguments"], 0)
                      if "needs" in p else p["temporaries"] + p["outputs"]} for name, p in programs.items()}  # fmt: skip
    peak = max(passing, key=lambda name: sum(passing[name].values()))
    total = stay + sum(passing[peak].values())
    limit = chip.hbm if chip else memory_of(devices)
    too_large = [name for name, p in programs.items() if "needs" in p]
    summed = lambda what: None if too_large else sum(p["calls"] * p[what] for p in programs.values())
    flops, moved = summed("flops"), summed("bytes")
    kinds: dict[str, dict[str, Any]] = {}
    for p in programs.values():
        for one in p.get("collectives", []):
            kind = kinds.setdefault(one["kind"], {"kind": one["kind"], "bytes": 0, "count": 0})
            kind["bytes"], kind["count"] = kind["bytes"] + p["calls"] * one["bytes"], kind["count"] + p["calls"] * one["count"]
    sent = lambda p, out: sum(one["bytes"] for one in p["collectives"] if one["kind"].startswith("dcn ") == out)
    bound = lambda p: max(p["flops"] / chip.flops, p["bytes"] / chip.bandwidth, sent(p, False) / (chip.links / 2),
                          sent(p, True) / chip.network) if chip else 0.0  # fmt: skip
    prompts, group, micro = sizes
    out = {
        "fits": None if limit is None else bool(total <= limit and not too_large), "topology": topology or devices[0].device_kind,
        "chips": on.mesh.size, "mesh": dict(on.mesh.shape), "config": config.get("name", ""), "model": config.model,
        "hbm_per_chip_bytes": {**resident, **passing[peak], "total": total, "limit": limit, "peak": peak},
        "flops_per_chip": flops, "bytes_accessed_per_chip": moved, "arithmetic_intensity": flops / moved if flops and moved else None,
        "collectives": list(kinds.values()), "unknown_loops": sum(p.get("unknown_loops", 0) for p in programs.values()),
        "roofline_seconds": sum(p["calls"] * bound(p) for p in programs.values()) if chip and not too_large else None,
        "roofline_source": SOURCE if chip else None,
        "effective_batch": {"samples": prompts * group, "prompts": prompts, "group": group,
                            "microbatch_per_chip": micro / sharding.shards(on.mesh), "updates": int(config.batch.get("updates", 1))},
        "does_not_compile": too_large, "fsdp_sizes": done["fsdp"], "programs": programs,
    }  # fmt: skip
    return out | {"advice": [] if out["fits"] is not False else advice(config, out)}


def out_of_memory(config: Any, said: str) -> str:
    """What a run is told whose devices ran out of memory: what to change, with the figures of its plan where one is kept."""
    path = Path(CACHE).expanduser() / f"{key(config, '', jax.devices())}.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    if done and done.get("names") == list(done["programs"]):
        found = plan(config)
        hbm = found["hbm_per_chip_bytes"]
        figures = f"its plan: {amount(hbm['total'])} a device, of which {amount(hbm['temporaries'])} temporaries of {hbm['peak']}"
        ways = advice(config, found)
    else:
        figures = "python -m alignment_jax plan with this --config says how much each part takes, and what a change would save"
        ways = ["a smaller batch.microbatch: as many samples at a time as there are devices, at least", "model_options.remat=True",
                "model_options.dtype=bfloat16, and with LoRA param_dtype=bfloat16", "sharding.fsdp over more devices"]  # fmt: skip
    return f"the devices ran out of memory: {said.splitlines()[0]}\n{figures}\nTry:\n  " + "\n  ".join(ways)


def memory_of(devices: Any) -> int | None:
    """Bytes of a device's memory; of a CPU's, an equal share of the host's; None where nobody says."""
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if limit is None and devices[0].platform == "cpu" and hasattr(os, "sysconf"):
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
    return limit


def advice(config: Any, found: dict[str, Any]) -> list[str]:
    """What to change in a config that does not fit, what promises most first, with the figures."""
    hbm, mesh, options = found["hbm_per_chip_bytes"], found["mesh"], dict(config.get("model_options") or {})
    stay, peak, passing = sum(hbm[k] for k in ("parameters", "optimizer", "ema", "copies")), hbm["peak"], hbm["temporaries"]
    parts, most = mesh["dcn"] * mesh["data"] * mesh["fsdp"], max(found["fsdp_sizes"])
    each = found["effective_batch"]["microbatch_per_chip"]
    less = stay * mesh["fsdp"] / most
    ways = [
        (stay - less, mesh["fsdp"] < most, f"sharding.fsdp={most} and data={mesh['data'] * mesh['fsdp'] // most}: parameters, optimiser "
         f"and copies, {amount(stay)} a chip, become about {amount(less)}"),
        (hbm["parameters"] / 2, options.get("param_dtype") == "float32" and bool(config.get("lora")), "model_options.param_dtype=bfloat16: "
         f"parameters of {amount(hbm['parameters'])} a chip become about half"),
        (hbm["reward"] / 2, hbm["reward"] > 0.1 * hbm["total"] and "bfloat16" not in str(config.get("reward")), "a reward with "
         f"'dtype': 'bfloat16' among its arguments, which the CLIP family takes: {amount(hbm['reward'])} a chip become about half"),
        (passing * 0.9, options.get("remat") is False and peak in ("gradient", "rollout", "anchor"), "model_options.remat=True: of "
         f"{peak}'s temporaries, {amount(passing)}, most is what a backward pass keeps"),
        (passing * (1 - 1 / each), each > 1, f"batch.microbatch={parts}, one sample a chip at a time: {peak}'s temporaries, "
         f"{amount(passing)}, are those of {each:g}"),
        (passing / 2, options.get("dtype") == "float32", f"model_options.dtype=bfloat16: temporaries, {amount(passing)}, about halve"),
        (hbm["held"] / 2, hbm["held"] > 0.1 * hbm["total"], f"fewer prompts, or a timestep_fraction below 1: {amount(hbm['held'])} of the "
         "step's items wait on a chip"),
    ]  # fmt: skip
    lines = [line for _, holds, line in sorted(ways, key=lambda way: -way[0]) if holds]
    return lines or ["nothing in the config makes it smaller but smaller pictures; take more chips, or chips with more memory"]


def amount(n: float) -> str:
    """Bytes for people."""
    unit = next((u for u in ("GiB", "MiB") if n >= 2 ** (30 if u == "GiB" else 20)), "KiB")
    return f"{n / 2 ** {'GiB': 30, 'MiB': 20, 'KiB': 10}[unit]:.2f} {unit}"


def text(found: dict[str, Any]) -> str:
    """The plan for people."""
    hbm, limit = found["hbm_per_chip_bytes"], found["hbm_per_chip_bytes"]["limit"]
    verdict = {True: "fits", False: "does not fit", None: "whether it fits is not known"}[found["fits"]]
    names = [k for k in hbm if k not in ("total", "limit", "peak")]
    batch = found["effective_batch"]
    tera = lambda n, unit: "not known: a program does not fit" if n is None else f"{n / 1e12:.3f} T{unit}"
    lines = [
        f"{found['config']} on {found['chips']} x {found['topology'] or 'device'}: {verdict}",
        *(f"  {name:14}{amount(hbm[name]):>12}" for name in names),
        f"  {'total':14}{amount(hbm['total']):>12} a chip{f' of {amount(limit)}' if limit else ''}, in {hbm['peak']}",
        f"batch         {batch['prompts']} prompts x {batch['group']} = {batch['samples']} samples a step, {batch['updates']} updates, "
        f"{batch['microbatch_per_chip']:g} samples a chip at a time",
        f"compute       {tera(found['flops_per_chip'], 'FLOP')} a chip and step",
        f"memory        {tera(found['bytes_accessed_per_chip'], 'B')} accessed"
        + (f", {found['arithmetic_intensity']:.0f} FLOP a byte" if found["arithmetic_intensity"] else ""),
        *(f"{one['kind']:20}{one['bytes'] / 1e9:10.3f} GB in {one['count']} a step" for one in found["collectives"]),
    ]  # fmt: skip
    if found["roofline_seconds"]:
        lines.append(f"roofline      {found['roofline_seconds']:.3g} s a step at least, by published figures ({SOURCE})")
    if found["unknown_loops"]:
        lines.append(f"note          {found['unknown_loops']} loops tell no number of rounds; they are counted once")
    if found["does_not_compile"]:
        lines.append(f"note          the compiler refuses {', '.join(found['does_not_compile'])}: above is what it says they take")
    return "\n".join([*lines, *(f"advice        {line}" for line in found["advice"])])
