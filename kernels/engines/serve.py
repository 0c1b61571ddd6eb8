"""`qat serve`: an exported folder behind an OpenAI-compatible HTTP server, through an engine that already exists.

transformers' own server runs anywhere, here with packed weights; vLLM's is started where it is installed. In front of
transformers' server stands `Front` (front.py).
"""

import asyncio
import importlib.util
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from qat.checkpoints.hf import load_tokenizer, read_json
from qat.errors import CheckpointError, ConfigError
from qat.kernels.compiler import end_idle_threads
from qat.kernels.engines.front import Front
from qat.kernels.engines.transformers import METHODS, compute_dtype, installed, loading

Engine = Literal["auto", "transformers", "vllm"]
_PATIENCE = 2  # seconds that running answers have left after Ctrl-C
_LAST_TOKEN = 60  # seconds that a step of a cancelled answer may take
_NEEDED = ("fastapi", "uvicorn", "openai", "starlette")


def serve(folder: Path, engine: Engine, host: str, port: int, device: str, dtype: str) -> None:
    """Serve until interrupted.

    Raises:
        CheckpointError: no folder of a model.
        ConfigError: the engine is not installed, or there is no such port or device.
    """
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port {port}: ports are 1 to 65535")
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    if (folder / "job.yaml").is_file():
        raise CheckpointError(f"{folder} is a run; export it first: qat export {folder} OUT, then: qat serve OUT")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no model (config.json); give what `qat export` wrote, or a model")
    config = read_json(folder / "config.json")
    if engine == "auto":
        engine = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    if engine == "vllm":
        if device != "auto":
            raise ConfigError(f"--device {device} is for --engine transformers; vLLM runs on the device of its build")
        return _serve_vllm(folder, host, port, dtype)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"serving needs {', '.join(missing)}: pip install 'qat-native[serve]'")
    _check_device(device)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None and method not in METHODS:
        print(f"qat serve: {method} checkpoints are left to transformers itself", file=sys.stderr)
    _check_port(host, port)
    with installed(), loading(folder):
        server = transformers_server(folder, host, port, device, dtype)
    bind = server.startup

    async def announced(sockets: Any = None) -> None:
        await bind(sockets)  # ends the process where the port is taken
        name = folder.resolve().name
        print(f"qat serve: {name} on http://{host}:{port}/v1 (stop with Ctrl-C)", file=sys.stderr, flush=True)

    server.startup = announced
    server.run()


def transformers_server(folder: Path, host: str, port: int, device: str = "cpu", dtype: str = "auto") -> Any:
    """transformers' server (a uvicorn.Server that is not running yet) with the model loaded."""
    from transformers.cli.serve import Serve

    class Prepared(Serve):
        def start_server(self) -> None:
            """The caller does."""

    context, tokenizer, name = _context(folder), load_tokenizer(folder), folder.resolve().name
    if dtype == "auto":
        dtype = str(compute_dtype(device)).removeprefix("torch.")
    prepared: Any = Prepared(
        force_model=str(folder.resolve()), host=host, port=port, device=device, dtype=dtype, non_blocking=True
    )
    models, generations = prepared._model_manager, prepared._generation_state
    (loaded,) = models.loaded_models.values()
    models.loaded_models = {name: loaded}  # answers give this name; where the folder lies is nobody's business
    models.process_model_name, models.force_model = str, name
    manager = _stoppable()
    generations.get_manager = lambda model, use_cb=False: manager
    prepared.server.config.timeout_graceful_shutdown = _PATIENCE
    prepared.server.config.app.add_middleware(Front, tokenizer=tokenizer, context=context, name=name)
    run = prepared.server.run

    def to_the_end(sockets: Any = None) -> None:
        try:
            run(sockets)
        finally:  # Python must not end under a thread that computes
            manager.submit(lambda: None).result(timeout=_LAST_TOKEN)

    prepared.server.run = to_the_end
    end_idle_threads()  # from here on, only the generating thread computes
    return prepared.server


def _stoppable() -> Any:
    """transformers' thread for one generation after the other, which stops writing an answer that nobody waits for."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList
    from transformers.cli.serving.utils import GenerateManager

    class Left(StoppingCriteria):
        def __init__(self) -> None:
            self.left = threading.Event()

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), self.left.is_set(), dtype=torch.bool, device=input_ids.device)

    class Stoppable(GenerateManager):
        def async_submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            client = Left()
            made = super().async_submit(fn, *args, **kwargs, stopping_criteria=StoppingCriteriaList([client]))
            answer = asyncio.shield(made)  # the thread sets `made` when it stops, cancelled or not
            answer.add_done_callback(lambda done: client.left.set() if done.cancelled() else None)
            return answer

    return Stoppable()


def _context(folder: Path) -> int:
    config = read_json(folder / "config.json")
    keys = ("max_position_embeddings", "n_positions")
    found = [part.get(key) for part in (config, config.get("text_config") or {}) for key in keys]
    for value in found:
        if isinstance(value, int):
            return value
    raise CheckpointError(f"{folder / 'config.json'} says neither {' nor '.join(keys)}, the longest text")


def _check_port(host: str, port: int) -> None:
    """Before a model is loaded for minutes."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port} ({error.strerror or error}); try another --port") from error


def _check_device(device: str) -> None:
    import torch

    try:
        device == "auto" or torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error


def _serve_vllm(folder: Path, host: str, port: int, dtype: str) -> None:
    """Becomes vLLM's server, so that signals reach it; our plugin is found through its entry point."""
    import os

    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("--engine vllm needs vLLM: pip install vllm, or use --engine transformers")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", folder.resolve().name, "--host", host, "--port", str(port)]
    command += ["--dtype", dtype]
    print(f"qat serve: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    os.execv(sys.executable, command)
