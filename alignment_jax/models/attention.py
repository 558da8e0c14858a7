"""Attention, whose scores on CPU are not kept for the backward pass: they are made again there, some queries at a time."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

Array = jax.Array
SCORES = 2**22  # of so many entries are the scores that the backward pass holds at a time


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
    if implementation in ("xla", "cudnn") or (implementation is None and jax.default_backend() != "cpu"):
        where = None if mask is None else mask[:, None, None, :].astype(bool)
        return jax.nn.dot_product_attention(q, k, v, mask=where, is_causal=causal,
                                            implementation=implementation)  # type: ignore[arg-type]  # fmt: skip
    scores = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
    return _einsum(q, k, v, mask, causal) if causal or scores <= SCORES else _recomputed(q, k, v, mask)


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


def _forward(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, tuple[Array, Array, Array, Array | None]]:
    return _einsum(q, k, v, mask), (q, k, v, mask)


def _backward(kept: tuple[Array, Array, Array, Array | None], d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, mask = kept
    b, n, heads, _ = q.shape
    fits = max(SCORES // (b * heads * k.shape[1]), 1)
    size = max(s for s in range(1, n + 1) if n % s == 0 and s <= fits)
    some = lambda x: jnp.moveaxis(x.reshape(b, n // size, size, heads, -1), 1, 0)  # noqa: E731

    def part(sums: tuple[Array, Array], these: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        queries, d_these = these
        dq, dk, dv = jax.vjp(partial(_einsum, mask=mask), queries, k, v)[1](d_these)
        return (sums[0] + dk, sums[1] + dv), dq

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(part, zeros, (some(q), some(d_out)))
    return jnp.moveaxis(dq, 0, 1).reshape(q.shape), dk.astype(k.dtype), dv.astype(v.dtype), None


_recomputed.defvjp(_forward, _backward)
