"""What `qat serve` lets a request say: every key of OpenAI's two endpoints that is served, or that changes nothing.

`Reader` turns a body into a `Request` or refuses it by name, before it costs anybody a token.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import normpath
from typing import Any

MAX_BODY = 4 << 20  # bytes of a request
_CHARACTERS = 64  # per token of the longest text; no text that has more is worth a tokenizer's time
_PROMPTS = 128  # of one request

Rule = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and which are, in words


class Refused(Exception):
    """What a client receives: HTTP status, words, and OpenAI's `param` and `code`."""

    def __init__(self, status: int, words: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(words)
        self.status, self.words, self.param, self.code = status, words, param, code


@dataclass(frozen=True)
class Request:
    """What is to be written. None is what the model's generation config decides."""

    chat: bool
    prompts: tuple[list[int], ...]
    limit: int | None = None  # tokens to write for each prompt
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    alternatives: int | None = None  # whose log-probabilities are given beside the chosen token's; None for none
    stream: bool = False
    usage: bool = False  # whether a stream ends with a chunk of token counts


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and _number(low, high)(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(each) and value == each for each in values)


def _stops(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return len(texts) <= 4 and all(isinstance(text, str) and 1 <= len(text) <= 100 for text in texts)


def _messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_whole(0, 1 << 31), value))


def _prompts(value: Any) -> bool:
    if isinstance(value, str) or _token_ids(value):
        return value != ""
    lists = isinstance(value, list) and 1 <= len(value) <= _PROMPTS
    return lists and (all(_text(item) and item for item in value) or all(map(_token_ids, value)))


def _stream_options(value: Any) -> bool:
    rest = {**value} if isinstance(value, dict) else {"": 0}
    return _flag(rest.pop("include_usage", True)) and rest.pop("include_obfuscation", False) is False and not rest


_TOKENS: Rule = (_whole(1, 1 << 31), "a whole number of tokens from 1")
_SERVED: dict[str, Rule] = {
    "model": (_text, "a text"),
    "stream": (_flag, "true or false"),
    "stream_options": (_stream_options, "{include_usage: true or false}"),
    "max_tokens": _TOKENS,
    "temperature": (lambda value: _number(0.01, 100)(value) or _number(0, 0)(value), "0, or a number from 0.01 to 100"),
    "top_p": (lambda value: _number(0, 1)(value) and value > 0, "a number above 0, up to 1"),
    "top_k": (_whole(-1, 1 << 31), "a whole number from 1, or 0 or -1 for all tokens"),
    "min_p": (_number(0, 1), "a number from 0 to 1"),
    "repetition_penalty": (_number(0.01, 100), "a number from 0.01 to 100"),
    "frequency_penalty": (_number(-2, 2), "a number from -2 to 2"),
    "presence_penalty": (_number(-2, 2), "a number from -2 to 2"),
    "seed": (_whole(0, (1 << 63) - 1), "a whole number from 0, of 63 bits"),
    "stop": (_stops, "a text or a list of up to 4 texts, of 1 to 100 characters"),
}
_NEUTRAL: dict[str, Rule] = {  # clients send these with every request; they are allowed as far as they change nothing
    "n": (_one_of(1), "1 (more answers are not served)"),
    "best_of": (_one_of(1), "1 (more answers are not served)"),
    "echo": (_one_of(False), "false (the prompt is not repeated)"),
    "suffix": (_one_of(""), "absent (insertion is not served)"),
    "logit_bias": (_one_of({}), "{} (biases are not served)"),
    "tools": (_one_of([]), "[] (tools are not served)"),
    "tool_choice": (_one_of("none", "auto"), '"none" or "auto" (tools are not served)'),
    "functions": (_one_of([]), "[] (tools are not served)"),
    "function_call": (_one_of("none", "auto"), '"none" or "auto" (tools are not served)'),
    "parallel_tool_calls": (_flag, "true or false"),
    "response_format": (_one_of({"type": "text"}), '{"type": "text"} (other formats are not served)'),
    "modalities": (_one_of(["text"]), '["text"]'),
    "verbosity": (_one_of("medium"), '"medium" (others are not served)'),
    "chat_template_kwargs": (_one_of({}), "{} (others are not served)"),
    "ignore_eos": (_one_of(False), "false (a text ends where the model ends it)"),
    "skip_special_tokens": (_one_of(True), "true (special tokens are not shown)"),
    "min_tokens": (_one_of(0), "0 (a text ends where the model ends it)"),
    "stop_token_ids": (_one_of([]), "[] (give texts in stop)"),
    "include_stop_str_in_output": (_one_of(False), "false (a stop text is left out)"),
    "add_generation_prompt": (_one_of(True), "true"),
    "store": (_one_of(False), "false (answers are not stored)"),
    "service_tier": (_one_of("auto", "default"), '"auto" or "default"'),
    "metadata": (lambda value: isinstance(value, dict), "an object"),
    **dict.fromkeys(("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"), (_text, "a text")),
}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
_PASSED = (*_SAMPLING, "seed", "stream")  # to the Request as they are
_MOST = 20  # alternatives to a token
_PROMPT = f"a text, a list of token ids, or a list of up to {_PROMPTS} of either, none of them empty"
ENDPOINTS: dict[str, dict[str, Rule]] = {  # the first key is needed
    "/v1/chat/completions": {
        "messages": (_messages, "a list of {role, content}"),
        "max_completion_tokens": _TOKENS,
        "logprobs": (_flag, "true or false"),
        "top_logprobs": (_whole(0, _MOST), f"a whole number from 0 to {_MOST}"),
        **_SERVED,
    },
    "/v1/completions": {
        "prompt": (_prompts, _PROMPT),
        "logprobs": (lambda value: value is False or _whole(0, _MOST)(value), f"a whole number from 0 to {_MOST}"),
        "top_logprobs": (_one_of(0), "0 (logprobs says how many)"),
        **_SERVED,
    },
}
_MESSAGE = ("role", "content", "name", "refusal", "reasoning_content")  # the last three are not put before the model


