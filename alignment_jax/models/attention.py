"""Attention, whose scores on CPU are not kept for the backward pass: they are made again there, some queries at a time."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from ..platform import platform

Array = jax.Array
SCORES = 2**21  # of so many entries are the scores that the backward pass holds at a time
KEPT = 2**18  # scores of no more entries than these are kept: what they take is less than what making them again would


def attention(
    q: Array, k: Array, v: Array, mask: Array | None = None, *, implementation: str | None = None, causal: bool = False
) -> Array:
    """softmax(q k^T / sqrt(D)) v; q [B,N,H,D], k, v [B,M,H,D], mask [B,M] of keys that exist -> [B,N,H,D].

    causal: a position attends to itself and to what comes before it.
    implementation: "einsum" (on CPU three times faster than `jax.nn.dot_product_attention`), "xla" or "cudnn" (those of
    that function; cudnn is flash attention, on GPUs, 16-bit types only), None: einsum on CPU, elsewhere its default.
    """
    if implementation not in (None, "einsum", "xla", "cudnn"):
        raise ValueError(f"attention implementation {implementation!r}; choose None, 'einsum', 'xla' or 'cudnn'")
    if implementation in ("xla", "cudnn") or (implementation is None and platform() != "cpu"):
        where = None if mask is None else mask[:, None, None, :].astype(bool)
        return jax.nn.dot_product_attention(q, k, v, mask=where, is_causal=causal,
                                            implementation=implementation)  # type: ignore[arg-type]  # fmt: skip
    scores = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
    return _einsum(q, k, v, mask, causal) if causal or scores <= KEPT else _recomputed(q, k, v, mask)


def _einsum(q: Array, k: Array, v: Array, mask: Array | None, causal: bool = False) -> Array:
    # the queries are scaled, not the scores: XLA on CPU writes the scale out at the size of the scores
    q = (q / jnp.sqrt(jnp.float32(q.shape[-1]))).astype(q.dtype)
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k).astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, -1e9)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores, -1).astype(q.dtype), v)


@jax.custom_vjp
def _recomputed(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    return _einsum(q, k, v, mask)


Kept = tuple[Array, Array, Array, Array | None, Array]


def _forward(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, Kept]:
    out = _einsum(q, k, v, mask)
    return out, (q, k, v, mask, out)


def _backward(kept: Kept, d_out: Array) -> tuple[Array, Array, Array, None]:
    """P = softmax(s q k^T), out = P v: dv = P^T d_out, dS = P (d_out v^T - <d_out, out>), dq = s dS k, dk = s dS^T q.

    Every product's operands lie as XLA's fast ones on CPU want them, contracted last on the left: others take twice the time.
    """
    q, k, v, mask, out = kept
    b, n, heads, d = q.shape
    fits = max(SCORES // (b * heads * k.shape[1]), 1)
    size = max(s for s in range(1, n + 1) if n % s == 0 and s <= fits)
    some = lambda x: jnp.moveaxis(x.reshape(b, n // size, size, heads, -1), (1, 3), (0, 2))  # noqa: E731 [parts,B,H,size,D]
    scale = 1 / jnp.sqrt(jnp.float32(d))
    scaled = (q * scale).astype(q.dtype)
    keys, keys_t, values_t = k.transpose(0, 2, 1, 3), k.transpose(0, 2, 3, 1), v.transpose(0, 2, 3, 1)
    inside = jnp.sum(jnp.float32(d_out) * out, -1, keepdims=True)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def part(sums: tuple[Array, Array], these: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        queries, queries_t, dy, dy_t, inner = these
        scores = product("bhnd,bhdm->bhnm", queries, keys_t)
        if mask is not None:
            scores = jnp.where(mask[:, None, None, :], scores, -1e9)
        p = jax.nn.softmax(scores, -1)
        dv = product("bhdn,bhnm->bhdm", dy_t, p.astype(q.dtype))
        ds = p * (product("bhnd,bhdm->bhnm", dy, values_t) - inner)
        if mask is not None:  # of a row without keys too
            ds = jnp.where(mask[:, None, None, :], ds, 0.0)
        ds = ds.astype(q.dtype)
        dk = product("bhdn,bhnm->bhdm", queries_t, ds)
        return (sums[0] + dk, sums[1] + dv), product("bhnm,bhmd->bhnd", ds, keys)

    zeros = jnp.zeros(keys_t.shape, jnp.float32), jnp.zeros(values_t.shape, jnp.float32)
    turned = lambda x: x.swapaxes(3, 4)  # noqa: E731
    queries, dy = some(scaled), some(d_out)
    (dk, dv), dq = jax.lax.scan(part, zeros, (queries, turned(queries), dy, turned(dy), some(inside)))
    dq = scale * jnp.moveaxis(dq, (0, 2), (1, 3)).reshape(q.shape)
    return dq.astype(q.dtype), dk.transpose(0, 3, 1, 2).astype(k.dtype), dv.transpose(0, 3, 1, 2).astype(v.dtype), None


_recomputed.defvjp(_forward, _backward)
