"""Writes the answers of `qat serve`: one after the other, in one thread, by transformers' `generate`.

An answer leaves that thread in pieces of finished text, each with the log-probabilities of its tokens where they are
asked for; streamed or not, the same pieces make it. It is no longer written when nobody waits for it.
"""

import asyncio
import contextlib
import copy
import math
import re
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from qat.checkpoints.decoding import TextStream
from qat.engines.graphs import Decoding
from qat.engines.requests import Request

MOST_TOKENS = 1024  # written where neither the request nor the generation config says how many
_UNLIKELY = -9999.0  # OpenAI's word for a log-probability that JSON has no number for
_VISIBLE = [byte for first, last in ("!~", "¡¬", "®ÿ") for byte in range(ord(first), ord(last) + 1)]
_HIDDEN = (byte for byte in range(256) if byte not in _VISIBLE)
_BYTES = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + i): byte for i, byte in enumerate(_HIDDEN)}  # GPT-2's

Finish = Literal["stop", "length"]


class Spelling(NamedTuple):
    """How a single token reads, which may be a part of a character."""

    text: str
    bytes: bytes


@dataclass(frozen=True)
class Token:
    """A written token with log-probabilities under the model's own distribution, whatever it was sampled from."""

    spelling: Spelling
    logprob: float
    offset: int  # of its text in the answer
    top: list[tuple[Spelling, float]]


@dataclass(frozen=True)
class Piece:
    """The next part of an answer; the last one has a reason to end."""

    text: str
    tokens: list[Token] = field(default_factory=list)
    written: int = 0  # tokens so far, the one that ends the text included
    finish: Finish | None = None