class Reader:
    """Reads requests to one model: knows its tokens, its longest text (`context`) and its names."""

    def __init__(self, tokenizer: Any, context: int, vocabulary: int, names: Sequence[str]) -> None:
        self.tokenizer, self.context, self.vocabulary, self.names = tokenizer, context, vocabulary, names

    def read(self, path: str, body: bytes) -> Request:
        """The request in `body`.

        Raises:
            Refused: it is not served, in words.
        """
        keys = ENDPOINTS.get(path)
        if keys is None:
            raise Refused(404, f"{path} is not served; POST to {' or '.join(ENDPOINTS)}")
        fields = _parsed(body)
        needed = next(iter(keys))
        if needed not in fields:
            raise Refused(400, f"give `{needed}`, {keys[needed][1]}", needed)
        for key, value in fields.items():
            if key not in keys and key not in _NEUTRAL:
                raise Refused(400, f"{key!r} is not served; allowed are {', '.join({**keys, **_NEUTRAL})}", key)
            allowed, words = keys[key] if key in keys else _NEUTRAL[key]
            if not allowed(value):
                raise Refused(400, f"{key} must be {words}, not {_short(value)}", key)
        if not self.knows(fields.get("model", self.names[0])):
            here = " or ".join(map(json.dumps, self.names))
            words = f"there is no model {_short(fields['model'])} here; this is {here}"
            raise Refused(404, words, "model", "model_not_found")
        chat = needed == "messages"
        prompts = [self._chat(fields["messages"])] if chat else self._prompts(fields["prompt"])
        limits = [fields[key] for key in ("max_completion_tokens", "max_tokens") if key in fields]
        for prompt in prompts:
            self._check_length(len(prompt), max(limits, default=0))
        stop = fields.get("stop", ())
        return Request(
            chat=chat,
            prompts=tuple(prompts),
            limit=limits[0] if limits else None,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            alternatives=_alternatives(fields, chat),
            usage=fields.get("stream_options", {}).get("include_usage", False),
            **{key: fields[key] for key in _PASSED if key in fields},
        )

    def knows(self, name: str) -> bool:
        """Whether the model has this name; a folder may be written in several ways."""
        return normpath(name) in map(normpath, self.names)

    def _check_length(self, length: int, limit: int) -> None:
        if length == 0:
            raise Refused(400, "the prompt has no tokens")
        if length + max(limit, 1) > self.context:
            more = f"and {limit} more are asked for" if limit else "and none can follow"
            raise Refused(400, f"the prompt has {length} tokens {more}; the model takes {self.context}")

    def _check_characters(self, characters: int) -> None:
        if characters > _CHARACTERS * self.context:
            raise Refused(400, f"the prompt has {characters} characters; the model takes {self.context} tokens")

    def _prompts(self, value: Any) -> list[list[int]]:
        prompts = [value] if isinstance(value, str) or _token_ids(value) else value
        ids = []
        for prompt in prompts:
            if isinstance(prompt, str):
                self._check_characters(len(prompt))
                prompt = self.tokenizer(prompt)["input_ids"]
            elif max(prompt) >= self.vocabulary:
                raise Refused(400, f"token {max(prompt)} does not exist; the model has {self.vocabulary}", "prompt")
            ids.append(list(prompt))
        return ids

    def _chat(self, entries: list[dict[str, Any]]) -> list[int]:
        messages = [_message(message) for message in entries]
        self._check_characters(sum(len(text) for message in messages for text in message.values()))
        try:
            encoded = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # templates raise what they like, such as jinja2's errors
            raise Refused(400, f"the model's chat template does not take these messages: {error}") from error
        return list(encoded["input_ids"])


def _parsed(body: bytes) -> dict[str, Any]:
    """The JSON object in `body` without nulls, which count as absent."""
    try:
        fields = json.loads(body)
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Refused(400, f"the text is not valid Unicode: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise Refused(400, f"the body must be a JSON object, not {type(fields).__name__}")
    return {key: value for key, value in fields.items() if value is not None}


def _message(message: dict[str, Any]) -> dict[str, str]:
    """{role, content}, both texts, for the chat template."""
    message = {key: value for key, value in message.items() if value is not None and (value != [] or key == "content")}
    other = sorted(set(message) - set(_MESSAGE))
    if other:
        raise Refused(400, f"messages with {', '.join(other)} are not served; allowed are {', '.join(_MESSAGE)}")
    role, content = message.get("role"), message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(role, str) or not isinstance(parts, list):
        raise Refused(400, "each message needs a role (a text) and content (a text, or a list of {type: text, text})")
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise Refused(400, "content other than {type: text, text} is not served")
    return {"role": role, "content": "\n".join(str(text) for text in texts)}


def _alternatives(fields: dict[str, Any], chat: bool) -> int | None:
    wants_logprobs = fields.get("logprobs", False)
    if not chat:
        return None if wants_logprobs is False else int(wants_logprobs)
    most = int(fields.get("top_logprobs", 0))
    if most and not wants_logprobs:
        raise Refused(400, f"top_logprobs {most} needs logprobs: true", "top_logprobs")
    return most if wants_logprobs else None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
