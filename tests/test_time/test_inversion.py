"""Inversion on the sampler's own grid, and the methods that need it: noise selection by stability, and zigzag sampling."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import S2, M, chain, exact, recursion

from alignment_jax.diffusion import (
    Sampler,
    draw,
    fold_in,
    guided,
    initial,
    inverse,
    inverted,
    rectified_flow,
    sample,
    sampling_grid,
    target,
    transition,
    zero_terminal_snr,
)
from alignment_jax.test_time.base import spread
from alignment_jax.test_time.noise_stability import noise_stability
from alignment_jax.test_time.zigzag import zigzag

KEY = jax.random.key(2)
STILL = chain(6, eta=0.0)
FLOW = Sampler(rectified_flow(), sampling_grid(rectified_flow(), 6), "flow")
DARK = Sampler(zero_terminal_snr(), sampling_grid(zero_terminal_snr(), 6, "trailing"), "v")


def gaussian_net(sampler):
    """The exact network of N(M, S2) in any parameterisation; at alpha = 0 the noise is x and the clean sample M."""

    def denoise(x, t, cond):
        alpha, sigma = sampler.schedule.alpha(t)[:, None], sampler.schedule.sigma(t)[:, None]
        eps = exact(x, alpha, sigma)
        x0 = M + alpha * S2 * (x - alpha * M) / (alpha**2 * S2 + sigma**2)
        return target(sampler.prediction, x0, eps, alpha[:, 0], sigma[:, 0])

    return denoise


@pytest.mark.parametrize("sampler", [STILL, FLOW], ids=["eps", "flow"])
def test_a_step_backwards_undoes_the_step_where_the_output_does_not_depend_on_x(sampler):
    x, output = jax.random.normal(KEY, (5, 2)), jax.random.normal(jax.random.fold_in(KEY, 1), (5, 2))
    for i in range(sampler.num_steps):
        forth = transition(sampler, i, x, output).mean
        np.testing.assert_allclose(inverse(sampler, i, forth, output), x, atol=3e-5)


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_elsewhere_it_does_so_to_the_square_of_the_step(kind):
    """The largest error of one step falls by four as the steps are halved, away from the ends."""
    off = []
    for steps in (40, 80, 160):
        sampler = chain(steps, eta=0.0) if kind == "eps" else Sampler(rectified_flow(), sampling_grid(rectified_flow(), steps), "flow")
        net, x, errors = gaussian_net(sampler), jnp.array([[2.0], [-1.5]]), []
        for i in range(steps // 4, 3 * steps // 4, steps // 20):
            t = jnp.full(2, sampler.grid.t[i])
            forth = transition(sampler, i, x, net(x, t, None)).mean
            errors.append(float(jnp.abs(inverse(sampler, i, forth, net(forth, t, None)) - x).max()))
        off.append(max(errors))
    assert 3.3 < off[0] / off[1] < 4.7 and 3.3 < off[1] / off[2] < 4.7, off


@pytest.mark.parametrize("sampler", [DARK, FLOW], ids=["zero terminal snr", "flow"])
def test_the_last_step_backwards_reaches_pure_noise(sampler):
    """At alpha = 0 the noise read at the state's new level would be the state itself, and the step would stand still."""
    net, z = gaussian_net(sampler), jax.random.normal(KEY, (64, 1))
    first, t = partial(transition, sampler, 0), jnp.full(64, sampler.grid.t[0])
    x = first(z, net(z, t, None)).mean
    back = inverse(sampler, 0, x, net(x, t, None))
    assert float(sampler.grid.alpha[0]) < 1e-6 and float(jnp.abs(x - z).max()) > 0.04
    assert float(jnp.abs(back - z).max()) < 0.5 * float(jnp.abs(x - z).max())


def test_inversion_along_the_grid_tends_to_the_noise_the_sample_came_from():
    off = []
    for sampler in (chain(25, eta=0.0), chain(100, eta=0.0), Sampler(FLOW.schedule, sampling_grid(FLOW.schedule, 25), "flow"),
                    Sampler(FLOW.schedule, sampling_grid(FLOW.schedule, 100), "flow")):  # fmt: skip
        net, z = gaussian_net(sampler), jax.random.normal(KEY, (64, 1))
        x0, _ = sample(KEY, net, {}, sampler, z)
        off.append(float(jnp.abs(inverted(net, x0, {}, sampler) - z).max()))
    assert off[1] < 0.4 * off[0] and off[3] < 0.4 * off[2] and max(off[1], off[3]) < 0.1, off


def selected(sampler, denoise, size=12, shape=(3,), **settings):
    keys, data = jax.random.split(jax.random.key(3), size), {"cond": {"c": jnp.zeros((size, 1))}, "condition": {}}
    made = noise_stability(sampler, shape, **settings)
    return jax.jit(lambda keys: made.draw(keys, {"policy": denoise}, data))(keys)


