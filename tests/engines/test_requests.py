"""What requests may say: everything else is refused by name, and what changes nothing is accepted."""

import json
from pathlib import Path
from typing import Any

import pytest

from qat.engines.requests import MAX_BODY

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "a"}]
TOOL = {"type": "function", "function": {"name": "f"}}
TOOLS = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
BAD: list[tuple[str, Any, int, str]] = [
    (TEXT, "{bad", 400, "not JSON"),
    (TEXT, "[" * 100_000, 400, "not JSON"),
    (TEXT, [1, 2], 400, "must be a JSON object, not list"),
    (TEXT, {}, 400, "give `prompt`"),
    (TEXT, {"prompt": 7}, 400, "prompt must be a text, a list of token ids, or a list of up to 128 of either"),
    *((TEXT, {"prompt": bad}, 400, "prompt must be") for bad in ([], [""], ["a", 1], [[]], [[1], "a"], ["a"] * 129)),
    *((TEXT, {"prompt": bad}, 400, "prompt must be") for bad in ([True], [-1], [1.5], [[1, "a"]], [None], {"a": 1})),
    (TEXT, {"prompt": [1, 384]}, 400, "token 384 does not exist; the model has 384"),
    (TEXT, {"prompt": [[1], [5] * 512]}, 400, "the prompt has 512 tokens and none can follow"),
    (TEXT, {"prompt": ["a", "fox " * 2000]}, 400, "and none can follow; the model takes 512"),
    (TEXT, {"prompt": ""}, 400, "prompt must be a text"),
    (TEXT, {"prompt": None}, 400, "give `prompt`"),
    (TEXT, r'{"prompt": "hi \ud800 there"}', 400, "not valid Unicode"),
    (TEXT, {"prompt": "x" * MAX_BODY}, 413, f"more than {MAX_BODY} bytes"),
    (CHAT, {"messages": []}, 400, "messages must be a list of {role, content}"),
    (CHAT, {"messages": ["a"]}, 400, "messages must be a list"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "each message needs a role (a text) and content"),
    (CHAT, {"messages": [{"content": "a"}]}, 400, "each message needs a role"),
    (CHAT, {"messages": [TOOLS]}, 400, "messages with tool_calls are not served"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "is not served"),
    (CHAT, {"messages": HELLO, "web_search_options": {}}, 400, "'web_search_options' is not served; allowed are"),
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, 400, "top_logprobs 2 needs logprobs: true"),
    (CHAT, {"messages": HELLO, "logprobs": 1}, 400, "logprobs must be true or false"),
    (CHAT, {"messages": [{"role": "user", "content": "fox " * 1000}]}, 400, "the model takes 512"),
    (CHAT, {"messages": [{"role": "fox " * 1000, "content": "a"}]}, 400, "the model takes 512"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "max_completion_tokens": 600},
        400,
        "600 more",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 600, "max_completion_tokens": 1},
        400,
        "600 more",
    ),
    (TEXT, {"prompt": "a", "max_tokens": 600}, 400, "600 more are asked for; the model takes 512"),
    (TEXT, {"prompt": "a", "generation_config": "{}"}, 400, "'generation_config' is not served"),
    (TEXT, {"prompt": "a", "max_output_tokens": 1}, 400, "'max_output_tokens' is not served"),
    (TEXT, {"prompt": "fox " * 2000}, 400, "and none can follow; the model takes 512"),
    (TEXT, {"prompt": "1" * 40_000}, 400, "has 40000 characters; the model takes 512"),
    (TEXT, {"prompt": "a", "model": "gpt-4"}, 404, 'there is no model "gpt-4" here; this is'),
    ("/v1/responses", {"input": "a"}, 404, "not served; POST to"),
    ("/v1/systemone", {}, 404, "not served; POST to"),
    ("/v1/audio/transcriptions", {}, 404, "not served; POST to"),
    ("/reset", {}, 404, "not served; POST to"),
    ("/load_model", {"model": "a/b"}, 404, "not served; POST to"),
]
BAD += [
    (TEXT, {"prompt": "a", key: value}, 400, f"{key} must be")
    for key, values in {
        "max_tokens": (0, -1, "many", 1.5, True),
        "temperature": ("hot", -1, 1e-300, float("nan"), True),
        "top_logprobs": (1,),
        "logprobs": (True, -1, 21, "1"),
        "top_p": ("a", 0, 1.5, -0.1),
        "frequency_penalty": (-2.1, 3, "a"),
        "presence_penalty": (2.5, []),
        "seed": ("x", -1, 1 << 64, 0.5),
        "stop": (5, "", [""], [5], ["a"] * 5, "a" * 101),
        "stream": ("yes",),
        "stream_options": (True, {"include_usage": 1}, {"other": True}),
        "n": (2, True, 0),
        "best_of": (2,),
        "echo": (True,),
        "suffix": ("end",),
        "logit_bias": ({"5": 1}, []),
        "tools": ([TOOL], {}),
        "tool_choice": ("required", {"type": "function"}),
        "functions": ([{"name": "f"}],),
        "response_format": ({"type": "json_object"}, {"type": "json_schema", "json_schema": {}}, "text"),
        "modalities": (["text", "audio"],),
        "chat_template_kwargs": ({"enable_thinking": False},),
        "store": (True,),
        "service_tier": ("priority",),
        "metadata": ("a",),
        "user": (5,),
        "model": (7,),
    }.items()
    for value in values
]


