from __future__ import annotations

import math

import pytest
import torch

from pairtune.maths import statistics
from pairtune.maths.statistics import (
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    distinct_n,
    distinct_n_interval,
    jackknife_interval,
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