def test_the_stability_of_a_gaussian_chain_has_its_closed_form_and_the_most_stable_noise_wins():
    """Both ways are affine: the cosine of each noise with its round trip, in float64 over all n."""
    n, size = 5, 12
    A, B, *_ = recursion(STILL)
    a, s = (np.asarray(v, np.float64) for v in STILL.grid[1:])
    keys = spread(jax.random.split(jax.random.key(3), size), n)
    z = np.asarray(initial(fold_in(keys, 0), STILL, (size * n, 3)), np.float64)
    x = z
    for i in range(6):
        x = A[i] * x + B[i]
    x0 = x
    for i in reversed(range(6)):
        eps = s[i] * (x - a[i] * M) / (a[i] ** 2 * S2 + s[i] ** 2)
        x = a[i] / a[i + 1] * (x - s[i + 1] * eps) + s[i] * eps
    cosines = ((z * x).sum(1) / np.linalg.norm(z, axis=1) / np.linalg.norm(x, axis=1)).reshape(size, n)
    got, info = selected(STILL, gaussian_net(STILL), n=n)
    np.testing.assert_allclose(info["stability"], cosines.max(1), atol=1e-5)
    np.testing.assert_allclose(got, x0.reshape(size, n, 3)[np.arange(size), cosines.argmax(1)], atol=1e-4)
    assert len(set(cosines.argmax(1))) > 1


def test_an_exact_inverter_scores_one_and_finer_steps_come_nearer():
    _, info = selected(STILL, lambda x, t, cond: 0.3 + jnp.cos(t)[:, None] + 0 * x, n=2)
    np.testing.assert_allclose(info["stability"], 1.0, atol=1e-5)
    coarse, fine = (1 - selected(s, gaussian_net(s), n=1)[1]["stability"].mean() for s in (STILL, chain(48, eta=0.0)))
    assert 0 < float(fine) < 0.2 * float(coarse)


def zigzagged(sampler, net, scale, size=6, **settings):
    """(zigzag's samples, the plain chain's at any scale) with an empty prompt of -1 and a prompt of 2."""
    keys, null = jax.random.split(jax.random.key(3), size), {"c": jnp.full((1, 1), -1.0)}
    cond, made = {"c": jnp.full((size, 1), 2.0)}, zigzag(sampler, (1,), guidance=scale, **settings)
    networks = {"policy": guided(net, null, scale), "guide": lambda scale: guided(net, null, scale)}
    x0, _ = jax.jit(lambda keys: made.draw(keys, networks, {"cond": cond, "condition": {}, "null": null}))(keys)
    return x0, lambda scale: draw(keys, guided(net, null, scale), cond, sampler, (1,))[0]


@pytest.mark.parametrize("sampler", [STILL, FLOW], ids=["eps", "flow"])
def test_of_an_output_without_x_zigzags_are_twice_the_guidance_less_the_inversions(sampler):
    """2 g1 - g2 on the steps that are taken twice, 3 g1 - 2 g2 on three times, g1 on the others; with g1 = g2 nothing changes."""
    net = lambda x, t, cond: cond["c"] * (1 + 0.1 * jnp.cos(t)[:, None]) + 0 * x  # noqa: E731
    x0, plain = zigzagged(sampler, net, 3.0, inverse_scale=1.0)
    both, middle = zigzagged(sampler, net, 3.0, inverse_scale=3.0)[0], zigzagged(sampler, net, 3.0, inverse_scale=1.0, steps=2)[0]
    np.testing.assert_allclose(both, plain(3.0), rtol=1e-4, atol=1e-3)

    keys = jax.random.split(jax.random.key(3), 6)
    twice = zigzagged(sampler, net, 3.0, inverse_scale=1.0, zigzags=2)[0]
    for got, last, scale in ((x0, 4, 5.0), (middle, 1, 5.0), (twice, 4, 7.0)):

        def by_step(x, t, cond, last=last, scale=scale):  # the higher guidance up to the step `last`
            return net(x, t, {"c": -1.0 + 3.0 * jnp.where(t >= float(sampler.grid.t[last]), scale, 3.0)[:, None]})

        np.testing.assert_allclose(got, draw(keys, by_step, {}, sampler, (1,))[0], rtol=1e-4, atol=1e-3)
    assert float(jnp.abs(x0 - plain(3.0)).min()) > 0.1


def test_zigzags_with_one_guidance_vanish_with_the_step():
    off = []
    for steps in (25, 50, 100):
        sampler = chain(steps, eta=0.0)
        exact_net = gaussian_net(sampler)
        x0, plain = zigzagged(sampler, lambda x, t, cond, net=exact_net: net(x, t, cond) + 0.1 * cond["c"], 2.0, inverse_scale=2.0)
        off.append(float(jnp.abs(x0 - plain(2.0)).max()))
    assert off[2] < 0.7 * off[1] < 0.5 * off[0], off


def test_both_need_a_sampler_without_noise_and_zigzag_guidance():
    assert noise_stability(STILL, (1,)).needs.still and zigzag(STILL, (1,)).needs.still and zigzag(STILL, (1,)).needs.guidance
    assert noise_stability(STILL, (1,)).needs.reward is None


@pytest.mark.parametrize(("make", "says"), [
    (partial(noise_stability, STILL, n=0), "n must be at least 1"),
    (partial(zigzag, STILL, steps=6), "before the last one, 0..5 in a chain of 6; got 6"), (partial(zigzag, STILL, steps=-1), "got -1"),
    (partial(zigzag, STILL, zigzags=-1), "zigzags must be at least 0"),
    (partial(zigzag, STILL, inverse_scale=8.0, guidance=5.5), "leads away from the prompt"),
    (partial(zigzag, STILL, inverse_scale=float("nan"), guidance=5.5), "leads away"),
    (partial(zigzag, Sampler(STILL.schedule, STILL.grid, "eps", solver="dpmsolver++")), "looks back"),
])  # fmt: skip
def test_bad_settings_are_refused_when_the_method_is_built(make, says):
    with pytest.raises(ValueError, match=says):
        make((1,))
