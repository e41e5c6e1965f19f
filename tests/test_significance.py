"""Statistics against values worked out by hand, closed forms and sums that need no library of statistics."""

import math
import random

import pytest

from pldr.study import significance as s


def t_probability(t, freedom):
    """That Student's t is at most so large: its density by Simpson's rule from 0 to t."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    steps = 2000
    weights = [1, *[4, 2] * (steps // 2 - 1), 4, 1]
    points = (t * k / steps for k in range(steps + 1))
    area = math.fsum(w * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for w, x in zip(weights, points, strict=True))
    return 0.5 + scale * area * t / steps / 3


def chance(counts, of, share):
    """That one of these counts is seen among so many."""
    return math.fsum(math.comb(of, k) * share**k * (1 - share) ** (of - k) for k in counts)


@pytest.mark.parametrize(
    ("freedom", "closed"),
    [
        (1, lambda t: 0.5 + math.atan(t) / math.pi),
        (2, lambda t: 0.5 + t / (2 * math.sqrt(2 + t * t))),
        (1.7, lambda t: t_probability(t, 1.7)),
        (7.31, lambda t: t_probability(t, 7.31)),
    ],
)
def test_one_sided_tests_and_intervals_are_students(freedom, closed):
    for t in (-6, -3, -0.2, 0, 0.7, 2.5):
        assert s.Difference(t * 0.25 + 1, 0.25, freedom).p_below(1) == pytest.approx(closed(t), rel=1e-9)
    for level in (0.5, 0.1, 0.05):
        low, high = s.Difference(3.0, 0.25, freedom).interval(level)
        assert closed((high - 3) / 0.25) == pytest.approx(1 - level / 2, rel=1e-9)
        assert low + high == pytest.approx(6)


def test_welch_by_hand():
    found = s.welch([1.0, 2.0, 3.0], [2.0, 4.0, 6.0, 8.0])  # means 2 and 5, variances 1 and 20/3
    a, b = 1 / 3, 20 / 3 / 4
    assert (found.value, found.error) == (3.0, pytest.approx(math.sqrt(a + b)))
    assert found.freedom == pytest.approx((a + b) ** 2 / (a**2 / 2 + b**2 / 3))
    assert found.p == pytest.approx(2 * t_probability(-3 / found.error, found.freedom))
    assert s.welch([1.0], [2.0, 4.0]) is None
    assert s.welch([1.0, 1.0], [2.0, 2.0]).p == 0
    assert s.welch([1.0, 1.0], [1.0, 1.0]).p == 1


def test_pairs_by_hand():
    found = s.paired([1.0, 5.0, 9.0], [2.0, 7.0, 12.0])  # differences 1, 2, 3: t of 2√3 with two degrees of freedom
    assert (found.value, found.error, found.freedom) == (2.0, pytest.approx(1 / math.sqrt(3)), 2)
    assert found.p == pytest.approx(1 - 2 * math.sqrt(3) / math.sqrt(2 + 12))
    low, high = found.interval()
    assert (low, high) == (pytest.approx(2 - 4.302652729911275 / math.sqrt(3)), pytest.approx(4.4841377118, abs=1e-8))


def test_equivalence_is_two_one_sided_tests():
    d = s.Difference(0.01, 0.005, 1)
    assert d.p_below(0.02) == pytest.approx(0.5 + math.atan(-2) / math.pi)
    assert d.p_equivalent(0.02) == pytest.approx(0.5 + math.atan(-2) / math.pi)  # the other side is farther away
    assert s.Difference(-0.01, 0.005, 1).p_equivalent(0.02) == pytest.approx(d.p_equivalent(0.02))
    assert s.Difference(0.03, 0.005, 9).p_equivalent(0.02) > 0.5  # beyond the margin
    low, high = s.Difference(0.01, 0.005, 9).interval(2 * s.LEVEL)
    assert s.Difference(0.01, 0.005, 9).p_equivalent(high) == pytest.approx(s.LEVEL)
    assert low > 0


def test_permutations_by_hand():
    assert s.permutation_p([1, 2], [3, 4]) == pytest.approx(2 / 6)  # of six ways, this and its mirror image
    assert s.permutation_p([1, 4], [2, 3]) == 1
    assert s.permutation_p([1, 2], [3, 4, 8]) == pytest.approx(0.2)  # and 1, 2, 3 against the others
    assert s.permutation_p([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / 252)


def test_holm_by_hand():
    assert s.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert s.holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert s.holm({}) == {}


def test_hedges_g_by_hand():
    assert s.hedges_g([1.0, 3.0], [5.0, 7.0]) == pytest.approx(4 / math.sqrt(2) * (1 - 3 / 7))
    assert s.hedges_g([1.0, 1.0], [2.0, 2.0]) is None


def test_exact_shares():
    assert s.share_interval(0, 10) == (0.0, pytest.approx(1 - 0.025**0.1))
    assert s.share_interval(10, 10) == (pytest.approx(0.025**0.1), 1.0)
    low, high = s.share_interval(17, 21)
    assert chance(range(17, 22), 21, low) == pytest.approx(0.025)
    assert chance(range(18), 21, high) == pytest.approx(0.025)


def test_groups_that_are_the_same_are_seldom_told_apart():
    """Six comparisons of five seeds drawn alike: one table of twenty tells any apart, no more. Five deviations are seen."""
    draw = random.Random(0)

    def sample(mean):
        return [draw.gauss(mean, 1.0) for _ in range(5)]

    def found(mean):
        reference = sample(0.0)
        ps = s.holm({str(index): s.welch(reference, sample(mean)).p for index in range(6)})
        return min(ps.values()) < s.LEVEL

    assert sum(found(0.0) for _ in range(400)) <= 0.05 * 400 + 2.5 * math.sqrt(0.05 * 0.95 * 400)
    assert sum(found(5.0) for _ in range(50)) >= 48
