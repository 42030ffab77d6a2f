"""What one training step costs: pairtune's against that of TRL's RLOOTrainer, at equal work on one machine.

    python benchmarks/step_cost.py                        # in the precision that this machine computes faster
    python benchmarks/step_cost.py --variants float32-24 float32-8 --warmup 2 --steps 3

A step takes 12 prompts through 2 completions of 28 tokens each, their rewards, their log-probabilities under the
reference and one update of all weights. With one update a batch, P3O and leave-one-out have the same gradient, so both
sides compute the same thing. Neither side can sample the end of a completion (its EOS id lies behind the vocabulary),
so both draw the same number of tokens after the same prompts; the benchmark stops where they do not.

Each side is a process of its own, which loads its model and then takes one step whenever it is told to. One side waits
while the other works: A B A B. A variant of TRL is named by its precision and its micro-batch, in completions:

    float32-24     float32 weights, nothing else
    autocast-24    float32 weights, forward passes under bfloat16 autocast (TRL's default)
    bfloat16-24    bfloat16 weights, moments and updates
    ...-8          three micro-batches of 8 in place of one of 24
    ...-ckpt       with gradient checkpointing (TRL's default; off otherwise, as it is in pairtune)

pairtune runs in float32 against the first and in bfloat16 (with float32 master weights) against the others.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NUM_PROMPTS, NUM_GENERATIONS, COMPLETION_LENGTH = 12, 2, 28
BETA, LEARNING_RATE, MAX_GRAD_NORM, SEED = 0.05, 1e-6, 1.0, 0
NUM_SAMPLES = NUM_PROMPTS * NUM_GENERATIONS
NO_TOKEN = 10**9
"""What ends a completion: an id behind every vocabulary, so that none ends early."""
REWARD = "pairtune.demo.vader.vader_sentiment"

TRL_VERSION = "1.16.0"
SIDES = ("pairtune", "trl")
MACHINE = "machine"
"""The process that measures matrix products, apart from both sides: what it frees is neither's memory."""
PRECISIONS = {"float32": "float32", "autocast": "bfloat16", "bfloat16": "bfloat16"}
"""TRL's precision -> the one of pairtune that it is compared with."""
MICRO_BATCHES = (24, 8)

PHASES = {
    "sample": "sampling",
    "score": "reward",
    "old_logprobs": "old log-probabilities",
    "ref_logprobs": "reference log-probabilities",
    "policy": "policy, forward and backward",
    "optimizer": "clipping and optimizer",
    "other": "everything else",
}
MATMULS = {
    "1152x576x1536": "a layer of the model over the tokens of a batch",
    "2048x2048x2048": "a large square",
    "672x576x49152": "the vocabulary head over all completion tokens",
    "24x576x1536": "the same layer in one step of decoding",
}
"""rows x inner x columns of the matrix products whose rate is measured. The fastest is the machine's."""

NOTES = (
    "'Times as fast' is the median over pairs of neighbouring steps. 'Peak GiB' is the most memory that the process "
    "held from its start on (VmHWM). 'Of matmul rate' is the share that the whole step reaches of the fastest matrix "
    "product below, counting only what a step must compute: what all prompts begin with once for all of them and "
    "every prompt once for its completions, the head where a completion token is predicted, a backward pass as twice "
    "its forward pass, no padding and no recomputation. TRL also scores the old policy in a pass of its own and, on a "
    "CPU, applies the head to every position; its bfloat16 variants keep no float32 master weights, which pairtune "
    "does."
)

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("pairtune", "torch", "transformers", "trl", "accelerate", "numpy")


