"""benchmarks/overoptimisation.py: the gold reward and its labels, best-of-n, the fits, the record, and a small run."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pairtune.completion_data import encode_completions
from pairtune.data import RawPrompts
from pairtune.feedback.reward_model import RewardModel
from pairtune.models.reward_backbone import load_reward_backbone
from pairtune.types import Completions

PATH = Path(__file__).parent.parent / "benchmarks" / "overoptimisation.py"
RECORD = PATH.parent / "results" / "overoptimisation.json"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(PATH.parent))
    spec = importlib.util.spec_from_file_location("overoptimisation", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["overoptimisation"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def policy(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that has learned nothing, as a folder."""
    folder = tmp_path_factory.mktemp("policy")
    bench.untrained_model().save_pretrained(folder)
    bench.tokenizer().save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------------------- the language


def test_the_gold_reward_is_the_sum_of_values_less_repetitions(bench: ModuleType) -> None:
    values = bench.VALUES[bench.TOPICS.index("C")].double()
    ba, be = (values[bench.WORDS.index(word)].item() for word in ("ba", "be"))
    assert bench.gold_reward("C", "") == 0
    assert bench.gold_reward("C", "ba be") == pytest.approx(ba + be)
    # The second costs 1, the third 2 more, the fourth 3 more.
    assert bench.gold_reward("C", "ba be ba ba ba") == pytest.approx(4 * ba + be - 6)
    assert bench.gold_reward("C", "ba A") == pytest.approx(ba)
    assert bench.gold_reward("D", "ba be") != pytest.approx(ba + be)
    assert bench.gold_function(["C", "D"], ["ba", "ba"]) == [
        bench.gold_reward("C", "ba"),
        bench.gold_reward("D", "ba"),
    ]


def test_words_and_topics_come_back_from_their_tokens(bench: ModuleType) -> None:
    reader = bench.tokenizer()
    text = " ".join([*bench.TOPICS, *bench.WORDS])
    ids = reader(text)["input_ids"]
    assert len(set(ids)) == len(bench.TOPICS) + len(bench.WORDS) == 48
    assert reader.decode(ids) == text
    assert reader.pad_token_id not in ids
    assert reader(" ba " + bench.END)["input_ids"][-1] == reader.eos_token_id
    assert bench.untrained_model().get_input_embeddings().weight.shape[0] == len(reader)


def test_sentences_have_three_words_or_more_and_know_their_topic(bench: ModuleType) -> None:
    draw = torch.Generator().manual_seed(0)
    groups = [[bench.sentence(topic, draw).split() for _ in range(150)] for topic in (0, 1)]
    lengths = {len(words) for group in groups for words in group}
    assert min(lengths) == 3
    assert max(lengths) == bench.MAX_TOKENS - 1
    first, second = ({word for words in group for word in words[:1]} for group in groups)
    assert first != second


def test_labels_are_drawn_by_the_gold_difference(bench: ModuleType, policy: Path) -> None:
    rows = bench.comparisons(policy, 400, seed=3)
    assert [row["prompt"] for row in rows[:8]] == bench.TOPICS
    assert rows == bench.comparisons(policy, 400, seed=3)
    assert rows != bench.comparisons(policy, 400, seed=4)
    leads = [bench.gold_reward(r["prompt"], r["chosen"]) - bench.gold_reward(r["prompt"], r["rejected"]) for r in rows]
    assert all(row["chosen"] != row["rejected"] and row["chosen"].strip() and row["rejected"].strip() for row in rows)
    # Given |lead|, the better one is chosen with probability s(|lead|).
    expected = sum(1 / (1 + math.exp(-abs(lead))) for lead in leads)
    error = math.sqrt(sum(1 / (2 + 2 * math.cosh(lead)) for lead in leads))
    assert abs(sum(lead > 0 for lead in leads) - expected) < 4 * error
    assert 0.55 < expected / len(leads) < 0.99


