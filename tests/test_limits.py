"""benchmarks/limits.py and benchmarks/learning_curves.py: the points at which methods come to rest, by other means than
those that found them; training towards them; and the records."""

from __future__ import annotations

import copy
import importlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pairtune.completion_data import load_preferences, load_scored
from pairtune.config import METHODS
from pairtune.evidence.exact import (
    EnumerableTask,
    exact_values,
    gradient_law,
    optimum,
    sequence_logprobs,
    tabular_model,
    value_function,
)

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RESULTS = BENCHMARKS / "results"

sys.path.insert(0, str(BENCHMARKS))
try:
    limits: Any = importlib.import_module("limits")
    curves: Any = importlib.import_module("learning_curves")
finally:
    sys.path.remove(str(BENCHMARKS))

TASK = limits.TASK
BY_NAME = {case.name: case for case in limits.CASES}
ENUMERATED = [
    "p3o",
    "p3o, KL at sampling",
    "p3o, clipped separately",
    "p3o, not clipped",
    "rloo",
    "rloo, clipped",
    "reinforce",
    "reinforce, no baseline",
    "vpg",
    "ppo",
    "online_dpo",
    "copg",
    "rebel",
    "grpo, KL in the reward",
    "grpo, KL in the reward, standardised",
    "grpo",
    "grpo, centred",
    "online_ipo",
]
"""Cases whose expected gradient `gradient_law` can enumerate, and whose limit has no zeros."""


@pytest.fixture(scope="module")
def reference() -> Any:
    return tabular_model(TASK, seed=0)


def table_with(law: Tensor, reference: Any, task: EnumerableTask = TASK) -> Any:
    """A tabular float64 policy with these (P, N) probabilities of completions."""
    model = copy.deepcopy(reference).double()
    table = model.model.table.weight
    with torch.no_grad():
        values = table.clone()
        table.copy_(torch.arange(len(table)).to(table)[:, None].expand_as(table))  # each row says which it is
        for prompt, probs in zip(task.prompts, law, strict=True):
            for prefix in {s[:t] for s in task.sequences for t in range(len(s))}:
                row = int(model.model(torch.tensor([[*prompt, *prefix]])).last_hidden_state[0, -1, 0])
                for word in range(task.vocab_size):
                    begins = [s[: len(prefix) + 1] == (*prefix, word) for s in task.sequences]
                    values[row, word] = probs[begins].sum().clamp(min=1e-300).log()
        table.copy_(values)
    torch.testing.assert_close(sequence_logprobs(model, task).exp(), law, rtol=0, atol=1e-12)
    return model


def expected_gradient(name: str, policy: Any, reference: Any) -> Tensor:
    config = BY_NAME[name].config()
    values = value_function(TASK, policy, reference, limits.BETA) if METHODS[config.algorithm].has_values else None
    return gradient_law(config, TASK, policy, reference, values=values).gradient


# ----------------------------------------------------------------------------------------------------------- the points


