"""A teacher behind a socket, against the same model in this process; what can pass is tried again, else it is said."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from qat.checkpoints.hf import load_model
from qat.errors import CheckpointError, ConfigError
from qat.trainers import remote
from qat.trainers.logitcache import TeacherCache
from qat.trainers.remote import Remote, Server, Stopped, key_of, prompts
from qat.training.known import Known, likeliest
from qat.training.losses import IGNORE
from tests.tiny import VOCABULARY, tiny_model
from tests.trainers.served import Served, serving

SIZES = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
K = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("models") / "teacher", seed=1, **SIZES)


@pytest.fixture(scope="module")
def started(model: Path) -> Iterator[Served]:
    with serving(model) as served:
        yield served


@pytest.fixture
def server(started: Served) -> Served:
    return started.set()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)


def asking(url: str, **changes: Any) -> Server:
    return Server(Remote(url=url, model="some/teacher", **{"timeout": 60, **changes}), K, VOCABULARY)


def row() -> Any:
    """Two documents and padding; some of each is not learned."""
    rng = np.random.default_rng(0)
    made = np.full((3, 20), -1, np.int32)
    made[0] = rng.integers(3, VOCABULARY, 20)
    made[1] = IGNORE
    made[1, :8] = made[0, 1:9]  # cut here: the row ends before the document does
    made[1, 2:5] = IGNORE
    made[1, 9:15] = made[0, 10:16]
    made[2, :9], made[2, 9:17] = 0, 1
    return made


def in_this_process(model: Path, given: Any) -> Known:
    """Document by document."""
    own, parts = load_model(model, torch.float32).eval(), []
    for number in (0, 1):
        place = given[2] == number
        with torch.no_grad():
            logits = own(input_ids=torch.from_numpy(given[0][place]).long()[None]).logits[0]
        parts.append(logits[torch.from_numpy(given[1][place] != IGNORE)])
    return likeliest(torch.cat(parts), K)


def test_prompts_are_the_documents_up_to_what_is_learned() -> None:
    given = row()
    (first, at_first), (second, at_second) = prompts(given)
    assert first == [*given[0, :8].tolist(), given[1, 7]] and at_first == [1, 2, 6, 7, 8]
    assert second == given[0, 9:16].tolist() and at_second == [1, 2, 3, 4, 5, 6]
    given[1] = IGNORE
    assert not list(prompts(given))


@pytest.mark.parametrize("ask", ["prompt_logprobs", "echo"])
def test_what_it_says_is_what_the_model_says(server: Served, model: Path, ask: str) -> None:
    found, expected = asking(server.url, ask=ask).row(row()), in_this_process(model, row())
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.log_p, expected.log_p, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.tail, expected.tail, rtol=1e-4, atol=1e-5)


def test_of_a_small_vocabulary_all_is_said(server: Served) -> None:
    found = Server(Remote(url=server.url, model="m"), 1000, 20)
    assert found.k == 20


@pytest.mark.parametrize("fault", ["500", "429", "503", "cut", "half", "html", "slow"])
def test_what_can_pass_is_tried_again(server: Served, model: Path, fault: str) -> None:
    server.set(faults=[fault, fault])
    found, expected = asking(server.url, retries=2, timeout=2).row(row()), in_this_process(model, row())
    assert torch.equal(found.ids, expected.ids)
    assert server.said == [fault, fault, "answered", "answered"]


def test_not_for_ever(server: Served) -> None:
    server.set(faults=["500"] * 9)
    with pytest.raises(CheckpointError, match="did not answer in 3 tries, the last time: 500 overloaded"):
        asking(server.url, retries=2).row(row())
    assert server.said == ["500"] * 3
    with pytest.raises(CheckpointError, match=r"did not answer in 1 tries, the last time: .*refused"):
        asking("http://127.0.0.1:1/v1", retries=0).row(row())


def test_what_cannot_pass_is_said_at_once(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    server.set(most=5, key="s3cret-key")
    monkeypatch.setenv("SOME_KEY", " s3cret-key\n")
    with pytest.raises(CheckpointError, match=r"refuses: 401 Unauthorized; .*key_env names the environment"):
        asking(server.url).row(row())
    teacher = asking(server.url + "/", key_env="SOME_KEY")
    with pytest.raises(CheckpointError, match=r"400 Requested prompt logprobs of 8, .* --max-logprobs 8"):
        teacher.row(row())
    assert len(server.said) == 2  # nothing was tried twice
    server.set(key="s3cret-key", faults=["secret"])
    with pytest.raises(CheckpointError, match=r"400 bad header Bearer \*\*\*") as caught:
        teacher.row(row())
    assert "s3cret-key" not in str(caught.value)
    assert teacher.row(row()).ids.shape == (11, K)
    with pytest.raises(CheckpointError, match="refuses: 404 Not Found"):
        asking(server.url + "/v2", key_env="SOME_KEY").row(row())


def test_a_stop_does_not_wait_for_answers(server: Served) -> None:
    server.set(hang_after=0)
    teacher = asking(server.url, timeout=600)
    ended: list[float] = []

    def ask() -> None:
        with pytest.raises(Stopped):
            teacher.row(row())
        ended.append(time.monotonic())

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    server.wait("hang", 3)
    begin = time.monotonic()
    teacher.stop()
    for thread in threads:
        thread.join(20)
    assert len(ended) == 3 and max(ended) - begin < 10
    with pytest.raises(Stopped):
        teacher.row(row())


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"choices": [{"text": "x"}]}, "does not say how likely"),
        ({"choices": [{"prompt_logprobs": [None]}]}, "answered for 1 of 9 tokens"),
        ({"choices": [{"prompt_logprobs": [None, *[{"3": {"logprob": -1.0}}] * 9]}]}, "names 1 tokens at a position"),
        ({"choices": [{"prompt_logprobs": [None, *[{str(i): {"logprob": -9.0} for i in range(399, 390, -1)}] * 9]}]},
         f"names token 399, and teacher and student have {VOCABULARY}"),
        ({"choices": [{"prompt_logprobs": [None, *[{str(i): {"logprob": -0.1} for i in range(9)}] * 9]}]},
         "must give log-probabilities"),
    ],
)  # fmt: skip
def test_answers_that_are_none_are_named(answer: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = asking("http://localhost:1/v1")
    monkeypatch.setattr(teacher, "_post", lambda _: answer)
    with pytest.raises(CheckpointError, match=said):
        teacher.row(row())


def test_tokens_named_by_their_text_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = asking("http://localhost:1/v1", ask="echo")
    monkeypatch.setattr(teacher, "_post", lambda _: {"choices": [{"logprobs": {"top_logprobs": [None, {"a": -1.0}]}}]})
    with pytest.raises(CheckpointError, match="names tokens by their text, as 'a'"):
        teacher.row(row())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "http://teacher.example/v1"}, "would get the text and the key unencrypted"),
        ({"url": "http://localhost.example/v1"}, "unencrypted"),
        ({"url": "ftp://teacher.example/v1"}, "give http"),
        ({"url": "https://teacher.example:port/v1"}, "give http"),
        ({"url": "https://teacher.example/v1?key=1"}, "without anything after the path"),
        ({"url": "https://user:secret@teacher.example/v1"}, "no key and no password in it"),
        ({"url": "https://teacher.example/v1", "key_env": "sk-1234"}, "key_env"),
    ],
)
def test_addresses_that_are_not_safe_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Remote(model="m", **settings)


@pytest.mark.parametrize("url", ["https://teacher.example/v1", "http://127.0.0.1:8000/v1", "http://[::1]:8000/v1"])
def test_addresses_that_are_safe(url: str) -> None:
    assert Remote(model="m", url=url).url == url
    assert Remote(model="m", url="http://teacher.example/v1", insecure=True).insecure


def test_a_key_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Remote(model="m", url="https://teacher.example/v1", key_env="SOME_KEY")
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match="environment variable SOME_KEY is not set"):
        key_of(config)
    monkeypatch.setenv("SOME_KEY", "s3\ncret")
    with pytest.raises(ConfigError, match="characters that no key has") as caught:
        key_of(config)
    assert "cret" not in str(caught.value)


def test_a_server_says_what_is_likeliest_and_nothing_else() -> None:
    asked = {"url": "https://teacher.example/v1", "model": "m"}
    assert TeacherCache.model_validate({"remote": asked}).kind == "topk"
    with pytest.raises(ValidationError, match="kind hybrid draws from all"):
        TeacherCache.model_validate({"remote": asked, "kind": "hybrid"})
