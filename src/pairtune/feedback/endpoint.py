"""A chat endpoint that speaks OpenAI's protocol: many questions side by side, each paid for once.

The standard library sends the requests. OpenAI's client would bring half a dozen packages, and of what is needed here
(a limit a minute, answers kept on disk, one sentence for each way to fail, no key in any message) it does only the
retrying, which has to know of the limit all the same.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import http.client
import json
import os
import random
import socket
import sqlite3
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pairtune.config import JudgeWords
from pairtune.data import first_line, shortened
from pairtune.errors import PairtuneError
from pairtune.models.weights import default_cache_dir

TRANSIENT = frozenset({408, 409, 425, 429})
"""Statuses below 500 after which the same request may succeed."""
FIRST_PAUSE, LAST_PAUSE = 0.5, 60.0
"""Seconds of the first and of the longest pause of our own before a request is sent again."""
LONGEST_RETRY_AFTER = 600.0
"""Seconds that a server may ask us to wait. One that asks for more will not answer today."""
REFUSALS_AT_FIRST = 3
"""So many questions refused before any was answered are no matter of the questions."""
LARGEST_ANSWER = 2**24
"""Bytes that are read of an answer."""
CHARACTERS_A_TOKEN = 4
"""Roughly: what a request costs of the tokens a minute is needed before it is known."""


@dataclass(frozen=True)
class Answer:
    """What the endpoint said to one question."""

    text: str
    finished: bool
    """False where max_tokens cut it short."""
    prompt_tokens: int
    completion_tokens: int
    refusal: str | None = None
    """Why the endpoint will not answer this question, while it answers others; the text is then empty. A status other
    than 200 stands first, the model's own words stand in quotation marks."""

    @property
    def lasts(self) -> bool:
        """Whether asking again tomorrow would bring the same: not where a status refused, since a setting, a limit or
        the server may be mended."""
        return self.refusal is None or not self.refusal[:1].isdigit()


