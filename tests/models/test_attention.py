"""Attention whose scores are made again in the backward pass, a part of the queries at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment_jax.models import attention as module
from alignment_jax.models.attention import attention


def inputs(dtype=jnp.float32, b=3, n=12, m=10, heads=2, d=4):
    q, k, v = (jax.random.normal(jax.random.key(i), (b, s, heads, d), dtype) for i, s in enumerate((n, m, m)))
    mask = jnp.arange(m) < jnp.array([10, 3, 0])[:, None]
    return q, k, v, mask


def gradients(q, k, v, mask):
    value = lambda q, k, v: jnp.sum(jnp.sin(attention(q, k, v, mask, implementation="einsum").astype(jnp.float32)))
    return jax.jit(jax.value_and_grad(value, (0, 1, 2)))(q, k, v)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scores", [1, 200, 300, 719])  # queries at a time: 1, 3, 4, 6 of 12
def test_the_gradients_are_those_of_scores_kept(monkeypatch, scores, masked):
    """With a mask the last sample has no key at all: its scores have no gradient, and its values have."""
    q, k, v, mask = inputs()
    mask = mask if masked else None
    value, wanted = gradients(q, k, v, mask)
    monkeypatch.setattr(module, "KEPT", 0)
    monkeypatch.setattr(module, "SCORES", scores)
    again, got = gradients(q, k, v, mask)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    for name, a, b in zip("qkv", got, wanted):
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=name)


def test_gradients_keep_bfloat16(monkeypatch):
    q, k, v, mask = inputs(jnp.bfloat16)
    _, wanted = gradients(q, k, v, mask)
    monkeypatch.setattr(module, "KEPT", 0)
    monkeypatch.setattr(module, "SCORES", 100)
    _, got = gradients(q, k, v, mask)
    for a, b in zip(got, wanted):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=0.02, rtol=0.01)


def test_the_memory_of_long_attentions_does_not_grow_with_their_number():
    """Trap: of every layer's scores a copy waits for its backward pass; five layers of 1024 positions took gigabytes."""
    def temporaries(layers: int) -> int:
        def value(x):
            for _ in range(layers):
                x = x + attention(x, x, x, implementation="einsum")
            return jnp.sum(x)

        x = jax.ShapeDtypeStruct((4, 1024, 8, 4), jnp.float32)
        return jax.jit(jax.grad(value)).lower(x).compile().memory_analysis().temp_size_in_bytes

    scores = 4 * 8 * 1024 * 1024 * 4
    assert temporaries(6) - temporaries(2) < scores
