"""ReNO and DNO against closed forms: where their optima lie, what passes for noise, and memory that the steps do not buy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import chain, exact, recursion

from alignment_jax.diffusion import Sampler, cosine, sampling_grid, scaled_linear
from alignment_jax.test_time.base import ascent, walk
from alignment_jax.test_time.dno import dno, likely, log_probability
from alignment_jax.test_time.reno import reno

# one step whose sample is the network's output, here a constant times the noise
ONE = Sampler(scaled_linear(), sampling_grid(scaled_linear(), 1, "trailing"), "x0")


def drawn(method, denoise, reward, n=4, augmented=None):
    keys = jax.random.split(jax.random.key(2), n)
    score = lambda keys, x0, condition: reward(x0)
    networks = {"policy": denoise, "reward": score, "augmented": augmented or score}
    x0, info = jax.jit(lambda k: method.draw(k, networks, {"cond": {"c": jnp.zeros(n)}, "condition": {}}))(keys)
    return np.asarray(x0), info


def normals(keys, n, size):
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), keys), (n, size))


def test_reno_of_a_linear_generator_ends_on_the_shell_along_the_rewards_gradient():
    """max g z + alpha K(z): z along g at r = [|g| / alpha + sqrt((|g| / alpha)^2 + 4 (D - 1))] / 2."""
    direction, alpha, D = jnp.array([3.0, -1.0, 2.0, 0.5]), 0.5, 4
    method = reno(ONE, (D,), iterations=600, learning_rate=0.2, clip=10.0, momentum=0.0, alpha=alpha)  # no overshoot, which rewards more
    x0, info = drawn(method, lambda x, t, c: 1.0 * x, lambda x: x @ direction)
    steep = float(jnp.linalg.norm(direction)) / alpha
    radius = (steep + math.sqrt(steep**2 + 4 * (D - 1))) / 2
    np.testing.assert_allclose(x0, np.broadcast_to(radius * direction / jnp.linalg.norm(direction), x0.shape), atol=1e-2)
    np.testing.assert_allclose(info["norm"], radius / math.sqrt(D - 1), rtol=1e-3)


def test_without_a_reward_the_shell_alone_draws_noise_to_the_length_of_noise():
    """|z| <- |z| + lr alpha ((D - 1) / |z| - |z|) at each step. The score, which has no gradient, only says which point to return."""
    D, rate, alpha = 9, 0.1, 0.5
    nearest = lambda x: jax.lax.stop_gradient(-jnp.square(jnp.linalg.norm(x, axis=1) - math.sqrt(D - 1)))

    def length(iterations):
        method = reno(ONE, (D,), iterations=iterations, learning_rate=rate, clip=10.0, momentum=0.0, alpha=alpha)
        return np.linalg.norm(drawn(method, lambda x, t, c: x, nearest)[0], axis=1)

    first = length(0)
    assert np.abs(first - math.sqrt(D - 1)).min() > 0.05
    np.testing.assert_allclose(length(1), first + rate * alpha * ((D - 1) / first - first), rtol=1e-5)
    np.testing.assert_allclose(length(100), math.sqrt(D - 1), rtol=1e-4)


@pytest.mark.parametrize(("iterations", "length"), [(1, 0.95), (2, 0.95 + 1.355)])
def test_each_sample_is_clipped_by_its_own_norm_and_momentum_is_nesterovs(iterations, length):
    """lr clip (1 + m), then + lr clip (1 + m + m^2): of each sample, however steep its own reward. A norm over the batch would tie them."""
    slopes = jnp.array([10.0, 1.0, 1000.0, 0.6])
    method = reno(ONE, (3,), iterations=iterations, learning_rate=5.0, clip=0.1, momentum=0.9, alpha=0.0)
    x0, _ = drawn(method, lambda x, t, c: x, lambda x: slopes * x[:, 0])
    start, _ = drawn(reno(ONE, (3,), iterations=0), lambda x, t, c: x, lambda x: x[:, 0])
    np.testing.assert_allclose(x0 - start, np.broadcast_to([length, 0, 0], (4, 3)), atol=1e-5)


@pytest.mark.parametrize("make", [lambda n: reno(chain(5), (2,), iterations=n, learning_rate=2000.0),
                                  lambda n: dno(chain(5), (2,), iterations=n, learning_rate=3.0, block=2, permutations=1)])  # fmt: skip
def test_steps_that_overshoot_cannot_return_less_than_the_start(make):
    """Steps far too long on a narrow reward: the last iterate is bad, the best one is kept, and gain says by how much."""
    sampler = chain(5)

    def denoise(x, t, cond):
        return exact(x, sampler.schedule.alpha(t)[:, None], sampler.schedule.sigma(t)[:, None])

    narrow = lambda x: -jnp.square(x - 0.5).sum(1)
    before, _ = drawn(make(0), denoise, narrow, 16)
    after, info = drawn(make(5), denoise, narrow, 16)
    rewards = [np.asarray(narrow(x)) for x in (before, after)]
    assert (rewards[1] >= rewards[0] - 1e-5).all()
    np.testing.assert_allclose(info["reward"], rewards[1], atol=1e-5)
    np.testing.assert_allclose(info["gain"], rewards[1] - rewards[0], atol=1e-4)
    assert (np.asarray(info["iteration"]) == 0).any(), "no start survived: the steps of this test are not too long"


def test_a_reward_with_augmentation_leads_by_it_and_is_kept_by_the_plain_score():
    wrong = lambda keys, x0, condition: -x0[:, 0]
    x0, info = drawn(reno(ONE, (3,), iterations=5), lambda x, t, c: x, lambda x: x[:, 0], augmented=wrong)
    assert (np.asarray(info["iteration"]) == 0).all() and (np.asarray(info["gain"]) == 0).all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dno_of_a_linear_chain_moves_every_noise_by_its_share_in_the_sample(eta):
    """x0 = sum_j w_j z_j + const; without penalty, clip or decay one step of Adam moves each by lr sign(w_j): sum lr |w_j| in all."""
    sampler, rate = chain(6, eta), 1e-2
    method = dno(sampler, (1,), iterations=1, learning_rate=rate, clip=1e6, weight_decay=0.0, alpha=0.0, block=1, permutations=0)

    def denoise(x, t, cond):
        return exact(x, sampler.schedule.alpha(t)[:, None], sampler.schedule.sigma(t)[:, None])

    _, info = drawn(method, denoise, lambda x: 2.0 * x[:, 0])
    A, _, _, std = recursion(sampler)
    weights = [np.prod(A)] + [std[i] * np.prod(A[i + 1 :]) for i in range(sampler.num_steps)]
    assert eta == 0 or sum(w > 1e-3 for w in weights) > 4, "several noises reach the sample"
    np.testing.assert_allclose(info["gain"], 2.0 * rate * np.sum(weights), rtol=1e-3)


def test_dno_of_a_linear_model_ends_where_the_penalty_holds_the_reward():
    """d/dz of a sum(z) - alpha D mean^2 / 2 at block 1: mean = a / alpha, every number moved alike (p2 sleeps until cov - 1 = 0.6)."""
    slope, alpha, D = 0.8, 2.0, 64
    method = dno(ONE, (D,), iterations=300, learning_rate=4e-3, clip=1e6, weight_decay=0.0, alpha=alpha, block=1, permutations=2)
    x0, info = drawn(method, lambda x, t, c: x, lambda x: slope * x.sum(1))
    np.testing.assert_allclose(x0.mean(1), slope / alpha, atol=0.015)
    np.testing.assert_allclose(info["log_p"], np.log(2.0) - 0.5 * D * np.square(x0.mean(1)), rtol=1e-3)


@pytest.mark.parametrize(("k", "known"), [(2, 0.25), (4, 0.2357)])
def test_gaussian_noise_seldom_looks_unlike_noise_and_how_often_is_known(k, known):
    """n |mean|^2 ~ chi^2_k passes 2 k log 2 with known probability, 1/4 at k = 2 (the bound is loose): small values all the same."""
    z = normals(1, 4000, 64 * k)
    n, means = 64, z.reshape(4000, 64, k).mean(1)
    active = n * jnp.square(means).sum(1) / (2 * k) > math.log(2)
    assert abs(float(active.mean()) - known) < 0.03
    values = np.asarray(likely(z, k))
    assert abs(float((values < 0).mean()) - known) < 0.04, "the covariance's bound hardly ever bites"
    assert values.mean() > -0.2 and np.quantile(values, 0.001) > -4.0


@pytest.mark.parametrize("kind", ["shifted", "scaled", "repeated", "alternating"])
def test_what_does_not_look_like_noise_is_told(kind):
    """A mean of 0.5, half the spread, copies of one number, and (only in its own order) a sign that alternates within blocks."""
    z = normals(2, 8, 4096)
    odd = {"shifted": z + 0.5, "scaled": 0.5 * z, "repeated": jnp.repeat(z[:, ::4], 4, axis=1),
           "alternating": jnp.abs(z) * jnp.where(jnp.arange(4096) % 2, 1.0, -1.0)}[kind]  # fmt: skip
    values, gradient, _ = ascent(lambda z: (log_probability(jax.random.split(jax.random.key(3), 8), z, 4, 4), None), odd)
    assert float(values.max()) < -10, values
    assert np.isfinite(gradient).all()
    assert float((gradient * (z - odd)).sum()) > 0, "the way back to noise is uphill"
    if kind == "shifted":
        expected = math.log(2) - 1024 * np.square(odd.reshape(8, 1024, 4).mean(1)).sum(-1) / 8
        p1_alone = log_probability(jax.random.split(jax.random.key(3), 8), odd, 4, 0)
        assert (np.asarray(p1_alone) < expected + 1e-3).all()


def test_a_random_order_tells_what_the_own_order_hides():
    """Each number twice, half a vector apart: blocks of neighbours are independent, and random blocks hold no pair often enough either;
    sorted numbers are told by their own order alone, and a mean by all."""
    z = jnp.sort(normals(4, 4, 1024), axis=1)
    keys = jax.random.split(jax.random.key(3), 4)
    own, many = likely(z, 4), log_probability(keys, z, 4, 16)
    assert float(own.max()) < -10
    assert float((many - own / 17).min()) > -2.0, "its permutations are Gaussian noise"


def test_the_gradient_is_finite_where_eigenvalues_coincide():
    """cov - I of all equal numbers has a threefold eigenvalue, where the derivative of eigenvectors is infinite."""
    z = jnp.full((2, 64), 2.0)
    _, gradient, _ = ascent(lambda z: (likely(z, 4), None), z)
    raw = jax.grad(lambda z: likely(z, 4).sum())(z)
    assert np.isfinite(raw).all() and np.abs(gradient).max() > 0


@pytest.mark.parametrize("remat", [True, False])
def test_recomputed_chains_need_memory_that_hardly_grows_with_the_steps(remat):
    """A small convolutional network through 4 and 8 steps: recomputed, only states are kept; kept, every activation is."""
    kernels = [jax.random.normal(jax.random.fold_in(jax.random.key(1), i), (3, 3, a, b)) * 0.1
               for i, (a, b) in enumerate([(3, 32), (32, 32), (32, 3)])]  # fmt: skip

    def denoise(x, t, cond):
        for w in kernels:
            x = jnp.tanh(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
        return x

    def temporary(steps):
        sampler = Sampler(cosine(t_max=0.98), sampling_grid(cosine(t_max=0.98), steps), "x0")
        keys = jax.random.split(jax.random.key(0), 2)
        total = lambda x: walk(keys, denoise, {}, sampler, x, remat=remat).sum()
        compiled = jax.jit(jax.grad(total)).lower(jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(4), temporary(8)
    state, activations = 2 * 32 * 32 * 3 * 4, 2 * 32 * 32 * 64 * 4
    if remat:
        assert long - short < 4 * 6 * state and long < 1.5 * short, (short, long)
    else:
        assert long - short > 4 * activations, (short, long)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: reno(ONE, (3,), iterations=-1), "iterations"),
    (lambda: reno(ONE, (3,), clip=0.0), "clip > 0"),
    (lambda: reno(ONE, (1,)), "one number"),
    (lambda: dno(ONE, (3,), block=4), r"block must lie in 1\.\.3"),
    (lambda: dno(chain(4), (1,), block=6), r"1\.\.5"),
    (lambda: dno(ONE, (8,), learning_rate=-1.0), "learning_rate"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused_when_the_method_is_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()