@dataclass
class Usage:
    """What was sent for. Answers from the disk cost nothing and are counted apart."""

    requests: int = 0
    retries: int = 0
    from_cache: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ChatEndpoint:
    """Asks one model at an OpenAI-compatible endpoint.

    Several threads ask at a time. A request is sent again after a time-out, 408, 409, 425, 429, 5xx and an answer that
    is no chat completion, with pauses that double and vary, so that many clients do not come back at once; where the
    server says Retry-After, for as long as that, and then all threads wait. Every answer is on disk before it is
    given, so that a killed run goes on where it stopped; a question that a status such as 400 refused has none in this
    run, and the next asks it again.
    """

    def __init__(self, config: JudgeWords) -> None:
        """Raises PairtuneError where the address is none or the environment lacks the key; nothing is sent."""
        self.config = config
        self.url = _address(str(config.base_url))
        self.usage = Usage()
        self._key = _key_from(config.api_key_env)
        self._kept = KeptAnswers(config.cache)
        self._pace = _Pace(config.requests_per_minute, config.tokens_per_minute)
        self._length_word = "max_tokens"
        self._reached = False
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def ask(self, questions: Sequence[str], advance: Callable[[float], None] = lambda done: None) -> list[Answer]:
        """An answer to each question, in their order; a question that stands twice is asked once.

        `advance` is called with the number of questions just answered. Until one has an answer they go one by one:
        what is wrong with the address, the key or the model is seen on the first. Raises PairtuneError for that, and
        where the endpoint keeps failing; the answers until then are kept.
        """
        keys = [self._identity(question) for question in questions]
        counts = Counter(keys)
        stored = {key: Answer(**answer) for key, answer in self._kept.read(list(counts)).items()}
        known = {key: one for key, one in stored.items() if one.lasts}  # earlier versions kept every refusal
        num_known = sum(counts[key] for key in known)
        self.usage.from_cache += num_known
        advance(num_known)

        def keep(key: str, found: Answer) -> None:
            if found.lasts:
                self._kept.write({key: asdict(found)})
            known[key] = found
            with self._lock:  # threads that count at once would lose counts
                advance(counts[key])

        def answer(key: str, question: str) -> None:
            try:
                keep(key, self._sent(question))
            except BaseException:
                self._stop.set()  # who waits to send does not; what is under way is paid for and heard out
                raise

        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in known}
        waiting = list(missing.items())
        self._stop.clear()
        refused: list[tuple[str, Answer]] = []
        while waiting and not self._reached:
            key, question = waiting.pop(0)
            refused.append((key, self._sent(question)))
            if not self._reached and (len(refused) == REFUSALS_AT_FIRST or not waiting):
                self._raise_refusal(refused[-1][1])
        for one in refused:
            keep(*one)
        with ThreadPoolExecutor(self.config.concurrency, thread_name_prefix="pairtune-judge") as pool:
            futures = [pool.submit(answer, *one) for one in waiting]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # Ctrl-C comes here too
                if not all(future.done() for future in futures):
                    self._stop.set()
                    pool.shutdown(cancel_futures=True)
        for error in (future.exception() for future in futures if not future.cancelled()):
            if error is not None and not isinstance(error, _Stopped):
                raise error
        return [known[key] for key in keys]

    def check(self, question: str) -> None:
        """Sends a question, known or not. Raises PairtuneError where the endpoint does not answer it."""
        answer = self._sent(question)
        if not self._reached:
            self._raise_refusal(answer)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """What so many tokens cost, None where no prices are given."""
        if self.config.input_price is None or self.config.output_price is None:
            return None
        return (prompt_tokens * self.config.input_price + completion_tokens * self.config.output_price) / 1e6

    def _identity(self, question: str) -> str:
        """A hash of all that an answer depends on."""
        words = [self.url, self.config.model, self.config.temperature, self.config.max_tokens, question]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()

    # One request.

    def _sent(self, question: str) -> Answer:
        """The answer, however often it takes. Raises PairtuneError where asking again is of no use."""
        reason, expected = "", len(question) / CHARACTERS_A_TOKEN + self.config.max_tokens
        for attempt in range(self.config.max_retries + 1):
            self._pace.wait(expected if attempt == 0 else 0, self._stop)
            try:
                answer = self._posted(question)
            except _Again as failure:
                reason = str(failure)
                if failure.retry_after is not None:
                    self._pace.hold(failure.retry_after)
                elif attempt < self.config.max_retries:
                    pause = min(FIRST_PAUSE * 2**attempt, LAST_PAUSE) * random.uniform(0.5, 1)
                    if self._stop.wait(pause):
                        raise _Stopped from None
                with self._lock:
                    self.usage.retries += 1
                continue
            used = answer.prompt_tokens + answer.completion_tokens
            self._pace.correct(used - expected if used else 0)
            with self._lock:
                self.usage.requests += 1
                self.usage.prompt_tokens += answer.prompt_tokens
                self.usage.completion_tokens += answer.completion_tokens
            return answer
        raise PairtuneError(
            f"{self.url} failed {self.config.max_retries + 1} times in a row ({reason}); the answers until now are "
            "kept, so the same command goes on from here."
        )

    def _posted(self, question: str) -> Answer:
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": question}],
            self._length_word: self.config.max_tokens,
        }
        if self.config.temperature is not None:
            body["temperature"] = self.config.temperature
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "pairtune"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)  # http or https: see `_address`
        try:
            with self._opener.open(request, timeout=self.config.timeout) as response:
                content = response.read(LARGEST_ANSWER)
        except urllib.error.HTTPError as error:
            with error:
                content = b""
                with contextlib.suppress(OSError, http.client.HTTPException):
                    content = error.read(LARGEST_ANSWER)
            return self._refused(question, error.code, error.headers, content)
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            hopeless = (ConnectionRefusedError, socket.gaierror, ssl.SSLCertVerificationError)
            if isinstance(cause, hopeless) and not self._reached:
                raise PairtuneError(
                    f"nothing answers at {self.url} ({cause}); check judge.base_url, and that the server runs."
                ) from None
            timed_out = isinstance(cause, TimeoutError)
            said = (
                f"no answer within {self.config.timeout:g} s" if timed_out else self._quoted(str(cause) or repr(cause))
            )
            raise _Again(said) from None
        return self._read(content)

    def _read(self, content: bytes) -> Answer:
        """The answer in a body that came with status 200."""
        try:
            body = json.loads(content)
            choice, usage = body["choices"][0], body.get("usage") or {}
            text, reason = choice["message"].get("content"), choice.get("finish_reason")
            if text is not None and not isinstance(text, str):
                raise TypeError("content")
            num_read, num_written = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _Again(f"what came is no chat completion: {self._quoted(_said(content))}") from None
        self._reached = True
        declined = choice["message"].get("refusal") or ("filtered" if reason == "content_filter" else None)
        refusal = self._quoted(str(declined)) if declined and not text else None
        return Answer(self._without_key(text or ""), reason != "length", num_read, num_written, refusal)

    def _refused(self, question: str, status: int, headers: Any, content: bytes) -> Answer:
        """What follows from a status other than 200: asking again, giving up, or one question without an answer."""
        said = f"{status}: {self._quoted(_said(content))}"
        if 300 <= status < 400:  # not followed: the key is for the address that was named
            elsewhere = self._quoted(str(headers.get("Location")))
            raise PairtuneError(f"{self.url} sends on to {elsewhere}; if that is right, give it as judge.base_url.")
        if status in (401, 403):
            key = f"the key in {self.config.api_key_env}" if self._key else "a request without a key"
            mend = "set it to a valid one" if self._key else "name the variable that holds one as judge.api_key_env"
            raise PairtuneError(f"{self.url} refuses {key} ({said}); {mend}.")
        if status == 404:
            raise PairtuneError(
                f"{self.url} is not there, or knows no model {self.config.model!r} ({said}); check judge.base_url and "
                "judge.model."
            )
        if status == 402 or b"insufficient_quota" in content:  # in mid-run too: every further question would meet it
            raise PairtuneError(f"the quota of the key at {self.url} is used up ({said}); top it up and go on.")
        if status in TRANSIENT or status >= 500:
            seconds = _retry_after(headers.get("Retry-After"))
            if seconds is not None and seconds > LONGEST_RETRY_AFTER:
                raise PairtuneError(
                    f"{self.url} asks to come back in {seconds / 60:.0f} minutes ({said}); the answers until now are "
                    "kept, so the same command goes on then."
                )
            raise _Again(said, seconds)
        if b"max_completion_tokens" in content and self._length_word == "max_tokens":
            self._length_word = "max_completion_tokens"  # what newer models of OpenAI call it
            return self._posted(question)
        return Answer("", True, 0, 0, refusal=said)

    def _raise_refusal(self, answer: Answer) -> None:
        raise PairtuneError(
            f"{self.url} refuses to answer ({answer.refusal}); change the setting of the judge that it names."
        )

    def _quoted(self, text: str) -> str:
        """A server's words for a message: short, and without control characters."""
        return shortened(self._without_key(text), 200)

    def _without_key(self, text: str) -> str:
        """A server's words without the key, which it may repeat."""
        return text if self._key is None else text.replace(self._key, "***")


