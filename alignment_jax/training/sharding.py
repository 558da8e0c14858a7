"""Where arrays live: one mesh over all devices, batches cut over dcn, data and fsdp, parameters placed by the names of their paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..rewards.base import Reward
from .programs import Parts, Programs, build

Tree = Any
Rule = tuple[str, Sequence[str | None]]  # a regular expression over paths; the axis of each dimension, counted from the last
AXES = ("dcn", "data", "fsdp", "tensor")
BATCH = PartitionSpec(("dcn", "data", "fsdp"))
SMALL = 2**14  # arrays of fewer entries stay whole on every device
# column-parallel layers cut what they give, row-parallel ones what they take (Megatron-LM, arXiv 1909.08053)
TENSOR: tuple[Rule, ...] = (
    (r"(to_q|to_k|to_v|q_proj|k_proj|v_proj|mlp\.fc1|ff\.net\.0\.proj)/kernel$", (None, "tensor")),
    (r"(to_out\.0|out_proj|mlp\.fc2|ff\.net\.2)/kernel$", ("tensor", None)),
)


class Layout(NamedTuple):
    """The mesh, the rules by which parameters lie on it (the first that a path matches holds), the backend, jit or pmap, and a second
    mesh, of devices that are set apart for scoring."""  # fmt: skip

    mesh: Mesh
    rules: tuple[Rule, ...] = ()
    backend: str = "jit"
    scorers: Mesh | None = None


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """All devices on the axes dcn (slices, or hosts), data, fsdp, tensor; of one axis the size may be -1, what is left: data by default.

    Axes are Auto: linen's layers do not run on explicit ones. Raises ValueError where they do not divide the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"dcn": 1, "data": -1, "fsdp": 1, "tensor": 1, **(sizes or {})}
    if set(sizes) != set(AXES):
        raise ValueError(f"sharding has the axes {', '.join(AXES)}; got {', '.join(sorted(set(sizes) - set(AXES)))}")
    left = [axis for axis, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    shown = ", ".join(f"{axis} {sizes[axis]}" for axis in AXES)
    if len(left) > 1 or known < 1 or len(devices) % known or (not left and known != len(devices)):
        divisors = [d for d in range(1, len(devices) + 1) if len(devices) % d == 0]
        raise ValueError(f"sharding of {shown} does not fit {len(devices)} devices: sizes must multiply to that, one of them may be -1 "
                         f"(what is left); {len(devices)} divides by {divisors}")  # fmt: skip
    if left:
        sizes[left[0]] = len(devices) // known
    shape = tuple(sizes[axis] for axis in AXES)
    auto = (AxisType.Auto,) * len(AXES)
    slices, processes = {getattr(d, "slice_index", 0) for d in devices}, {d.process_index for d in devices}
    if len(slices) > 1 and sizes["dcn"] != len(slices):
        raise ValueError(f"the devices are on {len(slices)} slices, between which the network is slow; set sharding.dcn={len(slices)}")
    if sizes["dcn"] > 1 and sizes["dcn"] in (len(slices), len(processes)):  # what each holds stays together; a GPU host is a slice
        grid = create_hybrid_device_mesh((1, *shape[1:]), (sizes["dcn"], 1, 1, 1), devices, process_is_granule=len(slices) == 1)
        return Mesh(grid, AXES, axis_types=auto)
    return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)


def layout(config: Mapping[str, Any], devices: Sequence[Any] | None = None) -> Layout:
    """That of config.sharding: sizes of the axes; rules, ((pattern, axes of the last dimensions), ...), before the usual ones; backend;
    scorers, how many of the devices, the last ones, score and do nothing else.

    Raises ValueError for an unknown backend, for pmap with parameters that are cut or with several processes, and for scorers that
    leave no device or are asked for by several processes.
    """
    given, devices = dict(config), jax.devices() if devices is None else devices
    rules, backend = tuple((pattern, tuple(axes)) for pattern, axes in given.pop("rules", ())), given.pop("backend", "jit")
    apart = int(given.pop("scorers", 0))
    if apart and (not 0 < apart < len(devices) or jax.process_count() > 1 or backend != "jit"):
        raise ValueError(f"sharding.scorers sets devices of one process apart, at most {len(devices) - 1} of these {len(devices)}, with "
                         f"the backend 'jit'; got {apart}, {jax.process_count()} processes, {backend!r}")  # fmt: skip
    scorers = make_mesh(None, devices[len(devices) - apart :]) if apart else None
    mesh = make_mesh(given, devices[: len(devices) - apart])
    if backend not in ("jit", "pmap"):
        raise ValueError(f"sharding.backend {backend!r}; choose 'jit' or 'pmap'")
    if backend == "pmap" and (mesh.shape["data"] != mesh.size or rules or jax.process_count() > 1):
        raise ValueError(f"the pmap backend cuts batches over the devices of one process and nothing else; got {dict(mesh.shape)}, "
                         f"{len(rules)} rules, {jax.process_count()} processes. Use backend 'jit' for these.")  # fmt: skip
    return Layout(mesh, (*rules, *(TENSOR if mesh.shape["tensor"] > 1 else ())), backend, scorers)


