"""Answers of `qat serve` against plain transformers on the same folder: sampled, streamed, with log-probabilities."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from qat.checkpoints.hf import load_tokenizer
from qat.engines.answers import Answer, Piece, Speller, Writer, generation_config
from qat.engines.requests import Request
from qat.engines.transformers import load_packed
from tests.engines.served import running
from tests.tiny import tiny_tokenizer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPT = "The quick brown fox"
ASK = {CHAT: {"messages": [{"role": "user", "content": PROMPT}]}, TEXT: {"prompt": PROMPT}}


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    """The same export, as transformers and compressed-tensors read it without us."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model(torch.tensor([[1]]))  # dequantizes the weights
    return torch.nn.Module.float(model)  # transformers' own refuses quantized models


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


def prompt_ids(tokenizer: Any, path: str) -> Any:
    if path == TEXT:
        return tokenizer(PROMPT, return_tensors="pt")
    return tokenizer.apply_chat_template(
        ASK[CHAT]["messages"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


def choice_text(choice: dict[str, Any]) -> str:
    text: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return text


def whole(client: Any, path: str, **more: Any) -> str:
    answer = client.post(path, json={**ASK[path], "max_tokens": 12, **more})
    assert answer.status_code == 200, answer.text
    return choice_text(answer.json()["choices"][0])


def chunks(client: Any, path: str, **more: Any) -> list[dict[str, Any]]:
    answer = client.post(path, json={**ASK[path], "max_tokens": 12, **more, "stream": True})
    assert answer.status_code == 200, answer.text
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


def streamed(client: Any, path: str, **more: Any) -> str:
    pieces = [chunk["choices"][0] for chunk in chunks(client, path, **more)]
    return "".join(piece.get("text") or piece.get("delta", {}).get("content") or "" for piece in pieces)


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("ask", [whole, streamed])
def test_a_temperature_means_sampling_with_its_seed(
    client: Any, plain: Any, tokenizer: Any, path: str, ask: Any
) -> None:
    """The generation config says nothing of sampling; every choice is the one plain transformers makes."""
    inputs = prompt_ids(tokenizer, path)
    greedy = ask(client, path, temperature=0)
    for sampling in ({"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.8}, {"top_p": 0.9}, {"temperature": 1}):
        for seed in (0, 7):
            torch.manual_seed(seed)
            made = plain.generate(
                **inputs, max_new_tokens=12, do_sample=True, **{"top_k": 0, "temperature": 1.0, **sampling}
            )
            expected = tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert ask(client, path, seed=seed, **sampling) == expected != greedy
    assert len({ask(client, path, temperature=1) for _ in range(3)}) == 3  # without a seed
    assert ask(client, path) == ask(client, path, top_p=1) == ask(client, path, temperature=0, top_p=0.5) == greedy


def test_seeds_hold_when_requests_come_at_once(client: Any) -> None:
    expected = {seed: whole(client, TEXT, temperature=1, seed=seed) for seed in range(4)}
    assert len(set(expected.values())) == 4
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda i: (i % 4, whole(client, TEXT, temperature=1, seed=i % 4)), range(12))
        assert all(text == expected[seed] for seed, text in found)


SAMPLES = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}


@pytest.mark.parametrize(
    ("config", "request_says", "sample", "temperature", "top_p", "top_k"),
    [
        ({}, {}, False, 1.0, 1.0, 50),
        ({}, {"temperature": 0.5}, True, 0.5, 1.0, 0),
        ({}, {"top_p": 0.5}, True, 1.0, 0.5, 0),
        ({}, {"top_p": 1.0}, False, 1.0, 1.0, 50),
        ({}, {"temperature": 0, "top_p": 0.5}, False, 1.0, 1.0, 50),
        (SAMPLES, {}, True, 0.6, 0.9, 20),
        (SAMPLES, {"temperature": 0}, False, 1.0, 1.0, 50),
        (SAMPLES, {"temperature": 1.0}, True, 1.0, 0.9, 20),
        (SAMPLES, {"top_p": 1.0}, True, 0.6, 1.0, 20),
        ({**SAMPLES, "do_sample": False}, {"temperature": 1.0}, True, 1.0, 0.9, 20),
        ({**SAMPLES, "do_sample": False}, {"top_p": 0.5}, True, 0.6, 0.5, 20),
        ({**SAMPLES, "do_sample": False}, {}, False, 1.0, 1.0, 50),
        ({"temperature": 0.0}, {"top_p": 0.5}, False, 1.0, 1.0, 50),
        ({}, {"temperature": 2, "top_p": 1}, True, 2.0, 1.0, 0),
        (SAMPLES, {"top_k": -1}, True, 0.6, 0.9, 0),
        (SAMPLES, {"top_k": 3}, True, 0.6, 0.9, 3),
    ],
)
def test_what_a_request_leaves_open_the_generation_config_decides(
    config: dict[str, Any], request_says: dict[str, Any], sample: bool, temperature: float, top_p: float, top_k: int
) -> None:
    found = generation_config(GenerationConfig(**config), Request(False, ([1],), **request_says), 5)
    assert (found.do_sample, found.temperature, found.top_p, found.top_k) == (sample, temperature, top_p, top_k)
    assert found.max_new_tokens == 5 and isinstance(found.temperature, float)  # `generate` refuses whole numbers


def test_whole_numbers_and_neutral_values_of_vllm_s_clients(client: Any) -> None:
    """A temperature of 2, not 2.0, is what JSON makes of it in many clients."""
    for says in ({"temperature": 2}, {"temperature": 2, "top_p": 1, "top_k": 5, "min_p": 0, "repetition_penalty": 1}):
        for extra in ({}, {"ignore_eos": False, "skip_special_tokens": True, "stop_token_ids": [], "top_k": -1}):
            body = {"prompt": "The fox", "max_tokens": 3, "seed": 1, **says, **extra}
            assert client.post("/v1/completions", json=body).status_code == 200


def test_a_repetition_penalty_keeps_text_from_repeating(client: Any) -> None:
    texts = [
        client.post("/v1/completions", json={"prompt": "The fox", "max_tokens": 24, "repetition_penalty": penalty})
        for penalty in (0.01, 100)
    ]
    repeating, other = (text.json()["choices"][0]["text"] for text in texts)
    assert repeating != other


@pytest.fixture(scope="module")
def sampler(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of the same export, whose generation config samples and ends after 5 tokens."""
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("sampler") / "out")
    config = {**json.loads((copy / "generation_config.json").read_text()), **SAMPLES, "max_new_tokens": 5}
    (copy / "generation_config.json").write_text(json.dumps(config))
    with running(copy) as opened:
        yield opened


def test_a_generation_config_that_samples_is_obeyed(sampler: Any, plain: Any, tokenizer: Any) -> None:
    inputs = prompt_ids(tokenizer, TEXT)
    torch.manual_seed(5)
    made = plain.generate(**inputs, max_new_tokens=5, **SAMPLES)[0, inputs["input_ids"].shape[1] :]
    answer = sampler.post(TEXT, json={"prompt": PROMPT, "seed": 5}).json()
    assert answer["choices"][0]["text"] == tokenizer.decode(made, skip_special_tokens=True)
    assert answer["usage"]["completion_tokens"] == 5 and answer["choices"][0]["finish_reason"] == "length"
    assert len({whole(sampler, CHAT) for _ in range(3)}) == 3
    assert len({whole(sampler, CHAT, temperature=0) for _ in range(3)}) == 1


def test_streamed_text_is_whole_text_wherever_it_is_cut(client: Any) -> None:
    """A random model writes broken characters all the time, and ends in the middle of one often."""
    ends = 0
    for seed in range(30):
        more = {"temperature": 1, "seed": seed, "max_tokens": 1 + seed % 9}
        text = whole(client, TEXT, **more)
        assert streamed(client, TEXT, **more) == text
        ends += text.endswith("\ufffd")
    assert ends > 3


def answered(tokens: list[int], tokenizer: Any, ends: tuple[int, ...] = (), **more: Any) -> list[Piece]:
    """The pieces of an answer of these tokens."""
    pieces: list[Any] = []
    request = Request(False, ([1],), **more)
    answer = Answer(request, len(tokens), set(ends), tokenizer, Speller(tokenizer))
    answer.send = pieces.append
    for last in range(1, len(tokens) + 1):
        answer.logits = torch.zeros(len(tokenizer))
        if bool(answer(torch.tensor([tokens[:last]]), None).all()):
            break
    return pieces


def test_characters_of_several_tokens_are_sent_whole() -> None:
    tokenizer = tiny_tokenizer()
    text = "海水 \U0001f30a fox é"
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) > len(text)
    pieces = answered(tokens, tokenizer)
    assert "".join(piece.text for piece in pieces) == text and not any("\ufffd" in piece.text for piece in pieces)
    for cut in range(1, len(tokens)):
        pieces = answered(tokens[:cut], tokenizer)
        assert "".join(piece.text for piece in pieces) == tokenizer.decode(tokens[:cut])
        assert pieces[-1].finish == "length" and pieces[-1].written == cut


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it() -> None:
    """Also where several tokens make it, or only seem to begin it; its tokens are not told either."""
    tokenizer = tiny_tokenizer()
    tokens = tokenizer("abc#!#abc#?abc")["input_ids"]
    for stop, left in (("#?", "abc#!#abc"), ("#!#?", None), ("!", "abc#"), ("c#?a", "abc#!#ab"), ("abc", "")):
        pieces = answered(tokens, tokenizer, stop=("zz", stop), alternatives=0)
        told = [token for piece in pieces for token in piece.tokens]
        text = "".join(piece.text for piece in pieces)
        assert text == (left if left is not None else "abc#!#abc#?abc")
        assert pieces[-1].finish == ("length" if left is None else "stop")
        assert "".join(token.spelling.text for token in told)[: len(text)] == text
        assert all(token.offset < len(text) for token in told)


def test_the_token_that_ends_the_text_is_counted_but_no_part_of_it() -> None:
    tokenizer = tiny_tokenizer()
    tokens = [*tokenizer("the fox")["input_ids"], tokenizer.eos_token_id, 5]
    pieces = answered(tokens, tokenizer, ends=(tokenizer.eos_token_id,), alternatives=0)
    assert "".join(piece.text for piece in pieces) == "the fox"
    assert (pieces[-1].finish, pieces[-1].written) == ("stop", len(tokens) - 1)
    assert sum(len(piece.tokens) for piece in pieces) == len(tokens) - 2


def test_a_stop_text_over_http(client: Any) -> None:
    text = whole(client, TEXT, temperature=0, max_tokens=12)
    stop = text[3:6]
    for ask in (whole, streamed):
        assert ask(client, TEXT, temperature=0, stop=stop) == text[: text.index(stop)]
        assert ask(client, CHAT, temperature=0, stop=["~~~", stop]) is not None


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.5, "seed": 2, "frequency_penalty": 0.5}])
def test_log_probabilities_are_those_of_the_model(
    openai_client: Any, plain: Any, tokenizer: Any, sampling: dict[str, Any]
) -> None:
    """Log-softmax of plain transformers' logits, whatever temperature and penalties made of them when choosing."""
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "logprobs": 3, **sampling}
    choice = openai_client.completions.create(**asked).choices[0]
    chat = {"model": "tiny", **ASK[CHAT], "max_tokens": 8, "logprobs": True, "top_logprobs": 3, **sampling}
    message = openai_client.chat.completions.create(**chat).choices[0]
    spell = Speller(tokenizer).spell
    ids_of = {spell(i).text: i for i in range(384)}  # more than the tokenizer has
    for path, spelled, values, tops in (
        (TEXT, choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs),
        (
            CHAT,
            [token.token for token in message.logprobs.content],
            [token.logprob for token in message.logprobs.content],
            [{other.token: other.logprob for other in token.top_logprobs} for token in message.logprobs.content],
        ),
    ):
        assert len(spelled) == len(values) == 8
        written = torch.tensor([[ids_of[token] for token in spelled]])
        inputs = torch.cat([prompt_ids(tokenizer, path)["input_ids"], written], dim=1)
        with torch.no_grad():
            logprobs = plain(inputs).logits[0, -9:-1].log_softmax(-1)
        torch.testing.assert_close(torch.tensor(values), logprobs.gather(1, written.T)[:, 0], rtol=1e-4, atol=1e-4)
        for row, top in zip(logprobs, tops, strict=True):
            best = {spell(int(i)).text: float(row[i]) for i in row.topk(3).indices}
            assert best.keys() <= top.keys() and len(top) <= 4
            assert all(abs(top[token] - value) < 1e-3 for token, value in best.items())
    joined = b"".join(bytes(token.bytes) for token in message.logprobs.content)
    assert joined.decode(errors="replace") == message.message.content
    assert choice.logprobs.text_offset[0] == 0 and choice.logprobs.text_offset == sorted(choice.logprobs.text_offset)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_streamed_log_probabilities_are_the_same(client: Any, path: str) -> None:
    more = {"temperature": 1, "seed": 4, "logprobs": True if path == CHAT else 2}
    expected = client.post(path, json={**ASK[path], "max_tokens": 12, **more}).json()["choices"][0]["logprobs"]
    parts = [chunk["choices"][0]["logprobs"] or {} for chunk in chunks(client, path, **more)]
    for key, values in expected.items():
        if key != "refusal":
            assert [value for part in parts for value in part.get(key, [])] == values and len(values) == 12


def test_a_stream_counts_tokens_where_it_is_asked_to(openai_client: Any) -> None:
    found = list(
        openai_client.chat.completions.create(
            model="tiny", max_tokens=4, stream=True, stream_options={"include_usage": True}, **ASK[CHAT]
        )
    )
    assert found[-1].choices == [] and found[-1].usage.completion_tokens == 4
    assert [piece.choices[0].finish_reason for piece in found[:-1]][-1] == "length"
    assert found[0].choices[0].delta.role == "assistant" and all(piece.usage is None for piece in found[:-1])


def test_a_list_of_prompts_is_answered_in_order(openai_client: Any, client: Any, tokenizer: Any) -> None:
    prompts = [PROMPT, "dog", "A language model"]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    more: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "temperature": 1, "seed": 3}
    single = [openai_client.completions.create(prompt=prompt, **more).choices[0].text for prompt in prompts]
    assert openai_client.completions.create(prompt=ids[1], **more).choices[0].text == single[1]
    for given in (prompts, ids):
        answer = openai_client.completions.create(prompt=given, **more)
        assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(single))
        assert answer.usage.prompt_tokens == sum(map(len, ids)) and answer.usage.completion_tokens == 18
        texts = ["", "", ""]
        for piece in openai_client.completions.create(prompt=given, stream=True, **more):
            texts[piece.choices[0].index] += piece.choices[0].text
        assert texts == single