# ---------------------------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class Variant:
    """One way to configure TRL."""

    precision: str
    micro_batch: int
    """Completions."""
    checkpointing: bool = False

    @classmethod
    def parse(cls, name: str) -> Variant:
        """Raises argparse.ArgumentTypeError for a name that is none."""
        match = re.fullmatch(rf"({'|'.join(PRECISIONS)})-({'|'.join(map(str, MICRO_BATCHES))})(-ckpt)?", name)
        if match is None:
            raise argparse.ArgumentTypeError(
                f"{name!r} is no variant: join one of {', '.join(PRECISIONS)} and one of "
                f"{', '.join(map(str, MICRO_BATCHES))} with a dash, -ckpt behind it for gradient checkpointing"
            )
        return cls(match[1], int(match[2]), match[3] is not None)

    @property
    def dtype(self) -> str:
        """pairtune's precision against it."""
        return PRECISIONS[self.precision]

    def __str__(self) -> str:
        return f"{self.precision}-{self.micro_batch}{'-ckpt' if self.checkpointing else ''}"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="See the head of the file for what a variant is."
    )
    parser.add_argument("--model", default="smollm2-135m-instruct-q4", help="hub id, folder or %(default)s")
    parser.add_argument(
        "--variants",
        nargs="+",
        type=Variant.parse,
        metavar="NAME",
        help="of TRL (default: all without checkpointing in the precision that is faster here)",
    )
    parser.add_argument("--warmup", type=_count(0), default=5, help="steps that do not count (%(default)s)")
    parser.add_argument("--steps", type=_count(1), default=10, help="steps that do (%(default)s)")
    parser.add_argument("--threads", type=_count(1), help="threads of each side (default: torch's own choice)")
    parser.add_argument(
        "--micro-batch-size", type=_count(1), help="of pairtune, in prompts (default: all 12 prompts at once)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--worker", choices=(*SIDES, MACHINE), help=argparse.SUPPRESS)
    return parser


def _count(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no number from {least} on")
        return int(text)

    return count


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parser()
    args = arguments.parse_args(argv)
    if args.worker:
        work(args)
        return
    if importlib.util.find_spec("trl") is None:
        arguments.error("TRL is not installed here; `make bench` makes an environment that has it")
    if (version := importlib.metadata.version("trl")) != TRL_VERSION:
        arguments.error(
            f"TRL {version} is installed here, not {TRL_VERSION}; `make bench` makes an environment that has it"
        )

    from pairtune.errors import PairtuneError
    from pairtune.models.loading import choose_device, choose_dtype
    from pairtune.models.weights import resolve_model

    try:
        model = resolve_model(args.model)
    except PairtuneError as error:
        arguments.error(str(error))
    if args.variants is None:
        faster = str(choose_dtype("auto", choose_device("cpu"))[0]).removeprefix("torch.")
        args.variants = [
            Variant(precision, size) for precision, dtype in PRECISIONS.items() if dtype == faster
            for size in MICRO_BATCHES
        ]  # fmt: skip
    sessions = [run_session(variant, model, args) for variant in args.variants]
    record = {**provenance(argv, args), "sessions": sessions}
    show(record)
    print(f"\nwritten: {write(record, args.output)}")


# ----------------------------------------------------------------------------------------- the work that a step must do


@dataclass(frozen=True)
class Shape:
    """What of a decoder's size the count of operations needs."""

    body_weights: int
    """Weights of the decoder's linear layers; each token takes one multiplication and one addition with each."""
    head_weights: int
    """Vocabulary by hidden size."""
    num_layers: int
    attention_width: int
    """Heads by head size."""

    @classmethod
    def of(cls, model: Any) -> Shape:
        from torch import nn

        head = model.get_output_embeddings()
        linear = (module for module in model.base_model.modules() if isinstance(module, nn.Linear))
        config = model.config
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            body_weights=sum(module.weight.numel() for module in linear if module is not head),
            head_weights=head.weight.numel(),
            num_layers=config.num_hidden_layers,
            attention_width=config.num_attention_heads * head_size,
        )


