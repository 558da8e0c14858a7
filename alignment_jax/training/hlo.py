"""What optimised HLO text says: which collectives a program runs, how many bytes they carry, and how often loops go round."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "partition-id"}


class Instruction(NamedTuple):
    """One line: its name, the type as text, what it does, the names of its operands, and what follows them."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool = False


class Collective(NamedTuple):
    """One collective instruction: bytes of what it works on, of the largest single array in its result, and how often it runs.

    bytes: of the whole array, on one chip: of what an all-gather gives, of what a reduce-scatter takes.
    """

    kind: str
    bytes: int
    largest: int
    times: int


class Module(NamedTuple):
    """Computations by name, in the text's order (what is called comes before what calls it), and the entry's name."""

    computations: dict[str, list[Instruction]]
    entry: str


class Loops(NamedTuple):
    """Runs of each computation, counted with its loops and with every loop body once; `unknown`: loops without a trip count."""

    times: dict[str, int]
    once: dict[str, int]
    unknown: int


def parse(text: str) -> Module:
    """The computations of `compiled.as_text()`."""
    found: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and " = " in line:
            name, _, rest = line.strip().partition(" = ")
            kind, rest = _first(rest)
            opcode, _, rest = rest.strip().partition("(")
            operands, attributes = _first(f"({rest}")
            names = tuple(part.split()[-1].lstrip("%") for part in _parts(operands[1:-1]))
            current.append(Instruction(name.split()[-1].lstrip("%"), kind, opcode, names, attributes, name.startswith("ROOT ")))
    return Module(found, entry)


def loops(module: Module) -> Loops:
    """How often each computation runs in one call of the program; of a conditional every branch counts."""
    times, once = ({name: int(name == module.entry) for name in module.computations} for _ in "12")
    missing = 0
    for name in reversed(module.computations):
        for op in module.computations[name]:
            trips: int | None = 1
            if op.opcode == "while":
                trips = trip_count(module, name, op)
                missing += trips is None and times[name] > 0
            for called in re.findall(r"(?:calls|body|condition|branch_computations|true_computation|false_computation|to_apply)="
                                     r"(\{[^}]*\}|%?[\w.\-]+)", op.attributes):  # fmt: skip
                for target in re.findall(r"[\w.\-]+", called):
                    if target in times:
                        times[target] += times[name] * (1 if trips is None else trips)
                        once[target] += once[name]
    return Loops(times, once, missing)


def trip_count(module: Module, where: str, op: Instruction) -> int | None:
    """Of a `while` of the computation `where`: what the compiler wrote down, else what its condition i < N compares; None: unknown."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', op.attributes)
    if known:
        return int(known[1])
    body = {i.name: i for i in module.computations.get(_called(op, "condition"), [])}
    test = next((i for i in body.values() if i.root), None)
    if test is not None and test.opcode == "fusion":  # a comparison wrapped by itself, of the fusion's own operands
        inner = next((i for i in module.computations[_called(test, "calls")] if i.root), test)
        test = inner._replace(operands=test.operands)
    if test is None or test.opcode != "compare" or "direction=LT" not in test.attributes or len(test.operands) != 2:
        return None
    counter, bound = (body.get(name) for name in test.operands)
    index = re.search(r"index=(\d+)", counter.attributes) if counter and counter.opcode == "get-tuple-element" else None
    outside = {i.name: i for i in module.computations[where]}
    start = outside.get(op.operands[0]) if index else None
    if bound is None or bound.opcode != "constant" or index is None or start is None or start.opcode != "tuple":
        return None
    first = outside.get(start.operands[int(index[1])])
    while first is not None and first.opcode in ("copy", "bitcast"):
        first = outside.get(first.operands[0])
    if first is None or first.opcode != "constant":
        return None
    return max(int(bound.operands[0]) - int(first.operands[0]), 0)


def collectives(module: Module, runs: Loops) -> list[Collective]:
    """Every collective that runs, also the asynchronous ones (by their start); those in loops as often as the loop goes round.

    A TPU runs one beside other work as pieces inside fusions, each written as the whole collective; they share its channel.
    """
    found, fused = dict[tuple[str, str], Collective](), fusions(module)
    for name, body in module.computations.items():
        types = {op.name: op.type for op in body}
        for op in body:
            kind = op.opcode.removesuffix("-start")
            between = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.attributes) if op.opcode == "send" else None
            if between and runs.times[name]:  # what a TPU's host sends to other slices, after the slice's own chips have shared the work
                sent = arrays(types.get(op.operands[0], ""))
                found[name, op.name] = Collective(f"dcn {between[1].lower().replace('_', '-')}", sum(sent), max(sent), runs.times[name])
            if kind in KINDS and runs.times[name]:
                taken, given = [n for x in op.operands for n in arrays(types.get(x, ""))], arrays(op.type)
                if kind != op.opcode and len(given) > len(taken):  # (what it takes, what it gives, contexts)
                    given = given[len(taken) : 2 * len(taken)]
                channel = re.search(r"\bchannel_id=(\d+)", op.attributes) if name in fused else None
                one = Collective(kind, max(sum(taken), sum(given)), max(given, default=0), runs.times[name])
                found.setdefault((op.opcode, channel[1]) if channel else (name, op.name), one)
    return list(found.values())


def fusions(module: Module) -> set[str]:
    """Names of the computations that are a fusion's body."""
    return {_called(op, "calls") for body in module.computations.values() for op in body if op.opcode == "fusion"}


