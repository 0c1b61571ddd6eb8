"""`qat serve`: an exported folder behind an OpenAI-compatible HTTP server, through an engine that already exists.

vLLM's server is started where vLLM is installed. Elsewhere transformers' `generate` writes the answers, from packed
weights: requests.py says what may be asked, answers.py has it written, replies.py shapes it, front.py speaks HTTP.
"""

import importlib.util
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from qat.checkpoints.hf import load_tokenizer, read_json
from qat.checkpoints.layouts.caches import says_nothing
from qat.checkpoints.layouts.compressed_tensors.transforms import KEY
from qat.checkpoints.peft import adapter_of, rank_of
from qat.checkpoints.positions import most_positions
from qat.engines import llama_cpp
from qat.engines.prompts import asked
from qat.engines.transformers import METHODS, load_packed
from qat.errors import CheckpointError, ConfigError
from qat.kernels.compiler import end_idle_threads

Engine = Literal["auto", "transformers", "vllm", "llama.cpp"]
BASE = "-base"  # after the name of a packed model that is served with an adapter beside it
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that its --max-lora-rank takes
_ENDLESS = 1 << 20  # tokens of a text, where the model does not limit it (ALiBi, recurrence)
_PATIENCE = 2  # seconds that running answers have left after Ctrl-C


def serve(
    folder: Path,
    engine: Engine,
    host: str,
    port: int,
    device: str,
    dtype: str,
    names: Sequence[str] = (),
    prompt_attention: str | None = None,
) -> None:
    """Serve until interrupted.

    Args:
        folder: of an exported checkpoint or a plain model.
        engine: what computes; auto takes vLLM where it is installed, unless the checkpoint asks for rotated inputs.
        host: address to listen on.
        port: to listen on.
        device: where the model runs.
        dtype: of the activations.
        names: of the model in requests, the first in answers too; the folder as it is given by default.
        prompt_attention: "int8" for INT8 products in prompts (`qat.engines.prompts`), with the engine transformers.

    Raises:
        CheckpointError: no folder of a model.
        ConfigError: the engine is not installed, or there is no such port or device.
    """
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port {port}: ports are 1 to 65535")
    if not all(names):
        raise ConfigError("--served-model-name is empty; give a name, or leave it out")
    if prompt_attention is not None and (folder.suffix == ".gguf" or engine != "transformers"):
        raise ConfigError(f"--prompt-attention {prompt_attention} goes with --engine transformers, and no .gguf file")
    if folder.suffix == ".gguf" or engine == "llama.cpp":
        return _serve_llama_cpp(folder, engine, names or [str(folder)], host, port)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    if (folder / "job.yaml").is_file():
        raise CheckpointError(f"{folder} is a run; export it first: qat export {folder} OUT, then: qat serve OUT")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no model (config.json); give what `qat export` wrote, or a model")
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config") or {}
    if engine == "auto":  # vLLM rotates on CUDA only, and more coarsely than was trained
        exact = says_nothing(quantization.get(KEY))
        engine = "vllm" if exact and importlib.util.find_spec("vllm") else "transformers"
    if engine == "vllm":
        if device != "auto":
            raise ConfigError(f"--device {device} is for --engine transformers; vLLM runs on the device of its build")
        return _serve_vllm(folder, names or [str(folder)], host, port, dtype)
    if importlib.util.find_spec("uvicorn") is None:
        raise ConfigError("serving needs uvicorn: pip install 'qat-native[serve]'")
    _check_device(device)
    method = quantization.get("quant_method")
    if method is not None and method not in METHODS:
        print(f"qat serve: {method} checkpoints are left to transformers itself", file=sys.stderr)
    _check_port(host, port)
    print(f"qat serve: loading {folder}", file=sys.stderr, flush=True)
    transformers_server(folder, names or [str(folder)], host, port, device, dtype, asked(prompt_attention)).run()


def transformers_server(
    folder: Path,
    names: Sequence[str],
    host: str,
    port: int,
    device: str = "cpu",
    dtype: str = "auto",
    prepare: Callable[[Any], None] | None = None,
) -> Any:
    """The server of `--engine transformers` (a uvicorn.Server that is not running yet), the model loaded."""
    import torch
    import uvicorn

    from qat.engines.answers import Writer
    from qat.engines.cache import quantized_cache
    from qat.engines.front import Front
    from qat.engines.requests import Reader

    tokenizer = load_tokenizer(folder)
    tokenizer.model_max_length = sys.maxsize  # the reader refuses what is too long, and no library warns of it
    model = load_packed(folder, None if dtype == "auto" else getattr(torch, dtype), device)
    if prepare is not None:
        prepare(model)
    if (cache := quantized_cache(model)) is not None:
        print(f"qat serve: {cache.cost}", file=sys.stderr, flush=True)
    context = most_positions(model) or _ENDLESS
    writer = Writer(model, tokenizer, context)
    reader = Reader(tokenizer, context, model.config.get_text_config().vocab_size, names)

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)  # ends the process where the port is taken
            address = f"{' or '.join(names)} on http://{host}:{port}/v1"
            print(f"qat serve: {address} (stop with Ctrl-C)", file=sys.stderr, flush=True)

        def run(self, sockets: Any = None) -> None:
            try:
                super().run(sockets)
            finally:
                writer.close()

    end_idle_threads()  # from here on, only the writer's thread computes
    config = uvicorn.Config(
        Front(reader, writer), host=host, port=port, lifespan="off", timeout_graceful_shutdown=_PATIENCE
    )
    return Server(config)


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


def _serve_vllm(folder: Path, names: Sequence[str], host: str, port: int, dtype: str) -> None:
    """Becomes vLLM's server, so that signals reach it; our plugin is found through its entry point."""
    import os

    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("--engine vllm needs vLLM: pip install vllm, or use --engine transformers")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    adapter = adapter_of(folder)
    if adapter is not None:
        command += _with_adapter(names, adapter)
        names = [f"{name}{BASE}" for name in names]
    command += ["--served-model-name", *names, "--host", host, "--port", str(port), "--dtype", dtype]
    print(f"qat serve: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    os.execv(sys.executable, command)


def _serve_llama_cpp(file: Path, engine: Engine, names: Sequence[str], host: str, port: int) -> None:
    if not file.is_file() or engine not in ("auto", llama_cpp.NAME):
        raise ConfigError(
            f"{file}: --engine llama.cpp serves a .gguf file, and nothing else does; give both, or neither"
        )
    llama_cpp.serve(file, names, host, port)


def _with_adapter(names: Sequence[str], adapter: Path) -> list[str]:
    """Options of vLLM that serve the adapter under the model's names; the packed model itself gets others."""
    rank = rank_of(adapter)
    largest = next((most for most in VLLM_RANKS if most >= rank), None)
    if largest is None:
        raise ConfigError(f"{adapter}: rank {rank} is more than vLLM serves ({VLLM_RANKS[-1]}); --engine transformers")
    modules = [f"{name}={adapter}" for name in names]
    slots = str(len(modules))
    return ["--enable-lora", "--max-lora-rank", str(largest), "--max-loras", slots, "--lora-modules", *modules]
