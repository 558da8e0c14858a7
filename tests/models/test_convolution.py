"""The convolution's own gradients are those of XLA's, and hold no transposed convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment_jax.models.convolution import Conv, convolution

NHWC = ("NHWC", "HWIO", "NHWC")
CASES = [  # kernel, strides, padding, height, width
    ((3, 3), (1, 1), ((1, 1), (1, 1)), 8, 8), ((3, 3), (1, 1), "SAME", 7, 10), ((3, 3), (2, 2), ((1, 1), (1, 1)), 8, 8),
    ((3, 3), (2, 2), ((0, 1), (0, 1)), 9, 8), ((3, 3), (2, 2), "SAME", 8, 7), ((1, 1), (1, 1), "SAME", 5, 5),
    ((4, 4), (4, 4), "VALID", 9, 8), ((3, 5), (1, 3), ((2, 1), (0, 3)), 6, 11),
]  # fmt: skip


def pulled(conv, x, kernel, strides, padding):
    y, pull = jax.vjp(lambda x, k: conv(x, k, strides, padding, dimension_numbers=NHWC), x, kernel)
    return y, *pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype))


@pytest.mark.parametrize(("size", "strides", "padding", "height", "width"), CASES)
def test_output_and_gradients_are_those_of_xla(size, strides, padding, height, width):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, height, width, 3), (*size, 3, 5)))
    ours, theirs = (pulled(c, x, kernel, strides, padding) for c in (convolution, jax.lax.conv_general_dilated))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_in_sixteen_bits_the_gradients_keep_their_types():
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((2, 8, 8, 3), (3, 3, 3, 5)))
    ours, theirs = (pulled(c, x, kernel, (1, 1), ((1, 1), (1, 1))) for c in (convolution, jax.lax.conv_general_dilated))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=0.03, atol=0.03)


def test_groups_and_dilation_are_left_to_xla():
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    for more in ({"feature_group_count": 2}, {"kernel_dilation": 2}, {"input_dilation": 2}):
        layer = Conv(4, (3, 3), padding=1, **more)
        params = layer.init(jax.random.key(1), x)
        plain = layer.clone(conv_general_dilated=None)
        np.testing.assert_array_equal(layer.apply(params, x), plain.apply(params, x))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere XLA's own gradients are used")
@pytest.mark.parametrize("strides", [1, 2])
def test_no_gradient_is_a_reversed_or_batch_contracting_convolution(strides):
    """Either is tens of times slower in a loop on CPU than outside one."""
    layer = Conv(5, (3, 3), strides=strides, padding=1)
    x = jnp.ones((2, 8, 8, 3))
    params = layer.init(jax.random.key(0), x)
    text = str(jax.make_jaxpr(jax.grad(lambda p, x: jnp.square(layer.apply(p, x)).sum(), (0, 1)))(params, x))
    assert text.count("conv_general_dilated[") == 2, "the forward pass, and the gradient by x"
    assert "lhs_dilation=(2, 2)" not in text and "lhs_spec=(3, 0" not in text and "rhs_spec=(2, 3" not in text