@pytest.mark.parametrize("name", ENUMERATED)
def test_the_expected_gradient_vanishes_at_the_limit_and_nowhere_near(name: str, reference: Any) -> None:
    law = limits.limit(BY_NAME[name])
    torch.testing.assert_close(law.sum(-1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert expected_gradient(name, table_with(law, reference), reference).abs().max() < 1e-8
    nearby = table_with(0.98 * law + 0.02 * sequence_logprobs(reference, TASK).exp(), reference)
    assert expected_gradient(name, nearby, reference).abs().max() > 1e-5
    # Where another point is claimed, the optimum is not one too.
    best = optimum(TASK, sequence_logprobs(reference, TASK), limits.BETA).logprobs.exp()
    at_optimum = expected_gradient(name, table_with(best, reference), reference).abs().max() < 1e-8
    assert at_optimum == BY_NAME[name].at_optimum


@pytest.mark.parametrize("standardise", [True, False])
def test_the_rest_of_grpo_among_completions_of_three_lengths(standardise: bool) -> None:
    """With no more than two tokens the mean over a completion's tokens would leave the limit where it is."""
    task = EnumerableTask.random(num_prompts=2, max_completion_length=3, seed=1)
    reference = tabular_model(task, seed=1)
    words = {"algorithm": "grpo", "num_generations": 2, "grpo.standardise": standardise}
    config = limits.configuration(task, words)
    policy = table_with(limits.limit_of(config, task, reference), reference, task)
    assert gradient_law(config, task, policy, reference).gradient.abs().max() < 1e-8


def test_every_method_has_a_case() -> None:
    assert {case.method for case in limits.CASES} == set(METHODS)
    assert len(BY_NAME) == len(limits.CASES)


def test_raft_ends_at_the_best_completion(reference: Any) -> None:
    law = limits.limit(BY_NAME["raft"])
    assert torch.equal(law, torch.nn.functional.one_hot(TASK.rewards.argmax(-1), TASK.num_completions).double())
    gradients = []
    for rest in (1e-2, 1e-10):
        policy = table_with((1 - rest) * law + rest * sequence_logprobs(reference, TASK).exp(), reference)
        gradients.append(expected_gradient("raft", policy, reference).abs().max().item())
    assert gradients[0] > 1e-3
    assert gradients[1] < 1e-8


def test_online_ipo_ends_where_its_own_chance_to_win_says(reference: Any) -> None:
    """log(policy / reference) = P(win against the policy itself) / beta + a constant: written out, sum by sum."""
    law, ref = limits.limit(BY_NAME["online_ipo"]), sequence_logprobs(reference, TASK)
    for p, rewards in enumerate(TASK.rewards.tolist()):
        chances = [
            sum(q * torch.tensor(r - other).sigmoid().item() for q, other in zip(law[p].tolist(), rewards, strict=True))
            for r in rewards
        ]
        constants = law[p].log() - ref[p] - torch.tensor(chances, dtype=torch.float64) / limits.BETA
        assert constants.max() - constants.min() < 1e-6


def offline_limit(name: str, reference: Any) -> tuple[Tensor, Tensor]:
    """(P, N) log(policy / reference) at the limit of a case, and how often which was chosen over which (P, N, N)."""
    counts = limits.preferences_of(TASK, limits.pairs_of(BY_NAME[name]))
    assert counts.sum((1, 2)).tolist() == [300, 300, 300]
    assert ((counts + counts.mT).flatten(1) > 0).sum(1).tolist() == [42, 42, 42]  # every pair of the seven is met
    return limits.limit(BY_NAME[name]).log() - sequence_logprobs(reference, TASK), counts


def test_offline_dpo_ends_at_the_most_likely_bradley_terry_reward(reference: Any) -> None:
    """There each completion is expected to win as often as it did."""
    logratio, counts = offline_limit("dpo", reference)
    scores = limits.BETA * logratio
    chance = (scores[:, :, None] - scores[:, None]).sigmoid()
    torch.testing.assert_close(((counts + counts.mT) * chance).sum(-1), counts.sum(-1), rtol=0, atol=1e-8)


def test_offline_ipo_ends_at_the_least_squares_of_its_margins(reference: Any) -> None:
    logratio, counts = offline_limit("ipo", reference)
    met = counts + counts.mT
    laplacian = torch.diag_embed(met.sum(-1)) - met
    margins = (counts - counts.mT).sum(-1) / (2 * limits.BETA)
    solved = (torch.linalg.pinv(laplacian) @ margins[..., None])[..., 0]
    torch.testing.assert_close(logratio - logratio.mean(-1, True), solved - solved.mean(-1, True), rtol=0, atol=1e-8)


def test_with_infinitely_many_pairs_dpo_ends_at_the_optimum_and_ipo_at_the_chance_to_win(reference: Any) -> None:
    """Of pairs of any law; with 300 pairs a prompt dpo is still off by what these happen to say."""
    ref = sequence_logprobs(reference, TASK)
    behaviour = torch.randn(ref.shape, dtype=torch.float64).softmax(-1)
    wins = (TASK.rewards[:, :, None] - TASK.rewards[:, None]).sigmoid()
    preferences = behaviour[:, :, None] * behaviour[:, None] * wins
    law = limits.limit_of(BY_NAME["dpo"].config(), TASK, reference, preferences)
    assert exact_values(TASK, law.log(), ref, limits.BETA).regret < 1e-10
    assert exact_values(TASK, limits.limit(BY_NAME["dpo"]).log(), ref, limits.BETA).regret > 5e-3

    law = limits.limit_of(BY_NAME["ipo"].config(), TASK, reference, preferences)
    chance = (wins * behaviour[:, None]).sum(-1)
    torch.testing.assert_close(law, (ref + chance / limits.BETA).softmax(-1), rtol=0, atol=1e-10)


def test_the_data_of_offline_methods_is_read_as_meant(reference: Any) -> None:
    pairs = limits.preference_pairs(TASK, 20, seed=3)
    read = load_preferences(BY_NAME["dpo"].config(), TASK.tokenizer(), limits.preference_rows(TASK, pairs))
    assert len(read) == 60
    found = [[tuple(side.ids) for side in group] for group in read.completions]
    assert found == [[TASK.sequences[c], TASK.sequences[r]] for _, c, r in pairs]
    assert read.prompts == [TASK.text(TASK.prompts[p]) for p, _, _ in pairs]

    scored = load_scored(
        BY_NAME["copg, offline"].config(), TASK.tokenizer(), limits.scored_rows(TASK, reference, 7, seed=0)
    )
    assert (len(scored), scored.num_completions) == (3, 21)
    for completions, rewards, table in zip(scored.completions, scored.rewards, TASK.rewards.tolist(), strict=True):
        assert {tuple(completion.ids) for completion in completions} == set(TASK.sequences)
        assert rewards == [table[TASK.sequences.index(tuple(completion.ids))] for completion in completions]


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.slow
@pytest.mark.parametrize("case", limits.CASES, ids=lambda case: case.name.replace(", ", "-").replace(" ", "_"))
def test_training_ends_at_the_limit(case: Any) -> None:
    result = limits.run(case, seed=3)  # none of the record's
    assert limits.is_near(case, result), result


def test_a_signal_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch, reference: Any) -> None:
    class Stopped:
        finished = False

    monkeypatch.setattr(limits, "train", lambda *args, **words: Stopped())
    with pytest.raises(KeyboardInterrupt):
        limits.run(BY_NAME["p3o"], 0)


# ---------------------------------------------------------------------------------------------------------- the records


@pytest.fixture(scope="module", params=[limits, curves], ids=["limits", "learning_curves"])
def bench(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any], Path]:
    path = RESULTS / f"{request.param.__name__}.json"
    return request.param, json.loads(path.read_text()), path