# ------------------------------------------------------------------------------------------------------------ best of n


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_the_mean_over_all_subsets(bench: ModuleType, n: int) -> None:
    chosen_by, worth = torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    expected = statistics.fmean(
        worth[topic, max(subset, key=lambda k: chosen_by[topic, k].item())].item()
        for topic in range(2)
        for subset in itertools.combinations(range(6), n)
    )
    assert bench.of_the_best(chosen_by, worth, n) == pytest.approx(expected)


def test_best_of_n_of_many_samples_stays_exact(bench: ModuleType) -> None:
    """Of uniform scores the best of n is n / (n + 1) in the mean; with 2,048 of 512 no weight overflows."""
    scores = (torch.arange(2048, dtype=torch.float64)[None] + 0.5) / 2048
    for n in (1, 16, 512):
        assert bench.of_the_best(scores, scores, n) == pytest.approx(n / (n + 1), abs=1e-3)
    found = bench.best_of_n(scores, 1 - scores)
    assert found["n"] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert found["kl"][:2] == [0.0, pytest.approx(math.log(2) - 0.5, rel=1e-5)]
    assert found["proxy"] == sorted(found["proxy"])
    assert found["gold"] == sorted(found["gold"], reverse=True)


def test_agreement(bench: ModuleType) -> None:
    worth = torch.tensor([[1.0, 0.0, 2.0, 3.0, 5.0, 5.0]])
    assert bench.agreement(worth, worth) == 1
    assert bench.agreement(-worth, worth) == 0
    assert bench.agreement(torch.tensor([[1.0, 0.0, 1.0, 1.0, 7.0, 0.0]]), worth) == 0.75  # right, tied, not counted