def apart(on: Layout, reward: Reward | None) -> Callable[[jax.Array, Tree], jax.Array] | None:
    """score(pictures, condition) [B] on the devices that are set apart for it, if any: pictures go there, scores come back."""
    if on.scorers is None or reward is None:
        return None
    params, there, here = place(Layout(on.scorers), reward.params), NamedSharding(on.scorers, BATCH), NamedSharding(on.mesh, BATCH)
    program = jax.jit(reward.score)

    def score(pictures: jax.Array, condition: Tree) -> jax.Array:
        scores: jax.Array = jax.device_put(program(params, *jax.device_put((pictures, condition), there)), here)
        return scores

    return score


def shards(mesh: Mesh) -> int:
    """Into how many parts a batch is cut."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH[0]]))


def shardings(on: Layout, tree: Tree) -> Tree:
    """A NamedSharding for every array: by the rules, then over fsdp along the largest dimension that is left and divides.

    Raises ValueError where a rule's dimension does not divide, and for an array beyond a million entries that fsdp cannot cut.
    """
    mesh, fsdp = on.mesh, on.mesh.shape["fsdp"]

    def spec(path: str, x: Any) -> PartitionSpec:
        axes: list[str | None] = [None] * x.ndim
        for pattern, wanted in on.rules:
            if re.search(pattern, path):
                if len(wanted) > x.ndim:
                    raise ValueError(f"rule {pattern!r} names {len(wanted)} dimensions; {path} has the shape {x.shape}")
                axes[x.ndim - len(wanted) :] = wanted
                break
        for n, axis in zip(x.shape, axes, strict=True):
            if axis and n % mesh.shape[axis]:
                raise ValueError(f"{path} {x.shape} is to be cut over {axis}, and {n} does not divide by {mesh.shape[axis]}; choose "
                                 f"another size of {axis}, or a rule of its own for it")  # fmt: skip
        if fsdp > 1 and x.size >= SMALL and "fsdp" not in axes:
            able = [i for i, n in enumerate(x.shape) if axes[i] is None and n % fsdp == 0]
            if able:
                axes[max(able, key=lambda i: (x.shape[i], i))] = "fsdp"
            elif x.size > 2**20:
                raise ValueError(f"no dimension of {path} {x.shape} divides by fsdp {fsdp}; choose a smaller one, or a rule for it")
        return PartitionSpec(*axes)

    return jax.tree.map(lambda path, x: NamedSharding(mesh, spec(path, x)), _paths(tree), tree)


def _paths(tree: Tree) -> Tree:
    """The path of every array, its parts with / between them."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path), tree)


def check(on: Layout, params: Tree) -> Tree:
    """The `shardings` of a model's parameters. Raises ValueError for a rule that matches none of them too, with some of their paths."""
    paths = jax.tree.leaves(_paths(params))
    for pattern, axes in on.rules:
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(f"sharding: the rule {pattern!r} ({axes}) matches no parameter; paths are like "
                             f"{paths[:: len(paths) // 4 + 1]}. Give config.sharding.rules of your own, or leave tensor at 1.")  # fmt: skip
    return shardings(on, params)


def place(on: Layout, tree: Tree) -> Tree:
    """Puts every array where its rule says; typed keys and scalars on every device."""
    return jax.device_put(tree, shardings(on, tree))


def kept(on: Layout, tree: Tree) -> Tree:
    """The same inside a compiled program: its results stay where `place` puts them."""
    return tree if on.mesh.size == 1 else jax.lax.with_sharding_constraint(tree, shardings(on, tree))


def cut(on: Layout, tree: Tree, others: Any = None) -> Tree:
    """Inside a compiled program: a batch's arrays [B, ...] are cut over the devices, if B divides; others: how their other axes are."""

    def one(x: jax.Array) -> jax.Array:
        if not x.ndim or x.shape[0] % shards(on.mesh):
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(on.mesh, PartitionSpec(*BATCH, *[others] * (x.ndim - 1))))

    return tree if on.mesh.size == 1 else jax.tree.map(one, tree)