def test_a_record_is_what_its_json_says(bench: tuple[Any, dict[str, Any], Path], tmp_path: Path) -> None:
    module, record, path = bench
    assert path.with_suffix(".md").read_text() == module.as_markdown(record)
    assert record["command"].startswith(f"python benchmarks/{path.stem}.py")
    if not hasattr(module, "draw"):
        return
    matplotlib = pytest.importorskip("matplotlib")
    module.draw(record, tmp_path / "drawn.svg")
    drawn = (tmp_path / "drawn.svg").read_bytes()
    if matplotlib.__version__ == record["environment"]["matplotlib"]:  # others draw the same, in other bytes
        assert drawn == path.with_suffix(".svg").read_bytes()
    assert all(f"<!-- {title} -->".encode() in drawn for title in module.TITLES.values())


def test_every_recorded_run_ended_at_its_limit() -> None:
    record = json.loads((RESULTS / "limits.json").read_text())
    assert [found["name"] for found in record["cases"]] == list(BY_NAME)
    for found in record["cases"]:
        case = BY_NAME[found["name"]]
        assert (found["words"], found["at_optimum"]) == (case.words, case.at_optimum)
        assert torch.tensor(found["limit"]).sub(limits.limit(case)).abs().max() < 1e-5
        assert [result["seed"] for result in found["runs"]] == record["seeds"]
        for result in found["runs"]:
            assert limits.is_near(case, result), (case.name, result)
            assert found["variation_of_reference"] > 4 * result["variation"]  # it had a way to go
    assert "**missed**" not in limits.as_markdown(record)
    record["cases"][0]["runs"][0]["regret"] = 0.01
    assert "**missed**" in limits.as_markdown(record)