def repeated(module: Module, runs: Loops) -> tuple[float, float]:
    """By how much (flops, bytes accessed) of the program exceed what is counted with every loop body once."""
    flops = {name: sum(_flops(op, types) for op in body)
             for name, body in module.computations.items() for types in [{op.name: op.type for op in body}]}  # fmt: skip
    fused = fusions(module)
    moved = {name: sum(_moved(module, op, types) for op in body)
             for name, body in module.computations.items() if name not in fused
             for types in [{op.name: op.type for op in body}]}  # fmt: skip

    def ratio(cost: dict[str, int]) -> float:
        single = sum(n * runs.once[name] for name, n in cost.items())
        return sum(n * runs.times[name] for name, n in cost.items()) / single if single else 1.0

    return ratio(flops), ratio(moved)


def arrays(kind: str) -> list[int]:
    """Bytes of every array in a type such as `(f32[2,3]{1,0}, bf16[4])`; layouts and padding do not count."""
    return [math.prod(int(n) for n in re.findall(r"\d+", dims)) * _bits(name) // 8 for name, dims in ARRAY.findall(kind)]


def _bits(name: str) -> int:
    digits = re.match(r"(?:f|s|u)(\d+)", name)
    return BITS[name] if name in BITS else int(digits[1]) if digits else 32


def _shape(kind: str) -> list[int]:
    match = ARRAY.search(kind)
    return [int(n) for n in re.findall(r"\d+", match[2])] if match else []


def _flops(op: Instruction, types: dict[str, str]) -> int:
    """2 x multiplications of a dot or convolution; windows at borders and zeros between dilated entries are left out roughly."""
    if op.opcode not in ("dot", "convolution") or len(op.operands) != 2:
        return 0
    left, right = (_shape(types.get(x, "")) for x in op.operands)
    entries = math.prod(_shape(op.type))
    if op.opcode == "dot":
        over = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
        return 2 * entries * math.prod(left[int(i)] for i in re.findall(r"\d+", over[1] if over else ""))
    labels = re.search(r"dim_labels=\w+_(\w+)->", op.attributes)
    if not labels or len(labels[1]) != len(right):
        return 0
    dilated = re.search(r"lhs_dilate=([\dx]+)", op.attributes)
    zeros = math.prod(int(n) for n in dilated[1].split("x")) if dilated else 1
    return 2 * entries * math.prod(right) // max(right[labels[1].index("o")], 1) // zeros


def _moved(module: Module, op: Instruction, types: dict[str, str]) -> int:
    """Bytes that an instruction reads and writes; of an array that is only sliced, or written in place, the slice."""
    if op.opcode in FREE or op.opcode.endswith("-done"):
        return 0
    sizes = [sum(arrays(types.get(x, ""))) for x in op.operands]
    result = sum(arrays(op.type))
    if op.opcode == "dynamic-slice":
        return 2 * result
    if op.opcode == "dynamic-update-slice":
        return 2 * sizes[1]
    if op.opcode == "fusion":
        body = module.computations.get(_called(op, "calls"), [])
        inner = {i.name: i.type for i in body}
        for given in (i for i in body if i.opcode == "parameter"):
            index, users = int(given.operands[0]), [i for i in body if given.name in i.operands]
            sliced = [sum(arrays(i.type)) if i.opcode == "dynamic-slice" else sum(arrays(inner.get(i.operands[1], "")))
                      for i in users if i.opcode in ("dynamic-slice", "dynamic-update-slice") and i.operands[0] == given.name]  # fmt: skip
            if users and len(sliced) == len(users) and index < len(sizes):
                whole, sizes[index] = sizes[index], min(sizes[index], sum(sliced))
                result = sizes[index] if result == whole and users[0].opcode == "dynamic-update-slice" else result
    return sum(sizes) + result


def _called(op: Instruction, name: str) -> str:
    match = re.search(rf"\b{name}=%?([\w.\-]+)", op.attributes)
    return match[1] if match else ""


def _first(text: str) -> tuple[str, str]:
    """(the first word or parenthesis, the rest)."""
    if not text.startswith("("):
        word, _, rest = text.partition(" ")
        return word, rest
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    return text, ""


def _parts(text: str) -> list[str]:
    """The comma-separated parts outside brackets, none empty."""
    depth, parts = 0, [""]
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part for part in map(str.strip, parts) if part]