class Speller:
    """What single tokens of a vocabulary are."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, Spelling] = {}
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]  # a first token may lose its space

    def spell(self, token: int) -> Spelling:
        """The spelling of one token; parts of characters are written as OpenAI does, tokens without text as vLLM."""
        if token not in self._known:
            before, text = (self._tokenizer.decode([*self._before, *ids]) for ids in ((), (token,)))
            text = text[len(before) :]
            raw = self._raw(token, text) if "\ufffd" in text else text.encode()
            try:
                spelling = Spelling(raw.decode() or f"token_id:{token}", raw)
            except UnicodeDecodeError:
                spelling = Spelling("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw)
            self._known[token] = spelling
        return self._known[token]

    def _raw(self, token: int, text: str) -> bytes:
        """Bytes of a part of a character, by the two ways in which vocabularies write it."""
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if re.fullmatch("<0x[0-9A-F]{2}>", name):
            return bytes([int(name[3:5], 16)])
        return bytes(_BYTES[letter] for letter in name) if all(letter in _BYTES for letter in name) else text.encode()


class Answer(StoppingCriteria):
    """One answer while it is written: `generate` asks it after each token whether to go on."""

    def __init__(self, request: Request, limit: int, ends: set[int], tokenizer: Any, speller: Speller) -> None:
        self._request, self._limit, self._ends = request, limit, ends
        self._stream, self._speller = TextStream(tokenizer), speller
        self._text, self._sent, self._searched, self._written = "", 0, 0, 0
        self._pending: list[Token] = []
        self._finish: Finish | None = None
        self.left = threading.Event()  # set when nobody waits any longer
        self.logits: torch.Tensor | None = None  # that the next token is chosen by
        self.send: Callable[[Piece | Exception], None]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Whether to end, given all tokens so far."""
        if self._finish is None and not self.left.is_set():
            self._take(int(input_ids[0, -1]))
        ended = self._finish is not None or self.left.is_set()
        return torch.full((len(input_ids),), ended, dtype=torch.bool, device=input_ids.device)

    def end(self) -> None:
        """`generate` has returned."""
        if self._finish is None:
            self._finish = "stop"
            self._close()

    def _take(self, token: int) -> None:
        self._written += 1
        if token in self._ends:
            self._finish = "stop"
        else:
            if self._request.alternatives is not None:
                self._pending.append(self._token_of(token, self._request.alternatives))
            self._text += self._stream.push(token)
            if self._written == self._limit:
                self._finish = "length"
        self._close()

    def _close(self) -> None:
        """Ends the text at a stop text, and sends what will not change any more."""
        stops = self._request.stop
        if self._finish:
            self._text += self._stream.rest()
        start = max(0, self._searched - max(map(len, stops), default=0))
        places = [place for stop in stops if (place := self._text.find(stop, start)) >= 0]
        self._searched = len(self._text)
        if places:
            self._text, self._finish = self._text[: min(places)], "stop"
            self._pending = [token for token in self._pending if token.offset < len(self._text)]
        ready = len(self._text) - (0 if self._finish else self._may_be_stop())
        if ready > self._sent or self._finish:
            tokens = [token for token in self._pending if self._finish or token.offset < ready]
            self._pending = self._pending[len(tokens) :]
            self.send(Piece(self._text[self._sent : ready], tokens, self._written, self._finish))
            self._sent = ready

    def _may_be_stop(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop text."""
        sizes = (size for stop in self._request.stop for size in range(len(stop)) if self._text.endswith(stop[:size]))
        return max(sizes, default=0)

    def _token_of(self, token: int, alternatives: int) -> Token:
        assert self.logits is not None  # the hook of `Writer` runs before
        logprobs = torch.log_softmax(self.logits.float(), dim=-1)
        values, ids = logprobs.topk(min(alternatives, len(logprobs)))
        top = [(self._speller.spell(i), _finite(v)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
        return Token(self._speller.spell(token), _finite(float(logprobs[token])), len(self._text), top)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else _UNLIKELY


class Penalties(LogitsProcessor):
    """OpenAI's `frequency_penalty` and `presence_penalty`, of what the answer holds already."""

    def __init__(self, request: Request, prompt: int) -> None:
        self._frequency, self._presence, self._prompt = request.frequency_penalty, request.presence_penalty, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores of the next token."""
        counts = torch.zeros_like(scores)
        written = input_ids[:, self._prompt :]
        counts.scatter_add_(1, written, torch.ones_like(written, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


def generation_config(defaults: GenerationConfig, request: Request, limit: int) -> GenerationConfig:
    """How to choose tokens: what the request says, and where it says nothing, what the model's own config does.

    A temperature above 0 or a top_p below 1 in the request means sampling, a temperature of 0 the likeliest token.
    """
    config = copy.deepcopy(defaults)
    temperature = _first(request.temperature, defaults.temperature, 1.0)
    samples = bool(request.temperature) or (request.top_p is not None and request.top_p < 1)
    config.do_sample = temperature > 0 and (samples or (request.temperature is None and bool(defaults.do_sample)))
    config.temperature = float(temperature) if config.do_sample else 1.0  # `generate` refuses whole numbers
    config.top_p = float(_first(request.top_p, defaults.top_p, 1.0)) if config.do_sample else 1.0
    top_k = max(0, _first(request.top_k, defaults.top_k, 0))
    config.top_k = top_k if config.do_sample else 50  # `generate` fills in 50, and takes no other
    config.min_p = _first(request.min_p, defaults.min_p, 0.0) if config.do_sample else None
    config.repetition_penalty = float(_first(request.repetition_penalty, defaults.repetition_penalty, 1.0))
    config.max_new_tokens, config.max_length = limit, None
    config.disable_compile = True  # steps are recorded as they are, see graphs.py
    for other in ("num_beams", "num_return_sequences", "early_stopping", "penalty_alpha", "prompt_lookup_num_tokens"):
        setattr(config, other, None)  # one token at a time
    return config


def _first(*values: float | None) -> Any:
    return next(value for value in values if value is not None)


class Writer:
    """The thread that runs the model."""

    def __init__(self, model: Any, tokenizer: Any, context: int) -> None:
        self._model, self._tokenizer, self._context = model, tokenizer, context
        self._speller, self._decoding = Speller(tokenizer), Decoding(model)
        self._defaults: GenerationConfig = model.generation_config
        model.generation_config = GenerationConfig()  # `generate` would fill in from it what a request leaves out
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")
        ends = self._defaults.eos_token_id
        self._ends: set[int] = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)

    async def write(self, prompt: list[int], request: Request) -> AsyncGenerator[Piece, None]:
        """The pieces of the answer to one prompt; close it where the answer is no longer wanted."""
        limit = request.limit or min(self._defaults.max_new_tokens or MOST_TOKENS, self._context - len(prompt))
        answer = Answer(request, limit, self._ends, self._tokenizer, self._speller)
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()

        def send(piece: Piece | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the server's loop has ended
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        answer.send = send
        config = generation_config(self._defaults, request, limit)
        self._thread.submit(self._generate, prompt, request, answer, config)
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish:
                    return
        finally:
            answer.left.set()

    def close(self) -> None:
        """Returns after the last computed step: Python must not end under a thread that computes."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _generate(self, prompt: list[int], request: Request, answer: Answer, config: GenerationConfig) -> None:
        def see(module: Any, inputs: Any, output: Any) -> None:
            answer.logits = output.logits[0, -1]

        if answer.left.is_set():
            return
        processors = [Penalties(request, len(prompt))] if request.frequency_penalty or request.presence_penalty else []
        seeing = contextlib.ExitStack()
        try:
            if request.seed is None:
                torch.seed()
            else:
                torch.manual_seed(request.seed)
            if request.alternatives is not None:
                seeing.callback(self._model.register_forward_hook(see).remove)
            ids = torch.tensor([prompt], device=self._model.device)
            with seeing:
                if (cache := self._decoding.cache(len(prompt) + config.max_new_tokens)) is not None:
                    config.cache_implementation = None
                self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    logits_processor=LogitsProcessorList(processors),
                    stopping_criteria=StoppingCriteriaList([answer]),
                    tokenizer=self._tokenizer,
                    past_key_values=cache,
                )
            answer.end()
        except Exception as error:  # of one answer; the thread goes on
            answer.send(error)
