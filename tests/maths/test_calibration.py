"""What a reward model is worth: accuracy, calibration, length."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from pairtune.maths import calibration
from pairtune.maths.calibration import (
    accuracy,
    binned,
    evaluate_pairs,
    expected_calibration_error,
    fitted_temperature,
    length_report,
    log_likelihood,
    pearson,
    reliability_curve,
    spearman,
)
from pairtune.maths.statistics import Interval, bootstrap_difference, bootstrap_mean, bootstrap_ratio

inf, nan = math.inf, math.nan


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def simulated(*size: int, temperature: float = 1.0, seed: int = 0) -> Tensor:
    """Differences of a model whose log-odds are `temperature` times too large: the first of a pair, with a log-odds
    drawn at random, is the chosen one as often as it says."""
    generator = torch.Generator().manual_seed(seed)
    log_odds = 1.5 * torch.randn(size, dtype=torch.float64, generator=generator)
    first_is_chosen = torch.rand(size, dtype=torch.float64, generator=generator) < log_odds.sigmoid()
    return temperature * torch.where(first_is_chosen, log_odds, -log_odds)


def share_covered(intervals: list[Interval], truth: float) -> float:
    return sum(low <= truth <= high for _, low, high in intervals) / len(intervals)


# ----------------------------------------------------------------------------------------------------------- accuracy


def test_accuracy_counts_ties_half() -> None:
    assert accuracy(double(2, -1, 0, 3)).mean == (1 + 0 + 0.5 + 1) / 4
    assert accuracy(double(0, 0, 0)).mean == 0.5
    assert accuracy(torch.tensor([1e-30, -1e-30, 5.0])).mean == pytest.approx(2 / 3)


def test_the_interval_of_an_accuracy_is_wilsons() -> None:
    """By hand, 7 of 10 right, z = 1.96; the standard error has n - 1 in place of n."""
    _, low, high = accuracy(double(*[1] * 7, *[-1] * 3))
    n, z = 9, 1.959964
    centre, half = (
        (0.7 + z**2 / (2 * n)) / (1 + z**2 / n),
        z / (1 + z**2 / n) * math.sqrt(0.21 / n + (z / (2 * n)) ** 2),
    )
    assert (low, high) == pytest.approx((centre - half, centre + half), rel=1e-6)


def test_an_interval_has_a_width_where_all_are_right() -> None:
    mean, low, high = accuracy(torch.ones(30))
    assert (mean, high) == (1.0, 1.0)
    assert low == pytest.approx(1 / (1 + 1.959964**2 / 30), rel=1e-6)
    mean, low, high = accuracy(-torch.ones(30))
    assert (mean, low) == (0.0, 0.0)
    assert high == pytest.approx(1 - accuracy(torch.ones(30)).low)
    mean, low, high = accuracy(torch.zeros(30))  # ties do not vary, and are no certainty either
    assert mean == 0.5
    assert (low, high) == pytest.approx((1 - high, 0.66846), abs=1e-4)
    # Of every two of a prompt one is right: not taken for more than 30 pairs either.
    balanced = accuracy(double(*[1, -1] * 15), prompts=torch.arange(30) // 2)
    assert balanced == pytest.approx((mean, low, high))


@pytest.mark.parametrize("truth, num_pairs", [(0.63, 60), (0.95, 40)])
def test_the_interval_of_an_accuracy_covers_the_truth(truth: float, num_pairs: int) -> None:
    draws = torch.rand(500, num_pairs, generator=torch.Generator().manual_seed(0))
    assert 0.92 < share_covered([accuracy(truth - row) for row in draws], truth) < 0.985


def test_pairs_of_a_prompt_stay_together() -> None:
    """50 prompts of 6 pairs that are right or wrong together more often than not: taken apart, too sure."""
    generator = torch.Generator().manual_seed(0)
    easy = (torch.rand(400, 50, 1, generator=generator) < 0.5) * 0.6 + 0.2  # a prompt is right with 0.2 or 0.8
    right = (torch.rand(400, 50, 6, generator=generator) < easy).flatten(1).double() - 0.5
    prompts = torch.arange(50).repeat_interleave(6) * 7 - 20
    together = [accuracy(row, prompts=prompts) for row in right]
    assert 0.91 < share_covered(together, 0.5) < 0.98
    assert share_covered([accuracy(row) for row in right], 0.5) < 0.85
    mixed = torch.randperm(300, generator=generator)  # in whatever order the pairs stand
    assert accuracy(right[0, mixed], prompts=prompts[mixed]) == pytest.approx(together[0])
    assert accuracy(right[0], prompts=torch.arange(300)) == accuracy(right[0])
    assert accuracy(torch.ones(300), prompts=prompts).low == pytest.approx(accuracy(torch.ones(50)).low)


def test_the_log_likelihood_is_the_mean_of_log_s() -> None:
    d = double(1, -2, 0.5, 0)
    expected = sum(math.log(sigmoid(x)) for x in d.tolist()) / 4
    assert log_likelihood(d).mean == pytest.approx(expected, rel=1e-12)
    assert log_likelihood(d, level=0.9) == pytest.approx(bootstrap_mean(d.sigmoid().log(), level=0.9), rel=1e-12)
    together = log_likelihood(d, prompts=torch.tensor([3, 1, 1, 3]))
    assert together.mean == pytest.approx(expected, rel=1e-12)
    first, second = (math.log(sigmoid(1)) - math.log(2)) / 2, (math.log(sigmoid(-2)) + math.log(sigmoid(0.5))) / 2
    assert (together.low, together.high) == pytest.approx((second, first))
    assert log_likelihood(double(-1e4, -1e4)).mean == -1e4


# -------------------------------------------------------------------------------------------------------- temperature


def test_the_temperature_of_two_sizes_by_hand() -> None:
    """Differences of one size, 3 of 4 right: s(d / T) = 3/4."""
    assert fitted_temperature(double(2, 2, 2, -2)).mean == pytest.approx(2 / math.log(3), rel=1e-12)
    assert fitted_temperature(double(2e4, 2e4, 0, 2e4, -2e4)).mean == pytest.approx(2e4 / math.log(3), rel=1e-12)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_a_known_temperature_is_recovered(temperature: float) -> None:
    found, low, high = fitted_temperature(simulated(20_000, temperature=temperature))
    assert found == pytest.approx(temperature, rel=0.04)
    assert low < temperature < high < 1.1 * low


def test_the_temperature_is_the_most_likely() -> None:
    d = simulated(200, temperature=3.0)
    found = fitted_temperature(d).mean
    best = log_likelihood(d / found).mean
    assert all(log_likelihood(d / (found * factor)).mean < best for factor in (0.9, 0.99, 1.01, 1.1))


def test_the_interval_of_a_temperature_covers_the_truth() -> None:
    intervals = [fitted_temperature(row) for row in simulated(250, 100, temperature=2.0)]
    assert 0.92 < share_covered(intervals, 2.0) < 0.98
    prompts = torch.arange(40).repeat_interleave(5)
    once = simulated(250, 40, temperature=2.0, seed=1)
    repeated = [row.repeat_interleave(5) for row in once]  # five times the same is no more than once
    together = [fitted_temperature(row, prompts=prompts) for row in repeated]
    assert 0.91 < share_covered(together, 2.0) < 0.99
    assert share_covered([fitted_temperature(row) for row in repeated], 2.0) < 0.75
    assert together[0] == pytest.approx(fitted_temperature(once[0]))


def test_the_temperature_where_none_is_the_most_likely() -> None:
    right = fitted_temperature(double(0.1, 3, 2))
    assert right.mean == 0  # s(d / T) tends to 1 for every pair
    assert math.isnan(right.low)
    assert math.isnan(right.high)
    assert fitted_temperature(double(0.1, 3, 0)).mean == 0
    for d in (double(-1, -2), double(1, -2), double(1, -1)):
        assert fitted_temperature(d).mean == inf  # no better than chance: every probability is to be 1/2
    assert all(map(math.isnan, fitted_temperature(torch.zeros(3))))
    assert all(map(math.isnan, fitted_temperature(torch.zeros(0))))
    # Little is known of a hint of an opinion: it may well be worth nothing.
    mean, low, high = fitted_temperature(double(1, 1, 1, -1, -1))
    assert 0 < low < mean < high == inf
    # The same in a mirror: 1 / T is negative, and its interval reaches above 0 by half a width less |1 / T|.
    mirrored = fitted_temperature(double(-1, -1, -1, 1, 1))
    assert mirrored.mean == mirrored.high == inf
    assert mirrored.low == pytest.approx(1 / ((1 / low - 1 / mean) - 1 / mean))


def test_the_search_for_a_temperature_ends() -> None:
    mean, low, high = fitted_temperature(double(1e4, 1e4, -1e-8))
    assert 0 < mean < 1e4
    assert not low > mean
    assert not high < mean
    assert fitted_temperature(double(1e-30, 1e-30, -1e-30)).mean == pytest.approx(1e-30 / math.log(2))
    assert fitted_temperature(torch.full((5,), 3e38).copysign(torch.tensor([1.0, 1, 1, 1, -1]))).mean < 3e38


# --------------------------------------------------------------------------------------------------------------- bins


def test_a_reliability_curve_by_hand() -> None:
    d = double(-0.5, 0.5, 3, 3, -4, 1)
    low, high = reliability_curve(d, num_bins=2)
    assert (low.low, low.high, low.num_pairs) == (0.5, 1, 3)
    assert low.predicted == pytest.approx((2 * sigmoid(0.5) + sigmoid(1)) / 3, rel=1e-12)
    assert low.accuracy == accuracy(double(-0.5, 0.5, 1))
    assert (high.low, high.high, high.num_pairs) == (3, 4, 3)
    assert high.predicted == pytest.approx((2 * sigmoid(3) + sigmoid(4)) / 3, rel=1e-12)
    assert high.accuracy.mean == pytest.approx(2 / 3)
    gaps = [abs(low.predicted - 2 / 3), abs(high.predicted - 2 / 3)]
    assert expected_calibration_error((low, high)) == pytest.approx(sum(gaps) / 2, rel=1e-12)
    halved = reliability_curve(d, num_bins=2, temperature=2.0)
    assert [one.high for one in halved] == [0.5, 2]
    assert [one.accuracy for one in halved] == [low.accuracy, high.accuracy]


def test_bins_hold_equally_many_and_equal_values_share_one() -> None:
    d = simulated(1000)
    assert [one.num_pairs for one in reliability_curve(d)] == [100] * 10
    assert [one.num_pairs for one in reliability_curve(d[:7], num_bins=3)] == [2, 3, 2]
    (one,) = reliability_curve(double(2, -2, 2))
    assert (one.low, one.high, one.num_pairs) == (2, 2, 3)
    margins = torch.tensor([1, 3, 3, 3, 1, 2])
    found = binned(double(1, 1, -1, 1, -1, 0), margins, num_bins=3)
    assert [(b.low, b.high, b.num_pairs, b.accuracy.mean) for b in found] == [
        (1, 1, 2, 0.5),
        (2, 2, 1, 0.5),
        (3, 3, 3, pytest.approx(2 / 3)),
    ]
    assert math.isnan(found[1].accuracy.low)  # one pair says nothing about the spread


def test_the_calibration_error_weighs_bins_by_their_pairs() -> None:
    unequal = binned(double(1, 1, 1, -2), torch.tensor([0, 0, 0, 1]), num_bins=2)
    assert [one.num_pairs for one in unequal] == [3, 1]
    expected = (3 * (1 - sigmoid(1)) + sigmoid(2)) / 4
    assert expected_calibration_error(unequal) == pytest.approx(expected, rel=1e-12)


def test_a_calibrated_model_has_no_calibration_error_and_a_model_that_is_not_has_the_known_one() -> None:
    calibrated = simulated(50_000)
    error = expected_calibration_error(reliability_curve(calibrated))
    assert error < 0.012  # 0.8 sqrt(p (1 - p) / 5000) is 0.005
    too_sure = 4 * calibrated
    expected = ((4 * calibrated).abs().sigmoid() - calibrated.abs().sigmoid()).mean().item()
    assert expected > 0.15
    assert expected_calibration_error(reliability_curve(too_sure)) == pytest.approx(expected, abs=0.01)
    mended = reliability_curve(too_sure, temperature=fitted_temperature(simulated(50_000, temperature=4, seed=1)).mean)
    assert expected_calibration_error(mended) < 0.015
    for one in reliability_curve(calibrated):
        assert one.accuracy.mean == pytest.approx(one.predicted, abs=0.025)


# ------------------------------------------------------------------------------------------------------------- length


def test_correlations_by_hand() -> None:
    x, y = double(1, 2, 3, 4), double(1, 3, 2, 8)
    assert pearson(x, y) == pytest.approx(10.0 / math.sqrt(5 * 29), rel=1e-12)
    assert spearman(x, y) == pytest.approx(0.8, rel=1e-12)
    assert spearman(x, y.exp()) == pytest.approx(0.8, rel=1e-12)
    assert pearson(x, -2 * x + 3) == pytest.approx(-1)
    assert abs(pearson(x, -2 * x + 3)) <= 1
    # Ranks 1.5, 1.5, 3 and 1, 2, 3.
    assert spearman(double(5, 5, 9), double(0, 1, 2)) == pytest.approx(1.5 / math.sqrt(1.5 * 2), rel=1e-12)
    # Ranks 1, 3, 3, 3, 5 and 1 to 5.
    assert spearman(double(1, 2, 2, 2, 3), double(1, 2, 3, 4, 5)) == pytest.approx(8 / math.sqrt(8 * 10), rel=1e-12)
    assert math.isnan(pearson(x, torch.ones(4)))
    assert math.isnan(spearman(double(1), double(1)))
    assert pearson(torch.tensor([1, 2, 4]), torch.tensor([1, 2, 4])) == pytest.approx(1)  # lengths are integers


def test_the_length_report_by_hand() -> None:
    chosen, rejected = double(2, 0, 1, 0, 5), double(1, 1, 0, 0, 9)
    chosen_lengths, rejected_lengths = torch.tensor([8, 9, 3, 4, 6]), torch.tensor([5, 2, 7, 6, 6])
    report = length_report(chosen, rejected, chosen_lengths, rejected_lengths)
    assert (report.chosen_longer.num_pairs, report.chosen_longer.accuracy.mean) == (2, 0.5)
    assert (report.chosen_shorter.num_pairs, report.chosen_shorter.accuracy.mean) == (2, 0.75)
    assert (report.equal_length.num_pairs, report.equal_length.accuracy.mean) == (1, 0.0)
    model, longer, shorter = double(1, 0, 1, 0.5, 0), double(1, 1, 0, 0, 0.5), double(0, 0, 1, 1, 0.5)
    for baseline, rule in [(report.longer_wins, longer), (report.shorter_wins, shorter)]:
        assert baseline.accuracy == accuracy(rule - 0.5)
        assert baseline.model_minus_baseline == pytest.approx(bootstrap_difference(model, rule))
    scores, lengths = torch.cat([chosen, rejected]), torch.cat([chosen_lengths, rejected_lengths]).double()
    assert report.pearson == pytest.approx(torch.corrcoef(torch.stack([scores, lengths]))[0, 1].item(), rel=1e-12)
    d, longer_by = double(1, -1, 1, 0, -4), double(3, 7, -4, -2, 0)
    expected = (d @ longer_by) / (d.norm() * longer_by.norm())
    assert report.pearson_within_pairs == pytest.approx(expected.item(), rel=1e-12)
    both = [torch.cat([x, -x]) for x in (d, longer_by)]
    assert report.spearman_within_pairs == pytest.approx(spearman(*both), rel=1e-12)
    assert report.spearman == spearman(scores, lengths)


def test_a_model_that_reads_nothing_but_length() -> None:
    """A constant a prompt hides it from the correlation over completions, not from that within pairs."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 100, (2, 400), generator=generator)
    prompt = 1000 * torch.randn(400, generator=generator, dtype=torch.float64)
    report = length_report(*(lengths + prompt), *lengths)
    assert report.pearson_within_pairs == pytest.approx(1)
    assert report.spearman_within_pairs == pytest.approx(1)
    assert abs(report.pearson) < 0.2
    assert report.longer_wins.model_minus_baseline == (0, 0, 0)
    assert report.chosen_longer.accuracy.mean == 1
    assert report.chosen_shorter.accuracy.mean == 0


