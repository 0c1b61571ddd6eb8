"""Tokens per second, time to the first token and memory of `qat serve`, low precision against BF16.

Every folder gets a server process of its own, all on this machine; requests with real prompts take turns between them,
so that a drifting machine hits all, and only one server works at a time. Figures are medians over the rounds; memory is
the server's peak (VmHWM) after the load. The first folder is what the others are compared with.

    python benchmarks/serving.py BF16_MODEL EXPORT [EXPORT ...] [--rounds 7] [--tokens 64] [--json FILE]

`embedded` stands for the embedded SmolLM2-135M.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from rich.progress import Progress

PROMPTS = (
    "Explain in two sentences why the sky is blue and what changes at sunset.",
    "Write a short letter to a neighbour who has lent you a ladder.",
    "What is the difference between a list and a tuple in Python, and when would you use each of them?",
    "Give three tips for growing tomatoes on a balcony, with the reason for each tip.",
)
LONG = "Summarize the following text in one sentence. " + "The river ran through the valley past the old mill. " * 40


class Server:
    """One `qat serve` process, ready to answer."""

    def __init__(self, folder: Path, name: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "qat.cli", "serve", str(folder), "--engine", "transformers"]
        self.name, self.url = name, f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [*command, "--port", str(port)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 300
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server of {name} did not start; try: qat serve {folder}")
            try:
                httpx.get(f"{self.url}/health", timeout=1).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.2)

    def ask(self, prompt: str, tokens: int) -> tuple[float, float, int]:
        """Seconds to the first piece of text, tokens per second after it, and tokens written."""
        body = {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        began, first, last, written = time.perf_counter(), 0.0, 0.0, 0
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=600) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if any(choice["delta"].get("content") for choice in chunk["choices"]):
                    last = time.perf_counter()
                    first = first or last
                written = (chunk.get("usage") or {}).get("completion_tokens", written)
        if not written:
            raise SystemExit(f"{self.name} wrote nothing to {prompt[:40]!r}")
        return first - began, (written - 1) / max(last - first, 1e-9), written

    def memory(self) -> int:
        """Peak resident bytes of the server."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait(timeout=30)


def together(server: Server, clients: int, tokens: int) -> float:
    """Tokens per second of several clients at once."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda index: server.ask(PROMPTS[index % len(PROMPTS)], tokens), range(clients)))
    return sum(written for *_, written in answers) / (time.perf_counter() - began)


def measure(servers: list[Server], rounds: int, tokens: int, clients: int) -> list[dict[str, Any]]:
    """One row per server; the first round warms up and is dropped."""
    found: dict[str, dict[str, list[float]]] = {
        server.name: {"first_s": [], "tokens_s": [], "first_long_s": [], "together_s": []} for server in servers
    }
    with Progress(transient=True, auto_refresh=False) as progress:  # draws between requests only
        task = progress.add_task("asking", total=(rounds + 1) * len(servers))
        for index in range(rounds + 1):
            for server in servers:
                progress.refresh()
                first, speed, _ = server.ask(PROMPTS[index % len(PROMPTS)], tokens)
                values = (first, speed, server.ask(LONG, 2)[0], together(server, clients, tokens))
                if index:
                    for series, value in zip(found[server.name].values(), values, strict=True):
                        series.append(value)
                progress.advance(task)
    rows: list[dict[str, Any]] = []
    for server in servers:
        medians = {key: statistics.median(series) for key, series in found[server.name].items()}
        rows.append({"name": server.name, **medians, "peak_bytes": server.memory()})
    return rows


def commit() -> str:
    """What was measured."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="a BF16 model, then exports")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64, help="to write per answer")
    parser.add_argument("--clients", type=int, default=4, help="at once, for the throughput")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    from qat.checkpoints.hf import ModelConfig, resolve

    servers = []
    try:
        for given in arguments.folders:
            folder = resolve(ModelConfig(id="embedded:smollm2-135m")) if given == "embedded" else Path(given)
            servers.append(Server(folder, "BF16" if given == "embedded" else folder.name))
        rows = measure(servers, arguments.rounds, arguments.tokens, arguments.clients)
    finally:
        for server in servers:
            server.stop()
    base = rows[0]
    clients = f"{arguments.clients} clients"
    print(f"{'':<34}{'tokens/s':>10}{'':>8}{'first token':>13}{'long prompt':>13}{clients:>11}{'peak':>9}")
    for row in rows:
        print(
            f"{row['name']:<34}{row['tokens_s']:>10.1f}{row['tokens_s'] / base['tokens_s']:>7.2f}x"
            f"{1000 * row['first_s']:>10.0f} ms{1000 * row['first_long_s']:>10.0f} ms"
            f"{row['together_s']:>9.1f}/s{row['peak_bytes'] / 1e9:>6.2f} GB"
        )
    if arguments.json:
        import torch

        from qat.engines.transformers import compute_dtype

        about = {
            "commit": commit(),
            "dtype": str(compute_dtype("auto")),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "rounds": arguments.rounds,
            "tokens": arguments.tokens,
        }
        Path(arguments.json).write_text(json.dumps({**about, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
