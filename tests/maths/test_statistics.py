from __future__ import annotations

import math

import pytest
import torch

from pairtune.maths import statistics
from pairtune.maths.statistics import (
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    crossed_estimate,
    distinct_n,
    distinct_n_interval,
    estimate_difference,
    estimate_mean,
    estimate_ratio,
    jackknife_interval,
    student_quantile,
    verdict,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------------------------------------------------- bootstrap


def test_the_interval_of_a_mean_has_the_width_of_the_standard_error() -> None:
    values = torch.randn(400, generator=generator(), dtype=torch.float64)
    mean, low, high = bootstrap_mean(values)
    standard_error = values.std().item() / math.sqrt(400)
    assert mean == pytest.approx(values.mean().item(), rel=1e-12)
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.08)
    assert low < mean < high


@pytest.mark.parametrize("level, least, most", [(0.95, 0.90, 0.97), (0.5, 0.43, 0.57)])
def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says(level: float, least: float, most: float) -> None:
    """400 experiments with 30 prompts each, values skewed as rewards are."""
    draws = torch.empty(400, 30).exponential_(generator=generator())
    intervals = [bootstrap_mean(row, num_resamples=400, level=level, seed=i) for i, row in enumerate(draws)]
    covered = sum(low <= 1.0 <= high for _, low, high in intervals) / len(intervals)
    assert least < covered < most


def test_a_ratio_is_that_of_the_sums() -> None:
    kl, tokens = torch.tensor([1.0, 9.0]), torch.tensor([1, 99])
    interval = bootstrap_ratio(kl, tokens)
    assert interval.mean == pytest.approx(0.1)
    assert (interval.low, interval.high) == pytest.approx((9 / 99, 1.0))  # a resample may hold one prompt twice


def test_the_interval_of_a_ratio_covers_the_truth() -> None:
    """Numerator and denominator belong together: the noise that they share cancels."""
    length = 5 + 50 * torch.rand(300, 30, generator=generator())
    kl = 0.1 * length + torch.randn(300, 30, generator=generator(1))
    intervals = [bootstrap_ratio(a, b, num_resamples=300) for a, b in zip(kl, length, strict=True)]
    covered = sum(low <= 0.1 <= high for _, low, high in intervals) / len(intervals)
    assert 0.88 < covered < 0.98
    assert all(high - low < 0.05 for _, low, high in intervals)


def test_a_difference_is_paired_by_prompt() -> None:
    prompts = 10 * torch.randn(60, generator=generator(), dtype=torch.float64)
    before, after = prompts, prompts + 0.5 + 0.1 * torch.randn(60, generator=generator(1), dtype=torch.float64)
    mean, low, high = bootstrap_difference(after, before)
    assert mean == pytest.approx(0.5, abs=0.05)
    assert 0.4 < low < high < 0.6
    alone = bootstrap_mean(after)
    assert alone.high - alone.low > 50 * (high - low)


def test_the_seed_decides_and_the_size_of_a_chunk_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(37, generator=generator())
    interval = bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) == interval
    assert bootstrap_mean(values, seed=2)[1:] != interval[1:]
    monkeypatch.setattr(statistics, "_DRAWS_AT_ONCE", 100)
    assert bootstrap_mean(values, seed=1) == interval


def test_too_few_prompts_have_no_interval() -> None:
    one, none = bootstrap_mean(torch.tensor([3.0])), bootstrap_mean(torch.tensor([]))
    assert one.mean == 3.0
    assert all(map(math.isnan, [one.low, one.high, *none]))


def test_prompts_without_a_denominator_are_left_out() -> None:
    """One prompt of five has a token: a third of the resamples have none and say nothing."""
    interval = bootstrap_ratio(torch.tensor([0.0, 0, 0, 0, 6]), torch.tensor([0.0, 0, 0, 0, 2]))
    assert interval == (3.0, 3.0, 3.0)
    assert math.isnan(bootstrap_ratio(torch.zeros(3), torch.zeros(3)).mean)