def test_the_recorded_curves_are_of_all_methods_and_at_least_three_seeds() -> None:
    record = json.loads((RESULTS / "learning_curves.json").read_text())
    assert {found["words"]["algorithm"] for found in record["curves"].values()} == set(METHODS)
    assert len(record["seeds"]) >= 3
    budgets = set()
    for name, found in record["curves"].items():
        best = min(found["sweep"], key=found["sweep"].get)
        for run, seed in zip(found["runs"], record["seeds"], strict=True):
            assert (run["seed"], run["learning_rate"]) == (seed, float(best)), name
            budgets.add(tuple(run["completions"]))
            assert run["regret"][0] == pytest.approx(record["curves"]["p3o"]["runs"][0]["regret"][0])
            assert run["kl"][0] == 0
        if found["limit_regret"] < 1e-6:
            assert statistics.median(run["regret"][-1] for run in found["runs"]) < run["regret"][0] / 2, name
    assert len(budgets) == 1


def test_a_curve_counts_what_it_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "WORDS", {**curves.WORDS, "max_steps": 4})
    for name in ("rloo", "ipo"):
        found = curves.curve(curves.CURVES[name], 0.003, seed=1)
        assert found["completions"] == [0, 384, 768]
        assert found["kl"][0] == 0 < found["kl"][1]
        assert found["regret"][1] != found["regret"][2]


def test_the_pairs_of_a_curve_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    model = curves.tiny_transformer(curves.TASK, seed=0)
    ref = sequence_logprobs(model, curves.TASK)
    pairs = curves.sampled_pairs(model, 6000, seed=0)
    assert len(pairs) == 6000
    assert all(first != second for _, first, second in pairs)
    counts = limits.preferences_of(curves.TASK, pairs)
    expected = curves.offline_weights(ref)
    expected = expected * (1 - torch.eye(curves.TASK.num_completions, dtype=torch.float64))
    expected = 2000 * expected / expected.sum((1, 2), keepdim=True)
    assert ((counts - expected) / (expected + 1).sqrt()).abs().max() < 5


def test_the_command_writes_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(limits, "COMMON", {**limits.COMMON, "max_steps": 2, "batch_size": 4})
    limits.main(["--seeds", "0", "7", "--only", "rebel", "--output", str(tmp_path / "new")])
    written = json.loads((tmp_path / "new" / "limits.json").read_text())
    assert written["command"] == "python benchmarks/limits.py --seeds 0 7 --only rebel --output ..."
    text = (tmp_path / "new" / "limits.md").read_text()
    assert "**missed**" in text  # two steps are too few
    out, err = capsys.readouterr()
    assert text in out
    assert err.splitlines()[0] == "1 of 2: rebel, seed 0"
    assert err.splitlines()[1].startswith("2 of 2: rebel, seed 7, about ")

    limits.main(["--seeds", "5", "--only", "copg, off", "--output", str(tmp_path / "new")])
    added = json.loads((tmp_path / "new" / "limits.json").read_text())["cases"]
    assert [found["name"] for found in added] == ["copg, offline", "rebel"]  # in the order of CASES
    assert added[1] == written["cases"][0]
    assert [found["command"].split("--")[1] for found in added] == ["seeds 5 ", "seeds 0 7 "]

    monkeypatch.setattr(curves, "WORDS", {**curves.WORDS, "max_steps": 4, "batch_size": 4})
    monkeypatch.setattr(curves, "LEARNING_RATES", (0.003,))
    curves.main(["--seeds", "0", "--methods", "copg", "--output", str(tmp_path / "new")])
    assert (tmp_path / "new" / "learning_curves.svg").read_text().count("CoPG") >= 1
    assert str(tmp_path) not in (tmp_path / "new" / "learning_curves.json").read_text()


@pytest.mark.parametrize(
    ("main", "words"),
    [("limits", ["--only", "sarsa"]), ("limits", ["--seeds", "-1"]), ("learning_curves", ["--methods", "sarsa"])],
)
def test_arguments_that_make_no_sense_are_refused(main: str, words: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        {"limits": limits, "learning_curves": curves}[main].main(words)
    assert "sarsa" in f"{stopped.value}{capsys.readouterr().err}" or words == ["--seeds", "-1"]
