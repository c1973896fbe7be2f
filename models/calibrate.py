"""A threshold from the scores of good parts, with a finite-sample upper bound on the false reject rate.

The threshold lies just above the r-th smallest of n scores (an order statistic). Whatever the scores'
distribution, if the parts are independent draws of it, then with probability `confidence` over the draw of
the n parts the rate of good parts at or above the threshold is at most the Clopper-Pearson (exact binomial)
upper limit for n - r rejects in n. r is the smallest rank for which that limit meets the target. No torch here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flawline.config.errors import ConfigError

METHOD = "order statistic, Clopper-Pearson upper limit"
LEAST_THRESHOLD = 1e-6  # a score of zero means no defect at any threshold


@dataclass(frozen=True)
class CalibratedThreshold:
    """`threshold` rejects `rejected` of the `count` good parts it was taken from; with the probability that was asked
    for it rejects at most the share `false_reject_bound` of all."""

    threshold: float
    count: int
    rejected: int
    false_reject_bound: float


def binomial_cdf(successes: int, trials: int, rate: float) -> float:
    """P(X <= successes) for X ~ Binomial(trials, rate)."""
    if rate <= 0.0 or successes >= trials:
        return 1.0
    if rate >= 1.0:
        return 0.0
    log_rate, log_rest = math.log(rate), math.log1p(-rate)
    logs = [
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * log_rate
        + (trials - k) * log_rest
        for k in range(successes + 1)
    ]
    return min(1.0, math.fsum(math.exp(value) for value in logs))


def clopper_pearson_upper(successes: int, trials: int, confidence: float) -> float:
    """The one-sided upper limit of a rate after `successes` in `trials`: the rate at which so few have
    probability 1 - confidence."""
    if successes >= trials:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if binomial_cdf(successes, trials, middle) > 1.0 - confidence:
            low = middle
        else:
            high = middle
    return high


def samples_needed(target_fpr: float, confidence: float) -> int:
    """The least number of good parts for which a threshold above all of them meets the target."""
    return math.ceil(math.log(1.0 - confidence) / math.log1p(-target_fpr) - 1e-9)


def require_enough(count: int, target_fpr: float, confidence: float, option: str = "--good") -> None:
    """Raises ConfigError, saying how many parts are needed, where `count` of them are too few."""
    needed = samples_needed(target_fpr, confidence)
    if count < needed:
        raise ConfigError(
            f"{option}: {count} parts are too few for a false reject rate of at most {target_fpr:g} with "
            f"confidence {confidence:g}: {needed} are needed (with {count}, at most "
            f"{clopper_pearson_upper(0, count, confidence):.3g} can be promised)"
        )


def promised(count: int, target_fpr: float, confidence: float, rejected: int = 0) -> float:
    """The target, or where `count` parts are too few for it what a threshold above all but `rejected` promises."""
    least = clopper_pearson_upper(rejected, count, confidence) if count else 0.0
    return target_fpr if least <= target_fpr else min(1.0, least * (1 + 1e-9))


def allowed_rejects(count: int, target_fpr: float, confidence: float) -> int:
    """How many of `count` good parts a threshold that meets the target may reject; they must be enough for it."""
    log_rate, log_rest = math.log(target_fpr), math.log1p(-target_fpr)
    log_term, total, rejected = count * log_rest, 0.0, -1
    # The limit after k rejects is within the target where at most k have probability 1 - confidence at the target.
    while rejected + 1 < count:
        total += math.exp(log_term)
        if total > 1.0 - confidence:
            break
        rejected += 1
        log_term += math.log((count - rejected) / (rejected + 1)) + log_rate - log_rest
    rejected = max(rejected, 0)
    while rejected and clopper_pearson_upper(rejected, count, confidence) > target_fpr:  # rounding, at a tie
        rejected -= 1
    return rejected


def calibrate(
    scores: Sequence[float], target_fpr: float, confidence: float, option: str = "--good"
) -> CalibratedThreshold:
    """The lowest threshold whose false reject rate is at most `target_fpr` with probability `confidence`.

    Raises ConfigError, naming the option that gave the parts, where there are too few of them (and how many are
    needed) or where they score as high as anything can.
    """
    count = len(scores)
    require_enough(count, target_fpr, confidence, option)
    rejected = allowed_rejects(count, target_fpr, confidence)
    highest_passed = np.sort(np.asarray(scores, np.float32))[count - 1 - rejected]
    threshold = max(float(np.nextafter(highest_passed, np.float32(np.inf))), LEAST_THRESHOLD)
    if threshold > 1.0:
        raise ConfigError(
            f"{option}: good parts reach a score of 1.0, so no threshold can pass them; "
            "look at them with `flawline inspect`, and give the recipe other words, a region or a memory"
        )
    actual = int((np.asarray(scores, np.float32) >= threshold).sum())
    return CalibratedThreshold(threshold, count, actual, clopper_pearson_upper(rejected, count, confidence))