def test_the_interval_of_a_gain_over_a_baseline_covers_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is right with 0.7; the longer one is chosen with 0.55, whatever the model says: a gain of 0.15."""
    generator = torch.Generator().manual_seed(0)
    zero, covered = torch.zeros(80), []
    monkeypatch.setattr(calibration, "bootstrap_ratio", partial(bootstrap_ratio, num_resamples=300))
    for _ in range(300):
        d = 0.7 - torch.rand(80, generator=generator)
        longer_by = torch.where(torch.rand(80, generator=generator) < 0.55, 1.0, -1.0)
        covered.append(length_report(d, zero, longer_by + 10, zero + 10).longer_wins.model_minus_baseline)
    assert 0.90 < share_covered(covered, 0.15) < 0.985


# ------------------------------------------------------------------------------------------------------ all of it


def example(num_pairs: int = 60, *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rejected = torch.randn(num_pairs, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 9, (2, num_pairs), generator=generator)
    return [rejected + simulated(num_pairs, seed=seed), rejected, *lengths]


def test_an_evaluation_holds_what_its_parts_say() -> None:
    pairs = example()
    pairs[0][3] = pairs[1][3]
    d = pairs[0] - pairs[1]
    prompts, margins = torch.arange(60) // 2, torch.arange(60) % 4
    report = evaluate_pairs(*pairs, margins=margins, prompts=prompts, num_bins=5, level=0.9)
    options = {"prompts": prompts, "level": 0.9}
    assert (report.num_pairs, report.num_prompts, report.num_ties) == (60, 30, 1)
    assert report.accuracy == accuracy(d, **options)
    assert report.log_likelihood == log_likelihood(d, **options)
    assert report.temperature == fitted_temperature(d, **options)
    assert report.reliability == reliability_curve(d, num_bins=5, **options)
    assert len(report.reliability) == 5
    assert report.expected_calibration_error == expected_calibration_error(report.reliability)
    assert report.by_margin == binned(d, margins, num_bins=4, **options)
    assert report.length == length_report(*pairs, **options)
    alone = evaluate_pairs(*pairs)
    assert alone.by_margin is None
    assert alone.num_prompts == 60
    assert alone.accuracy == accuracy(d)


def test_pairs_that_a_prompt_repeats_change_no_interval() -> None:
    chosen, rejected, *lengths = example(80)
    pairs = [chosen, rejected, 2 * lengths[0], 2 * lengths[1] + 1]
    once = evaluate_pairs(*pairs, margins=torch.arange(80) % 4)
    four_times = [x.repeat(4) for x in pairs]
    prompts = torch.arange(80).flip(0).repeat(4)
    again = evaluate_pairs(*four_times, margins=torch.arange(320) % 4, prompts=prompts)
    assert (again.num_pairs, again.num_prompts) == (320, 80)
    for name in ("accuracy", "temperature"):
        assert getattr(again, name) == pytest.approx(getattr(once, name), rel=1e-9)
    for some in ("reliability", "by_margin"):
        before, after = ([one.accuracy for one in getattr(report, some)] for report in (once, again))
        assert after == [pytest.approx(interval, rel=1e-9) for interval in before]
    for name in ("chosen_longer", "chosen_shorter", "longer_wins", "shorter_wins"):
        interval = getattr(once.length, name).accuracy
        assert getattr(again.length, name).accuracy == pytest.approx(interval, rel=1e-9)
    # The bootstrap draws other prompts, for they stand in another order.
    for name in ("longer_wins", "shorter_wins"):
        before, after = (getattr(report.length, name).model_minus_baseline for report in (once, again))
        assert after.mean == pytest.approx(before.mean)
        assert after.high - after.low == pytest.approx(before.high - before.low, rel=0.1)
    before, after = once.log_likelihood, again.log_likelihood
    assert after.high - after.low == pytest.approx(before.high - before.low, rel=0.1)


def test_a_constant_a_prompt_changes_what_it_may() -> None:
    pairs = [torch.round(8 * x) / 8 for x in example()[:2]] + example()[2:]
    shift = torch.arange(60) - 30
    before = evaluate_pairs(*pairs).as_dict()
    after = evaluate_pairs(pairs[0] + shift, pairs[1] + shift, *pairs[2:]).as_dict()
    for report in (before, after):
        for name in ("pearson", "spearman"):
            assert report["length"].pop(name) == pytest.approx(0, abs=0.3)
        for name in ("pearson_within_pairs", "spearman_within_pairs"):
            report["length"][name] = pytest.approx(report["length"][name], abs=1e-12)
    assert after == before


def test_swapping_a_pair_turns_right_into_wrong() -> None:
    pairs = example()
    swapped = [pairs[1], pairs[0], pairs[3], pairs[2]]
    here, there = evaluate_pairs(*pairs), evaluate_pairs(*swapped)
    assert here.accuracy.mean + there.accuracy.mean == pytest.approx(1)
    assert here.accuracy.low == pytest.approx(1 - there.accuracy.high)
    assert [one.predicted for one in here.reliability] == pytest.approx([one.predicted for one in there.reliability])
    assert here.length.pearson_within_pairs == pytest.approx(there.length.pearson_within_pairs)
    assert here.length.longer_wins.accuracy.mean == pytest.approx(there.length.shorter_wins.accuracy.mean)


def test_a_model_must_beat_both_baselines_by_their_intervals() -> None:
    chosen, rejected, *lengths = example(400)
    assert evaluate_pairs(chosen, rejected, *lengths).beats_length_baselines
    longer = torch.where(torch.arange(400) < 320, 1, -1)  # four of five times, the longer one is chosen
    by_length = evaluate_pairs(longer.double(), torch.zeros(400), longer + 5, torch.full((400,), 5))
    assert by_length.length.shorter_wins.model_minus_baseline.low > 0.4
    assert not by_length.beats_length_baselines
    by_shortness = evaluate_pairs(longer.double(), torch.zeros(400), 5 - longer, torch.full((400,), 5))
    assert by_shortness.length.longer_wins.model_minus_baseline.low > 0.4
    assert not by_shortness.beats_length_baselines
    assert not evaluate_pairs(chosen[:1], rejected[:1], *(x[:1] for x in lengths)).beats_length_baselines


def test_an_evaluation_becomes_plain_data() -> None:
    report = evaluate_pairs(*example(), margins=torch.arange(60) % 2)
    plain = report.as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["accuracy"] == {"mean": report.accuracy.mean, "low": report.accuracy.low, "high": report.accuracy.high}
    assert plain["reliability"][2]["accuracy"]["mean"] == report.reliability[2].accuracy.mean
    assert plain["by_margin"][1]["num_pairs"] == 30
    gain = plain["length"]["longer_wins"]["model_minus_baseline"]
    assert gain == report.length.longer_wins.model_minus_baseline._asdict()
    assert evaluate_pairs(*example()).as_dict()["by_margin"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rewards_of_any_precision_are_compared_in_float64(dtype: torch.dtype) -> None:
    pairs = [x.to(dtype) if x.is_floating_point() else x for x in example()]
    wide = [x.double() for x in pairs]
    assert evaluate_pairs(*(x.requires_grad_(x.is_floating_point()) for x in pairs)) == evaluate_pairs(*wide)


def test_few_pairs() -> None:
    one = evaluate_pairs(*example(1), margins=torch.ones(1))
    assert one.num_pairs == 1
    assert one.accuracy.mean in (0.0, 1.0)
    assert math.isnan(one.accuracy.low)
    none = evaluate_pairs(*example(0), margins=torch.ones(0))
    assert none.num_pairs == none.num_prompts == none.num_ties == 0
    assert none.reliability == none.by_margin == ()
    assert all(map(math.isnan, [*none.accuracy, *none.log_likelihood, *none.temperature]))
    assert math.isnan(none.expected_calibration_error)
    assert none.length.equal_length.num_pairs == 0


def test_a_wrong_call_says_what_is_wrong() -> None:
    two, three = torch.zeros(2), torch.zeros(3)
    for arguments in ([two, two, two, three], [torch.zeros(2, 1)] * 4):
        with pytest.raises(ValueError, match=r"one a pair, \(N,\) and alike"):
            evaluate_pairs(*arguments)
    for name in ("margins", "prompts"):
        with pytest.raises(ValueError, match=r"one a pair.*\(2,\), \(3,\)"):
            evaluate_pairs(two, two, two, two, **{name: three})
    for calls in (accuracy, log_likelihood, fitted_temperature, reliability_curve):
        with pytest.raises(ValueError, match="some are NaN or infinite"):
            calls(double(1, nan))
    for measure in (accuracy, log_likelihood, fitted_temperature):
        with pytest.raises(ValueError, match="level must lie between 0 and 1, but it is 95"):
            measure(double(1, -1, 2), level=95)
    with pytest.raises(ValueError, match="num_bins must be at least 1, but it is 0"):
        reliability_curve(two, num_bins=0)
    for temperature in (0.0, nan):
        with pytest.raises(ValueError, match="temperature must be greater than 0"):
            reliability_curve(two, temperature=temperature)
    with pytest.raises(ValueError, match=r"\(2,\), \(3,\)"):
        calibration.pearson(two, three)
