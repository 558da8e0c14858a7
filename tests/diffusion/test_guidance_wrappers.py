"""Guidance between two outputs: an interval of times, a weaker network, and what they cost."""

from collections import Counter

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import worlds

from alignment_jax import diffusion as d
from alignment_jax.training import build, evaluate, generate, programs, steering
from alignment_jax.training.count import counted

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 3))
COND, NULL = {"w": jnp.arange(1.0, 5.0)[:, None]}, {"w": jnp.full((1, 1), 0.25)}


def good(x, t, c):
    return jnp.tanh(x) * c["w"]


def bad(x, t, c):
    return 0.5 * x + c["w"]


def test_outside_the_interval_a_sample_is_drawn_by_the_network_alone():
    """One batch holds times inside and outside (training does that): each gets its own treatment; both ends belong to it."""
    t = jnp.array([0.1, 0.2, 0.8, 0.9])
    out = d.guided(good, NULL, 3.0, interval=(0.2, 0.8))(X, t, COND)
    np.testing.assert_allclose(out[1:3], d.guided(good, NULL, 3.0)(X, t, COND)[1:3], rtol=1e-5)
    np.testing.assert_allclose(out[jnp.array([0, 3])], good(X, t, COND)[jnp.array([0, 3])], rtol=1e-5)


def test_the_interval_holds_for_rescale_and_for_guidance_away():
    t = jnp.array([0.1, 0.5, 0.5, 0.9])
    for wrap in (lambda **more: d.guided(good, NULL, 3.0, rescale=0.7, **more), lambda **more: d.guided_away(good, bad, NULL, 3.0, **more),
                 lambda **more: d.guided_away(good, bad, None, 3.0, **more)):  # fmt: skip
        inside, out = wrap()(X, t, COND), wrap(interval=(0.4, 0.6))(X, t, COND)
        np.testing.assert_allclose(out[1:3], inside[1:3], rtol=1e-5)
        np.testing.assert_allclose(out[0], good(X, t, COND)[0], rtol=1e-5)
        assert float(jnp.abs(out[0] - inside[0]).max()) > 1e-3


def test_steps_outside_the_interval_cost_one_call_and_no_interval_is_the_program_without_one():
    counter: Counter = Counter()
    net = counted(lambda p, x, t, c: good(x, t, c), counter, "network")
    grid = d.sampling_grid(d.cosine(t_max=0.98), 8)
    sampler = d.Sampler(d.cosine(t_max=0.98), grid, "x0")
    times = grid.t[:-1]
    inside = int(((times >= 0.2) & (times <= 0.8)).sum())
    assert 0 < inside < 8
    denoise = d.guided(lambda x, t, c: net(None, x, t, c), NULL, 3.0, interval=(0.2, 0.8))
    jax.block_until_ready(jax.jit(lambda k: d.draw(k, denoise, COND, sampler, (3,)))(jax.random.split(KEY, 4)))
    jax.effects_barrier()
    assert counter["network"] == 4 * (8 + inside)
    t = jnp.full(4, 0.5)
    text = str(jax.make_jaxpr(d.guided(good, NULL, 3.0))(X, t, COND))
    assert "cond[" not in text
    assert "cond[" in str(jax.make_jaxpr(d.guided(good, NULL, 3.0, interval=(0.2, 0.8)))(X, t, COND))


def test_a_gradient_goes_through_the_interval():
    t = jnp.array([0.1, 0.5, 0.5, 0.9])
    scaled = lambda interval: jax.grad(  # noqa: E731
        lambda w: d.guided(lambda x, t, c: w * good(x, t, c), NULL, 3.0, interval=interval)(X, t, COND).sum())(1.0)  # fmt: skip
    np.testing.assert_allclose(scaled((0.0, 1.0)), d.guided(good, NULL, 3.0)(X, t, COND).sum(), rtol=1e-5)
    np.testing.assert_allclose(scaled((2.0, 3.0)), good(X, t, COND).sum(), rtol=1e-5)


def test_autoguidance_shows_both_networks_the_same_condition_and_npo_the_empty_one():
    t = jnp.full(4, 0.5)
    auto, npo = d.guided_away(good, bad, None, 2.5)(X, t, COND), d.guided_away(good, bad, NULL, 2.5)(X, t, COND)
    np.testing.assert_allclose(auto, bad(X, t, COND) + 2.5 * (good(X, t, COND) - bad(X, t, COND)), rtol=1e-6)
    empty = bad(X, t, {"w": jnp.full((4, 1), 0.25)})
    np.testing.assert_allclose(npo, empty + 2.5 * (good(X, t, COND) - empty), rtol=1e-6)
    assert float(jnp.abs(auto - npo).max()) > 0.1
    np.testing.assert_array_equal(d.guided_away(good, bad, None, 1.0)(X, t, COND), good(X, t, COND))
    np.testing.assert_allclose(d.guided_away(good, good, NULL, 2.5)(X, t, COND), d.guided(good, NULL, 2.5)(X, t, COND), rtol=1e-6)