@pytest.mark.parametrize(("path", "body", "status", "message"), BAD, ids=range(len(BAD)))
def test_bad_requests_are_refused_in_words(client: Any, path: str, body: Any, status: int, message: str) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    answer = client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status and message in answer.json()["error"]["message"]
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([], None),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "stop": ([], None),
    "logprobs": (False, None),
    "top_logprobs": (0, None),
    "logit_bias": ({}, None),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": (None, ""),
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0.0,),
    "stream": (False,),
    "stream_options": ({}, {"include_usage": False}),
    "store": (False,),
    "metadata": ({"job": "a"}, {}),
    "service_tier": ("auto", "default"),
    "user": ("somebody",),
    "safety_identifier": ("a",),
    "prompt_cache_key": ("a",),
    "chat_template_kwargs": ({},),
    "verbosity": ("medium",),
    "audio": (None,),
}


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_changes_nothing_is_accepted_and_changes_nothing(client: Any, path: str) -> None:
    """Alone and all together; frameworks send such keys with every request."""
    body: dict[str, Any] = {"prompt": "The quick"} if path == TEXT else {"messages": HELLO}
    body |= {"max_tokens": 3, "temperature": 0}
    plain = client.post(path, json=body).json()["choices"]
    together = {key: values[0] for key, values in NEUTRAL.items()}
    alone = [{key: value} for key, values in NEUTRAL.items() for value in values]
    for more in (together, *alone):
        answer = client.post(path, json={**body, **more})
        assert answer.status_code == 200, (more, answer.text)
        assert answer.json()["choices"] == plain, more


def test_messages_of_earlier_answers_are_accepted(client: Any) -> None:
    """As the client's own objects write themselves out, with nulls and empty lists."""
    earlier = client.post(CHAT, json={"messages": HELLO, "max_tokens": 2}).json()["choices"][0]["message"]
    more = {"annotations": [], "audio": None, "function_call": None, "tool_calls": None, "name": None}
    for message in (earlier, {**earlier, **more}, {**earlier, "tool_calls": []}):
        body = {"messages": [*HELLO, message, *HELLO], "max_tokens": 2}
        answer = client.post(CHAT, json=body)
        assert answer.status_code == 200, answer.text


def test_no_path_of_the_machine_is_told(client: Any, folder: Path) -> None:
    for path, body, *_ in BAD[:40]:
        assert str(folder.parent) not in client.post(path, content=json.dumps(body)).text
    assert str(folder.parent) not in client.get("/v1/models").text
