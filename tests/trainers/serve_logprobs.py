"""A server of a model's log-probabilities, as vLLM's completions endpoint gives them, which can misbehave.

    python serve_logprobs.py

It prints its port. POST /set says what to do from here on: `folder` of the model, `most` likeliest tokens that may be
asked for, `key` that is wanted, `hang_after` so many answers, and `faults`, each of which spoils one request, in order:
a status; `cut` (the connection ends without an answer), `half` (it ends within one), `html` (another page), `slow`
(next to nothing arrives), `secret` (400, and it says the key). POST /said gives what became of each request since.
"""

import contextlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qat.checkpoints.hf import load_model, load_tokenizer

SLOW_SECONDS = 30.0


class Model:
    """What is served."""

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer = load_model(folder, torch.float32).eval(), load_tokenizer(folder)
        self.lock = threading.Lock()

    def log_p(self, ids: list[int]) -> Tensor:
        """At each position, of what follows."""
        with self.lock, torch.no_grad():
            return self.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """As the endpoint gives it."""
        prompt = asked["prompt"]
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else prompt
        said = self.log_p(ids)
        echo = bool(asked.get("echo"))
        k = asked["logprobs"] if echo else asked["prompt_logprobs"]
        if echo:
            assert asked["return_tokens_as_token_ids"]
            ids = [*ids, int(said[-1].argmax())]
        positions: list[dict[int, float] | None] = [None]
        for at, token in zip(said, ids[1:], strict=False):
            best = at.topk(k)
            named = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            positions.append({token: at[token].item(), **named})  # the prompt's own comes first, whatever its rank
        if echo:
            top = [at and {f"token_id:{token}": value for token, value in at.items()} for at in positions]
            return {"choices": [{"text": "", "logprobs": {"top_logprobs": top}}]}
        full = [at and {str(t): {"logprob": v, "rank": 1} for t, v in at.items()} for at in positions]
        return {"choices": [{"text": "", "prompt_logprobs": full}]}


@dataclass
class Settings:
    """What to do."""

    folder: str = ""
    most: int = 64
    key: str = ""
    faults: list[str] = field(default_factory=list)
    hang_after: int = -1
    said: list[str] = field(default_factory=list)

    def next(self) -> str:
        """What becomes of this request."""
        fault = self.faults.pop(0) if self.faults else ""
        if not fault and 0 <= self.hang_after <= self.said.count("answered"):
            fault = "hang"
        self.said.append(fault or "answered")
        return fault


class Handler(BaseHTTPRequestHandler):
    """One request."""

    settings = Settings()
    models: ClassVar[dict[str, Model]] = {}
    lock = threading.Lock()

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def do_POST(self) -> None:
        """Answer, or misbehave."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        settings = Handler.settings
        with Handler.lock:
            if self.path == "/set":
                Handler.settings = settings = Settings(**asked)
                if settings.folder not in Handler.models:
                    Handler.models[settings.folder] = Model(Path(settings.folder))
            if self.path in ("/set", "/said"):
                return self.give(200, settings.said)
            fault = settings.next()
        k = asked.get("prompt_logprobs") or asked.get("logprobs")
        if fault == "hang":
            time.sleep(3600)
        if self.path != "/v1/completions":
            self.give(404, {"detail": "Not Found"})
        elif settings.key and self.headers.get("Authorization") != f"Bearer {settings.key}":
            self.give(401, {"error": "Unauthorized"})
        elif fault == "secret":
            self.give(400, {"error": {"message": f"bad header {self.headers.get('Authorization')}"}})
        elif fault.isdigit():
            self.give(int(fault), {"error": {"message": "overloaded"}}, {"Retry-After": "0"})
        elif fault == "cut":
            self.close_connection = True
        elif k > settings.most:
            said = f"Requested prompt logprobs of {k}, which is greater than max allowed: {settings.most}"
            self.give(400, {"error": {"message": said, "type": "BadRequestError"}})
        else:
            self.give(200, Handler.models[settings.folder].answer(asked), fault=fault)
        return None

    def give(self, status: int, answer: Any, headers: dict[str, str] | None = None, fault: str = "") -> None:
        """Send it."""
        data = b"<html>a proxy's page</html>" if fault == "html" else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        if fault == "half":
            self.wfile.write(data[: len(data) // 2])
        elif fault == "slow":
            ends = time.monotonic() + SLOW_SECONDS
            with contextlib.suppress(OSError):
                while time.monotonic() < ends:
                    self.wfile.write(b" ")
                    time.sleep(0.1)
        else:
            self.wfile.write(data)


def main() -> None:
    """Serve until killed."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