def test_a_wrong_call_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"one a prompt.*\(2, 3\)"):
        bootstrap_mean(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"one a prompt.*\(2,\), \(3,\)"):
        bootstrap_difference(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="level must lie between 0 and 1, but it is 95"):
        bootstrap_mean(torch.zeros(2), level=95)
    with pytest.raises(ValueError, match="n must be at least 1"):
        distinct_n(torch.zeros(2, 3), n=0)


# --------------------------------------------------------------------------------------------------- distinct n-grams


def padded(completions: list[list[int]], width: int = 8) -> torch.Tensor:
    return torch.tensor([c + [-1] * (width - len(c)) for c in completions])


def test_distinct_n_by_hand() -> None:
    ids = padded([[1, 2, 1, 2], [2, 1, 3], [4]])
    assert distinct_n(ids, 1) == 4 / 8
    assert distinct_n(ids, 2) == 3 / 5  # 12 21 12, 21 13
    assert distinct_n(ids, 3) == 3 / 3  # 121 212, 213
    assert math.isnan(distinct_n(ids, 5))
    assert math.isnan(distinct_n(ids[:, :3], 4))


def test_distinct_n_equals_a_set_of_tuples() -> None:
    vocabulary = 150_000
    ids = torch.randint(vocabulary - 20, vocabulary, (40, 2, 30), generator=generator())
    ids = torch.where(torch.arange(30) < torch.randint(0, 31, (40, 2, 1), generator=generator(1)), ids, -1)
    for n in (1, 2, 4):
        grams = [
            tuple(row[t : t + n])
            for row in ids.flatten(0, 1).tolist()
            for t in range(31 - n)
            if -1 not in row[t : t + n]
        ]
        assert distinct_n(ids, n) == len(set(grams)) / len(grams)


def test_padding_changes_nothing() -> None:
    ids = padded([[1, 2, 1, 2], [2, 1, 3]])
    wider = torch.nn.functional.pad(ids, (0, 5), value=-1)
    assert distinct_n(ids) == distinct_n(wider)
    assert distinct_n_interval(ids) == distinct_n_interval(wider)


def test_the_interval_of_distinct_n_leaves_each_prompt_out_once() -> None:
    ids = torch.randint(0, 12, (15, 2, 10), generator=generator())
    ids[3] = -1  # a prompt without a completion
    ids[4, :, 5:] = -1
    without = torch.tensor([distinct_n(ids[torch.arange(15) != i]) for i in range(15)], dtype=torch.float64)
    torch.testing.assert_close(
        torch.tensor(distinct_n_interval(ids, level=0.9)),
        torch.tensor(jackknife_interval(distinct_n(ids), without, level=0.9)),
    )


def test_the_interval_of_distinct_n_covers_what_other_prompts_would_give() -> None:
    """Where a percentile bootstrap would not: drawing a prompt twice makes every resample less distinct than the
    set."""
    num_prompts, length, words = 40, 20, 40
    law = 1 / torch.arange(1, words + 1)
    tokens = torch.multinomial(law, 250 * num_prompts * length, replacement=True, generator=generator())
    sets = tokens.view(250, num_prompts, length)
    values = [distinct_n(ids) for ids in sets]
    truth = sum(values) / len(values)
    covered = sum(low <= truth <= high for _, low, high in map(distinct_n_interval, sets)) / len(sets)
    assert 0.90 < covered < 0.995
    resamples = torch.randint(num_prompts, (200, num_prompts), generator=generator())
    assert max(distinct_n(sets[0][drawn]) for drawn in resamples) < distinct_n(sets[0])


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = torch.randn(50, generator=generator(), dtype=torch.float64)
    without = (values.sum() - values) / 49
    mean, low, high = jackknife_interval(values.mean().item(), without)
    assert high - mean == pytest.approx(mean - low)
    assert high - mean == pytest.approx(1.959964 * values.std().item() / math.sqrt(50), rel=1e-6)


def test_one_prompt_has_no_interval_for_distinct_n() -> None:
    ids = padded([[1, 2, 1, 2]])
    mean, low, high = distinct_n_interval(ids)
    assert mean == 2 / 3
    assert math.isnan(low)
    assert math.isnan(high)
    assert all(map(math.isnan, distinct_n_interval(torch.full((3, 4), -1))))


