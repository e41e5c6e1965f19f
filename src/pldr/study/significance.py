"""Tests of means over seeds, and exact bounds on shares.

Few seeds, and spreads that differ by a factor of four between operators: so means are compared by Welch's t. An exact test by
permutation assumes less of the numbers, but that both spreads are equal, and its least p of five seeds against five, 2 / 252,
hardly survives a correction over six comparisons; it stands beside the other.

scipy is imported where it is used: it takes a second, and comes with an extra.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Of tests, and 1 - that of intervals.
LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """A difference of means, with what is known of its error.

    Attributes:
        value: the second mean less the first.
        error: its standard error.
        freedom: degrees of freedom of the t that value / error is.
    """

    value: float
    error: float
    freedom: float

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The two-sided interval of 1 - level; that of 1 - 2 level lies within a margin where the two tests of it reject."""
        from scipy import stats

        reach = self.error * float(stats.t.ppf(1 - level / 2, self.freedom))
        return self.value - reach, self.value + reach

    def p_below(self, bound: float) -> float:
        """Of the one-sided test whose hypothesis is that the difference is `bound` or more."""
        from scipy import stats

        if self.error == 0:
            return 0.0 if self.value < bound else 1.0
        return float(stats.t.cdf((self.value - bound) / self.error, self.freedom))

    def _p_within(self, margin: float) -> tuple[float, float]:
        """Of the two one-sided tests whose hypotheses are that the difference is `margin` or more, and -margin or less."""
        return self.p_below(margin), Difference(-self.value, self.error, self.freedom).p_below(margin)

    @property
    def p(self) -> float:
        """Of the two-sided test whose hypothesis is that there is no difference."""
        return min(1.0, 2 * min(self._p_within(0)))

    def p_equivalent(self, margin: float) -> float:
        """Of two one-sided tests (TOST), whose hypothesis is that the difference is `margin` or more, either way."""
        return max(self._p_within(margin))

    def to_json(self) -> dict[str, Any]:
        return {"difference": self.value, "interval": list(self.interval()), "p": self.p}


def welch(reference: Sequence[float], other: Sequence[float]) -> Difference | None:
    """Between means of two samples, spreads unequal; None where one has fewer than two."""
    if min(len(reference), len(other)) < 2:
        return None
    parts = [statistics.variance(sample) / len(sample) for sample in (reference, other)]
    squares = sum(part**2 / (len(sample) - 1) for part, sample in zip(parts, (reference, other), strict=True))
    freedom = sum(parts) ** 2 / squares if squares else 1.0
    return Difference(statistics.fmean(other) - statistics.fmean(reference), math.sqrt(sum(parts)), freedom)


def paired(reference: Sequence[float], other: Sequence[float]) -> Difference | None:
    """Between means of pairs; None where there are fewer than two."""
    differences = [b - a for a, b in zip(reference, other, strict=True)]
    if len(differences) < 2:
        return None
    count = len(differences)
    return Difference(statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(count), count - 1)


def permutation_p(reference: Sequence[float], other: Sequence[float]) -> float:
    """The exact share of ways to part all values into two groups of these sizes whose means are as far apart, or farther."""
    from scipy import stats

    def distance(one: Any, two: Any, axis: int) -> Any:
        return abs(one.mean(axis) - two.mean(axis))

    found = stats.permutation_test((reference, other), distance, n_resamples=math.inf, alternative="greater")
    return float(found.pvalue)


def holm(ps: dict[str, float]) -> dict[str, float]:
    """Each p as Holm corrects it for their number: at most `LEVEL`, and the chance of any false difference is."""
    adjusted, largest = {}, 0.0
    for index, name in enumerate(sorted(ps, key=lambda name: ps[name])):
        largest = max(largest, min(1.0, (len(ps) - index) * ps[name]))
        adjusted[name] = largest
    return adjusted


def hedges_g(reference: Sequence[float], other: Sequence[float]) -> float | None:
    """The difference of means over the pooled standard deviation, with Hedges' correction for few; None where there is none."""
    if min(len(reference), len(other)) < 2:
        return None
    freedom = len(reference) + len(other) - 2
    pooled = sum((len(sample) - 1) * statistics.variance(sample) for sample in (reference, other)) / freedom
    if pooled == 0:
        return None
    return (statistics.fmean(other) - statistics.fmean(reference)) / math.sqrt(pooled) * (1 - 3 / (4 * freedom - 1))


def share_interval(count: int, of: int, level: float = LEVEL) -> tuple[float, float]:
    """The exact two-sided interval (Clopper and Pearson) on a share, of which `count` were seen among so many."""
    from scipy import stats

    low, high = stats.binomtest(count, of).proportion_ci(1 - level, "exact")
    return float(low), float(high)