def test_penalties_are_openais(client: Any, plain: Any, tokenizer: Any) -> None:
    """Greedy with penalties, against a loop that subtracts them from plain transformers' logits."""
    for frequency, presence in ((1.5, 0.0), (0.0, 2.0), (-1.0, 0.5)):
        ids = prompt_ids(tokenizer, TEXT)["input_ids"][0].tolist()
        counts = torch.zeros(384)
        for _ in range(12):
            with torch.no_grad():
                logits = plain(torch.tensor([ids])).logits[0, -1]
            ids.append(int((logits - frequency * counts - presence * (counts > 0)).argmax()))
            counts[ids[-1]] += 1
        expected = tokenizer.decode(ids[-12:], skip_special_tokens=True)
        more = {"temperature": 0, "frequency_penalty": frequency, "presence_penalty": presence}
        assert whole(client, TEXT, **more) == expected


def test_a_failure_is_told_without_a_path_and_the_next_answer_comes(
    client: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError(f"out of memory in {folder}")

    expected = whole(client, TEXT, temperature=0)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.LlamaForCausalLM.forward", broken)
        answer = client.post(TEXT, json=ASK[TEXT])
        assert answer.status_code == 500 and "RuntimeError" in answer.json()["error"]["message"]
        events = client.post(TEXT, json={**ASK[TEXT], "stream": True}).text
        assert '"type": "server_error"' in events and events.endswith("data: [DONE]\n\n")
        assert str(folder.parent) not in answer.text + events
    assert whole(client, TEXT, temperature=0) == expected


def test_a_model_that_names_no_end_writes_to_the_limit(plain: Any, tokenizer: Any) -> None:
    before = plain.generation_config
    for given, expected in ((None, set()), (2, {2}), ([2, 5], {2, 5})):
        plain.generation_config = GenerationConfig(eos_token_id=given)
        writer = Writer(plain, tokenizer, 512)
        assert writer._ends == expected
        writer.close()
    plain.generation_config = before


def test_other_searches_of_a_generation_config_write_one_token_at_a_time(folder: Path, tokenizer: Any) -> None:
    """Beams, and drafts of several tokens a step, cannot be streamed; what is left open is not filled in again."""
    model = load_packed(folder, torch.float32)

    async def text() -> str:
        writer = Writer(model, tokenizer, 512)
        request = Request(False, ([5, 6, 7],), limit=9, temperature=0)
        pieces = [piece async for piece in writer.write([5, 6, 7], request)]
        writer.close()
        assert pieces[-1].written == 9
        return "".join(piece.text for piece in pieces)

    expected = asyncio.run(text())
    for search in ({"num_beams": 4}, {"prompt_lookup_num_tokens": 3}, {"penalty_alpha": 0.6, "top_k": 4}):
        model.generation_config = GenerationConfig(eos_token_id=2, max_length=5, **search)
        assert asyncio.run(text()) == expected