def count_flops(
    shape: Shape, prompt_lengths: Sequence[int], num_generations: int, completion_length: int, *, opening: int = 0
) -> dict[str, dict[str, int]]:
    """Floating-point operations of the matrix products that a step cannot do without: part -> body, attention, head.

    The first `opening` tokens are those of every prompt and are encoded once for all of them, the rest of a prompt once
    for all its completions, and the head is applied only where a completion token is predicted: at a prompt's last
    token and at every completion token but the last one, which is never fed back. The policy's own pass gives the old
    log-probabilities. A backward pass takes two products for each one forward. Nothing else counts: no padding, no
    recomputation, no elementwise work, no optimizer.
    """
    fed = completion_length - 1
    num_prompts = len(prompt_lengths)
    prompt_tokens = sum(prompt_lengths) - (num_prompts - 1) * opening
    decoded = num_prompts * num_generations * fed
    # Pairs of a token and one that it sees, itself included; each costs width multiply-adds in either product.
    prompt_pairs = sum(length * (length + 1) // 2 for length in prompt_lengths)
    prompt_pairs -= (num_prompts - 1) * (opening * (opening + 1) // 2)
    completion_pairs = num_generations * sum(fed * length + fed * (fed + 1) // 2 for length in prompt_lengths)
    attention = 4 * shape.num_layers * shape.attention_width
    prompts = {
        "body": 2 * shape.body_weights * prompt_tokens,
        "attention": attention * prompt_pairs,
        "head": 2 * shape.head_weights * num_prompts,
    }
    decoding = {
        "body": 2 * shape.body_weights * decoded,
        "attention": attention * completion_pairs,
        "head": 2 * shape.head_weights * decoded,
    }
    forward = {kind: prompts[kind] + decoding[kind] for kind in prompts}
    return {
        "sampling: prompts, once": prompts,
        "sampling: decoding": decoding,
        "reference: forward": forward,
        "policy: forward": forward,
        "policy: backward": {kind: 2 * count for kind, count in forward.items()},
    }


def total_flops(flops: dict[str, dict[str, int]]) -> int:
    return sum(sum(kinds.values()) for kinds in flops.values())


# ---------------------------------------------------------------------------------------------------------- one session


class Worker:
    """One side, in a process of its own: answers each line on its standard input with a line of JSON."""

    def __init__(self, side: str, command: Sequence[str]) -> None:
        self.side = side
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            tail = "".join(self.log.readlines()[-15:])
            sys.exit(f"{tail}\nThe process of {self.side} ended before it was told to; above are its last words.")
        return json.loads(line)

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either, and `answer` says why
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()


def worker_command(side: str, variant: Variant, model: str, args: argparse.Namespace) -> list[str]:
    command = [sys.executable, __file__, "--worker", side, "--variants", str(variant), "--model", model]
    command += ["--warmup", str(args.warmup), "--steps", str(args.steps)]
    if args.threads is not None:
        command += ["--threads", str(args.threads)]
    if args.micro_batch_size is not None:
        command += ["--micro-batch-size", str(args.micro_batch_size)]
    return command


def run_session(variant: Variant, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """pairtune and one variant of TRL, step by step in turn, and the machine's matrix products between the rounds."""
    print(f"{variant}: loading both sides", file=sys.stderr, flush=True)
    machine, *sides = (Worker(side, worker_command(side, variant, model, args)) for side in (MACHINE, *SIDES))
    workers = dict(zip(SIDES, sides, strict=True))
    try:
        loaded = {side: worker.answer() for side, worker in workers.items()}
        if loaded["pairtune"]["threads"] != loaded["trl"]["threads"]:
            sys.exit("The two sides do not run on the same number of threads; give --threads.")
        steps: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        rates: dict[str, list[float]] = {name: [] for name in MATMULS}
        for number in range(args.warmup + args.steps):
            for side, worker in workers.items():
                steps[side].append(worker.ask("step"))
            _check_equal_work(steps["pairtune"][-1], steps["trl"][-1])
            if number >= args.warmup:
                for name, rate in machine.ask("matmul").items():
                    rates[name].append(rate)
            which = f"step {number + 1 - args.warmup} of {args.steps}"
            if number < args.warmup:
                which = f"warm-up {number + 1} of {args.warmup}"
            took = ", ".join(f"{side} {done[-1]['seconds']:.2f} s" for side, done in steps.items())
            print(f"{variant}: {which}: {took}", file=sys.stderr, flush=True)
    finally:
        for worker in (machine, *sides):
            worker.close()
    shape, last = Shape(**loaded["pairtune"]["shape"]), steps["pairtune"][-1]
    return {
        "variant": str(variant),
        "pairtune_dtype": variant.dtype,
        "threads": loaded["trl"]["threads"],
        "shape": asdict(shape),
        "flops": count_flops(
            shape, last["prompt_lengths"], NUM_GENERATIONS, COMPLETION_LENGTH, opening=loaded["pairtune"]["opening"]
        ),
        "prompt_lengths": last["prompt_lengths"],
        "opening": loaded["pairtune"]["opening"],
        "completion_tokens": sum(last["completion_lengths"]),
        "matmul_rates": rates,
        **{
            side: {
                "loaded_bytes": loaded[side]["peak_bytes"],
                "peak_bytes": steps[side][-1]["peak_bytes"],
                "warmup_seconds": [step["seconds"] for step in steps[side][: args.warmup]],
                "seconds": [step["seconds"] for step in steps[side][args.warmup :]],
                "phases": [step["phases"] for step in steps[side][args.warmup :]],
            }
            for side in SIDES
        },
    }


def _check_equal_work(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Same prompts, same number of tokens drawn, or there is nothing to compare."""
    for what in ("prompt_lengths", "completion_lengths"):
        if ours[what] != theirs[what]:
            sys.exit(f"The two sides did not do the same work: {what} of pairtune {ours[what]}, of TRL {theirs[what]}.")
    if ours["completion_lengths"] != [COMPLETION_LENGTH] * NUM_SAMPLES:
        sys.exit(f"Completions should have {COMPLETION_LENGTH} tokens, but have {ours['completion_lengths']}.")


# ---------------------------------------------------------------------------------------------------------- the workers


class Channel:
    """A worker's end of the pipes. What libraries print goes to the log, not between the answers."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, answer: dict[str, Any]) -> None:
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()

    def commands(self) -> Iterator[str]:
        return (line.strip() for line in sys.stdin)


def work(args: argparse.Namespace) -> None:
    """The life of a worker: load, say so, then obey until the pipe is closed."""
    import torch

    from pairtune.runs.memory import freed_memory_kept

    channel = Channel()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    (variant,) = args.variants
    if args.worker == "trl":
        run_trl(variant, args, channel)
        return
    if args.worker == MACHINE:
        for _ in channel.commands():
            channel.send(matmul_rates(variant.dtype))
        return
    step = PairtuneStep(pairtune_config(args.model, variant.dtype, args.micro_batch_size))
    shape = Shape.of(step.policy.model)
    loaded = {"shape": asdict(shape), "opening": step.opening}
    channel.send({"threads": torch.get_num_threads(), "peak_bytes": peak_bytes(), **loaded})
    with freed_memory_kept():
        for _ in channel.commands():
            channel.send(step())


def pairtune_config(model: str, dtype: str, micro_batch_size: int | None) -> Any:
    from pairtune.config import TrainConfig

    return TrainConfig(
        model=model,
        dataset="everyday",
        dataset_test_split=None,
        reward_funcs=[REWARD],
        beta=BETA,
        num_iterations=1,
        num_generations=NUM_GENERATIONS,
        batch_size=NUM_PROMPTS,
        micro_batch_size=micro_batch_size,
        max_completion_length=COMPLETION_LENGTH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        dtype=dtype,
        device="cpu",
        seed=SEED,
    )


class PairtuneStep:
    """The step of pairtune's own loop, from its own parts, on the same prompts every time."""

    def __init__(self, config: Any) -> None:
        from pairtune.algorithms import ALGORITHMS
        from pairtune.data import load_prompts
        from pairtune.feedback.rewards import load_rewards
        from pairtune.models.loading import load_policy, load_tokenizer
        from pairtune.models.sampler import HFSampler
        from pairtune.runs.metrics import Timer
        from pairtune.stages import rl
        from pairtune.stages.optimization import make_optimizer

        tokenizer = load_tokenizer(config.model)
        self.prompts, _ = load_prompts(config, tokenizer)
        self.rewards = load_rewards(config, tokenizer, self.prompts)
        self.policy = load_policy(config.model, tokenizer=tokenizer, dtype=config.dtype, device=config.device)
        self.sampler = HFSampler(
            self.policy.model,
            tokenizer,
            eos_token_ids=(NO_TOKEN,),
            pad_token_id=self.policy.pad_token_id,
            opening=self.policy.scorer.opening,
        )
        self.config, self.algorithm = config, ALGORITHMS[config.algorithm]
        self.optimizer = make_optimizer(config, self.policy.masters)
        self.progress = rl.Progress()
        self.timer = Timer()
        timed(rl, "_apply_gradients", self.timer, "optimizer")

    @property
    def opening(self) -> int:
        """Tokens that all the prompts of a step begin with."""
        from pairtune.models.opening import opening_length

        batch = self.prompts.batch(range(NUM_PROMPTS), device="cpu")
        return opening_length(batch.ids, batch.mask)

    def __call__(self) -> dict[str, Any]:
        from pairtune.experience import collect
        from pairtune.stages import rl

        start = time.perf_counter()
        self.progress.updates_in_step = 0
        collected = collect(
            self.prompts.batch(range(NUM_PROMPTS), device=self.policy.device),
            policy=self.policy,
            sampler=self.sampler,
            feedback=self.rewards,
            config=self.config,
            step=self.progress.step,
            policy_version=self.progress.num_updates,
            phase=self._phase,
        )
        experience, _ = rl._update(
            self.config, self.algorithm, self.policy, self.optimizer, collected, self.progress, self._phase
        )
        self.progress.step += 1
        rl._step_metrics(self.config, experience, self.progress)
        seconds = time.perf_counter() - start

        completions = experience.completions
        lengths = completions.prompt_mask.sum(1).tolist(), completions.num_tokens.flatten().tolist()
        return step_report(seconds, self.timer.take(), *lengths)

    @contextlib.contextmanager
    def _phase(self, name: str, label: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        with self.timer("policy" if name == "update" else name):
            yield lambda amount: None


def run_trl(variant: Variant, args: argparse.Namespace, channel: Channel) -> None:
    """TRL's own training loop, held up between its steps until the next one is asked for."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    from pairtune.data import load_prompts
    from pairtune.demo.vader import vader_sentiment
    from pairtune.models.loading import load_tokenizer
    from pairtune.runs.metrics import Timer

    tokenizer = load_tokenizer(args.model)
    prompts = load_prompts(pairtune_config(args.model, variant.dtype, None), tokenizer)[0].prompts[:NUM_PROMPTS]
    if tokenizer.chat_template:  # pairtune makes a user's turn of each by itself
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    num_steps = args.warmup + args.steps
    folder = tempfile.TemporaryDirectory()
    trainer = RLOOTrainer(
        model=args.model,
        reward_funcs=vader_sentiment,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts] * num_steps),
        args=RLOOConfig(
            output_dir=folder.name,
            model_init_kwargs={"dtype": "bfloat16" if variant.precision == "bfloat16" else "float32"},
            bf16=variant.precision == "autocast",
            gradient_checkpointing=variant.checkpointing,
            per_device_train_batch_size=variant.micro_batch,
            gradient_accumulation_steps=NUM_SAMPLES // variant.micro_batch,
            max_steps=num_steps,
            num_generations=NUM_GENERATIONS,
            max_completion_length=COMPLETION_LENGTH,
            generation_kwargs={"eos_token_id": [NO_TOKEN]},
            beta=BETA,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            shuffle_dataset=False,
            seed=SEED,
            use_cpu=True,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    trainer.eos_token_ids = [NO_TOKEN]  # what it cuts completions at after they are sampled
    timer, lengths = Timer(), Lengths()
    lengths.record(trainer)
    time_trl(trainer, timer)

    class OnCommand(TrainerCallback):  # type: ignore[misc]
        """Waits before the first step and after each one; what is timed is all that happens between."""

        def __init__(self) -> None:
            self.commands = channel.commands()
            self.start = 0.0

        def wait(self, control: Any) -> None:
            if next(self.commands, None) is None:
                control.should_training_stop = True
            self.start = time.perf_counter()

        def on_train_begin(self, arguments: Any, state: Any, control: Any, **kwargs: Any) -> None:
            timed(trainer.optimizer, "step", timer, "optimizer")
            channel.send({"threads": torch.get_num_threads(), "peak_bytes": peak_bytes()})
            self.wait(control)

        def on_step_end(self, arguments: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seconds = time.perf_counter() - self.start
            channel.send(step_report(seconds, timer.take(), lengths.prompts, lengths.completions))
            self.wait(control)

    trainer.add_callback(OnCommand())
    trainer.train()
    folder.cleanup()


class Lengths:
    """The tokens of what TRL's trainer generated last."""

    def __init__(self) -> None:
        self.prompts: list[int] = []
        self.completions: list[int] = []

    def record(self, trainer: Any) -> None:
        generate = trainer._generate

        def recorded(prompts: Any) -> Any:
            result = generate(prompts)
            self.prompts = [len(ids) for ids in result[0]][::NUM_GENERATIONS]  # a prompt stands there once a completion
            self.completions = [len(ids) for ids in result[1]]
            return result

        trainer._generate = recorded


def time_trl(trainer: Any, timer: Any) -> None:
    """Counts the parts of TRL's step under pairtune's names for them."""
    import torch

    timed(trainer, "_generate_single_turn", timer, "sample")
    timed(trainer, "_calculate_rewards", timer, "score")
    timed(trainer, "compute_loss", timer, "policy")
    timed(trainer.accelerator, "backward", timer, "policy")
    timed(trainer.accelerator, "clip_grad_norm_", timer, "optimizer")
    score = trainer._get_per_token_logps_and_entropies

    def scored(model: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return score(model, *args, **kwargs)  # within compute_loss
        with timer("ref_logprobs" if model is trainer.ref_model else "old_logprobs"):
            return score(model, *args, **kwargs)

    trainer._get_per_token_logps_and_entropies = scored


def timed(owner: Any, name: str, timer: Any, phase: str) -> None:
    """Replaces a function of a module or an object by one that counts its time under `phase`."""
    function = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with timer(phase):
            return function(*args, **kwargs)

    setattr(owner, name, call)


def step_report(
    seconds: float, times: dict[str, float], prompt_lengths: list[int], completion_lengths: list[int]
) -> dict[str, Any]:
    phases = {name.removeprefix("time/"): spent for name, spent in times.items()}
    return {
        "seconds": seconds,
        "phases": {**phases, "other": seconds - sum(phases.values())},
        "prompt_lengths": prompt_lengths,
        "completion_lengths": completion_lengths,
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """The most memory that this process has held so far (Linux)."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def matmul_rates(dtype: str) -> dict[str, float]:
    """Operations a second of each of MATMULS, the best of three."""
    import torch

    from pairtune.models.loading import _matmul_rate

    return {name: _matmul_rate(getattr(torch, dtype), tuple(map(int, name.split("x")))) for name in MATMULS}


# ----------------------------------------------------------------------------------------------------------- the result


@dataclass(frozen=True)
class Spread:
    """A median and its extremes."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


@dataclass(frozen=True)
class Summary:
    """What a session comes to."""

    variant: str
    dtype: str
    seconds: dict[str, Spread]
    """Of a step, by side."""
    samples: dict[str, Spread]
    """Completions a second, by side."""
    speedup: Spread
    """How many times faster pairtune is, over pairs of neighbouring steps."""
    peak_gib: dict[str, float]
    memory_ratio: float
    """pairtune's peak by TRL's."""
    phases: dict[str, dict[str, float]]
    """Median seconds by side and phase."""
    matmul_rates: dict[str, Spread]
    """GFLOP/s by shape."""
    share: dict[str, float]
    """Of the machine's fastest matrix product that the whole step reaches with the work it must do, by side."""


def summarise(session: dict[str, Any]) -> Summary:
    seconds = {side: session[side]["seconds"] for side in SIDES}
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    peak_gib = {side: session[side]["peak_bytes"] / 2**30 for side in SIDES}
    rates = {name: Spread.of([rate / 1e9 for rate in values]) for name, values in session["matmul_rates"].items()}
    gflop = total_flops(session["flops"]) / 1e9
    fastest = max(rate.median for rate in rates.values())
    return Summary(
        variant=session["variant"],
        dtype=session["pairtune_dtype"],
        seconds={side: Spread.of(values) for side, values in seconds.items()},
        samples={side: Spread.of([NUM_SAMPLES / value for value in values]) for side, values in seconds.items()},
        speedup=Spread.of([t / p for p, t in zip(seconds["pairtune"], seconds["trl"], strict=True)]),
        peak_gib=peak_gib,
        memory_ratio=peak_gib["pairtune"] / peak_gib["trl"],
        phases={
            side: {
                phase: statistics.median(step.get(phase, 0.0) for step in session[side]["phases"]) for phase in PHASES
            }
            for side in SIDES
        },
        matmul_rates=rates,
        share={side: gflop / medians[side] / fastest for side in SIDES},
    )


def best_of_trl(summaries: Sequence[Summary]) -> dict[str, Summary]:
    """Of each precision the variant in which TRL's step was fastest: what pairtune is held against."""
    best: dict[str, Summary] = {}
    for summary in sorted(summaries, key=lambda summary: summary.seconds["trl"].median):
        best.setdefault(summary.dtype, summary)
    return best


def _is_best(summary: Summary, summaries: Sequence[Summary]) -> bool:
    """Worth saying only where there was something to choose from."""
    rivals = [other for other in summaries if other.dtype == summary.dtype]
    return len(rivals) > 1 and best_of_trl(rivals)[summary.dtype] is summary


@dataclass(frozen=True)
class Rows:
    """A table, to be shown on a terminal or in Markdown."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.header, ["---"] + ["---:"] * (len(self.header) - 1), *self.rows]
        return "\n".join([f"**{self.title}**", "", *("| " + " | ".join(line) + " |" for line in lines)])

    def rich(self) -> Any:
        from rich.table import Table

        table = Table(title=self.title, title_justify="left")
        for place, name in enumerate(self.header):
            table.add_column(name, justify="right" if place else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def tables(sessions: Sequence[dict[str, Any]]) -> list[Rows]:
    summaries = [summarise(session) for session in sessions]
    best = best_of_trl(summaries)
    found = [
        Rows(
            f"One step: {NUM_PROMPTS} prompts x {NUM_GENERATIONS} completions x {COMPLETION_LENGTH} tokens; median "
            "(lowest-highest)",
            [
                "session",
                "seconds a step",
                "samples a second",
                "times as fast",
                "peak GiB",
                "of TRL's",
                "of matmul rate",
            ],
            [row for summary in summaries for row in _session_rows(summary, _is_best(summary, summaries))],
        )
    ]
    for dtype, summary in best.items():
        session = next(one for one in sessions if one["variant"] == summary.variant)
        found += [_phase_rows(summary), _matmul_rows(dtype, summary), _flop_rows(session["flops"])]
    return found


def _session_rows(summary: Summary, is_best: bool) -> list[list[str]]:
    names = {"pairtune": f"pairtune {summary.dtype}", "trl": f"TRL {summary.variant}" + " (its best)" * is_best}
    compared = {"pairtune": [summary.speedup.text(), f"{summary.memory_ratio:.0%}"], "trl": ["1", "100%"]}
    return [
        [
            names[side],
            summary.seconds[side].text(),
            summary.samples[side].text(),
            compared[side][0],
            f"{summary.peak_gib[side]:.2f}",
            compared[side][1],
            f"{summary.share[side]:.0%}",
        ]
        for side in SIDES
    ]


def _phase_rows(summary: Summary) -> Rows:
    ours, theirs = summary.phases["pairtune"], summary.phases["trl"]
    return Rows(
        f"Where the time goes: pairtune {summary.dtype} and TRL {summary.variant}, median seconds",
        ["phase", "pairtune", "TRL"],
        [[label, f"{ours[phase]:.2f}", f"{theirs[phase]:.2f}"] for phase, label in PHASES.items()],
    )


def _matmul_rows(dtype: str, summary: Summary) -> Rows:
    return Rows(
        f"Matrix products in {dtype}, measured between the rounds, GFLOP/s",
        ["rows x inner x columns", "rate", "what it is"],
        [[name, rate.text(0), MATMULS[name]] for name, rate in summary.matmul_rates.items()],
    )


def _flop_rows(flops: dict[str, dict[str, int]]) -> Rows:
    kinds = ["body", "attention", "head"]
    rows = [
        [part, *(f"{counts[kind] / 1e9:.1f}" for kind in kinds), f"{sum(counts.values()) / 1e9:.1f}"]
        for part, counts in flops.items()
    ]
    sums = [f"{sum(counts[kind] for counts in flops.values()) / 1e9:.1f}" for kind in kinds]
    rows.append(["all", *sums, f"{total_flops(flops) / 1e9:.1f}"])
    return Rows("What a step must compute, GFLOP", ["part", *kinds, "all"], rows)


def show(record: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 150)  # into a file: wide enough for every table
    for table in tables(record["sessions"]):
        console.print()
        console.print(table.rich())


def provenance(argv: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """What is needed to get the figures again. Paths are a machine's own: a model's folder is given by its name."""
    shown = list(argv)
    for place, word in enumerate(argv):
        if word == args.model and Path(word).exists():
            shown[place] = Path(word).resolve().name
        elif word == str(args.output):
            shown[place] = "..."
    return {
        "benchmark": "step_cost",
        "command": shlex.join(["python", "benchmarks/step_cost.py", *shown]),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "memory_gib": round(_memory_bytes() / 2**30, 1)},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "seed": SEED,
        "warmup": args.warmup,
        "steps": args.steps,
    }


def commit() -> str:
    """Of the repository that this file lies in, and whether something in it has changed since."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_name() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write(record: dict[str, Any], folder: Path) -> Path:
    """The record as JSON and, beside it, as Markdown to read; returns the latter. An older result stays."""
    folder.mkdir(parents=True, exist_ok=True)
    cpu = re.sub(r"[^a-z0-9]+", "-", record["machine"]["cpu"].lower()).strip("-")
    name = stem = f"{record['benchmark']}-{record['date']}-{cpu}"
    number = 1
    while (folder / f"{name}.json").exists():
        number += 1
        name = f"{stem}-{number}"
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    path = folder / f"{name}.md"
    path.write_text(to_markdown(record))
    return path


def to_markdown(record: dict[str, Any]) -> str:
    machine, session = record["machine"], record["sessions"][0]
    facts = [
        f"command: `{record['command']}`",
        f"commit: {record['commit']}",
        f"machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"threads of each side: {session['threads']}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        f"seed {record['seed']}; {record['warmup']} warm-up steps of each side do not count, {record['steps']} do, in "
        "turn",
        f"equal work, checked at every step: the same {len(session['prompt_lengths'])} prompts "
        f"({sum(session['prompt_lengths'])} tokens), {session['completion_tokens']} tokens drawn",
    ]
    head = [f"# {record['benchmark']}, {record['date']}", "\n".join(f"- {fact}" for fact in facts), NOTES]
    return "\n\n".join([*head, *(table.markdown() for table in tables(record["sessions"]))]) + "\n"


if __name__ == "__main__":
    main()
