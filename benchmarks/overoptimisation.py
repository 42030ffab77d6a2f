"""Reward over-optimisation: P3O against reward models that learned from few comparisons, and what that is truly worth.

    python benchmarks/overoptimisation.py                  # five seeds, about half an hour on one core
    python benchmarks/overoptimisation.py --seeds 0 1 2 --comparisons 256 4096

The set-up of Gao, Schulman and Hilton 2022 (arXiv 2210.10760), small: a gold reward that is known labels pairs of
samples of an SFT policy, proxies learn from different numbers of these, and the policy is optimised for a proxy while
the gold reward is only watched. Everything goes through pairtune: `sft` makes the policy, `reward` the proxies, `train`
(P3O, beta 0) optimises them.

The language has 40 words and 8 topics. The gold reward of a completion is the sum of its words' values, which depend on
the topic, less a price for saying a word again. Samples of the SFT policy seldom repeat a word: what repeating costs is
what few comparisons do not tell. Labels are drawn by s(gold difference), so that a perfect proxy is the gold reward, up
to a number a topic. Written are overoptimisation.json (every number), overoptimisation.md and overoptimisation.svg
(both made from the JSON alone).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import random
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from limits import RESULTS, Progress, listed, machine_line, provenance, whole
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pairtune import TrainConfig, train
from pairtune.config import RewardConfig, SFTConfig
from pairtune.maths.statistics import student_quantile
from pairtune.runs import checkpoint
from pairtune.runs.metrics import read_jsonl
from pairtune.stages.reward import reward
from pairtune.stages.sft import sft

WORDS = [consonant + vowel for consonant in "bdfgklmn" for vowel in "aeiou"]
TOPICS = list("ABCDEFGH")
"""The prompts."""
END, PAD = "<end>", "<pad>"
MAX_TOKENS = 12
"""Of a completion, END included."""
REPETITION = 1.0
"""What saying a word costs for each time that it was said before, log-odds."""

COMPARISONS = (64, 256, 1024, 4096)
UPDATES = {64: 40, 256: 60, 1024: 120, 4096: 240}
"""At most; a proxy is kept as it was where held-out comparisons were likeliest."""
EVERY = 5
"""Updates between two looks of a proxy at its held-out comparisons, and steps between two measurements of a policy."""
NUM_HELD_OUT = 512
STEPS = 100
GENERATIONS = 64
"""Completions a topic of each measurement."""
SAMPLES = 2048
"""Completions a topic that best-of-n chooses from."""
LARGEST_N = 512
GOLD = "gold"
"""Where the gold reward itself is optimised."""

SHARED: dict[str, Any] = {
    "dataset": "in memory",
    "chat": "never",
    "dtype": "float32",
    "device": "cpu",
    "num_threads": 1,
}
SFT_WORDS = {"batch_size": 64, "micro_batch_size": None, "num_epochs": 10, "learning_rate": 3e-3, "eval_steps": 0}
REWARD_WORDS = {"batch_size": 64, "micro_batch_size": None, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
TRAIN_WORDS = {"batch_size": 64, "num_iterations": 2, "learning_rate": 1e-3, "beta": 0.0}


# --------------------------------------------------------------------------------------------------------- the language

_draws = torch.Generator().manual_seed(0)
AFTER = torch.randn(len(WORDS) + 1, len(WORDS), generator=_draws)
"""Logits of the next word by the word before it, the last row by none."""
ABOUT = torch.randn(len(TOPICS), len(WORDS), generator=_draws)
"""Logits of the next word by the topic."""
VALUES = 0.5 + torch.randn(len(WORDS), generator=_draws) + 0.5 * torch.randn(len(TOPICS), len(WORDS), generator=_draws)
"""What each word is worth under each topic, log-odds."""


def sentence(topic: int, draw: torch.Generator) -> str:
    """What people write about a topic: three words or more, each in view of the one before it."""
    places: list[int] = []
    while len(places) < MAX_TOKENS - 1:
        logits = AFTER[places[-1] if places else -1] + ABOUT[topic]
        places.append(int(torch.multinomial(logits.softmax(0), 1, generator=draw)))
        if len(places) >= 3 and torch.rand((), generator=draw) < 0.2:
            break
    return " ".join(WORDS[place] for place in places)


def gold_reward(topic: str, completion: str) -> float:
    """The sum of the words' values, less what repetitions cost; log-odds."""
    counts = Counter(completion.split())
    values = VALUES[TOPICS.index(topic)]
    # A word may be a topic's name, which is worth nothing.
    worth = sum(count * values[WORDS.index(word)].item() for word, count in counts.items() if word in WORDS)
    return worth - REPETITION * sum(count * (count - 1) / 2 for count in counts.values())