def test_autoguidance_of_two_gaussians_moves_the_mean_away_from_the_worse_one():
    """Scores add: N(m, v) and N(m', v) at weight w give N(m' + w (m - m'), v), exactly and at every step."""
    schedule = d.cosine(t_max=0.98)
    sampler = d.Sampler(schedule, d.sampling_grid(schedule, 40), "x0")

    def net(mean):
        def denoise(x, t, c):
            a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
            return mean + a * 0.25 / (a**2 * 0.25 + s**2) * (x - a * mean)

        return denoise

    keys = jax.random.split(KEY, 16)
    got = d.draw(keys, d.guided_away(net(1.0), net(0.6), None, 2.0), {"c": jnp.zeros(16)}, sampler, (1,))[0]
    np.testing.assert_allclose(got, d.draw(keys, net(1.4), {"c": jnp.zeros(16)}, sampler, (1,))[0], atol=1e-4)


def sampler_of(schedule=None, **settings):
    bundle = worlds.mixture_bundle()
    return build.sampler(ml_collections.ConfigDict({"sampling": settings}), bundle if schedule is None else bundle._replace(
        schedule=schedule, sampling={"num_steps": 4, "spacing": "leading"}))[1]  # fmt: skip


def test_the_interval_is_a_setting_of_sampling_in_shares_of_the_time():
    """From the command line it is text; discrete times are thousandths: 0.2 is 200 and not a fifth of the first step."""
    assert sampler_of(guidance_scale=3.0).interval is None
    assert sampler_of(guidance_interval=(0, 1)).interval is None
    assert sampler_of(guidance_interval=["0.2", "0.8"]).interval == (0.2, 0.8)
    assert sampler_of(d.scaled_linear(), guidance_interval=(0.2, 0.8)).interval == (200.0, 800.0)


@pytest.mark.parametrize("wrong", [["0.2"], ["a", "b"], (0.8, 0.2), (0.5, 0.5), (-0.1, 1.0), (0.0, 200.0), 0.5])
def test_an_interval_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="guidance_interval is two numbers"):
        sampler_of(guidance_interval=wrong)


def test_every_user_of_guidance_hands_the_interval_on():
    """The policy of training, of a method's `guide` and of the report: none of them may guide where sampling does not."""
    bundle, null = worlds.mixture_bundle(), {"label": jnp.zeros((1, 2))}
    params = jax.tree.map(lambda v: 3.0 * jax.random.normal(KEY, v.shape), bundle.init(KEY))
    guidance = programs.Guidance(4.0, 0.0, (0.4, 0.6))
    x, cond = jax.random.normal(KEY, (3, 2)), {"label": jnp.ones((3, 2))}
    t = jnp.array([0.2, 0.5, 0.8])
    expected = d.guided(lambda x, t, c: bundle.denoise(params, x, t, c), null, 4.0, interval=(0.4, 0.6))(x, t, cond)
    plain = bundle.denoise(params, x, t, cond)
    assert float(jnp.abs(expected - plain)[1].max()) > 1e-2
    np.testing.assert_array_equal(expected[::2], plain[::2])

    parts, *_ = worlds.mixture_run("sft")
    parts = parts._replace(guidance=guidance)
    trained, frozen_params = parts.partition.init(KEY, params)
    frozen = {"params": frozen_params, "reward": None, "null": null}
    policy = programs.bind(parts, (trained, {}), {}, frozen)["policy"]
    guide = steering.networks(bundle, params, policy, null, guidance, None, None)["guide"](4.0)

    class Reporter:
        session = type("S", (), {"run": type("R", (), {"parts": parts}), "frozen": frozen})

    reported = evaluate.Evaluator._denoise(Reporter(), params)
    for net in (policy, guide, reported):
        np.testing.assert_allclose(net(x, t, cond), expected, rtol=1e-5, atol=1e-5)


def test_a_network_that_leads_away_sees_the_prompt_or_the_empty_one():
    """Away from itself: with the same prompt nothing is left of guidance, with the empty one it is ordinary guidance."""
    bundle = worlds.mixture_bundle()._replace(tokenize=lambda prompts: np.array([[float(len(p))] * 2 for p in prompts]) / 4)
    params = jax.tree.map(lambda v: jax.random.normal(KEY, v.shape), bundle.init(KEY))
    drawn = lambda scale, **more: generate.pictures(  # noqa: E731
        bundle, params, ["a", "four"], jax.random.split(KEY, 2), {"guidance_scale": scale}, **more)[0]  # fmt: skip
    plain, guided = drawn(1.0), drawn(3.0)
    assert np.abs(plain - guided).max() > 1e-2
    np.testing.assert_allclose(drawn(3.0, away=params, autoguidance=True), plain, atol=1e-4)
    np.testing.assert_allclose(drawn(3.0, away=params), guided, atol=1e-4)


def test_the_base_is_a_network_to_lead_away_from():
    bundle = worlds.mixture_bundle()
    base, tuned = ({"w": jnp.full(2, v)} for v in (1.0, 3.0))
    for share, expected in ((0.0, 1.0), (0.25, 1.5)):
        np.testing.assert_array_equal(generate.negative_network("base", share, bundle, tuned, base)["w"], expected)


def test_autoguidance_without_a_weaker_network_is_refused():
    with pytest.raises(ValueError, match="needs a weaker network"):
        generate.generate(model="critters", weights_file="shipped", run=None, scale=None, prompts="a", out="unused", seed=0, samples=1,
                          noise=None, save_arrays=False, settings={}, autoguidance=True)  # fmt: skip
