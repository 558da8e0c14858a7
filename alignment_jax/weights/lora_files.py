"""Low-rank factors in the files that diffusers, PEFT and kohya's tools write and read.

Our factors of a kernel are {"a" [in, r], "b" [r, out]} under the kernel's path, a convolution's `in` being h w in flattened
in that order; the tuned kernel is W + scale a b. A file's are down [r, in] or [r, in, h, w] and up [out, r] or [out, r, 1, 1],
and scale = alpha / r.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from . import layouts, torch_names
from .files import atomic

Tree = Any
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
DOWN, UP = ("lora_A.weight", "lora_down.weight", "lora.down.weight"), ("lora_B.weight", "lora_up.weight", "lora.up.weight")

STABILITY = re.compile(r"_(input_blocks|middle_block|output_blocks|label_emb|time_embed|out)_\d")


def write_peft(
    path: str | Path,
    factors: Tree,
    like: Tree,
    *,
    rank: int,
    alpha: float | None = None,
    prefix: str | Mapping[str, str] = "unet",
    dtype: Any = np.float32,
) -> None:
    """Factors as diffusers' load_lora_weights reads them: PREFIX.MODULE.lora_A.weight and lora_B.weight.

    like: the parameters that are tuned (arrays or shapes), for the kernels' shapes. prefix: the component in diffusers'
    pipeline, or {top key of the trees: component}. The format has no alpha that every reader respects, so alpha / rank is
    multiplied into lora_B, and the file's own scale is 1. Factors of a lower rank are filled up with zeros, for readers
    differ about mixed ranks.
    """
    out = {}
    for top, module, a, b, shape in _modules(factors, like, rank, prefix):
        down, up = _to_file(a, b, shape, rank)
        name = f"{top}.{module}" if top else module
        out[f"{name}.lora_A.weight"], out[f"{name}.lora_B.weight"] = down, up * np.float32(_scale(alpha, rank))
    _write(path, out, dtype)


def write_kohya(
    path: str | Path,
    factors: Tree,
    like: Tree,
    *,
    rank: int,
    alpha: float | None = None,
    prefix: str | Mapping[str, str] = "unet",
    dtype: Any = np.float32,
) -> None:
    """Factors as kohya's tools, ComfyUI and others read them: lora_unet_MODULE.lora_down.weight, .lora_up.weight, .alpha.

    Arguments as for `write_peft`; a component may be named unet, text_encoder (lora_te, or lora_te1 beside a second),
    text_encoder_2, or by its prefix in the file. The factors are kept as they are: alpha carries the scale.
    """
    tops = set(prefix.values()) if isinstance(prefix, Mapping) else {prefix}
    out = {}
    for top, module, a, b, shape in _modules(factors, like, rank, prefix):
        # the one module that diffusers knows only by the name of Stability's own code
        module = module.replace("add_embedding.linear_1", "label_emb.0.0").replace("add_embedding.linear_2", "label_emb.0.2")
        component = "lora_te1" if top == "text_encoder" and "text_encoder_2" in tops else KOHYA.get(top, top)
        name = f"{component}_{module.replace('.', '_')}"
        out[f"{name}.lora_down.weight"], out[f"{name}.lora_up.weight"] = _to_file(a, b, shape, rank)
        out[f"{name}.alpha"] = np.asarray(rank if alpha is None else alpha, np.float32)
    _write(path, out, dtype)


def read_lora(path: str | Path, like: Tree, *, prefix: str | Mapping[str, str] = "unet") -> tuple[Tree, float]:
    """(factors, scale) of a file of either format, for the parameters `like` (arrays or shapes): effective W + scale a b.

    prefix: which of the file's components these are, as for `write_peft`. Where the file's modules have different scales,
    they are multiplied into b and the scale is 1. Raises ValueError for keys of other modules or kinds of adapters, for
    halves without the other, and for shapes of another model or rank: the first ten, with the nearest names.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    named = _module_names(like, prefix, tensors)
    shapes = {k: tuple(v.shape) for k, v in flatten_dict(like, sep="/").items()}
    halves: dict[str, dict[str, np.ndarray]] = {}
    unknown = []
    for key, value in tensors.items():
        module, part = _split(key)
        if part is None or module not in named:
            unknown.append(key)
        else:
            halves.setdefault(module, {})[part] = value
    if unknown:
        raise ValueError(_unknown(path, unknown, named, len(tensors)))
    wrong: list[str] = []
    factors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    scales: dict[str, float] = {}
    for module, parts in halves.items():
        if missing := {"down", "up"} - parts.keys():
            wrong.append(f"{module} has no {missing.pop()} half")
            continue
        kernel = named[module]
        problem, a, b = _from_file(parts["down"], parts["up"], shapes[kernel])
        if problem:
            wrong.append(f"{module}: {problem}")
            continue
        if kernel in factors:
            wrong.append(f"{module} is there under another name as well")
            continue
        rank = parts["down"].shape[0]
        scales[kernel] = float(parts["alpha"].ravel()[0]) / rank if "alpha" in parts else _metadata_scale(metadata, module, rank)
        factors[kernel] = (a, b)
    if wrong:
        raise ValueError(f"{path} does not fit the model: {len(wrong)} of {len(halves)} modules are wrong.\n  "
                         + "\n  ".join(wrong[:10]))  # fmt: skip
    if not factors:
        raise ValueError(f"{path} holds no LoRA factors")
    scale = next(iter(scales.values())) if len(set(scales.values())) == 1 else 1.0
    flat = {}
    for kernel, (a, b) in factors.items():
        flat[f"{kernel}/a"] = a
        flat[f"{kernel}/b"] = b if scales[kernel] == scale else b * np.float32(scales[kernel] / scale)
    return unflatten_dict(flat, sep="/"), scale


