"""Tests of means over seeds, and exact bounds on shares.

Few seeds, and spreads that differ by a factor of four between operators: so means are compared by Welch's t. An exact test by
permutation assumes less of the numbers, but that both spreads are equal, and its least p of five seeds against five, 2 / 252,
hardly survives a correction over six comparisons; it stands beside the other.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
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
        reach = self.error * t_quantile(1 - level / 2, self.freedom)
        return self.value - reach, self.value + reach

    def p_below(self, bound: float) -> float:
        """Of the one-sided test whose hypothesis is that the difference is `bound` or more."""
        if self.error == 0:
            return 0.0 if self.value < bound else 1.0
        return t_probability((self.value - bound) / self.error, self.freedom)

    @property
    def p(self) -> float:
        """Of the two-sided test whose hypothesis is that there is no difference."""
        if self.error == 0:
            return 0.0 if self.value else 1.0
        return 2 * t_probability(-abs(self.value) / self.error, self.freedom)

    def p_equivalent(self, margin: float) -> float:
        """Of two one-sided tests (TOST), whose hypothesis is that the difference is `margin` or more, either way."""
        mirrored = Difference(-self.value, self.error, self.freedom)
        return max(self.p_below(margin), mirrored.p_below(margin))

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
    values, count = [*reference, *other], len(other)
    total = math.fsum(values)

    def distance(part: Sequence[float]) -> float:
        mine = math.fsum(part)
        return abs(mine / count - (total - mine) / (len(values) - count))

    observed = distance(other)
    found = [distance(part) >= observed * (1 - 1e-12) for part in combinations(values, count)]
    return sum(found) / len(found)


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
    # The chance of `count` or more among so many is a beta distribution's.
    low = _root(lambda share: incomplete_beta(count, of - count + 1, share), level / 2) if count else 0.0
    high = _root(lambda share: incomplete_beta(count + 1, of - count, share), 1 - level / 2) if count < of else 1.0
    return low, high


# --- distributions --------------------------------------------------------------------------------------------------


def t_probability(t: float, freedom: float) -> float:
    """That Student's t is at most so large."""
    tail = incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t)) / 2
    return tail if t < 0 else 1 - tail


def t_quantile(probability: float, freedom: float) -> float:
    """What Student's t does not exceed with this probability, 0.5 or more."""
    high = 1.0
    while t_probability(high, freedom) < probability:
        high *= 2
    return high * _root(lambda share: t_probability(high * share, freedom), probability)


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (Lentz's way)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction would converge slowly
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    ) / a  # fmt: skip
    value, c, d = 1.0, 1.0, 0.0
    for step in range(1000):
        m = step // 2
        if step == 0:
            term = 1.0
        elif step % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / _not_zero(1 + term * d)
        c = _not_zero(1 + term / c)
        value *= c * d
        if step and abs(c * d - 1) < 1e-15:
            break
    return front * (value - 1)


def _not_zero(value: float) -> float:
    return value if abs(value) > 1e-300 else 1e-300


def _root(rising: Callable[[float], float], wanted: float) -> float:
    """Where a function that rises from 0 to 1 has a value."""
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return high
