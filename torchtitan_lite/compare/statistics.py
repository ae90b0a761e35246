"""Intervals that tell a difference from noise. Pure arithmetic; no torch, no numpy."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, variance

CONFIDENCE = 0.99

# Student's t, 0.995 quantiles, by degrees of freedom (NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2).
_T: tuple[float, ...] = (63.657, 9.925, 5.841, 4.604, 4.032, 3.707, 3.499, 3.355, 3.250, 3.169)
_T += (3.106, 3.055, 3.012, 2.977, 2.947, 2.921, 2.898, 2.878, 2.861, 2.845)
_T += (2.831, 2.819, 2.807, 2.797, 2.787, 2.779, 2.771, 2.763, 2.756, 2.750)
_DRAWS = 2000
_LONG = 500  # values of a series; a longer one is drawn in pieces


@dataclass(frozen=True)
class Interval:
    """A mean and what it may be as well, at CONFIDENCE."""

    middle: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        return not self.low <= value <= self.high

    def exp(self) -> "Interval":
        return Interval(math.exp(self.middle), math.exp(self.low), math.exp(self.high))

    def within(self, reach: float) -> "Interval":
        """The same, no further from the middle than `reach`."""
        return Interval(self.middle, max(self.low, self.middle - reach), min(self.high, self.middle + reach))

    def bounds(self) -> list[float]:
        return [self.low, self.high]


def paired_interval(differences: Sequence[float]) -> Interval:
    """Of the mean of differences, one for each repeat; of a single one everything is possible."""
    middle, count = fmean(differences), len(differences)
    if count < 2:
        return Interval(middle, -math.inf, math.inf)
    reach = _quantile(count - 1) * math.sqrt(variance(differences) / count)
    return Interval(middle, middle - reach, middle + reach)


def unpaired_interval(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Of mean(b) - mean(a), of runs that have nothing in common (Welch 1947)."""
    middle = fmean(b) - fmean(a)
    if len(a) < 2 or len(b) < 2:
        return Interval(middle, -math.inf, math.inf)
    parts = variance(a) / len(a), variance(b) / len(b)
    if not (total := sum(parts)):
        return Interval(middle, middle, middle)
    freedom = total**2 / (parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1))
    reach = _quantile(freedom) * math.sqrt(total)
    return Interval(middle, middle - reach, middle + reach)


def block_bootstrap(values: Sequence[float], of_medians: bool = False) -> Interval:
    """Of the mean or median of a series whose neighbours are alike: blocks of a tenth of it are drawn (Kuensch 1989).

    Says what one run says of itself, and nothing of other runs.
    """
    middle = median if of_medians else fmean
    if (step := math.ceil(len(values) / _LONG)) > 1:
        values = [middle(values[start : start + step]) for start in range(0, len(values), step)]
    size = max(1, len(values) // 10)
    starts, count = range(len(values) - size + 1), math.ceil(len(values) / size)
    draw = random.Random(0)
    means = []
    for _ in range(_DRAWS):
        drawn = [value for start in draw.choices(starts, k=count) for value in values[start : start + size]]
        means.append(middle(drawn[: len(values)]))
    means.sort()
    cut = round((1 - CONFIDENCE) / 2 * _DRAWS)
    return Interval(middle(values), means[cut], means[-1 - cut])


def _quantile(freedom: float) -> float:
    """Of the whole degrees of freedom below, and of the table's last ones at most: the wider interval."""
    return _T[min(max(1, int(freedom)), len(_T)) - 1]
