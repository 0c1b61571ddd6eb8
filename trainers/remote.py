"""A teacher behind an OpenAI-compatible completions endpoint (vLLM), asked for the likeliest tokens of given ones.

Prompts are token ids, so that no text is split anew, and a document is a prompt: nothing else is seen with it. What can
pass is tried again (an overloaded server, a cut connection, half an answer), what cannot is said once, in the server's
words; the key is in no message and in no file. A stop closes the connections instead of waiting for answers.
"""

import contextlib
import http.client
import ipaddress
import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

import numpy as np
import torch
from pydantic import Field, model_validator

from qat.config import Strict
from qat.errors import CheckpointError, ConfigError
from qat.trainers.packing import Row
from qat.training.known import Known
from qat.training.rows import IGNORE

PATH = "/completions"
CONNECT_SECONDS = 10.0  # an attempt to connect cannot be interrupted
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before another try; doubled each time
PASSING = {408, 409, 425, 429, 500, 502, 503, 504}  # what may be otherwise a little later
MOST_BYTES = 1 << 30  # of an answer
SHOWN = 300  # characters of what a server says
TOO_MUCH = 1.01  # sum of probabilities above which they are none


class Remote(Strict):
    """A server that says how likely the teacher finds tokens.

    Attributes:
        url: up to the version, as clients of OpenAI's interface have it: https://host/v1; without TLS only loopback.
        model: as the server calls it.
        key_env: name of the environment variable that holds the key, which itself never belongs into a file.
        ask: `prompt_logprobs` as vLLM has it, or `echo` with `logprobs`, OpenAI's older way (vLLM has both).
        concurrency: requests under way at once.
        timeout: seconds for one answer.
        retries: further tries of a request whose trouble can pass.
        insecure: send text and key to other hosts without TLS, too.
    """

    url: str
    model: str = Field(min_length=1)
    key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    ask: Literal["prompt_logprobs", "echo"] = "prompt_logprobs"
    concurrency: int = Field(default=8, ge=1, le=256)
    timeout: float = Field(default=300.0, gt=0)
    retries: int = Field(default=6, ge=0)
    insecure: bool = False

    @model_validator(mode="after")
    def _reachable(self) -> "Remote":
        parts = _split(self.url)
        if parts.scheme == "http" and not (self.insecure or _loopback(parts.hostname or "")):
            raise ValueError(
                f"url: {parts.hostname} would get the text and the key unencrypted; give an https:// address, tunnel "
                "to it (ssh -L) and give http://127.0.0.1:PORT/v1, or say insecure: true"
            )
        return self


def _split(url: str) -> SplitResult:
    parts = urlsplit(url)
    try:
        number = parts.port
    except ValueError:
        number = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or number == -1 or parts.query or parts.fragment:
        raise ValueError("url: give http(s)://HOST[:PORT]/v1, without anything after the path")
    if parts.username is not None or parts.password is not None:
        raise ValueError("url: no key and no password in it; key_env names the environment variable with the key")
    return parts


def _loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def key_of(config: Remote) -> str | None:
    """The key.

    Raises:
        ConfigError: the variable is not set, or holds what no header can carry.
    """
    if config.key_env is None:
        return None
    key = os.environ.get(config.key_env, "").strip()
    if not key:
        raise ConfigError(f"teacher_cache.remote.key_env: the environment variable {config.key_env} is not set")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"teacher_cache.remote.key_env: {config.key_env} holds characters that no key has")
    return key


class Stopped(Exception):
    """Somebody called `Server.stop`."""


class _Passing(Exception):
    """What went wrong may be otherwise a little later.

    Attributes:
        after: seconds that the server asked to wait, if it did.
    """

    def __init__(self, said: str, after: float | None = None) -> None:
        super().__init__(said)
        self.after = after


# --- asking -------------------------------------------------------------------------------------------


