"""Statistics against values worked out by hand and, for distributions, against scipy, which only the tests need."""

import math
import random

import pytest

from pldr.study import significance as s

stats = pytest.importorskip("scipy.stats")


def test_students_t_by_its_closed_forms():
    assert s.t_probability(1.0, 1) == pytest.approx(0.75, abs=1e-12)  # Cauchy: 1/2 + atan(t)/π
    assert s.t_probability(-1.0, 1) == pytest.approx(0.25, abs=1e-12)
    assert s.t_probability(2.0, 2) == pytest.approx(0.5 + 2 / (2 * math.sqrt(6)), abs=1e-12)  # 1/2 + t/(2√(2+t²))
    assert s.t_quantile(0.75, 1) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("freedom", [1, 1.7, 4, 7.31, 60])
def test_students_t_as_scipy_has_it(freedom):
    for t in (-40, -3, -0.2, 0, 0.7, 2.5, 12):
        assert s.t_probability(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), rel=1e-9, abs=1e-14)
    for p in (0.5, 0.9, 0.975, 0.9999):
        assert s.t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-8, abs=1e-9)


def test_welch_by_hand():
    found = s.welch([1.0, 2.0, 3.0], [2.0, 4.0, 6.0, 8.0])  # means 2 and 5, variances 1 and 20/3
    a, b = 1 / 3, 20 / 3 / 4
    assert (found.value, found.error) == (3.0, pytest.approx(math.sqrt(a + b)))
    assert found.freedom == pytest.approx((a + b) ** 2 / (a**2 / 2 + b**2 / 3))
    assert found.p == pytest.approx(stats.ttest_ind([1, 2, 3], [2, 4, 6, 8], equal_var=False).pvalue)
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
    wanted = stats.binomtest(17, 21).proportion_ci(0.95, "exact")
    assert s.share_interval(17, 21) == pytest.approx((wanted.low, wanted.high))


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
