"""Answers in the shapes of OpenAI's two endpoints, whole or in the chunks of a stream."""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from qat.engines.answers import Finish, Piece, Spelling, Token
from qat.engines.requests import Request


class Reply:
    """What one request gets."""

    def __init__(self, request: Request, name: str) -> None:
        self._request = request
        kind = "chat.completion" if request.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"{kind}.chunk" if request.chat and request.stream else kind,
            "created": int(time.time()),
            "model": name,
        }

    def whole(self, answers: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """All answers, of which each ends with its last piece."""
        choices = []
        for index, pieces in enumerate(answers):
            text = "".join(piece.text for piece in pieces)
            body: dict[str, Any] = {"text": text}
            if self._request.chat:
                body = {"message": {"role": "assistant", "content": text, "refusal": None}}
            tokens = [token for piece in pieces for token in piece.tokens]
            choices.append(self._choice(index, body, tokens, pieces[-1].finish))
        return {**self._head, "choices": choices, "usage": self._usage(sum(pieces[-1].written for pieces in answers))}

    def begin(self, index: int) -> list[bytes]:
        """What comes before the first piece of an answer."""
        return [self._chunk(index, {"role": "assistant", "content": ""})] if self._request.chat else []

    def piece(self, index: int, piece: Piece) -> list[bytes]:
        """One piece of a streamed answer."""
        chunks = []
        if piece.text or piece.tokens:
            body = {"content": piece.text} if self._request.chat else {"text": piece.text}
            chunks.append(self._chunk(index, body, piece.tokens))
        if piece.finish:
            chunks.append(self._chunk(index, {} if self._request.chat else {"text": ""}, finish=piece.finish))
        return chunks

    def end(self, written: int) -> list[bytes]:
        """What ends a stream in which `written` tokens were."""
        usage = {**self._head, "choices": [], "usage": self._usage(written)}
        return [*([event(usage)] if self._request.usage else []), b"data: [DONE]\n\n"]

    def _chunk(
        self, index: int, body: dict[str, Any], tokens: Sequence[Token] = (), finish: Finish | None = None
    ) -> bytes:
        choice = self._choice(index, {"delta": body} if self._request.chat else body, tokens, finish)
        return event({**self._head, "choices": [choice], **({"usage": None} if self._request.usage else {})})

    def _choice(
        self, index: int, body: dict[str, Any], tokens: Sequence[Token], finish: Finish | None
    ) -> dict[str, Any]:
        logprobs = None
        if self._request.alternatives is not None and (tokens or not self._request.stream):
            logprobs = _chat_logprobs(tokens) if self._request.chat else _text_logprobs(tokens)
        return {"index": index, **body, "logprobs": logprobs, "finish_reason": finish}

    def _usage(self, written: int) -> dict[str, int]:
        read = sum(map(len, self._request.prompts))
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def event(value: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def _chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    def entry(spelling: Spelling, logprob: float) -> dict[str, Any]:
        return {"token": spelling.text, "logprob": logprob, "bytes": list(spelling.bytes)}

    content = [
        {**entry(token.spelling, token.logprob), "top_logprobs": [entry(*other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    """The older shape; the chosen token is always among the alternatives."""
    return {
        "tokens": [token.spelling.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            {spelling.text: logprob for spelling, logprob in [*token.top, (token.spelling, token.logprob)]}
            for token in tokens
        ],
        "text_offset": [token.offset for token in tokens],
    }