class Server:
    """Asks; may be used from several threads.

    Args:
        config: where.
        k: likeliest tokens wanted at each position.
        columns: token ids that there are; k is at most so many.
    """

    def __init__(self, config: Remote, k: int, columns: int) -> None:
        self.config, self.k, self.columns = config, min(k, columns), columns
        self._parts, self._key = _split(config.url), key_of(config)
        self._stopped = threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def stop(self) -> None:
        """End all that is under way, at once: those who wait get `Stopped`."""
        self._stopped.set()
        with self._lock:
            for connected in self._open:
                with contextlib.suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)

    def row(self, row: Row) -> Known:
        """What the teacher says of the learned tokens of a row (3, seq_len), in order.

        Raises:
            CheckpointError: no answer, or none that can be used.
            Stopped: see `stop`.
        """
        found: list[tuple[list[int], list[float]]] = []
        for prompt, places in prompts(row):
            answer = self.answer(prompt, self.k)
            found += [_ranked(answer[place], self.k, self.columns) for place in places]
        ids, log_p = (np.array([one[part] for one in found]) for part in (0, 1))
        wide = torch.from_numpy(log_p.reshape(-1, self.k).astype(np.float64))
        tail = (1 - wide.exp().sum(-1)).clamp_min(0).float()
        return Known(torch.from_numpy(ids.reshape(-1, self.k).astype(np.int64)), wide.float(), tail)

    def answer(self, prompt: list[int] | str, k: int) -> list[dict[int, float]]:
        """Log-probabilities by token id at every position of the prompt, given what stands before it; the first has
        none.

        Raises:
            CheckpointError: no answer, or none that can be used.
            Stopped: see `stop`.
        """
        body: dict[str, Any] = {"model": self.config.model, "prompt": prompt, "max_tokens": 1, "temperature": 1.0}
        if isinstance(prompt, str):
            body["add_special_tokens"] = False
        if self.config.ask == "echo":
            body |= {"echo": True, "logprobs": k, "return_tokens_as_token_ids": True}
        else:
            body["prompt_logprobs"] = k
        try:
            found = _positions(self._post(body), self.config.ask)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self.config.url} does not say how likely it finds the prompt's tokens ({type(error).__name__}: "
                f"{str(error)[:SHOWN]}); remote.ask: {self.config.ask} needs a server that has it, as vLLM does"
            ) from error
        if isinstance(prompt, list):
            if len(found) < len(prompt):
                raise CheckpointError(f"{self.config.url} answered for {len(found)} of {len(prompt)} tokens")
            found = found[: len(prompt)]  # echo gives the one that was written, too
        return found

    def _post(self, body: dict[str, Any]) -> Any:
        """The answer to a request, tried again where that may help."""
        data = json.dumps(body).encode()
        for tried in range(self.config.retries + 1):
            if self._stopped.is_set():
                raise Stopped
            try:
                return self._once(data)
            except (_Passing, OSError, http.client.HTTPException) as error:
                if self._stopped.is_set():
                    raise Stopped from None
                if tried == self.config.retries:
                    said = str(error) or type(error).__name__
                    raise CheckpointError(
                        f"{self.config.url} did not answer in {tried + 1} tries, the last time: {self._shown(said)}"
                    ) from None
                wait = min(FIRST_WAIT * 2.0**tried, LONGEST_WAIT) * random.uniform(0.5, 1.0)
                self._stopped.wait(max(wait, getattr(error, "after", None) or 0.0))
        raise AssertionError

    def _once(self, data: bytes) -> Any:
        status, headers, answer = self._exchange(data)
        text = answer.decode("utf-8", errors="replace")
        if status in PASSING:
            after = headers.get("Retry-After", "")
            raise _Passing(f"{status} {_reason(text)}", min(float(after), LONGEST_WAIT) if after.isdigit() else None)
        if status != 200:
            hint = ""
            if "logprob" in text.lower():
                hint = f"; a vLLM server says {self.k} likeliest tokens if started with --max-logprobs {self.k}"
            if status in (401, 403) and self._key is None:
                hint = "; teacher_cache.remote.key_env names the environment variable with the key"
            raise CheckpointError(f"{self.config.url} refuses: {status} {self._shown(_reason(text))}{hint}")
        try:
            return json.loads(answer)
        except ValueError:
            raise _Passing("an answer that is no JSON, or half of it") from None

    def _exchange(self, data: bytes) -> tuple[int, Any, bytes]:
        deadline = time.monotonic() + self.config.timeout
        with self._connected() as (connection, connected):
            connected.settimeout(self.config.timeout)
            headers = {"Content-Type": "application/json", "Connection": "close"}
            if self._key is not None:
                headers["Authorization"] = f"Bearer {self._key}"
            connection.request("POST", self._parts.path.rstrip("/") + PATH, data, headers)
            response = connection.getresponse()
            parts, length = [], 0
            while part := response.read1(1 << 16):
                parts.append(part)
                length += len(part)
                left = deadline - time.monotonic()
                if left <= 0:
                    raise _Passing(f"no whole answer within {self.config.timeout:g} s")
                if length > MOST_BYTES:
                    raise CheckpointError(f"{self.config.url} answers with more than {MOST_BYTES:,} bytes")
                connected.settimeout(left)
            return response.status, response.headers, b"".join(parts)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[tuple[http.client.HTTPConnection, socket.socket]]:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        wait = min(self.config.timeout, CONNECT_SECONDS)
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=wait)
        try:
            connection.connect()
            connected = connection.sock
            with self._lock:
                self._open.add(connected)
            if self._stopped.is_set():
                raise Stopped
            try:
                yield connection, connected
            finally:
                with self._lock:
                    self._open.discard(connected)
        finally:
            connection.close()

    def _shown(self, said: str) -> str:
        return said.replace(self._key, "***") if self._key else said


