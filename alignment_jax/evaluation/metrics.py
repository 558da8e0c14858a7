"""The catalogue of metric names: what each means and what is healthy. Only names listed here are logged."""

from __future__ import annotations

import difflib

METRICS: dict[str, str] = {
    "step": "Training step: one pass of rollout, reward and update.",
    "time": "Seconds since training began, compilation included.",
    "samples_seen": "Samples drawn or read by training so far.",
    "lr": "Learning rate of this step's update.",
    "loss": "What the optimiser descends, mean over items; comparable only within one method.",
    "denoising_error": "Mean squared error of the denoised samples (SFT and pre-training); healthy: falls slowly.",
    "distillation_error": "Mean squared distance of the student's output from the guided teacher's; healthy: falls.",
    "grad_norm": "Global gradient norm before clipping; healthy: steady. Growing over a run warns of collapse.",
    "reward/mean": "Mean training reward of the step's samples; healthy: rises, then levels off.",
    "reward/std": "Spread of the training reward over the step's samples; near 0 leaves nothing to learn from.",
    "reward/<part>": "Mean of one part of a weighted reward, before weighting: shows which part pays for the total.",
    "rewards/<part>": "Mean reward of one column, an aspect or a group of people, where several are aggregated.",
    "rewards/worst": "Least of the columns' mean rewards of the step; healthy: rises. The mean rising alone: someone pays.",
    "coefficient/<part>": "What one column weighs in the sum that is climbed: a dual variable, a group's weight; levels off.",
    "proxy": "Mean of the reward that is optimised, on the evaluation prompts.",
    "gold/all": "Share of evaluation samples in which the gold judge finds all right; it is never trained on.",
    "gold/<attribute>": "Share of evaluation samples in which the gold judge finds this attribute right.",
    "diversity/pixel_right": "Mean pixel distance within a prompt among samples that gold calls right, the declared "
    "measure; healthy: at least 0.90 of the base's.",
    "kl/path": "KL of the sampling paths from the reference, in nats (K1): the price of the reward.",
    "ratio/deviation_max": "Largest |likelihood ratio - 1| of the step; exactly 0 before the first update, else a bug.",
    "ratio/clip_fraction": "Share of ratios outside the clip range; healthy: below 0.3. Higher: smaller steps.",
    "kl/step": "KL of one step of the chain from the reference's, in nats or a mean over entries: what kl_weight weighs.",
    "critic/error": "Mean squared error of the critic's prediction of the standardised reward; healthy: falls below 1.",
    "window": "The first of the sampling steps that have noise and gradient; moves from noisy (0) to clean and back to 0.",
    "drift/old": "Mean squared distance of the clean prediction from the old policy's; healthy: small against the loss.",
    "drift/reference": "Mean squared distance of the network's output from the reference's, before its weight; levels off.",
    "drift/ema": "Mean squared distance of the network's output from the averaged policy's; healthy: small and steady.",
    "loss_clipped": "Share of items whose loss exceeds loss_clip and teaches nothing; healthy: below 0.1.",
    "log_ratio/moved_max": "Furthest that a step's log-ratio has moved since the rollout, in nats; 0 before the first update.",
    "weight/effective": "Effective share of the samples behind the weights, (sum w)^2 / (N sum w^2); healthy: above 0.1.",
    "reward/outside": "Share of rewards outside [low, high], which count as its ends; healthy: near 0.",
    "k": "How many of the last sampling steps were differentiated, mean over the batch.",
    "reward": "The differentiated reward of this step's samples, mean; healthy: rises, then levels off.",
    "anchor": "Distance of the samples' path from the reference network's, before its weight; healthy: levels off.",
    "reward/best": "Mean reward of the samples that were kept to learn from; above reward/mean, else nothing is learned.",
    "advantage/std": "Spread of the advantages; healthy: near 1 when they are normalised.",
    "implicit_accuracy": "Share of pairs whose winner the policy prefers more than the reference does; 0.5 at the "
    "start, healthy: rises; near 1 means overfitting.",
    "margin": "Mean difference of implicit rewards, winner minus loser; healthy: grows slowly.",
    "winner_drift": "Denoising loss of winners against the reference's; healthy: below 0. Above: both sides get worse.",
    "loser_drift": "Denoising loss of losers against the reference's; healthy: above 0, but not far.",
    "loser_share": "Share of the loser's gradient that the safeguard lets through, mean; 1 where it never stands in the way.",
    "offset": "Mean implicit reward of the batch that KTO holds each picture against, in units of its link; 0 at the start.",
    "ranked": "Share of the lists in which two pictures can be told apart; healthy: near 1.",
    "inverted_noise": "Mean square of the noise that inversion adds to a picture; healthy: near 1, as of fresh noise.",
    "log_ratio/winner": "Log-likelihood ratio of the winners' steps against the reference; healthy: above the losers'.",
    "log_ratio/loser": "Log-likelihood ratio of the losers' steps against the reference; healthy: below 0.",
    "pairs/counted": "Share of the step's pairs that can be told apart and are learned from; healthy: above 0.1.",
    "pairs/gap": "Mean difference of the scores of winner and loser; near 0 leaves nothing to prefer.",
    "pairs/ties": "Share of the counted pairs whose label is 1/2; healthy: small.",
    "pairs/age": "Mean age of the counted pairs, in steps; 0 when all were drawn by this step.",
    "<head>/clean": "A recogniser's accuracy on held-out renders: one attribute, or all of them.",
    "<head>/augmented": "The same on augmented renders; far below clean: easy to fool as a reward.",
    "seconds/<part>": "Of profiled steps: data, rollout, reward, anchor, update; host_wait: data and a host reward's last answers.",
    "model_tflops": "Of the steps that are profiled: TFLOP a second of one device, nothing that is computed twice counted.",
    "mfu": "Of the steps that are profiled: model FLOP utilisation, the share of a known device's peak in bfloat16 that model_tflops is.",
    "images_per_second": "Samples drawn and learned from, per second of this step.",
}

SUFFIXES: dict[str, str] = {
    "low": "lower end of the 95 % interval",
    "high": "upper end of the 95 % interval",
    "n": "number of samples behind it",
}


def describe(name: str) -> str:
    """The meaning of a metric, also of gold/eyes (a kind) or gold/all/low (an end of an interval).

    Raises ValueError for a name that is not in the catalogue, and names the nearest.
    """
    stem, _, last = name.rpartition("/")
    if last in SUFFIXES and stem:
        return f"{describe(stem)} Here the {SUFFIXES[last]}."
    if name in METRICS:
        return METRICS[name]
    kinds = (f"{stem}/<part>", f"{stem}/<attribute>", f"<head>/{last}")
    for kind in kinds if stem and last else ():
        if kind in METRICS:
            return METRICS[kind]
    near = difflib.get_close_matches(name, METRICS, 1)
    raise ValueError(f"unknown metric {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; see METRICS"))
