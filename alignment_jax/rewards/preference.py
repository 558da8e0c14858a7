"""Laws of choice: how likely an answer is, given scores. Losses in nats, float32; only differences of scores count."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
# nodes of the double exponential rule on (0, 1), u = sigmoid(pi sinh x): right where the integrand is singular at its ends
_X = np.linspace(-3.0, 3.0, 61)
_LOG_U, _LOG_V = -np.logaddexp(0, -np.pi * np.sinh(_X)), -np.logaddexp(0, np.pi * np.sinh(_X))
_LOG_WEIGHT = np.log(np.pi * np.cosh(_X) * (_X[1] - _X[0])) + _LOG_U + _LOG_V


def bradley_terry(gap: Array, p: Array | float = 1.0) -> Array:
    """-p log sigma(gap) - (1 - p) log sigma(-gap) [N], gap = s_a - s_b (Bradley and Terry, Biometrika 39, 1952).

    p: the label, the probability that a is the better one: 1, 0, 1/2 for a tie, or a soft one, whose optimum is the gap
    log p / (1 - p).
    """
    gap = gap.astype(jnp.float32)
    return p * jax.nn.softplus(-gap) + (1 - p) * jax.nn.softplus(gap)


def davidson(gap: Array, p: Array, log_nu: Array | float) -> Array:
    """Bradley-Terry with a third answer, the tie [N]: P(a), P(tie), P(b) ~ e^{s_a}, nu e^{(s_a + s_b) / 2}, e^{s_b}.

    Davidson (JASA 65, 1970). p: 1, 1/2 (a tie) or 0; between them lies a mixture of the two next answers. nu = e^log_nu:
    equal scores tie with probability nu / (2 + nu); nu -> 0 is Bradley-Terry.
    """
    gap, p = gap.astype(jnp.float32), jnp.asarray(p, jnp.float32)
    logits = jnp.stack([gap / 2, jnp.broadcast_to(log_nu, gap.shape), -gap / 2], -1)
    answer = jnp.stack([jnp.maximum(2 * p - 1, 0), 1 - jnp.abs(2 * p - 1), jnp.maximum(1 - 2 * p, 0)], -1)
    return -(answer * jax.nn.log_softmax(logits)).sum(-1)


def plackett_luce(scores: Array, ranks: Array, top: int | None = None) -> Array:
    """-log P of a ranking [N] of scores [N, K]; ranks int [N, K]: 1 is best, equal ones are ties, 0 is no item at all.

    Sum over the tied blocks S, best first, of -log P(all of S are chosen before the rest R): the likelihood summed over
    every order within the ties (arXiv 2006.05067), prod over i in S of (1 - u^{w_i / W}) integrated over u in (0, 1), w = e^s,
    W the sum of w over R. Of a block of one it is -s_i + log sum over S and R of e^s (Plackett 1975), and with K = 2
    `bradley_terry`. top: only ranks up to it count as seen, what is below is not told apart.
    """
    s = scores.astype(jnp.float32)
    ranks = jnp.asarray(ranks)
    total = jnp.zeros(s.shape[:-1])
    for rank in range(1, min(s.shape[-1], top or s.shape[-1]) + 1):
        block, rest = ranks == rank, ranks > rank
        total = total + jnp.where(block.any(-1) & rest.any(-1), _before(s, block, rest), 0.0)
    return total


def _before(s: Array, block: Array, rest: Array) -> Array:
    """-log P(the block's items are the first ones) [N]; scores s and masks [N, K], neither mask empty."""
    # entries of an empty mask are replaced before the logarithm: a gradient through a masked infinity is NaN
    log_rest = jax.nn.logsumexp(jnp.where(rest | ~rest.any(-1, keepdims=True), s, -jnp.inf), -1)
    log_all = jax.nn.logsumexp(jnp.where(block | rest | ~(block | rest).any(-1, keepdims=True), s, -jnp.inf), -1)
    single = log_all - jnp.where(block, s, 0.0).sum(-1)
    # log(1 - u^a) = log(1 - e^{-y}), y = -a log u; below e^-8 it is log y - y / 2
    log_y = (s - log_rest[..., None])[..., None] + jnp.asarray(np.log(-_LOG_U), jnp.float32)
    y = jnp.exp(jnp.clip(log_y, -8.0, 80.0))
    small = jnp.minimum(log_y, -8.0)
    log_factor = jnp.where(log_y < -8.0, small - jnp.exp(small) / 2, jnp.log(-jnp.expm1(-y)))
    log_product = jnp.where(block[..., None], log_factor, 0.0).sum(-2)
    several = -jax.nn.logsumexp(log_product + jnp.asarray(_LOG_WEIGHT, jnp.float32), -1)
    return jnp.where(block.sum(-1) == 1, single, several)


def annotated(gap: Array, log_temperature: Array | float = 0.0, offset: Array | float = 0.0) -> Array:
    """The gap [N] as an annotator sees it, (gap + offset) / e^log_temperature.

    temperature: how unsure the annotator is. offset: a liking for the picture shown first; it cannot be told from the
    scores where pairs are stored winner first, so it needs pairs in the order in which they were shown.
    """
    return (gap + offset) / jnp.exp(log_temperature)