def test_proxy_scores_are_those_that_training_sees(bench: ModuleType, policy: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reader = AutoTokenizer.from_pretrained(policy)
    load_reward_backbone(AutoModelForCausalLM.from_pretrained(policy), tokenizer=reader, device="cpu").save(tmp_path)
    long = " ".join(bench.WORDS[: bench.MAX_TOKENS])  # cut by the cap: no END behind it
    drawn = [[f"ba {word}", long] for word in bench.WORDS[: len(bench.TOPICS)]]
    raw = RawPrompts.from_rows([{"prompt": topic} for topic in bench.TOPICS])
    prompts = raw.encode(reader, chat="never")
    batch = prompts.batch(range(len(bench.TOPICS)))
    encoded = encode_completions(
        raw, [[f" {one}" for one in group] for group in drawn], reader, max_completion_length=bench.MAX_TOKENS
    )
    ids = torch.full((len(drawn), 2, bench.MAX_TOKENS), reader.pad_token_id)
    for p, group in enumerate(encoded):
        for k, one in enumerate(group):
            ids[p, k, : len(one.ids)] = torch.tensor(one.ids)
    truncated = torch.tensor([[one.truncated for one in group] for group in encoded])
    assert truncated.tolist() == [[False, True]] * len(drawn)
    sampled = Completions(batch.ids, batch.mask, ids, ids != reader.pad_token_id, ids * 0.0, truncated, 0)
    judge = RewardModel.from_pretrained(str(tmp_path), chat="never", policy_tokenizer=reader)
    expected = judge.score(batch, sampled, drawn)
    assert bench.scores(tmp_path, drawn).flatten().tolist() == pytest.approx(expected, abs=1e-4)


# ------------------------------------------------------------------------------------------------------ fits and curves


@pytest.mark.parametrize("optimiser", ["p3o", "best_of_n"])
def test_a_fit_finds_the_coefficients_of_its_own_form(bench: ModuleType, optimiser: str) -> None:
    kl = [0.0, 0.3, 1.0, 4.0, 9.0, 20.0]
    forms = {"p3o": lambda d: d * (3 - 0.7 * math.log(d)), "best_of_n": lambda d: d * (3 - 0.7 * d)}
    gold = [5.0, *(5.0 + forms[optimiser](math.sqrt(x)) for x in kl[1:])]
    assert bench.fit({"kl": kl, "gold": gold}, optimiser) == pytest.approx((3, 0.7))
    assert bench.fitted((3, 0.7), optimiser, [2.0]) == [pytest.approx(forms[optimiser](2.0))]


def test_gains_at_a_distance_lie_on_lines_between_measurements(bench: ModuleType) -> None:
    points = {"kl": [0.0, 1.0, 4.0, 3.0, 9.0], "gold": [2.0, 3.0, 5.0, 0.0, 8.0]}
    found = bench.at_distances(points, "gold", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
    assert found == pytest.approx([0, 0.5, 1, 2, 3, 6])  # where the run first gets there, not where it comes back to
    with pytest.raises(StopIteration):
        bench.at_distances(points, "gold", [3.1])


def arm(peak: float, *, reach: float = 36.0, seed: int = 0) -> dict[str, Any]:
    """A made-up arm whose gold gain is largest at d = `peak`."""
    kl = [reach * k / 20 for k in range(21)]
    gold = [2 * peak * math.sqrt(x) - x + 0.01 * seed * (x > 0) for x in kl]
    p3o = {"steps": list(range(21)), "kl": kl, "proxy": [5 * math.sqrt(x) for x in kl], "gold": gold}
    n = [2**k for k in range(10)]
    kls = [math.log(k) - (k - 1) / k for k in n]
    return {
        "seed": seed,
        "updates": 5 + seed,
        "agreement": 0.5 + 0.1 * peak,
        "p3o": p3o,
        "best_of_n": {"n": n, "kl": kls, "proxy": [2 * x for x in kls], "gold": [1 + x for x in kls]},
    }


@pytest.fixture
def made_up(bench: ModuleType) -> dict[str, Any]:
    seeds = [0, 1, 2]
    arms = {
        name: [arm(peak, seed=seed) for seed in seeds] for name, peak in (("64", 1.0), ("4096", 3.0), ("gold", 8.0))
    }
    return {"command": "python x", "environment": {"cpu": "c"}, "seeds": seeds, "gold_spread": 2.5, "arms": arms}


def test_the_peak_and_what_is_lost_after_it(bench: ModuleType, made_up: dict[str, Any]) -> None:
    found = bench.after_the_peak(made_up["arms"]["4096"])
    assert found["kl"] == pytest.approx(9.0, abs=1.0)
    assert found["gain"] == pytest.approx(9.01, abs=0.1)
    assert found["last_kl"] == pytest.approx(36)
    assert found["change"] == pytest.approx(-9, abs=0.2)
    assert found["change_half"] < 0.1
    never_falls = bench.after_the_peak(made_up["arms"]["gold"])
    assert (never_falls["kl"], never_falls["change"]) == (pytest.approx(36), 0)


def test_a_course_ends_where_the_shortest_run_does(bench: ModuleType) -> None:
    found = bench.course([arm(3.0), arm(3.0, reach=16.0)], "p3o", "gold")
    assert (found["d"][0], found["d"][-1]) == (0, pytest.approx(4.0))
    assert found["mean"][0] == found["half"][0] == 0


def test_intervals_are_students(bench: ModuleType) -> None:
    mean, half = bench.estimate([1.0, 2.0, 4.5])
    assert mean == 2.5
    assert half == pytest.approx(4.302653 * statistics.stdev([1.0, 2.0, 4.5]) / math.sqrt(3), rel=1e-5)
    assert math.isnan(bench.estimate([1.0])[1])


# ------------------------------------------------------------------------------------------------------ record, command


def test_one_record_one_figure_to_the_byte(bench: ModuleType, made_up: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        bench.draw(json.loads(json.dumps(made_up)), tmp_path / name)
    svg = (tmp_path / "one.svg").read_text()
    assert svg == (tmp_path / "two.svg").read_text()
    text = bench.as_markdown(made_up)
    assert "| 4,096 | 80.0% | 5 to 7 | 9.0" in text
    assert "| the gold reward itself |  |  |" in text
    one_seed = {**made_up, "seeds": [0], "arms": {name: runs[:1] for name, runs in made_up["arms"].items()}}
    assert "nan" not in bench.as_markdown(one_seed)
    bench.draw(one_seed, tmp_path / "one.svg")


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def test_the_record_is_what_its_numbers_make(bench: ModuleType, record: dict[str, Any]) -> None:
    assert RECORD.with_suffix(".md").read_text() == bench.as_markdown(record)
    assert RECORD.with_suffix(".svg").is_file()
    assert list(record["arms"]) == [*map(str, bench.COMPARISONS), "gold"]
    for runs in record["arms"].values():
        assert [run["seed"] for run in runs] == record["seeds"]
        for run in runs:
            assert (run["p3o"]["steps"][0], run["p3o"]["steps"][-1]) == (0, bench.STEPS)
            assert abs(run["p3o"]["kl"][0]) < 1e-4


def test_the_record_shows_what_docs_reward_md_says(bench: ModuleType, record: dict[str, Any]) -> None:
    proxies = [record["arms"][str(count)] for count in bench.COMPARISONS]
    few, many = proxies[0], proxies[-1]
    # The proxy's reward rises to the end of every run, up to what sampling makes of it; gold does not.
    for runs in proxies:
        rises = bench.course(runs, "p3o", "proxy")["mean"]
        assert rises[-1] > 0.95 * max(rises)
    assert bench.after_the_peak(few)["change"] < 0
    assert bench.after_the_peak(few)["kl"] < 10
    assert bench.course(few, "p3o", "gold")["mean"][-1] < 0
    assert statistics.fmean(run["agreement"] for run in few) > 0.5
    # With more comparisons it is worth more, and it lasts.
    most = bench.after_the_peak(many)
    assert most["gain"] > bench.after_the_peak(few)["gain"]
    assert most["change"] > -0.5 * most["gain"]
    ends = [
        statistics.fmean(run["best_of_n"]["gold"][-1] for run in runs) for runs in [*proxies, record["arms"]["gold"]]
    ]
    assert ends == sorted(ends)
    for runs in proxies:
        best_of_n = bench.course(runs, "best_of_n", "gold")["mean"]
        assert best_of_n[-1] > 0.95 * max(best_of_n)
        assert max(bench.course(runs, "p3o", "gold")["mean"]) < max(
            bench.course(record["arms"]["gold"], "p3o", "gold")["mean"]
        )


@pytest.mark.slow
def test_the_command_runs(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small: two steps, few samples, proxies of a handful of updates."""
    pytest.importorskip("matplotlib")
    small = {"STEPS": 2, "EVERY": 1, "GENERATIONS": 2, "SAMPLES": 8, "LARGEST_N": 4, "NUM_HELD_OUT": 8}
    for name, value in small.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "UPDATES", {64: 2})
    monkeypatch.setattr(bench, "SFT_WORDS", {**bench.SFT_WORDS, "num_epochs": 0.05})
    best_of_n = bench.best_of_n
    monkeypatch.setattr(bench, "best_of_n", lambda *tensors: best_of_n(*tensors, 4))
    bench.main(["--seeds", "0", "--comparisons", "64", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "overoptimisation.json").read_text())
    assert record["command"] == "python benchmarks/overoptimisation.py --seeds 0 --comparisons 64 --output ..."
    run = record["arms"]["64"][0]
    assert run["updates"] in (1, 2)
    assert run["p3o"]["steps"] == [0, 1, 2]
    assert run["best_of_n"]["n"] == [1, 2, 4]
    assert all(math.isfinite(x) for name in ("kl", "proxy", "gold") for x in run["p3o"][name])
    gold = record["arms"]["gold"][0]["p3o"]
    assert gold["proxy"] == pytest.approx(gold["gold"], abs=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {f"overoptimisation.{kind}" for kind in ("json", "md", "svg")}
