"""VADER's compound sentiment as a reward, and a watch on the cheapest way to earn it.

VADER (Hutto & Gilbert 2014, ICWSM, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text") sums the valences of a lexicon's words, with rules for negation and emphasis, and squashes the sum to [-1, 1].
A policy can please it by repeating the lexicon's strongest words; `strongest_word_share` shows whether it does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from pairtune.errors import PairtuneError


def vader_sentiment(completions: list[Any], **kwargs: Any) -> list[float]:
    """VADER's compound score of each completion, in [-1, 1]; a reward function with TRL's signature.

    A conversational completion counts with the text of all its turns.

    Raises PairtuneError if the package vaderSentiment is not installed.
    """
    return [float(_analyser().polarity_scores(_text(completion))["compound"]) for completion in completions]


@cache
def strongest_words(n: int = 20) -> tuple[str, ...]:
    """The n words (letters only) with the highest valence in VADER's lexicon, strongest first."""
    words = [word for word in _analyser().lexicon if word.isalpha()]
    return tuple(sorted(words, key=lambda word: (-_analyser().lexicon[word], word))[:n])


def strongest_word_share(texts: Iterable[Any], n: int = 20) -> float:
    """The share of all words of the texts that are among VADER's n strongest; 0 where there are no words."""
    strongest = set(strongest_words(n))
    words = [word for text in texts for word in _words(text)]
    return sum(word in strongest for word in words) / max(1, len(words))


def num_words(completion: Any) -> int:
    """How many words a completion has, counted as `strongest_word_share` counts them."""
    return len(_words(completion))


@cache
def _analyser() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise PairtuneError(
            "VADER is not installed, so there is no vader_sentiment: run `pip install 'pairtune[demo]'`."
        ) from error
    return SentimentIntensityAnalyzer()


def _words(completion: Any) -> list[str]:
    return re.findall(r"[^\W\d_]+", _text(completion).lower())


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else "\n".join(turn["content"] for turn in completion)