# --------------------------------------------------------------------------------------------------- prompts and seeds


def two_way(num_seeds: int, num_prompts: int, seeds: float, prompts: float, noise: float) -> torch.Tensor:
    """(S, P) whose parts have exactly these mean squares over S, over P and of the interaction, times any count."""
    random = generator(5)
    a = torch.randn(num_seeds, 1, generator=random, dtype=torch.float64)
    b = torch.randn(1, num_prompts, generator=random, dtype=torch.float64)
    ab = torch.randn(num_seeds, num_prompts, generator=random, dtype=torch.float64)
    a, b = a - a.mean(), b - b.mean()
    ab = ab - ab.mean(0) - ab.mean(1, keepdim=True) + ab.mean()
    return seeds * a / a.std() + prompts * b / b.std() + noise * ab / ab.std()


def test_quantiles_of_students_t() -> None:
    """Closed forms at 1, 2 and 4 degrees of freedom; a table; the normal in the limit; a numerical integral between."""
    p, u = 0.975, 2 * 0.975 - 1
    assert student_quantile(p, 1) == pytest.approx(math.tan(math.pi * u / 2), rel=1e-9)
    assert student_quantile(p, 2) == pytest.approx(u * math.sqrt(2 / (1 - u**2)), rel=1e-9)
    alpha = 4 * p * (1 - p)
    q = math.cos(math.acos(math.sqrt(alpha)) / 3) / math.sqrt(alpha)
    assert student_quantile(p, 4) == pytest.approx(2 * math.sqrt(q - 1), rel=1e-9)
    assert student_quantile(p, 59) == pytest.approx(2.000995, abs=1e-6)
    assert student_quantile(0.95, 30) == pytest.approx(1.697261, abs=1e-6)
    assert student_quantile(p, 1e7) == pytest.approx(1.959964, abs=1e-6)
    assert student_quantile(0.5, 3) == 0
    t = torch.linspace(0, student_quantile(0.99, 2.7), 200_001, dtype=torch.float64)
    density = (1 + t**2 / 2.7) ** (-3.7 / 2) * math.gamma(1.85) / math.gamma(1.35) / math.sqrt(2.7 * math.pi)
    assert torch.trapezoid(density, t).item() == pytest.approx(0.49, abs=1e-9)
    for arguments in ((0.4, 3), (1.0, 3), (0.9, 0.5), (0.9, math.nan)):
        with pytest.raises(ValueError, match="no quantile"):
            student_quantile(*arguments)


def test_seeds_and_prompts_each_get_their_own_t_interval() -> None:
    """By hand, from known parts of the variance; symmetric prompts, so that nothing is corrected."""
    half = torch.randn(30, generator=generator(3), dtype=torch.float64).abs()
    prompts = torch.cat([half, -half])
    prompts = prompts / prompts.std()
    values = 7 + prompts + torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)
    found = estimate_mean(values)
    assert found.prompt_error == pytest.approx(1 / math.sqrt(60), rel=1e-12)
    assert found.seed_error == pytest.approx(1 / math.sqrt(3), rel=1e-12)
    width = math.hypot(2.000995 / math.sqrt(60), 4.302653 / math.sqrt(3))
    assert (found.low, found.mean, found.high) == pytest.approx((7 - width, 7, 7 + width), rel=1e-5)
    assert found.by_seed == pytest.approx((6, 7, 8))
    assert found.seeds_included
    assert found.prompts_included


def test_what_prompts_and_completions_explain_is_taken_out_of_the_scatter_of_seeds() -> None:
    num_seeds, num_prompts, seeds, noise = 4, 50, 0.5, 3.0
    values = two_way(num_seeds, num_prompts, seeds, 1.0, noise)
    ab = two_way(num_seeds, num_prompts, 0, 0, noise)
    interaction = ab.square().sum().item() / (3 * 49)
    expected = seeds**2 / num_seeds - interaction / (num_seeds * num_prompts)
    assert estimate_mean(values).seed_error == pytest.approx(math.sqrt(expected), rel=1e-9)
    assert estimate_mean(two_way(num_seeds, num_prompts, 0.1, 1.0, noise)).seed_error == 0


