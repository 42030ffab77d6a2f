"""`pairtune sample`: talk to a model, or to the result of a run."""

from __future__ import annotations

import sys
from typing import Any

from pairtune.config import SampleConfig
from pairtune.data import RawPrompts
from pairtune.experience import decode, sampling_params
from pairtune.models.loading import choose_device, choose_dtype, eos_ids, load_causal_lm, load_tokenizer
from pairtune.models.sampler import HFSampler
from pairtune.runs.display import clean
from pairtune.runs.memory import out_of_memory
from pairtune.types import Prompt


@out_of_memory("sampling", "lower num_generations or max_completion_length, or choose device: cpu")
def sample(config: SampleConfig) -> None:
    """Answer one prompt, or, without one, hold a conversation until end of input."""
    device = choose_device(config.device)
    dtype, _ = choose_dtype(config.dtype, device)
    tokenizer = load_tokenizer(config.model, revision=config.model_revision, trust_remote_code=config.trust_remote_code)
    model = load_causal_lm(
        config.model,
        dtype=dtype,
        device=device,
        attn_implementation=config.attn_implementation,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
    )
    sampler = HFSampler(model, tokenizer, eos_token_ids=eos_ids(model, tokenizer), pad_token_id=tokenizer.pad_token_id)
    if config.prompt is not None:
        for text in answers(config, sampler, tokenizer, config.prompt):
            print(clean(text).strip())
    else:
        _converse(config, sampler, tokenizer)


def answers(config: SampleConfig, sampler: HFSampler, tokenizer: Any, prompt: Prompt, turn: int = 0) -> list[str]:
    """K completions of a prompt or a conversation; `turn` takes the place of a dataset row in their seeds."""
    conversation = not isinstance(prompt, str)
    dataset = RawPrompts([prompt], {}, "your prompt").encode(
        tokenizer,
        chat=config.chat,
        system_prompt=None if conversation else config.system_prompt,
        max_prompt_length=sys.maxsize,
    )
    prompts = dataset.batch([0])
    completions = sampler.generate(
        prompts, config.num_generations, sampling_params(config), seed=config.seed, stream=turn
    )
    return decode(tokenizer, completions)[0]


def _converse(config: SampleConfig, sampler: HFSampler, tokenizer: Any) -> None:
    keeps_turns = config.chat != "never" and bool(tokenizer.chat_template) and config.num_generations == 1
    opening = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    turns = list(opening)
    if sys.stdin.isatty():
        print("Ctrl-D ends the conversation" + (", an empty line starts a new one." if keeps_turns else "."))
    turn = 0
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not text:
            turns = list(opening)
            continue
        turns.append({"role": "user", "content": text})
        replies = answers(config, sampler, tokenizer, turns if keeps_turns else text, turn)
        turns.append({"role": "assistant", "content": replies[0]})
        for reply in replies:
            print(clean(reply).strip())
        turn += 1
