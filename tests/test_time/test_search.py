"""Search at test time: hill climbing on the noise, search over paths, beams; limits of one another and closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import S2, M, chain, exact, law, recursion

from alignment_jax.diffusion import Sampler, draw, fold_in, rectified_flow, renoise, sampling_grid
from alignment_jax.test_time.base import fan, top
from alignment_jax.test_time.beam import beam
from alignment_jax.test_time.best_of_n import best_of_n
from alignment_jax.test_time.path_search import path_search
from alignment_jax.test_time.zero_order import zero_order

STILL, NOISY = chain(6, eta=0.0), chain(6, eta=1.0)


def gaussian_net(sampler):
    return lambda x, t, cond: exact(x, sampler.schedule.alpha(t)[:, None], sampler.schedule.sigma(t)[:, None])


def first_entry(keys, x0, condition):
    return x0[:, 0]


def wave(keys, x0, condition):
    """No monotone reward: what is judged must be the very state that the method means."""
    return jnp.sin(5.0 * x0[:, 0])


def run(factory, sampler, size=16, reward=wave, denoise=None, shape=(1,), **settings):
    networks = {"policy": denoise or gaussian_net(sampler), "reward": reward}
    data = {"cond": {"c": jnp.zeros((size, 1))}, "condition": {}}
    keys = jax.random.split(jax.random.key(3), size)
    return jax.jit(lambda keys: factory(sampler, shape, **settings).draw(keys, networks, data))(keys)


def plain(sampler, size=16, denoise=None, shape=(1,)):
    keys = jax.random.split(jax.random.key(3), size)
    return draw(keys, denoise or gaussian_net(sampler), {"c": jnp.zeros((size, 1))}, sampler, shape)[0]


def test_zero_order_without_strength_draws_the_plain_sample_however_often():
    x0, info = run(zero_order, STILL, strength=0.0, iterations=3)
    np.testing.assert_allclose(x0, plain(STILL), atol=1e-6)
    np.testing.assert_allclose(info["gain"], 0.0, atol=1e-5)


def test_zero_order_never_falls_and_keeps_what_it_found():
    """A pivot that is not among its own candidates, as in the paper's listing, may be followed by a worse one."""
    found = [run(zero_order, STILL, n=2, iterations=k) for k in (0, 1, 3)]
    rewards = np.stack([info["reward"] for _, info in found])
    assert (np.diff(rewards, axis=0) >= 0).all() and rewards[2].mean() > rewards[0].mean() + 0.2
    for x0, info in found:
        np.testing.assert_allclose(wave(None, x0, None), info["reward"], atol=1e-6)
        np.testing.assert_allclose(info["reward"] - info["gain"], rewards[0], atol=1e-6)


@pytest.mark.parametrize(("n", "iterations", "expected"), [(3, 1, 1.0294), (5, 3, 1.7660)])
def test_zero_order_at_infinite_strength_is_random_search(n, iterations, expected):
    """E max of 1 + n iterations standard normals."""
    size = 8000
    x0, _ = run(zero_order, STILL, size, first_entry, n=n, iterations=iterations, strength=1e6)
    mean, variance = law(STILL)
    assert abs(float(x0.mean()) - (mean + variance**0.5 * expected)) < 4 * (variance / size) ** 0.5


def test_a_noise_nearby_is_as_long_as_the_pivot_at_its_cosine():
    """z + s u unscaled would be sqrt(1 + s^2) times too long, which the model has never seen."""
    shape, size = (4096,), 4
    nothing = lambda x, t, cond: jnp.zeros_like(x)  # noqa: E731
    base = plain(STILL, size, nothing, shape)  # a multiple of x_T
    other = lambda keys, x0, condition: -(x0 * base).sum(1)  # noqa: E731
    x0, _ = run(zero_order, STILL, size, other, nothing, shape, n=1, iterations=1, strength=0.75)
    norms = jnp.linalg.norm(x0, axis=1), jnp.linalg.norm(base, axis=1)
    np.testing.assert_allclose((x0 * base).sum(1) / (norms[0] * norms[1]), 0.8, atol=0.04)
    np.testing.assert_allclose(norms[0] / norms[1], 1.0, atol=0.04)


