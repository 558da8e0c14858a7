"""The arithmetic that a step needs: products and convolutions in its programs, with nothing computed twice (model FLOPs)."""

from __future__ import annotations

import math
from typing import Any

import jax

from .. import platform
from ..rewards.base import Reward
from . import abstract
from .plan import CHIPS

# FLOP/s in bfloat16, dense, by how jax calls a device; of GPUs those of nvidia.com/data-center
PEAKS = {"TPU v5 lite": CHIPS["v5e"].flops, "TPU v5": CHIPS["v5p"].flops, "TPU v6 lite": CHIPS["v6e"].flops, "NVIDIA A100": 312e12,
         "NVIDIA H100": 989e12, "NVIDIA H200": 989e12}  # fmt: skip


def one_step(config: Any, reward: Reward | None = None) -> float:
    """Model FLOPs of one step of a config on all devices together, from shapes alone; reward: as in `abstract.one_step`.

    Programs are traced without recomputation. Scans count as often as they run, other loops once, of branches the largest one.
    """
    if "remat" in (config.get("model_options") or {}):
        config = config.copy_and_resolve_references()
        config.model_options.remat = False
    with platform.assumed(jax.default_backend(), recomputes=False):
        programs = abstract.one_step(config, reward)
        programs.pop("init")
        return sum(p.calls * count(jax.make_jaxpr(p.function)(*p.arguments).jaxpr) for p in programs.values())


def count(jaxpr: Any) -> float:
    """FLOPs of the products and convolutions of a jaxpr, a multiplication and an addition counted as two."""
    total = 0.0
    for eqn in jaxpr.eqns:
        name, given = eqn.primitive.name, eqn.params
        if name == "dot_general":
            summed = math.prod(eqn.invars[0].aval.shape[i] for i in given["dimension_numbers"][0][0])
            total += 2 * eqn.outvars[0].aval.size * summed
        elif name == "conv_general_dilated":
            kernel, out_channels = eqn.invars[1].aval, given["dimension_numbers"].rhs_spec[0]
            summed = kernel.size / kernel.shape[out_channels] / math.prod(given["lhs_dilation"])  # dilation puts zeros between entries
            total += 2 * eqn.outvars[0].aval.size * summed
        elif name == "cond":
            total += max(count(branch.jaxpr) for branch in given["branches"])
        else:
            inner = sum(count(sub) for value in given.values() for sub in _jaxprs(value))
            total += inner * (given["length"] if name == "scan" else 1)
    return total


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [sub for one in value for sub in _jaxprs(one)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


def utilisation(flops: float, seconds: float) -> dict[str, float]:
    """{"model_tflops"}: a device's, per second; and "mfu", the share of the published peak that this is, of kinds in PEAKS."""
    devices = jax.devices()
    reached = flops / seconds / len(devices)
    peak = next((peak for kind, peak in PEAKS.items() if devices[0].device_kind.startswith(kind)), None)
    return {"model_tflops": reached / 1e12} | ({"mfu": reached / peak} if peak else {})
