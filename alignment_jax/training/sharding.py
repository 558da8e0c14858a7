"""Where arrays live: one mesh over all devices, parameters on every device, batches cut over `data`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = Any


def make_mesh() -> Mesh:
    """All devices on one axis "data". Axes are Auto: linen's layers do not run on explicit ones."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Puts a copy of every array on every device; typed keys too."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard(mesh: Mesh, tree: Tree) -> Tree:
    """Cuts host arrays [B, ...] of this process over the devices; B divides by them (checked when the run is built)."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)
