"""A Hugging Face sequence classifier with one label as a source of rewards."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pairtune.completion_data import UNCUT, answer_end, encode_completions
from pairtune.data import Chat, RawPrompts, first_line
from pairtune.errors import PairtuneError
from pairtune.types import Completions, Prompt, Prompts, real_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


SHIFT = "pairtune_reward_shift"
"""Field of a model's config with a number that is added to its scores: the class itself has no bias."""


class RewardModel:
    """A Hugging Face sequence classifier with one label, read as a reward.

    Conversations, and plain prompts where `chat` says so ("always", or "auto" and its tokenizer has a chat template),
    are scored as its own template writes them, with the completion as the assistant's turn. Everything else is scored
    as plain text, prompt and completion joined. A completion that was finished is closed, with what the template
    closes a turn with or with the reward tokenizer's EOS; one that the length cap ended is not, and the two score
    differently. So does `pairtune reward` show completions to the model that it trains, and their scores are the same
    to the last rounding.

    Where policy and reward model share the vocabulary and the template, nothing is tokenised again: the model reads
    the very ids that the policy read and wrote. Its vocabulary may hold more than the policy's, such as a padding
    token of its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "reward_model",
        batch_size: int = 16,
        chat: Chat = "auto",
        system_prompt: str | None = None,
        policy_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """`batch_size` is in completions; `system_prompt` is put before plain prompts that become conversations, as it
        is for the policy. Without `policy_tokenizer` every completion is scored as text.

        Raises PairtuneError if the model has more than one label, no usable padding token, or, under `chat` "always",
        no chat template.
        """
        _check_labels(model.config, name)
        if chat == "always" and not tokenizer.chat_template:
            raise PairtuneError(f"chat is `always`, but the tokenizer of reward model `{name}` has no chat template.")
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.batch_size, self.chat, self.system_prompt = batch_size, chat, system_prompt
        self.shift = float(getattr(model.config, SHIFT, 0.0))
        self.pad_token_id = _choose_pad_token(model, tokenizer, name)
        self.policy_tokenizer = policy_tokenizer
        self.same_vocabulary = (
            policy_tokenizer is not None and policy_tokenizer.get_vocab().items() <= tokenizer.get_vocab().items()
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str | None = None,
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> RewardModel:
        """Load a hub id or a local folder; `settings` are those of the constructor. Without a `dtype` it is float32 on
        a CPU, elsewhere the checkpoint's own.

        Raises PairtuneError if it cannot be loaded, is no model with one label, or lacks trained weights for its head.
        """
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        if dtype is None:
            dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
        try:
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
            _check_labels(config, name_or_path)
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                name_or_path, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
            )
        except PairtuneError:
            raise
        except Exception as error:  # no such id, no network, no such class, a broken file: transformers says which
            raise PairtuneError(f"cannot load reward model {name_or_path!r}: {first_line(error)}") from error
        if missing := sorted(loading["missing_keys"]):
            raise PairtuneError(
                f"reward model {name_or_path!r} has no weights for {', '.join(missing)}: it was not trained as a "
                "sequence classifier, and its scores would be random."
            )
        if isinstance(getattr(model, "score", None), nn.Linear):
            # The last product in float32, as in training: bfloat16 has steps of 0.03 at a reward of 4.
            model.score.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        name = os.path.basename(os.path.normpath(name_or_path))
        return cls(model.to(device), tokenizer, **{"name": name, **settings})

    def check(self, prompt: Prompt) -> None:
        """Raises PairtuneError if prompts of this kind (text, conversation) cannot be scored."""
        if not isinstance(prompt, str) and not self.tokenizer.chat_template:
            raise PairtuneError(
                f"the prompts are conversations, but the tokenizer of reward model `{self.name}` has no chat template: "
                "use plain-text prompts."
            )

    @torch.no_grad()
    def score(self, prompts: Prompts, completions: Completions, texts: list[list[str]]) -> list[float]:
        """P * K scores, prompt-major; arguments as in `RewardSet.score`.

        Raises PairtuneError if a completion with its prompt is longer than the model has positions.
        """
        sequences = self._sequences(prompts, completions, texts)
        longest = max(map(len, sequences))
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise PairtuneError(
                f"a prompt with its completion has {longest} tokens for reward model `{self.name}`, which has {limit} "
                "positions: lower max_prompt_length or max_completion_length."
            )
        scores = [0.0] * len(sequences)
        by_length = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        for start in range(0, len(by_length), self.batch_size):
            batch = by_length[start : start + self.batch_size]
            for index, score in zip(batch, self._forward([sequences[index] for index in batch]), strict=True):
                scores[index] = score
        return scores

    def _forward(self, sequences: list[list[int]]) -> list[float]:
        """One right-padded batch. A decoder's score is read at its last token that is not padding."""
        width = max(map(len, sequences))
        ids = torch.full((len(sequences), width), self.pad_token_id)
        mask = torch.zeros((len(sequences), width), dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        device = self.model.device
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        return (logits[:, 0].float() + self.shift).tolist()

    def _sequences(self, prompts: Prompts, completions: Completions, texts: list[list[str]]) -> list[list[int]]:
        """What the model reads of each completion with its prompt, as token ids."""
        finished = (~completions.truncated).flatten().tolist()
        raw = RawPrompts(
            prompts.prompts, {}, f"the prompts of reward model `{self.name}`", numbers=prompts.rows.tolist()
        )
        if self.tokenizer.eos_token_id is None and not self._templated(self.tokenizer, prompts):
            return self._joined(prompts, texts)
        if self._reads_what_the_policy_reads(prompts):
            end = answer_end(raw, self.tokenizer, chat=self.chat)
            sampled = _sampled_ids(completions)
            return [self._closed(ids, end) if done else ids for ids, done in zip(sampled, finished, strict=True)]
        system_prompt = self.system_prompt
        if not isinstance(raw.prompts[0], str) or not self._templated(self.tokenizer, prompts):
            system_prompt = None  # it has nowhere to go
        prompt_format = raw.format(self.tokenizer, chat=self.chat, system_prompt=system_prompt)
        answers = encode_completions(
            raw,
            texts,
            self.tokenizer,
            chat=self.chat,
            system_prompt=system_prompt,
            max_completion_length=UNCUT,
        )
        end = answer_end(raw, self.tokenizer, chat=self.chat)
        openings = [prompt_format.text(prompt, raw.place(row)) for row, prompt in enumerate(raw.prompts)]
        behind = [
            [*prompt_ids, *answer.ids]
            for prompt_ids, group in zip(prompt_format.token_ids(openings), answers, strict=True)
            for answer in group
        ]
        return [[*ids, *end[1:]] if done else ids[:-1] for ids, done in zip(behind, finished, strict=True)]

    def _reads_what_the_policy_reads(self, prompts: Prompts) -> bool:
        """Whether the policy's ids are those that this model was to read, vocabulary and template being the same."""
        if self.policy_tokenizer is None or not self.same_vocabulary:
            return False
        templated, of_policy = (self._templated(t, prompts) for t in (self.tokenizer, self.policy_tokenizer))
        same_template = self.tokenizer.chat_template == self.policy_tokenizer.chat_template
        return templated == of_policy and (same_template or not templated)

    def _templated(self, tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> bool:
        conversational = not isinstance(prompts.prompts[0], str)
        return conversational or self.chat == "always" or (self.chat == "auto" and bool(tokenizer.chat_template))

    def _closed(self, ids: list[int], end: list[int]) -> list[int]:
        """A finished completion behind its prompt, with what follows the token that ended it, and with that token too
        where a stop string came instead."""
        has_end = ids[-1] in self.tokenizer.all_special_ids or ids[-1] == end[0]  # a chat model has several
        return [*ids, *end[1:]] if has_end else [*ids, *end]

    def _joined(self, prompts: Prompts, texts: list[list[str]]) -> list[list[int]]:
        """Plain text for an encoder, whose tokenizer closes a text in its own way."""
        joined = [f"{prompt}{text}" for prompt, group in zip(prompts.prompts, texts, strict=True) for text in group]
        return self.tokenizer(joined, return_attention_mask=False, verbose=False)["input_ids"]


def _sampled_ids(completions: Completions) -> list[list[int]]:
    """The ids of each completion behind those of its prompt, without padding, prompt-major."""
    prompts = real_ids(completions.prompt_ids, completions.prompt_mask)
    answers = real_ids(completions.completion_ids.flatten(0, 1), completions.completion_mask.flatten(0, 1))
    num_generations = len(answers) // len(prompts)
    return [prompts[index // num_generations] + ids for index, ids in enumerate(answers)]


def _check_labels(config: Any, name: str) -> None:
    if config.num_labels != 1:
        raise PairtuneError(
            f"{name!r} is no reward model: it gives {config.num_labels} labels, where a reward model has num_labels "
            "= 1 in its config."
        )


def _choose_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    """The id to pad with: the one that the model was trained with, if its config tells, else a special token.

    The config must know it, for a decoder reads its score at the last token that is not it.
    """
    text_config, eos = model.config.get_text_config(), tokenizer.eos_token_id
    pad = getattr(text_config, "pad_token_id", None)
    if pad is None:
        candidates = [tokenizer.pad_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
        pad = next((token_id for token_id in candidates if token_id not in (None, eos, tokenizer.unk_token_id)), None)
        if pad is None:
            raise PairtuneError(
                f"reward model `{name}` has no padding token that differs from its end-of-sequence token, so it cannot "
                "tell where a text ends: add one to its tokenizer and name it as pad_token_id in its config."
            )
        model.config.pad_token_id = text_config.pad_token_id = pad
    elif pad == eos:
        warnings.warn(
            f"reward model `{name}` pads with its end-of-sequence token and reads its score before it, so a finished "
            "and an unfinished completion score alike; missing_eos_penalty tells them apart.",
            stacklevel=2,
        )
    return pad