def gold_function(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The gold reward, as `train` calls it."""
    return [gold_reward(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word, topic, END and padding."""
    vocabulary = {word: place for place, word in enumerate([END, PAD, *TOPICS, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([END, PAD])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PAD, unk_token=PAD)


def untrained_model() -> LlamaForCausalLM:
    """A Llama of two layers and hidden size 48, in float32."""
    config = LlamaConfig(
        vocab_size=2 + len(TOPICS) + len(WORDS),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).float().eval()


# ----------------------------------------------------------------------------------------------------- the three stages


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def newest(run: Path) -> Path:
    found = checkpoint.latest(run)
    assert found is not None
    return found


def fine_tuned(folder: Path, num_sentences: int = 4000) -> Path:
    """The SFT policy, one for all seeds, as a folder that `from_pretrained` loads."""
    draw = torch.Generator().manual_seed(1)
    rows = [
        {"prompt": TOPICS[n % len(TOPICS)], "completion": f" {sentence(n % len(TOPICS), draw)}"}
        for n in range(num_sentences)
    ]
    config = SFTConfig(model="in memory", output_dir=str(folder), save_steps=0, **SHARED, **SFT_WORDS)
    split = num_sentences // 10
    with quietly():
        sft(
            config,
            model=untrained_model(),
            tokenizer=tokenizer(),
            train_dataset=rows[split:],
            eval_dataset=rows[:split],
        )
    return newest(folder)


@torch.no_grad()
def samples(policy: Path, num_each: int, seed: int) -> list[list[str]]:
    """`num_each` completions of every topic."""
    model, reader = AutoModelForCausalLM.from_pretrained(policy).eval(), AutoTokenizer.from_pretrained(policy)
    found = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for topic in TOPICS:
            ids = torch.tensor([reader(topic)["input_ids"]] * num_each)
            drawn = model.generate(ids, do_sample=True, top_k=0, max_new_tokens=MAX_TOKENS)[:, 1:]
            found.append([reader.decode(one, skip_special_tokens=True) for one in drawn])
    return found


def comparisons(policy: Path, count: int, seed: int) -> list[dict[str, str]]:
    """Pairs of samples of one topic, topics in turn, the chosen one drawn by s(gold difference)."""
    draw, rows = random.Random(seed), []
    # Some pairs are no comparison: both alike, or one of them empty.
    drawn = samples(policy, 2 * math.ceil(1.2 * count / len(TOPICS)) + 4, seed)
    for k in range(0, len(drawn[0]), 2):
        for topic, completions in zip(TOPICS, drawn, strict=True):
            first, second = completions[k], completions[k + 1]
            if first != second and first and second:
                lead = gold_reward(topic, first) - gold_reward(topic, second)
                if draw.random() > 1 / (1 + math.exp(-lead)):
                    first, second = second, first
                rows.append({"prompt": topic, "chosen": f" {first}", "rejected": f" {second}"})
    assert len(rows) >= count
    return rows[:count]


def proxy(policy: Path, folder: Path, count: int, seed: int, *, max_updates: int | None = None) -> tuple[Path, int]:
    """A reward model that learned from so many comparisons, as a folder, and after how many updates it was best."""
    config = RewardConfig(
        model=str(policy),
        output_dir=str(folder),
        max_steps=max_updates or UPDATES[count],
        eval_steps=EVERY,
        save_steps=EVERY,
        keep_last=10**6,
        seed=seed,
        **SHARED,
        **REWARD_WORDS,
    )
    rows = comparisons(policy, count, 1000 * (seed + 1))
    held_out = comparisons(policy, NUM_HELD_OUT, 1000 * (seed + 1) + 1)
    with quietly():
        reward(config, train_dataset=rows, eval_dataset=held_out)
    likelihood = {
        line["step"]: line["log_likelihood"]["mean"]
        for line in read_jsonl(folder / "evaluations.jsonl")
        if line["step"]
    }
    best = max(likelihood, key=likelihood.__getitem__)
    return folder / "checkpoints" / f"step-{best}", best


def optimised(policy: Path, judge: Path | None, folder: Path, seed: int) -> dict[str, Any]:
    """P3O on a proxy, or on the gold reward where there is none: steps, KL, proxy and gold, means over the topics."""
    config = TrainConfig(
        model=str(policy),
        output_dir=str(folder),
        reward_funcs=[str(judge)] if judge else [],
        reward_batch_size=512,
        max_completion_length=MAX_TOKENS,
        max_steps=STEPS,
        eval_steps=EVERY,
        eval_generations=GENERATIONS,
        save_steps=0,
        seed=seed,
        **SHARED,
        **TRAIN_WORDS,
    )
    prompts = [{"prompt": topic} for topic in TOPICS]
    functions = {} if judge else {"reward_funcs": [gold_function]}
    with quietly():
        result = train(config, train_dataset=prompts * 8, eval_dataset=prompts, **functions)
    if not result.finished:  # a signal ends a run, and with it the benchmark
        raise KeyboardInterrupt
    at: defaultdict[int, list[tuple[float, float, float]]] = defaultdict(list)
    for sample in read_jsonl(folder / "samples.jsonl"):
        if sample["split"] == "eval":
            worth = gold_reward(sample["prompt"], sample["completion"])
            at[sample["step"]].append((sample["kl"], sample["reward"], worth))
    means = [[statistics.fmean(column) for column in zip(*at[step], strict=True)] for step in sorted(at)]
    columns = dict(zip(("kl", "proxy", "gold"), zip(*means, strict=True), strict=True))
    return {"steps": sorted(at), **{name: rounded(values) for name, values in columns.items()}}


# ------------------------------------------------------------------------------------------------------------ best of n


@torch.no_grad()
def scores(judge: Path, drawn: list[list[str]]) -> Tensor:
    """(topics, samples) what a proxy gives, read as transformers reads it. A completion without END was cut."""
    model, reader = (
        AutoModelForSequenceClassification.from_pretrained(judge).eval(),
        AutoTokenizer.from_pretrained(judge),
    )
    found = []
    for topic, completions in zip(TOPICS, drawn, strict=True):
        texts = [
            f"{topic} {completion}" + (f" {END}" if len(completion.split()) < MAX_TOKENS else "")
            for completion in completions
        ]
        inputs = reader(texts, padding=True, padding_side="right", return_tensors="pt")
        found.append(model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0])
    return torch.stack(found).double()


def gold_scores(drawn: list[list[str]]) -> Tensor:
    """(topics, samples)"""
    worth = [[gold_reward(topic, one) for one in group] for topic, group in zip(TOPICS, drawn, strict=True)]
    return torch.tensor(worth, dtype=torch.float64)


def of_the_best(chosen_by: Tensor, worth: Tensor, n: int) -> float:
    """The expected worth of the best by `chosen_by` of n samples, both (topics, N), mean over topics.

    Over all subsets of n of the N samples, which is unbiased (Nakano et al. 2021, arXiv 2112.09332, appendix I): the
    sample of rank i from 0 is the best of C(i, n - 1) among C(N, n).
    """
    total = chosen_by.shape[1]
    rank = torch.arange(n - 1, total, dtype=torch.float64)
    log_subsets = log_choose(rank, n - 1) - log_choose(torch.tensor(float(total), dtype=torch.float64), n)
    ordered = worth.gather(1, chosen_by.argsort(1))[:, n - 1 :]
    return (ordered * log_subsets.exp()).sum(1).mean().item()


def log_choose(total: Tensor, part: int) -> Tensor:
    """log of the binomial coefficient."""
    number = torch.tensor(float(part), dtype=torch.float64)
    return torch.lgamma(total + 1) - torch.lgamma(number + 1) - torch.lgamma(total - number + 1)


def best_of_n(chosen_by: Tensor, worth: Tensor, largest: int = LARGEST_N) -> dict[str, Any]:
    """n = 1, 2, 4, ...; the KL is log n - (n - 1) / n, which holds up to ties (an upper bound with them)."""
    numbers = [2**k for k in range(int(math.log2(largest)) + 1)]
    return {
        "n": numbers,
        "kl": rounded([math.log(n) - (n - 1) / n for n in numbers]),
        "proxy": rounded([of_the_best(chosen_by, chosen_by, n) for n in numbers]),
        "gold": rounded([of_the_best(chosen_by, worth, n) for n in numbers]),
    }


def agreement(chosen_by: Tensor, worth: Tensor) -> float:
    """Share of the pairs of neighbouring samples that a proxy orders as the gold reward does, ties half."""
    differences = [(values[:, 0::2] - values[:, 1::2]) for values in (chosen_by, worth)]
    decided = differences[1] != 0
    agreed = (differences[0] * differences[1]).sign()[decided]
    return ((agreed + 1) / 2).mean().item()


# ------------------------------------------------------------------------------------------------------------ measuring


def rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def measure(counts: Sequence[int], seeds: Sequence[int], folder: Path) -> Iterator[dict[str, Any]]:
    """Every proxy, every run, and best-of-n by the same proxies: what is known after each seed."""
    progress = Progress(1 + (len(counts) + 1) * len(seeds))
    with progress("the SFT policy"):
        policy = fine_tuned(folder / "sft")
    arms: dict[str, list[dict[str, Any]]] = {str(name): [] for name in (*counts, GOLD)}
    spreads: list[float] = []
    for seed in seeds:
        drawn = samples(policy, SAMPLES, 10**6 + seed)
        worth = gold_scores(drawn)
        spreads.append((worth - worth.mean(1, keepdim=True)).std().item())
        for count in counts:
            with progress(f"{count} comparisons, seed {seed}"):
                judge, updates = proxy(policy, folder / f"proxy-{count}-{seed}", count, seed)
                by_proxy = scores(judge, drawn)
                found = {"seed": seed, "updates": updates, "agreement": agreement(by_proxy, worth)}
                run = optimised(policy, judge, folder / f"p3o-{count}-{seed}", seed)
                arms[str(count)].append({**found, "p3o": run, "best_of_n": best_of_n(by_proxy, worth)})
        with progress(f"the gold reward itself, seed {seed}"):
            run = optimised(policy, None, folder / f"p3o-gold-{seed}", seed)
            arms[GOLD].append({"seed": seed, "p3o": run, "best_of_n": best_of_n(worth, worth)})
        yield {"seeds": list(seeds[: len(spreads)]), "gold_spread": statistics.fmean(spreads), "arms": arms}


# ------------------------------------------------------------------------------------------------------- what they say


def gains(points: dict[str, Any], which: str) -> tuple[list[float], list[float]]:
    """(d, gain): the root of the KL, from 0 on, and by how much a reward exceeds that of the SFT policy."""
    kl, values = points["kl"], points[which]
    return [math.sqrt(max(0.0, x)) for x in kl], [value - values[0] for value in values]


def at_distances(points: dict[str, Any], which: str, grid: Sequence[float]) -> list[float]:
    """The gain at each distance d of a grid, between measurements on a line; the run must reach so far.

    A run may come back: the gain at d is that where it first gets there.
    """
    distances, values = gains(points, which)
    found = []
    for d in grid:
        after = next(k for k, x in enumerate(distances) if x >= d)
        if after == 0:
            found.append(values[0])
        else:
            low, high = distances[after - 1], distances[after]
            share = (d - low) / (high - low)
            found.append(values[after - 1] + share * (values[after] - values[after - 1]))
    return found


def estimate(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half-width of its 95% interval by Student's t) over seeds."""
    if len(values) < 2:
        return values[0], math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), student_quantile(0.975, len(values) - 1) * error


def course(runs: Sequence[dict[str, Any]], optimiser: str, which: str) -> dict[str, list[float]]:
    """Mean gain over seeds with its interval, on distances that every seed reaches."""
    reach = min(max(gains(run[optimiser], which)[0]) for run in runs)
    grid = [step * reach / 40 for step in range(41)]
    columns = [at_distances(run[optimiser], which, grid) for run in runs]
    means, halves = zip(*(estimate(at) for at in zip(*columns, strict=True)), strict=True)
    return {"d": grid, "mean": list(means), "half": list(halves)}


FORMS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "p3o": ("d (a - b log d)", lambda d: torch.stack([d, -d * d.log()], 1)),
    "best_of_n": ("d (a - b d)", lambda d: torch.stack([d, -(d**2)], 1)),
}
"""Gao et al. 2022: the gold gain at d, the root of the KL, under reinforcement learning and best-of-n."""


def fit(points: dict[str, Any], optimiser: str) -> tuple[float, float]:
    """(a, b) of the form by least squares over a run's measurements; d = 0 says nothing."""
    distances, values = gains(points, "gold")
    d, gain = (torch.tensor(x, dtype=torch.float64)[torch.tensor(distances) > 0] for x in (distances, values))
    solution = torch.linalg.lstsq(FORMS[optimiser][1](d), gain[:, None]).solution
    return solution[0].item(), solution[1].item()


def fitted(coefficients: tuple[float, float], optimiser: str, grid: Sequence[float]) -> list[float]:
    d = torch.tensor(grid, dtype=torch.float64).clamp(min=1e-9)
    return (FORMS[optimiser][1](d) @ torch.tensor(coefficients, dtype=torch.float64)).tolist()


def after_the_peak(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Where the mean gold gain under P3O is largest, how large, and what it has lost by the farthest common KL."""
    found = course(runs, "p3o", "gold")
    peak = max(range(len(found["d"])), key=found["mean"].__getitem__)
    ends = [found["d"][peak], found["d"][-1]]
    changes = [last - best for best, last in (at_distances(run["p3o"], "gold", ends) for run in runs)]
    change, half = estimate(changes)
    return {
        "kl": ends[0] ** 2,
        "gain": found["mean"][peak],
        "half": found["half"][peak],
        "last_kl": ends[1] ** 2,
        "change": change,
        "change_half": half,
    }


# ----------------------------------------------------------------------------------------------------------- the record

NOTES = """\
- A gain is what exceeds the SFT policy, in log-odds of the gold reward, whose standard deviation among the SFT policy's
  samples of a topic is {spread:.2f}. Intervals are Student's over seeds: other comparisons, another order of learning,
  other samples. The SFT policy and the language are the same for all.
- The peak is that of the mean over seeds, found on the same seeds that the change after it is taken from: chance alone
  would make a flat course seem to fall a little.
- Compare the shapes of gold and proxy, not their heights: a proxy that stopped early is less sure than the gold reward
  that drew its labels, and its gains are smaller. What tells is that the proxy goes on rising where gold does not.
- A proxy is one that few comparisons make, stopped where {held_out} held-out ones are likeliest. A larger dataset also
  pays for more updates; what differs between the columns is both.
- beta is 0: what stops a run is that nothing is left to gain from the proxy. With a pull to the reference runs would
  end earlier.
- The two optimisers spend their KL differently, and best-of-n cannot spend more than log n - (n - 1) / n: compare
  within a row of the figure, not across.
- The task is made so that it can happen: what costs reward is rare among the samples that comparisons are drawn from.
  How much is lost, and after how many nats, says nothing of other tasks."""


def shown(value: float, half: float, form: str = ".2f") -> str:
    return f"{value:{form}}" if math.isnan(half) else f"{value:{form}} ± {half:{form}}"


def named(arm: str) -> str:
    return "the gold reward itself" if arm == GOLD else f"{int(arm):,}"


def as_markdown(record: dict[str, Any]) -> str:
    """The record to read."""
    arms = record["arms"]
    lines = [
        "# Reward over-optimisation, recorded",
        "",
        f"`{record['command']}`",
        "",
        machine_line(record),
        "",
        f"A transformer of two layers and hidden size 48 on a language of {len(WORDS)} words and {len(TOPICS)} topics. "
        "P3O, clipped jointly, beta 0, optimises reward models that learned from so many comparisons of samples of the "
        "SFT policy; the gold reward that drew their labels is only watched.",
        "",
        "![Gold and proxy reward against the KL](overoptimisation.svg)",
        "",
        f"Means over seeds {listed(record['seeds'], 'd')} with 95% intervals. Agreement: the share of pairs of samples "
        "of the SFT policy that the proxy orders as the gold reward does.",
        "",
        "| comparisons | agreement | updates | peak of the gold gain | at KL | then, up to KL | it changes by |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm, runs in arms.items():
        peak = after_the_peak(runs)
        agreed = "" if arm == GOLD else f"{estimate([run['agreement'] for run in runs])[0]:.1%}"
        updates = "" if arm == GOLD else f"{min(r['updates'] for r in runs)} to {max(r['updates'] for r in runs)}"
        lines.append(
            f"| {named(arm)} | {agreed} | {updates} | {shown(peak['gain'], peak['half'])} | {peak['kl']:.1f} | "
            f"{peak['last_kl']:.1f} | {shown(peak['change'], peak['change_half'])} |"
        )
    lines += ["", "Best-of-n by the same proxies, gold gain (proxy gain):", ""]
    shown_n = [n for n in (4, 32, 512) if n in next(iter(arms.values()))[0]["best_of_n"]["n"]]
    kls = [f"n = {n}, KL {math.log(n) - (n - 1) / n:.2f}" for n in shown_n]
    lines += [f"| comparisons | {' | '.join(kls)} |", "|---:|" + "---:|" * len(shown_n)]
    for arm, runs in arms.items():
        cells = []
        for n in shown_n:
            place = runs[0]["best_of_n"]["n"].index(n)
            gold, of_proxy = (
                estimate([gains(run["best_of_n"], which)[1][place] for run in runs]) for which in ("gold", "proxy")
            )
            cells.append(f"{shown(*gold)} ({of_proxy[0]:.2f})")
        lines.append(f"| {named(arm)} | {' | '.join(cells)} |")
    lines += [
        "",
        "The forms of Gao et al. fitted to the gold gains of each seed, d the root of the KL: "
        f"{FORMS['p3o'][0]} under P3O, {FORMS['best_of_n'][0]} under best-of-n.",
        "",
        "| comparisons | P3O: a | b | best-of-n: a | b |",
        "|---:|---:|---:|---:|---:|",
    ]
    for arm, runs in arms.items():
        cells = []
        for optimiser in FORMS:
            pairs = [fit(run[optimiser], optimiser) for run in runs]
            cells += [shown(*estimate(column)) for column in zip(*pairs, strict=True)]
        lines.append(f"| {named(arm)} | {' | '.join(cells)} |")
    notes = NOTES.format(spread=record["gold_spread"], held_out=NUM_HELD_OUT)
    return "\n".join([*lines, "", notes]) + "\n"


# ----------------------------------------------------------------------------------------------------------- the figure

COLOURS = ("#74b3dd", "#3d8dc9", "#1f66ab", "#08306b")
"""From few comparisons to many, told apart in grey too."""


def draw(record: dict[str, Any], path: Path) -> None:
    """Above P3O, below best-of-n: a panel a number of comparisons, and all gold curves on a plain KL axis. Thin lines
    are seeds, the band is the interval of their mean. The same record gives the same bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter

    style: dict[Any, Any] = {
        "svg.hashsalt": "pairtune",
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    arms = {arm: runs for arm, runs in record["arms"].items() if arm != GOLD}
    colour_of = {arm: COLOURS[len(COLOURS) - len(arms) + k] for k, arm in enumerate(arms)}
    with rc_context(style):
        figure = Figure(figsize=(2.0 * len(arms) + 3.2, 4.6), layout="constrained")
        grid = figure.add_gridspec(2, len(arms) + 1, width_ratios=[1.0] * len(arms) + [1.6])
        first: dict[int, Any] = {}
        for row, (optimiser, title) in enumerate({"p3o": "P3O", "best_of_n": "best-of-n"}.items()):
            perfect = course(record["arms"][GOLD], optimiser, "gold")
            # The panels show every seed; an interval of few seeds may be wider than they are.
            low, high = 0.0, max(perfect["mean"])
            ends: dict[str, tuple[float, float]] = {}
            together = figure.add_subplot(grid[row, len(arms)])
            for column, (arm, runs) in enumerate(arms.items()):
                share = {"sharex": first[row], "sharey": first[row]} if column else {}
                axes = figure.add_subplot(grid[row, column], **share)
                first.setdefault(row, axes)
                gold, of_proxy = course(runs, optimiser, "gold"), course(runs, optimiser, "proxy")
                colour = colour_of[arm]
                axes.plot(perfect["d"], perfect["mean"], color="#b0b0b0", lw=0.9, label="gold, where gold is optimised")
                axes.plot(of_proxy["d"], of_proxy["mean"], color="#d55e00", lw=1.2, ls=(0, (4, 2)), label="proxy")
                bounds = [[m + s * h for m, h in zip(gold["mean"], gold["half"], strict=True)] for s in (-1, 1)]
                axes.fill_between(gold["d"], *bounds, color=colour, alpha=0.25, lw=0)
                axes.plot(gold["d"], gold["mean"], color=colour, lw=1.8, label="gold")
                for run in runs:
                    one = at_distances(run[optimiser], "gold", gold["d"])
                    axes.plot(gold["d"], one, color=colour, lw=0.5, alpha=0.8)
                    low, high = min(low, *one), max(high, *one)
                pairs = [fit(run[optimiser], optimiser) for run in runs]
                mean_fit = tuple(statistics.fmean(column) for column in zip(*pairs, strict=True))
                axes.plot(
                    gold["d"][1:], fitted(mean_fit, optimiser, gold["d"][1:]), color="k", lw=0.8, ls=":", label="fit"
                )
                axes.axhline(0, color="#888888", lw=0.5)
                if row == 0:
                    last_above = axes
                    axes.set_title(f"{named(arm)} comparisons", fontsize=8, loc="left")
                if column:
                    axes.tick_params(labelleft=False)
                else:
                    axes.set_ylabel(f"{title}: gain over SFT, log-odds")
                nats = [0, 1, 4, 9, 16, 25, 36] if row == 0 else [0, 0.5, 1, 2, 3, 4, 5]
                reach = max(perfect["d"])
                axes.xaxis.set_major_locator(FixedLocator([math.sqrt(x) for x in nats if math.sqrt(x) <= reach]))
                axes.xaxis.set_major_formatter(FuncFormatter(lambda d, _: f"{d * d:.2g}"))
                axes.set_xlabel("KL to SFT, nats (root scale)")
                squares = [d * d for d in gold["d"]]
                together.plot(squares, gold["mean"], color=colour, lw=1.5)
                ends[arm] = squares[-1], gold["mean"][-1]
            together.plot([d * d for d in perfect["d"]], perfect["mean"], color="#b0b0b0", lw=0.9)
            together.axhline(0, color="#888888", lw=0.5)
            together.margins(x=0.12)
            first[row].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
            gap = 0.07 * (high - min(0.0, *(end for _, end in ends.values())))
            lowest = -math.inf
            for arm, (kl, end) in sorted(ends.items(), key=lambda item: item[1][1]):
                lowest = max(end, lowest + gap)  # a name over the one below it
                together.annotate(
                    named(arm), (kl, lowest), xytext=(3, 0), textcoords="offset points",
                    color=colour_of[arm], va="center", fontsize=7,
                )  # fmt: skip
            together.set_xlabel("KL to SFT, nats")
            together.set_title(f"{title}, gold only, by comparisons", fontsize=8, loc="left")
        handles, labels = last_above.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=8)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


# ---------------------------------------------------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0, 1, 2, 3, 4], help="default: 0 1 2 3 4")
    parser.add_argument(
        "--comparisons", type=int, nargs="+", choices=COMPARISONS, default=list(COMPARISONS), help="default: all"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; older ones are replaced")
    parser.add_argument("--redraw", action="store_true", help="text and figure anew, from the numbers that are there")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    torch.set_num_threads(1)
    if args.redraw:
        write(json.loads((args.output / "overoptimisation.json").read_text()), args.output)
        return
    source = provenance("overoptimisation", argv, args.output)
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for found in measure(args.comparisons, args.seeds, Path(folder)):
            write({**source, **found}, args.output)
    print((args.output / "overoptimisation.md").read_text())


def write(record: dict[str, Any], folder: Path) -> None:
    """The numbers, and what is made of them."""
    (folder / "overoptimisation.json").write_text(json.dumps(record) + "\n")
    (folder / "overoptimisation.md").write_text(as_markdown(record))
    draw(record, folder / "overoptimisation.svg")


if __name__ == "__main__":
    main()