@pytest.mark.parametrize("flow", [False, True])
def test_noise_added_on_the_way_keeps_the_marginal_of_every_time(flow):
    """N(alpha m, alpha^2 s^2 + sigma^2), also at a flow's alpha = 0, where only noise is left."""
    schedule = rectified_flow()
    sampler = Sampler(schedule, sampling_grid(schedule, 6), "flow") if flow else STILL
    alpha, sigma = (np.asarray(a, np.float64) for a in sampler.grid[1:])
    n, key = 40_000, jax.random.key(0)
    clean = M + S2**0.5 * jax.random.normal(key, (n, 1))
    for i, to in ((6, 5), (6, 2), (4, 1), (3, 0)):
        x = alpha[i] * clean + sigma[i] * jax.random.normal(jax.random.fold_in(key, 1), (n, 1))
        got = jax.jit(partial(renoise, sampler=sampler))(jax.random.fold_in(key, 2), x=x, i=i, to=to)
        variance = alpha[to] ** 2 * S2 + sigma[to] ** 2
        assert abs(float(got.mean()) - alpha[to] * M) < 4 * (variance / n) ** 0.5
        assert abs(float(got.var()) / variance - 1) < 4 * (2 / n) ** 0.5
        np.testing.assert_allclose(renoise(key, sampler, x, i, i), x, rtol=1e-6)


@pytest.mark.parametrize("sampler", [STILL, NOISY], ids=["still", "noisy"])
def test_search_that_branches_nowhere_is_best_of_n(sampler):
    """Paths without new noise, and beams of one child; slots keep their places and their noise."""
    x0, info = run(best_of_n, sampler, n=4)
    for other in (partial(path_search, n=4, children=1, forward=0, back=1, rounds=4), partial(path_search, n=4, rounds=0),
                  partial(beam, beams=4, children=1, lookahead=2)):  # fmt: skip
        same, told = run(other, sampler)
        np.testing.assert_allclose(same, x0, atol=1e-6)
        np.testing.assert_allclose(told["reward"], info["reward"], atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_one_path_has_its_closed_law(eta):
    """The variance through steps and new noise, with a network that no marginal is stationary under: a wrong index shows."""
    sampler, size, share = chain(8, eta), 20_000, 0.7
    a, s = (np.asarray(v, np.float64) for v in sampler.grid[1:])
    var, k = 1.0, 0
    for first, until in ((0, 4), (2, 6), (4, 8)):  # three walks, the second and third from two steps back
        if k:
            r = a[first] / a[k]
            var = r**2 * var + s[first] ** 2 - (r * s[k]) ** 2
        for i in range(first, until):
            std = eta * s[i + 1] / s[i] * np.sqrt(max(0.0, 1 - (a[i] / a[i + 1]) ** 2))
            factor = a[i + 1] / a[i] + share * (np.sqrt(s[i + 1] ** 2 - std**2) - a[i + 1] / a[i] * s[i])
            var = factor**2 * var + std**2
        k = until
    x0, _ = run(path_search, sampler, size, denoise=lambda x, t, cond: share * x, rounds=2, n=1, children=1, forward=2, back=4)
    assert abs(float(x0.mean())) < 4 * (var / size) ** 0.5
    assert abs(float(x0.var()) / var - 1) < 4 * (2 / size) ** 0.5, (float(x0.var()), var)


def test_paths_find_more_than_as_many_samples():
    found = {name: float(run(f, STILL, 2000, first_entry)[1]["reward"].mean())
             for name, f in (("paths", partial(path_search, n=4, rounds=3, forward=1, back=2)), ("best", partial(best_of_n, n=4)),
                             ("as many calls", partial(best_of_n, n=10)))}  # fmt: skip
    assert found["paths"] > found["best"] + 0.2, found


def by_hand(sampler, size, children, lookahead):
    """Greedy search on the Gaussian in float64, from the same noises."""
    A, B, _, std = recursion(sampler)
    a, s = (np.asarray(v, np.float64) for v in sampler.grid[1:])
    keys, n_steps = jax.random.split(jax.random.key(3), size), sampler.num_steps
    slots = [keys, *(fold_in(keys, (1 << 24) + j) for j in range(1, children))]
    x = np.asarray(jax.vmap(lambda k: jax.random.normal(k, ()))(fold_in(keys, 0)), np.float64)

    def ahead(x, i):
        places = [i + j * (n_steps - i) // lookahead for j in range(lookahead + 1)]
        for p, q in zip(places, places[1:], strict=False):
            eps = s[p] * (x - a[p] * M) / (a[p] ** 2 * S2 + s[p] ** 2)
            x = a[q] / a[p] * (x - s[p] * eps) + s[q] * eps
        return x

    for i in range(n_steps):
        z = np.stack([jax.vmap(lambda k: jax.random.normal(k, ()))(fold_in(fold_in(k, 1), 2 * i)) for k in slots], 1)
        kids = (A[i] * x + B[i])[:, None] + std[i] * z
        best = np.argmax(np.sin(5.0 * ahead(kids, i + 1)), 1)
        x = kids[np.arange(size), best]
    return x


@pytest.mark.parametrize("lookahead", [1, 3])
def test_one_beam_is_greedy_search_by_the_lookahead_of_each_child(lookahead):
    """1: the child's clean prediction. Judged by the parent's prediction, as a scan's state offers it, all children were equal."""
    x0, info = run(beam, NOISY, 24, beams=1, children=3, lookahead=lookahead)
    want = by_hand(NOISY, 24, 3, lookahead)
    near = np.abs(np.asarray(x0[:, 0]) - want) < 1e-3
    assert near.mean() > 0.95, np.abs(np.asarray(x0[:, 0]) - want)  # a near tie may fall otherwise in float32
    np.testing.assert_allclose(wave(None, x0, None), info["reward"], atol=1e-5)


def test_beams_rise_with_beams_and_children_and_one_of_one_is_the_chain():
    mean = {(b, k): float(run(beam, NOISY, 500, first_entry, beams=b, children=k, lookahead=1)[1]["reward"].mean())
            for b, k in ((1, 1), (1, 2), (2, 2))}  # fmt: skip
    assert mean[1, 1] + 0.3 < mean[1, 2] < mean[2, 2], mean
    np.testing.assert_allclose(run(beam, NOISY, beams=1, children=1)[0], plain(NOISY), atol=1e-6)


def test_a_reward_that_says_nothing_leaves_the_plain_chain_and_different_beams():
    """All children of one beam first would make every tie a collapse onto that beam."""
    flat = lambda keys, x0, condition: jnp.zeros(len(x0))  # noqa: E731
    np.testing.assert_allclose(run(beam, NOISY, reward=flat, beams=2, children=2)[0], plain(NOISY), atol=1e-6)
    parents = fan(jnp.arange(6.0), 3, 2)
    np.testing.assert_array_equal(parents, [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5])
    kept = top(jnp.zeros((2, 6)), 3)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(parents).reshape(2, 6), np.asarray(kept), 1), [[0, 1, 2], [3, 4, 5]])