def test_luck_below_zero_in_one_arm_is_held_against_luck_above_it_in_another() -> None:
    values = two_way(3, 50, 0.5, 1.0, 1.0)
    alike = two_way(3, 50, 0.0, 1.0, 1.0)  # seeds even closer to each other than their noise would have them
    interaction = two_way(3, 50, 0, 0, 1.0).square().sum().item() / (2 * 49)
    alone, both = estimate_mean(values), estimate_difference(values, alike)
    assert estimate_mean(alike).seed_error == 0
    assert both.seed_error**2 == pytest.approx(alone.seed_error**2 - interaction / 150, rel=1e-9)
    assert estimate_difference(alike, alike).seed_error == 0


def test_the_degrees_of_freedom_of_several_arms_are_pooled() -> None:
    """Alike arms of 3 seeds: 4 degrees of freedom; one that dwarfs the other: 2."""
    values = torch.tensor([[-1.0, -1.0], [0, 0], [1, 1]], dtype=torch.float64)
    alike, dwarfed = estimate_difference(values, values), estimate_difference(values, 1e-3 * values)
    assert alike.high == pytest.approx(student_quantile(0.975, 4) * math.sqrt(2 / 3), rel=1e-9)
    assert dwarfed.high == pytest.approx(student_quantile(0.975, 2) * math.sqrt(1 / 3), rel=1e-5)
    assert alike.by_seed == ()


def test_skewed_prompts_move_the_interval_towards_the_long_tail() -> None:
    """And by what Hall's transformation says: both ends, put through it, are the quantiles of Student's t."""
    values = torch.exp(torch.randn(60, generator=generator(), dtype=torch.float64))
    mean, low, high = estimate_mean(values)[:3]
    assert high - mean > 1.3 * (mean - low)
    centred = values - mean
    a = 60 / (59 * 58) * centred.pow(3).sum().item() / values.std().item() ** 3 / math.sqrt(60)
    for end, sign in ((low, 1), (high, -1)):
        t = (mean - end) / (values.std().item() / math.sqrt(60))
        assert t + a * t**2 / 3 + a**2 * t**3 / 27 + a / 6 == pytest.approx(
            sign * student_quantile(0.975, 59), rel=1e-9
        )
    mirrored = estimate_mean(-values)
    assert (mirrored.low, mirrored.high) == pytest.approx((-high, -low), rel=1e-12)


def test_the_interval_of_a_share_is_wilsons_and_stays_within_0_and_1() -> None:
    values = torch.zeros(50, dtype=torch.float64)
    values[:5] = 1
    found = estimate_mean(values, share=True)
    trials, z = 50 * (49 / 50), student_quantile(0.975, 49)  # the variance of a share counts 49 trials of 50
    centre = (0.1 + z**2 / trials / 2) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(0.1 * 0.9 / trials + z**2 / 4 / trials**2)
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), rel=1e-9)
    other = estimate_mean(1 - values, share=True)
    assert (other.low, other.high) == pytest.approx((1 - found.high, 1 - found.low), rel=1e-9)
    all_won = estimate_mean(torch.ones(3, 50), share=True)
    assert (all_won.mean, all_won.high) == (1, 1)
    assert all_won.low == pytest.approx(1 / (1 + z**2 / 50), rel=1e-9)
    apart = estimate_mean(torch.tensor([[0.9], [1.0], [0.2]]) * torch.ones(3, 50), share=True)
    assert (apart.low, apart.high) == (0, 1)


def test_prompts_drop_out_of_a_difference_and_seeds_do_not() -> None:
    prompts = 10 * torch.randn(60, generator=generator(), dtype=torch.float64)
    a = prompts + torch.tensor([[0.9], [1.0], [1.1]], dtype=torch.float64)
    found = estimate_difference(a, prompts + torch.zeros(3, 1))
    assert found.mean == pytest.approx(1)
    assert found.prompt_error == pytest.approx(0, abs=1e-12)
    assert found.seed_error == pytest.approx(0.1 / math.sqrt(3), rel=1e-9)
    backwards = estimate_difference(prompts + torch.zeros(3, 1), a)
    assert (backwards.low, backwards.high) == pytest.approx((-found.high, -found.low), rel=1e-9)
    with pytest.raises(ValueError, match="same, but there are 60 and 59"):
        estimate_difference(a, a[:, 1:])