def _reason(text: str) -> str:
    """What a server says went wrong, where it says so."""
    found: Any = None
    with contextlib.suppress(ValueError):
        found = json.loads(text)
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    return (found if isinstance(found, str) else " ".join(text.split()))[:SHOWN]


# --- what is asked, and what is answered --------------------------------------------------------------


def prompts(row: Row) -> Iterator[tuple[list[int], list[int]]]:
    """The prompts of a row (3, seq_len), one for each document with learned tokens: its ids up to the last one that is
    learned, and the places of the learned ones in it."""
    ids, targets, numbers = row
    cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    for begin, end in pairwise(cuts):
        learned = np.flatnonzero(targets[begin:end] != IGNORE)
        if len(learned):
            last = begin + int(learned[-1])
            yield [*ids[begin : last + 1].tolist(), int(targets[last])], (learned + 1).tolist()


def _positions(answer: Any, ask: str) -> list[dict[int, float]]:
    choice = answer["choices"][0]
    if ask == "echo":
        found = choice["logprobs"]["top_logprobs"]
        return [{_id(token): float(log_p) for token, log_p in (at or {}).items()} for at in found]
    found = choice["prompt_logprobs"]
    return [{int(token): float(said["logprob"]) for token, said in (at or {}).items()} for at in found]


def _id(token: str) -> int:
    name, _, number = token.partition(":")
    if name != "token_id":
        raise ValueError(f"it names tokens by their text, as {token[:20]!r}, which can stand for several")
    return int(number)


def _ranked(at: dict[int, float], k: int, columns: int) -> tuple[list[int], list[float]]:
    """The `k` likeliest; the prompt's own token comes with them."""
    best = sorted(at.items(), key=lambda item: -item[1])[:k]
    if len(best) < k:
        raise CheckpointError(f"the teacher's server names {len(best)} tokens at a position, not {k}")
    ids, log_p = ([item[part] for item in best] for part in (0, 1))
    if max(ids) >= columns or min(ids) < 0:
        raise CheckpointError(
            f"the teacher's server names token {max(ids)}, and teacher and student have {columns} in common; is it "
            "another model?"
        )
    if not sum(np.exp(log_p)) < TOO_MUCH:
        raise CheckpointError(
            f"the teacher's server gives {k} tokens probabilities that sum to {sum(np.exp(log_p)):.3f}; it must give "
            "log-probabilities (vLLM: --logprobs-mode raw_logprobs)"
        )
    return [int(i) for i in ids], [float(value) for value in log_p]
