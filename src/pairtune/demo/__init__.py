"""`pairtune demo`: P3O aligns SmolLM2-135M-Instruct on this machine, and shows what that did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pairtune.config import TrainConfig

NUM_SHOWN = 5


def run(config: TrainConfig) -> None:
    """Train as `config` says; then the policy before and after on the held-out prompts, and a report."""
    from pairtune.evidence.report import reward_change, write_report
    from pairtune.runs.display import evaluation_rows, evaluation_table, make_console, side_by_side
    from pairtune.runs.metrics import read_jsonl
    from pairtune.stages.rl import train

    result = train(config)
    if not result.finished:
        return
    console = make_console()
    evaluations = read_jsonl(result.output_dir / "evaluations.jsonl")
    samples = [s for s in read_jsonl(result.output_dir / "samples.jsonl") if s["split"] == "eval"]
    if len(evaluations) >= 2:
        before, after = evaluations[0], evaluations[-1]
        first, last = ([s for s in samples if s["step"] == line["step"]] for line in (before, after))
        rows_before, rows_after = evaluation_rows(before), evaluation_rows(after)
        if any("vader" in name for name in config.reward_funcs):
            rows_before.append(strongest_word_row(first))
            rows_after.append(strongest_word_row(last))
        title = f"{before['num_prompts']} held-out prompts, before and after {result.steps} steps of {config.algorithm}"
        change = reward_change(evaluations, samples)
        console.print(evaluation_table(rows_before, rows_after, [change] if change else [], title))
        console.print(side_by_side(pairs_to_show(first, last)))
    report = write_report(result.output_dir)
    console.print(f"report: {report}", soft_wrap=True)
    console.print(f"talk to it: pairtune sample {result.output_dir}", soft_wrap=True)


def strongest_word_row(samples: list[dict[str, Any]]) -> tuple[str, float, float, float]:
    """The share of words that are among VADER's twenty strongest, as a ratio of sums over prompts, with its
    interval."""
    import torch

    from pairtune.demo.vader import num_words, strongest_word_share
    from pairtune.maths.statistics import bootstrap_ratio
    from pairtune.runs.display import QUANTITIES

    words = torch.tensor([float(num_words(s["completion"])) for s in samples])
    shares = torch.tensor([strongest_word_share([s["completion"]]) for s in samples])
    return (QUANTITIES["strongest_word_share"][0], *bootstrap_ratio(shares * words, words))


def pairs_to_show(first: list[dict[str, Any]], last: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first few held-out prompts with their completions before and after; not chosen by how well they came out."""
    after = {(s["row"], s["completion_index"]): s for s in last}
    return [
        {
            "prompt": s["prompt"],
            "before": s["completion"],
            "after": after[s["row"], 0]["completion"],
            "reward_before": s["reward"],
            "reward_after": after[s["row"], 0]["reward"],
        }
        for s in first
        if s["completion_index"] == 0
    ][:NUM_SHOWN]