def test_a_ratio_is_the_mean_over_seeds_of_ratios_of_sums() -> None:
    kl = 1 + torch.rand(3, 40, generator=generator(), dtype=torch.float64)
    length = 5 + 20 * torch.rand(3, 40, generator=generator(1), dtype=torch.float64)
    found = estimate_ratio(kl, length)
    by_seed = kl.sum(1) / length.sum(1)
    assert found.by_seed == pytest.approx(by_seed.tolist(), rel=1e-12)
    assert found.mean == pytest.approx(by_seed.mean().item(), rel=1e-12)
    without = torch.stack([(kl.sum(1) - kl[:, p]).div(length.sum(1) - length[:, p]).mean() for p in range(40)])
    jackknife = math.sqrt(39 / 40 * (without - without.mean()).square().sum().item())
    assert found.prompt_error == pytest.approx(jackknife, rel=0.05)


def test_one_seed_or_one_prompt_is_said() -> None:
    values = torch.randn(3, 20, generator=generator(), dtype=torch.float64)
    one_seed, one_prompt, one_cell = (
        estimate_mean(values[0]),
        estimate_mean(values[:, :1]),
        estimate_mean(values[:1, :1]),
    )
    assert (one_seed.seeds_included, one_seed.prompts_included) == (False, True)
    assert math.isnan(one_seed.seed_error)
    assert one_seed.low < one_seed.mean < one_seed.high
    assert (one_prompt.seeds_included, one_prompt.prompts_included) == (True, False)
    assert math.isnan(one_prompt.prompt_error)
    half = student_quantile(0.975, 2) * values[:, 0].std().item() / math.sqrt(3)
    assert one_prompt.high - one_prompt.mean == pytest.approx(half, rel=1e-9)
    assert math.isnan(one_cell.low)
    assert math.isnan(one_cell.high)
    assert not one_cell.seeds_included
    not_trained = estimate_mean(values[0], fixed=True)
    assert not_trained.seeds_included
    assert not_trained[1:3] == one_seed[1:3]
    assert not estimate_difference(values, values[:1]).seeds_included
    assert estimate_difference(values, values[:1], fixed=(False, True)).seeds_included
    with pytest.raises(ValueError, match=r"\(S, 20\).*\(3, 19\)"):
        crossed_estimate(0.0, values[0], [values[:, 1:]])


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e100])
def test_the_unit_of_the_values_does_not_matter(scale: float) -> None:
    values = 1 + torch.exp(torch.randn(3, 20, generator=generator(), dtype=torch.float64))
    plain, scaled = estimate_mean(values), estimate_mean(scale * values)
    assert [x / scale for x in scaled[:5]] == pytest.approx(plain[:5], rel=1e-9)


def test_only_a_difference_with_the_seeds_in_it_is_confirmed() -> None:
    values = 1 + 0.1 * torch.randn(3, 40, generator=generator(), dtype=torch.float64)
    assert verdict(estimate_mean(values)).word == "confirmed"
    assert "lies above 0" in verdict(estimate_mean(values)).reason
    assert "lies below 0" in verdict(estimate_mean(-values)).reason
    apart = values + torch.tensor([[-1.0], [0.0], [1.0]])
    assert verdict(estimate_mean(apart))[1:] == (False, "the interval over prompts and seeds contains 0")
    assert verdict(estimate_mean(apart)).word == "not confirmed"
    assert verdict(estimate_mean(values), against=1.0).reason.endswith("contains 1")
    assert verdict(estimate_mean(values[:1])).reason == "one training seed does not show how much seeds differ"
    assert "not every run" in verdict(None).reason
    exact = verdict(estimate_mean(values.mean(1, keepdim=True)))
    assert exact[1:] == (True, "the interval over seeds lies above 0")
    assert not verdict(estimate_mean(values[:1, :1], fixed=True)).confirmed