def layer(on: Layout, module: nn.Module, x: jax.Array) -> jax.Array:
    """Inside a compiled program: what a layer gives is `cut`, over tensor as its kernel makes it, if it is no smaller than the kernel.

    Else the compiler cuts it now and then by its channels, as fsdp cuts the kernel, and sends what went in and comes out in place of
    the kernel: less, where pictures are small and kernels large (docs/benchmarks.md).
    """
    if not module.has_variable("params", "kernel") or x.size < jnp.size(module.get_variable("params", "kernel")):
        return x
    result: jax.Array = cut(on, x, PartitionSpec.UNCONSTRAINED)
    return result


def options(on: Layout) -> dict[str, Any] | None:
    """Of the compiler, for what runs networks: a kernel that is cut is gathered whole before it is used.

    Trap: left to itself, TPU's partitioner makes a loop over the pieces of such a kernel, from 8 of them on, and multiplies by each as
    it comes ("windowed einsum"). Of 128 channels over 16 chips a piece is 8, where a chip multiplies by 128 at once.
    """
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"} if on.mesh.devices.flat[0].platform == "tpu" else None


def programs(on: Layout, parts: Parts) -> Programs:
    """The programs of a run's parts on a layout, by its backend."""
    stays = partial(kept, on)
    if on.backend == "pmap":
        return pmapped(on, build(parts, stays))
    return build(parts, stays, partial(cut, on), partial(layer, on), options(on))


def pmapped(on: Layout, programs: Programs) -> Programs:
    """The second backend, `jax.pmap`: each device runs the programs on its own share of a batch, and all hold all parameters.

    Gradients and sums are added over the devices by psum; `prepare` and `apply` see everything and stay as they are. A batch that
    does not divide, such as the one empty prompt, is not cut.
    """
    count, one_each = on.mesh.size, NamedSharding(on.mesh, BATCH)

    def over(program: Callable[..., Tree], same: int, added: Callable[[Tree], Tree] | None = None) -> Callable[..., Tree]:
        """program, whose first `same` arguments every device gets whole and whose others are cut; results are joined, or `added`."""

        @lru_cache
        def mapped(others: int) -> Callable[..., Tree]:
            one = program if added is None else lambda *arguments: added(program(*arguments))
            return jax.pmap(one, "data", in_axes=(None,) * same + (0,) * others, out_axes=0 if added is None else None)

        def call(*arguments: Tree) -> Tree:
            whole, parts = arguments[:same], arguments[same:]
            if len(jax.tree.leaves(parts)[0]) % count:
                return program(*arguments)
            parts = jax.device_put(jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), parts), one_each)
            out = mapped(len(parts))(*whole, *parts)
            return out if added else jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

        return call

    def over_devices(gradients: Tree) -> Tree:
        grads, sums = gradients
        how = lambda k: jax.lax.pmax if k.endswith("_max") else jax.lax.psum  # noqa: E731
        return jax.lax.psum(grads, "data"), {k: how(k)(v, "data") for k, v in sums.items()}

    same = {"encode": 1, "to_samples": 1, "to_pictures": 1, "score": 1, "rollout": 2, "anchor": 2}
    joined = {name: over(getattr(programs, name), n) for name, n in same.items()}
    return programs._replace(gradient=over(programs.gradient, 3, over_devices), **joined)


def shard(on: Layout, tree: Tree) -> Tree:
    """Cuts host arrays [B, ...] of this process over the devices; B divides by them (checked when the run is built)."""
    sharding = NamedSharding(on.mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def spread(on: Layout, tree: Tree) -> Tree:
    """The same of host arrays [B, ...] that every process holds whole; typed keys too."""
    sharding = NamedSharding(on.mesh, BATCH)

    def cut(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(cut(jax.random.key_data(x)))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(cut, tree)


def own(on: Layout, x: jax.Array) -> np.ndarray:
    """The rows of an array [B, ...] that `shard` would have taken from this process."""
    if jax.process_count() == 1:
        return np.asarray(x)
    where = NamedSharding(on.mesh, BATCH)
    if not x.sharding.is_equivalent_to(where, x.ndim):
        x = jax.jit(lambda x: x, out_shardings=where)(x)
    parts = {s.index[0].start or 0: s.data for s in x.addressable_shards}
    return np.concatenate([np.asarray(parts[i]) for i in sorted(parts)])


def whole(tree: Tree) -> Tree:
    """Arrays as numpy, whole on every process; all of them must ask."""

    def gathered(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(gathered, tree)