def test_the_best_are_kept_in_their_places_and_what_failed_last():
    scores = jnp.array([[1.0, 3.0, jnp.nan, 3.0, 2.0], [jnp.nan, -jnp.inf, jnp.nan, -2.0, jnp.nan]])
    np.testing.assert_array_equal(top(scores, 3), [[1, 3, 4], [0, 1, 3]])
    np.testing.assert_array_equal(top(scores, 1), [[1], [3]])


def test_beams_with_children_need_noise_to_choose_from_and_zero_order_none():
    assert beam(STILL, (1,)).needs.noise and not beam(STILL, (1,), children=1).needs.noise
    assert zero_order(STILL, (1,)).needs.still


@pytest.mark.parametrize(("make", "says"), [
    (partial(zero_order, STILL, n=0), "n >= 1"), (partial(zero_order, STILL, iterations=-1), "iterations >= 0"),
    (partial(zero_order, STILL, strength=-0.1), "strength >= 0"), (partial(zero_order, STILL, strength=float("nan")), "strength >= 0"),
    (partial(beam, NOISY, beams=0), "at least 1; got 0, 2 and 6"), (partial(beam, NOISY, children=0), "at least 1"),
    (partial(beam, NOISY, lookahead=0), "lookahead of at least 1"),
    (partial(path_search, STILL, rounds=-1), "rounds >= 0"), (partial(path_search, STILL, n=0), "n >= 1"),
    (partial(path_search, STILL, forward=2, back=2), "forward < back; got 2 and 2"),
    (partial(path_search, STILL, forward=-1), "0 <= forward"),
    (partial(path_search, STILL, rounds=3, forward=2, back=4), "do not lie in a chain of 6 steps"),
    (partial(path_search, STILL, forward=0, back=1), "children without noise are one"),
])  # fmt: skip
def test_bad_settings_are_refused_when_the_method_is_built(make, says):
    with pytest.raises(ValueError, match=says):
        make((1,))


def test_a_solver_with_a_memory_is_refused_where_its_past_is_undone():
    sampler = Sampler(STILL.schedule, STILL.grid, "eps", solver="dpmsolver++")
    with pytest.raises(ValueError, match="looks back"):
        path_search(sampler, (1,), rounds=1)
    x0, _ = run(beam, Sampler(STILL.schedule, STILL.grid, "eps", eta=1.0, solver="dpmsolver++"), beams=1, children=1, lookahead=1)
    np.testing.assert_allclose(x0, plain(Sampler(STILL.schedule, STILL.grid, "eps", eta=1.0, solver="dpmsolver++")), atol=1e-5)