class _Again(Exception):
    """The request may succeed if it is sent again."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class _Stopped(Exception):
    """Another thread met an error, or the user ended the run."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Pace:
    """When the next request may leave, for all threads."""

    def __init__(
        self,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._a_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._a_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._clock = clock or time.monotonic
        self._lock = threading.Lock()
        self._request_at = self._tokens_at = self._held_until = -float("inf")

    def reserve(self, tokens: float) -> float:
        """Seconds until a request of so many tokens may leave; its place is taken."""
        with self._lock:
            now = self._clock()
            start = max(now, self._request_at, self._tokens_at, self._held_until)
            self._request_at, self._tokens_at = start + self._a_request, start + tokens * self._a_token
            return start - now

    def correct(self, tokens: float) -> None:
        """A request has taken so many tokens more than was thought."""
        with self._lock:
            self._tokens_at += tokens * self._a_token

    def hold(self, seconds: float) -> None:
        """Nothing leaves for so long."""
        with self._lock:
            self._held_until = max(self._held_until, self._clock() + seconds)

    def wait(self, tokens: float, stop: threading.Event) -> None:
        """Sleeps until a request may leave. Raises _Stopped where `stop` is set before."""
        pause = self.reserve(tokens)
        while pause > 0 or stop.is_set():
            if stop.wait(pause):
                raise _Stopped
            pause = self._held_until - self._clock()  # another thread may have been told to wait meanwhile


class KeptAnswers:
    """Answers by a hash of what they depend on, in one SQLite file that several processes may share."""

    def __init__(self, cache: str | None) -> None:
        """`cache` is a folder, None for one in pairtune's own cache. Raises PairtuneError where it cannot be used."""
        folder = Path(cache).expanduser() if cache else default_cache_dir() / "judge"
        self._path = folder / "answers.sqlite"
        with self._refusals():
            folder.mkdir(parents=True, exist_ok=True)
            with self._opened() as base:
                base.execute("PRAGMA journal_mode=WAL")
                base.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")

    def read(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Those that are known, as they were written."""
        found: list[tuple[str, str]] = []
        with self._refusals(), self._opened() as base:
            for start in range(0, len(keys), 500):  # SQLite takes so many values, and not any number
                some = keys[start : start + 500]
                marks = ",".join("?" * len(some))
                found += base.execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", some).fetchall()
        return {key: json.loads(answer) for key, answer in found}

    def write(self, answers: Mapping[str, dict[str, Any]]) -> None:
        """Keeps answers, all of them or none."""
        rows = [(key, json.dumps(answer)) for key, answer in answers.items()]
        with self._refusals(), self._opened() as base:
            base.execute("BEGIN")
            base.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
            base.execute("COMMIT")

    def _opened(self) -> contextlib.closing[sqlite3.Connection]:
        # One connection a use, since threads and forked processes cannot share one. With a write-ahead log a killed
        # process loses nothing, and a power cut at most the last answers, without waiting for the disk at each.
        base = sqlite3.connect(self._path, timeout=60, isolation_level=None)
        base.execute("PRAGMA synchronous=NORMAL")
        return contextlib.closing(base)

    @contextlib.contextmanager
    def _refusals(self) -> Any:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise PairtuneError(
                f"the answers of the judge cannot be kept in {self._path} ({first_line(error)}); name another "
                "folder as judge.cache, or remove that file."
            ) from error


def _address(base_url: str) -> str:
    """Where chat completions are asked for. Raises PairtuneError where the base URL is none."""
    try:
        parts = urllib.parse.urlsplit(base_url)
        host = (parts.hostname or "").encode("idna")
        if not host or parts.port == 0:
            raise ValueError("it has no host")
    except ValueError as error:  # UnicodeError is one
        raise PairtuneError(f"judge.base_url {base_url!r} is no address ({error}); correct it.") from None
    return f"{base_url.rstrip('/').removesuffix('/chat/completions')}/chat/completions"


def _key_from(variable: str | None) -> str | None:
    """The key in an environment variable. Raises PairtuneError where it is missing or cannot stand in a header."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise PairtuneError(
            f"the environment variable {variable} (judge.api_key_env) is not set; set it to the endpoint's key, or "
            "judge.api_key_env to null where the endpoint needs none."
        )
    if not (key.isascii() and key.isprintable()):
        raise PairtuneError(
            f"the environment variable {variable} (judge.api_key_env) holds no key: it has characters "
            "that no header can carry."
        )
    return key


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date; None where it says neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(seconds, 0.0) if seconds == seconds else None


def _said(content: bytes) -> str:
    """What the server says in a body: the message of its error, else the text."""
    text = content.decode("utf-8", "replace").strip()
    with contextlib.suppress(ValueError, AttributeError):
        body = json.loads(text)
        error = body.get("error", body.get("detail", body.get("message")))
        return str(error.get("message", error)) if isinstance(error, dict) else str(error or text)
    return text