def factors(
    path: str | Path, like: Tree, fresh: Tree | None = None, *, scale: float = 1.0
) -> tuple[Tree, dict[str, int], float]:
    """(factors to train on from, rank of every kernel, scale): W + scale a b is what the file, of any format, makes of W.

    like: the model's parameters (arrays or shapes). fresh: the factors that the run would start from without the file, of
    the same top keys; its kernels are those that are trained, its ranks the ones wanted. Kernels that the file leaves out
    start as in fresh, and so do the directions beyond a lower rank, whose b = 0 changes nothing. scale: the run's own; b is
    what the file's alpha / rank is folded into. Raises ValueError for a file of another model (see `read_lora`), for kernels
    that the run does not train and for another rank.
    """
    path = Path(path).expanduser()
    if not scale > 0:
        raise ValueError(f"a LoRA cannot go on from {path} at scale {scale}; choose one above 0, or alpha")
    read, own = read_lora(path, like, prefix={name: name for name in like if name != "vae"})
    flat = {k: np.asarray(v) for k, v in flatten_dict(read, sep="/").items()}
    kernels = list(dict.fromkeys(k.rpartition("/")[0] for k in flat))
    ranks = {k: flat[f"{k}/a"].shape[1] for k in kernels}
    ours = {f"{k}/a": flat[f"{k}/a"] for k in kernels} | {f"{k}/b": flat[f"{k}/b"] * np.float32(own / scale) for k in kernels}
    if fresh is None:
        return unflatten_dict(ours, sep="/"), ranks, scale
    start: dict[str, Any] = flatten_dict(fresh, sep="/")
    if left := [k for k in kernels if f"{k}/a" not in start]:
        tops = ", ".join(dict.fromkeys(k.partition("/")[0] for k in left))
        raise ValueError("\n  ".join([f"{path} adapts {len(left)} of {len(kernels)} kernels that this run does not train, in {tops}:",
                                      *left[:10]]) + "\nWiden lora.targets to them, or give a file without them.")  # fmt: skip
    wanted = {k: start[f"{k}/a"].shape[1] for k in kernels}
    high = max(kernels, key=lambda k: (ranks[k] - wanted[k], ranks[k]))
    if ranks[high] > wanted[high] or max(ranks.values()) < max(wanted.values()):
        raise ValueError(f"{path} has factors of rank {ranks[high]} and this run's are of rank {wanted[high]}, as at {high}; set "
                         f"lora.rank={max(ranks.values())}")  # fmt: skip
    for k in kernels:
        more = start[f"{k}/a"][:, ranks[k] :]
        start[f"{k}/a"] = jnp.concatenate([ours[f"{k}/a"], more], 1)
        start[f"{k}/b"] = jnp.pad(ours[f"{k}/b"], ((0, more.shape[1]), (0, 0)))
    return unflatten_dict(start, sep="/"), ranks, scale


