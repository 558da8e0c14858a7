"""Diffusion-DPO: the winner's denoising error should improve over the reference more than the loser's (arXiv 2311.12908)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from ..diffusion import Denoise, Sampler, predict, target
from .base import Algorithm, Info, Needs, Networks, Tree, mean_square
from .losses import LINKS, noised

Array = jax.Array
SIDES = ("winner", "loser")
SPACES = ("native", "eps", "x0")
# errors are those of the networks themselves, as in pre-training; guidance is for sampling
PLAIN = {"policy": 1.0, "reference": 1.0}


def diffusion_dpo(sampler: Sampler, *, beta: float = 5000.0, link: str = "logistic", label_smoothing: float = 0.0,
                  weight_space: str = "native", safeguard: float | None = None, negative: bool = False) -> Algorithm:  # fmt: skip
    """L = link(u), u = -beta/2 [(m_w - m_l) - (m_w_ref - m_l_ref)], m = mean |output - target|^2 at a shared (t, eps).

    link: logistic (DPO; label_smoothing: cDPO), rdpo (arXiv 2403.00409), ipo (arXiv 2310.12036), hinge (arXiv 2305.10425),
    dmpo (arXiv 2507.07510). A pair's soft label p weighs link(u) and link(-u) by p and 1 - p; p = 1/2 is a tie. At theta =
    ref the logistic loss is log 2 and its gradient beta/4 grad(m_w - m_l). beta belongs to the mean over entries, as in the
    official code; code and papers without the 1/2 call 2500 what is 5000 here.
    weight_space: what m measures, the network's own output, the noise, or the clean sample that it means. Flow-DPO
    (arXiv 2501.13918) is this loss on a flow model: "native" is its constant beta, which it found the better one, and "eps"
    has its (1 - t)^2.
    safeguard: mu of SDPO, see `pairwise`. negative: the labels swapped, u -> -u: training of Diffusion-NPO's second network
    (arXiv 2505.11245), which `diffusion.guided_away` samples with.
    The noise must be shared inside a pair: with independent noise the optimum of the 1-D toy is .50, not 1.30.
    """
    anchor, loss = pairwise(sampler, lambda keys, items, side: noised(keys, items[side], sampler.schedule), beta=beta, link=link,
                            label_smoothing=label_smoothing, weight_space=weight_space, safeguard=safeguard,
                            sides=SIDES[::-1] if negative else SIDES)  # fmt: skip
    return Algorithm(Needs("pairs", copies={"reference": "frozen"}, guidance=PLAIN), loss, anchor=anchor)


def residual(denoise: Denoise, x_t: Array, t: Array, eps: Array, x0: Array, cond: Tree, sampler: Sampler,
             space: str = "native") -> Array:  # fmt: skip
    """output - target at x_t [B, ...], or the error of the noise ("eps") or of the clean sample ("x0") that it means.

    `predict` is linear in (output, x), so the error passes through it at x = 0, and nothing cancels.
    """
    alpha, sigma = sampler.schedule.alpha(t), sampler.schedule.sigma(t)
    missed = denoise(x_t, t, cond) - target(sampler.prediction, x0, eps, alpha, sigma)
    return missed if space == "native" else predict(sampler.prediction, missed, 0 * missed, alpha, sigma)[space == "eps"]


def check(beta: float, weight_space: str = "native") -> None:
    """Raises ValueError for what no preference loss can mean."""
    if not beta > 0:
        raise ValueError(f"beta weighs the preference against staying near the reference and is above 0; got {beta}")
    if weight_space not in SPACES:
        raise ValueError(f"weight_space {weight_space!r} is not known; choose one of {', '.join(SPACES)}")


def accuracy(u: Array) -> Array:
    """1 where the margin is above 0, 1/2 where it is 0, as at the start."""
    return jnp.where(u == 0, 0.5, (u > 0).astype(jnp.float32))


def loser_share(won: Array, lost: Array, mu: float) -> Array:
    """SDPO's lambda [B] = clip((1 - mu) <g_w, g_w> / <g_w, g_l>, 0, 1), 1 where <g_w, g_l> <= 0 (arXiv 2511.03317).

    won, lost: residuals [B, ...], what the outputs' gradients are up to one factor of the pair. Departure: one lambda a
    pair. The official code has one a batch, of summed products, which would change with the size of the microbatches;
    where no pair raises its winner's error, the batch does not either.
    """
    own, inner = ((won * x).sum(tuple(range(1, won.ndim))) for x in (won, lost))
    limit = (1 - mu) * own / jnp.where(inner > 0, inner, 1.0)
    return jax.lax.stop_gradient(jnp.where(inner > 0, jnp.clip(limit, 0.0, 1.0), 1.0))


def pairwise(sampler: Sampler, states: Callable[[Array, Tree, str], tuple[Array, Array, Array]], *, beta: float,
             link: str = "logistic", label_smoothing: float = 0.0, weight_space: str = "native",
             safeguard: float | None = None, gamma: float | None = None,
             sides: tuple[str, str] = SIDES) -> tuple[Callable[..., Tree], Callable[..., tuple[Array, Info]]]:  # fmt: skip
    """(anchor, loss) of a pair method; states(keys, items, side) -> (x_t, t, eps) says where the errors are measured.

    safeguard mu: to first order, in the space of outputs, a pair's step leaves at least mu of its winner's descent; only
    gradients change (`loser_share`). gamma: SmPO's link(gamma (2p - 1) u) in the place of p link(u) + (1 - p) link(-u).
    """
    check(beta, weight_space)
    if link not in LINKS:
        raise ValueError(f"link {link!r} is not known; choose one of {', '.join(LINKS)}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is the share of wrong labels, in [0, 0.5); got {label_smoothing}")
    if label_smoothing and link in ("ipo", "hinge"):
        raise ValueError(f"link {link!r} has no label_smoothing; got {label_smoothing}. Use logistic, rdpo or dmpo")
    if safeguard is not None and not 0 <= safeguard <= 1:
        raise ValueError(f"safeguard is the share of the winner's descent to keep, in [0, 1], or None; got {safeguard}")
    f = partial(LINKS[link], label_smoothing=label_smoothing) if label_smoothing else LINKS[link]

    def residuals(name: str, keys: Array, networks: Networks, items: Tree) -> list[Array]:
        return [residual(networks[name], *states(keys, items, side), items[side], items["cond"], sampler, weight_space)
                for side in sides]  # fmt: skip

    def anchor(keys: Array, networks: Networks, items: Tree) -> Tree:
        missed = residuals("reference", keys, networks, items)
        return {**items, "reference_error": jnp.stack([mean_square(x) for x in missed], 1)}

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        won, lost = residuals("policy", keys, networks, items)
        m_w, m_l = mean_square(won), mean_square(lost)
        info = {}
        if safeguard is not None:
            share = loser_share(won, lost, safeguard)
            still = jax.lax.stop_gradient(m_l)
            m_l, info = still + share * (m_l - still), {"loser_share": share}
        drift = jnp.stack([m_w, m_l], 1) - items["reference_error"]
        u = -0.5 * beta * (drift[:, 0] - drift[:, 1])
        p = items.get("preference", jnp.ones(len(keys)))
        value = p * f(u) + (1 - p) * f(-u) if gamma is None else f(gamma * (2 * p - 1) * u)
        return value, {"implicit_accuracy": accuracy(u), "margin": u, "winner_drift": drift[:, 0], "loser_drift": drift[:, 1],
                       **info}  # fmt: skip

    return anchor, loss