def _modules(
    factors: Tree, like: Tree, rank: int, prefix: str | Mapping[str, str]
) -> list[tuple[str, str, np.ndarray, np.ndarray, tuple[int, ...]]]:
    """(component, module, a, b, kernel's shape) of every adapted kernel. Raises ValueError when they do not fit `like`."""
    flat = flatten_dict(jax.device_get(factors), sep="/")
    shapes = {k: tuple(v.shape) for k, v in flatten_dict(like, sep="/").items()}
    found = []
    for kernel in dict.fromkeys(k.rpartition("/")[0] for k in flat):
        a, b = np.asarray(flat[f"{kernel}/a"], np.float32), np.asarray(flat[f"{kernel}/b"], np.float32)
        shape = shapes.get(kernel)
        if shape is None or a.shape[0] * b.shape[1] != np.prod(shape) or a.shape[1] != b.shape[0] or b.shape[1] != shape[-1]:
            raise ValueError(f"factors {kernel}: a {a.shape}, b {b.shape}, and the parameters' kernel there is {shape}; "
                             "wanted a [in, r], b [r, out] of a kernel [..., in, out]")  # fmt: skip
        if a.shape[1] > rank:
            raise ValueError(f"factors {kernel} have rank {a.shape[1]}; rank={rank} was given")
        top, module = _component(kernel, prefix)
        found.append((top, _standard(top, module), a, b, shape))
    return found


def _component(kernel: str, prefix: str | Mapping[str, str]) -> tuple[str, str]:
    """(component, module's name in it) of a kernel's path."""
    if isinstance(prefix, str):
        return prefix, torch_names.torch_name(kernel).removesuffix(".weight")
    top, _, rest = kernel.partition("/")
    if top not in prefix:
        raise ValueError(f"no component is given for {top!r} of {kernel}; prefix names {', '.join(prefix)}")
    return prefix[top], torch_names.torch_name(rest).removesuffix(".weight")


def _standard(top: str, module: str) -> str:
    """A text encoder's modules carry text_model. in every file, whatever the library calls them."""
    return f"text_model.{module}" if _is_text(top) and module.startswith("encoder.") else module


def _is_text(top: str) -> bool:
    return top.startswith(("text_encoder", "lora_te"))


def _to_file(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...], rank: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.pad(a, ((0, 0), (0, rank - a.shape[1]))), np.pad(b, ((0, rank - b.shape[0]), (0, 0)))
    if len(shape) == 2:
        return a.T, b.T
    return a.reshape(*shape[:-1], rank).transpose(3, 2, 0, 1), b.T[:, :, None, None]


def _from_file(down: np.ndarray, up: np.ndarray, shape: tuple[int, ...]) -> tuple[str, np.ndarray, np.ndarray]:
    """(what is wrong or "", a, b) for a kernel [in, out] or [h, w, in, out]."""
    down, up = np.asarray(down, np.float32), np.asarray(up, np.float32)
    sizes = f"down {list(down.shape)}, up {list(up.shape)}"
    if len(shape) == 4 and down.ndim == 2 and shape[:2] == (1, 1):
        down, up = down[:, :, None, None], up.reshape(*up.shape[:2], 1, 1)  # a pointwise convolution, stored as a matrix
    if len(shape) == 2 and down.ndim == 4 and down.shape[2:] == (1, 1):
        down, up = down[:, :, 0, 0], up.reshape(up.shape[:2])
    fits = (len(shape) == 2 and down.ndim == up.ndim == 2 and (down.shape[1], up.shape[0]) == shape) or (
        len(shape) == 4 and down.ndim == up.ndim == 4 and up.shape[2:] == (1, 1)
        and down.shape[2:] + (down.shape[1], up.shape[0]) == shape)  # fmt: skip
    if not fits:
        wanted = list(torch_names.torch_shape("kernel", shape))
        return f"{sizes} do not make a kernel {wanted}; is this LoRA of another model?", down, up
    if down.shape[0] != up.shape[1]:
        return f"{sizes}: ranks {down.shape[0]} and {up.shape[1]} differ", down, up
    if not (np.isfinite(down).all() and np.isfinite(up).all()):
        return f"{sizes} hold NaN or infinity", down, up
    a = down.T if len(shape) == 2 else down.transpose(2, 3, 1, 0).reshape(-1, down.shape[0])
    b = up.reshape(up.shape[0], up.shape[1]).T
    # the zeros that `_to_file` fills up with
    full = min(a.shape[0], b.shape[1])
    if a.shape[1] > full and not a[:, full:].any() and not b[full:].any():
        a, b = a[:, :full], b[:full]
    return "", np.ascontiguousarray(a), np.ascontiguousarray(b)


def _module_names(like: Tree, prefix: str | Mapping[str, str], tensors: Mapping[str, Any]) -> dict[str, str]:
    """{module's name in a file of either format: path of our kernel}."""
    kernels = [k for k, v in flatten_dict(like, sep="/").items() if k.endswith("kernel") and len(v.shape) >= 2
               and (isinstance(prefix, str) or k.partition("/")[0] in prefix)]  # fmt: skip
    by_component: dict[str, dict[str, str]] = {}
    for kernel in kernels:
        top, module = _component(kernel, prefix)
        by_component.setdefault(top, {})[module] = kernel
    named: dict[str, str] = {}
    # a file of one component may leave its name away, and PEFT's own has another
    bare = len(by_component) == 1 and not any(_split(k)[0].startswith(f"{t}.") for k in tensors for t in by_component)
    for top, modules in by_component.items():
        aliases = {m: {m, _standard(top, m), m.removeprefix("text_model.") if _is_text(top) else m} for m in modules}
        kohya = [KOHYA.get(top, top)] + (["lora_te1"] if top == "text_encoder" else [])
        # kohya's tools name SDXL's modules as Stability's code does
        if layouts.component([f"{m}.weight" for m in modules]) == "unet" and any(STABILITY.search(k) for k in tensors):
            for place_of, place in layouts.places([f"{m}.weight" for m in modules], "ldm").items():
                stem = place.name.removeprefix(layouts.UNET).removesuffix(".weight")
                named |= {f"{k}_{stem.replace('.', '_')}": modules[place_of.removesuffix(".weight")] for k in kohya}
        for module, kernel in modules.items():
            for alias in aliases[module]:
                named[f"{top}.{alias}" if top else alias] = kernel
                named |= {f"{k}_{alias.replace('.', '_')}": kernel for k in kohya}
                if bare:
                    named |= {alias: kernel, f"base_model.model.{alias}": kernel}
    return named


def _split(key: str) -> tuple[str, str | None]:
    """(module, "down", "up", "alpha" or None) of a file's key; diffusers' first format is read as well."""
    key = re.sub(r"(?:\.processor)?\.to_(q|k|v)_lora\.", r".to_\1.lora.", key)
    key = re.sub(r"(?:\.processor)?\.to_out_lora\.", ".to_out.0.lora.", key)
    for part, endings in (("down", DOWN), ("up", UP), ("alpha", ("alpha",))):
        for ending in endings:
            if key.endswith(f".{ending}"):
                return key.removesuffix(f".{ending}"), part
    return key, None


def _unknown(path: Path, unknown: list[str], named: Mapping[str, str], total: int) -> str:
    known = list(named)
    lines = []
    for key in sorted(unknown)[:10]:
        near = difflib.get_close_matches(_split(key)[0], known, 1, 0.5)
        lines.append(f"{key} (nearest: {near[0]})" if near else key)
    kinds = ("dora_scale", "lora_magnitude_vector", "lokr_", "lora_mid", "hada_", "oft_")
    other = next((k for k in kinds if any(k in key for key in unknown)), None)
    why = f" Keys with {other} are of another kind of adapter, which is not LoRA." if other else (
        " A LoRA of another model? Or of components that prefix does not name?")  # fmt: skip
    return f"{path} does not fit the model: {len(unknown)} of {total} keys are unknown.{why}\n  " + "\n  ".join(lines)


def _metadata_scale(metadata: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank as the adapter's configuration states it, per module where it has patterns; 1 without one."""

    def lookup(table: Mapping[str, float], default: float) -> float:
        return next((v for k, v in table.items() if re.match(rf"(.*\.)?({k.lstrip('^')})$", module)), default)

    top = next((t for t in sorted(metadata, key=len, reverse=True) if t and module.startswith(f"{t}.")), "")
    config = metadata.get(top, {})
    if config.get("lora_alpha") is None:
        return 1.0
    alpha = lookup(config.get("alpha_pattern") or {}, config["lora_alpha"])
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """(tensors, {component: adapter's configuration}) of a file; the configuration is in its header or beside it."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no LoRA file at {path}; expected a .safetensors file")
    try:
        with safe_open(path, framework="numpy") as file:
            tensors, header = {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}, {path.stat().st_size} bytes, is not a whole safetensors file ({error}). "
                         "Copy it again.") from error  # fmt: skip
    flat = json.loads(header["lora_adapter_metadata"]) if "lora_adapter_metadata" in header else {}
    beside = path.parent / "adapter_config.json"
    if not flat and path.name == "adapter_model.safetensors" and beside.is_file():
        flat = json.loads(beside.read_text())
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        top, _, field = key.rpartition(".")
        configs.setdefault(top, {})[field] = value
    return tensors, configs


def _write(path: str | Path, tensors: dict[str, np.ndarray], dtype: Any) -> None:
    from safetensors.numpy import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {k: np.asarray(v, dtype, order="C") for k, v in tensors.items()}
    atomic(path, partial(save_file, arrays, metadata={"format": "pt"}))


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank
