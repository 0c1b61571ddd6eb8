"""What each command of `qat` takes: its arguments, their defaults and their help. What it then does stands in `cli`."""

import argparse
from pathlib import Path


def path(text: str) -> Path:
    """A path as typed; shells leave `~` alone in quotes and behind `=`."""
    return Path(text).expanduser()


def train(parser: argparse.ArgumentParser) -> None:
    """`qat train`."""
    parser.add_argument("config", help="YAML file of the run: model, rules, text, steps (start from one in configs/)")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="change single keys: steps=200 optim.lr=3e-4 name=hotter"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run from its last saved state, exactly; "
                        "only steps= may grow, devices= and strategy= change, models and texts move")  # fmt: skip
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be quantized, how much memory and time it takes, and what "
        "export will refuse; load and train nothing",
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document on stdout")


def teacher(parser: argparse.ArgumentParser) -> None:
    """`qat teacher`."""
    parser.add_argument("config", help="YAML file of the run; its texts with source: teacher, or parts of a mix, are "
                        "written now, its teacher_cache is filled (by its weights, or with teacher_cache.remote by a "
                        "server), and qat train with the same file then starts at once")  # fmt: skip
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="a.b=c",
        help="change single keys: data.source=teacher data.generate.chats=0.5 (half the documents are chats in the "
        "model's own template, if it has one) data.seed=1 (other text) teacher_cache.remote.concurrency=16 "
        "(requests at once; its key is read from the environment variable that teacher_cache.remote.key_env names); "
        "give qat train the same ones",
    )
    parser.add_argument("--json", action="store_true", help="print folders, counts and samples as one JSON document")


def export(parser: argparse.ArgumentParser) -> None:
    """`qat export`."""
    parser.add_argument("trained", type=path, metavar="RUN", help="folder of a run: runs/NAME")
    parser.add_argument("out", type=path, metavar="OUT", help="folder to write; must not exist, or be empty "
                         "(a name that ends in .gguf with --target gguf)")  # fmt: skip
    layouts = (
        "file layout: compressed-tensors, modelopt, fp8, mxfp4, ascend or gguf (default: %(default)s); see "
        "docs/export.md"
    )
    parser.add_argument("--target", default="compressed-tensors", help=layouts)
    parser.add_argument(
        "--checkpoint",
        default="best",
        help="which of RUN/checkpoints: best (default) is the student with the lowest held-out KL",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if an export wrote it")
    tables = "pack quantized embeddings, once with a head tied to them; few engines read that, see docs/export.md"
    parser.add_argument("--pack-tables", action="store_true", help=tables)
    moved(parser)


def moved(parser: argparse.ArgumentParser) -> None:
    """Of the commands that read a run."""
    parser.add_argument("--model", metavar="PATH", help="where the model that a run was made from is now, if it moved")


def verify(parser: argparse.ArgumentParser) -> None:
    """`qat verify`."""
    parser.add_argument("folder", type=path, metavar="DIR", help="an exported checkpoint, or a .gguf file")
    parser.add_argument(
        "--no-logits",
        action="store_true",
        help="compare files only; do not load it in plain transformers and compare logits",
    )
    engines = ("vllm-ascend", "sglang-ascend", "mindie")
    parser.add_argument("--engine", choices=engines, help="an engine on Ascend NPUs: whether it loads every layer, "
                        "and its operators, simulated, compute what was trained")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")


def convert(parser: argparse.ArgumentParser) -> None:
    """`qat convert`."""
    parser.add_argument("folder", type=path, metavar="DIR", help="an exported checkpoint")
    parser.add_argument("out", type=path, metavar="OUT", help="folder to write; must not exist, or be empty")
    orders = "one for codes, one for scales, or both: see docs/ascend_layouts.md; anything else stays in plain order"
    parser.add_argument("--layout", nargs="+", required=True, metavar="NAME", help=orders)
    parser.add_argument("--json", action="store_true", help="print the description of the blobs")


def evaluate(parser: argparse.ArgumentParser) -> None:
    """`qat eval`."""
    parser.add_argument("folder", type=path, metavar="DIR", help="a run, an exported checkpoint, or a plain model")
    parser.add_argument("--teacher", help="model to compare with (default: what DIR was made from)")
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="what to measure on: files, as data.source (default: the shipped prose)",
    )
    moved(parser)
    parser.add_argument(
        "--tokens",
        type=int,
        default=8192,
        help="how much of it; below 4096, a few per cent are noise (default: %(default)s)",
    )
    parser.add_argument("--activation-rule", choices=("vllm", "compressed_tensors", "ascend", "ascend_310p"),
                        help="of an export: whose arithmetic inputs follow (default: its engine's)")  # fmt: skip
    _prompts(parser)
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="lm-eval tasks (pip install 'qat-native[eval]')")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")


def _prompts(parser: argparse.ArgumentParser) -> None:
    """Of the commands that read prompts."""
    parser.add_argument("--prompt-attention", choices=("int8",), help="multiply the queries and keys of prompts as "
                        "INT8 codes (SageAttention's way; docs/serve.md): faster on GPUs, other numbers")  # fmt: skip


def generate(parser: argparse.ArgumentParser) -> None:
    """`qat generate`."""
    parser.add_argument("folder", type=path, metavar="DIR",
                        help="a run, an exported checkpoint, a .gguf file, or a plain model")  # fmt: skip
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--engine", choices=("auto", "qat", "llama.cpp"), default="auto",
                        help="for a .gguf file; auto takes llama.cpp if installed (default: %(default)s)")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=64, help="most tokens to write (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default), else 0.01 to 100")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    _prompts(parser)
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    moved(parser)
    parser.add_argument(
        "--dense",
        action="store_true",
        help="unpack an export's weights once, as `qat eval` does: more memory, no kernels",
    )


def serve(parser: argparse.ArgumentParser) -> None:
    """`qat serve`."""
    parser.add_argument("folder", metavar="DIR", help="an exported checkpoint, a .gguf file, or a plain model")
    parser.add_argument("--served-model-name", action="append", metavar="NAME",
                        help="what requests call the model (default: DIR as given); may be repeated")  # fmt: skip
    parser.add_argument("--engine", choices=("auto", "transformers", "vllm", "llama.cpp"), default="auto",
                        help="auto: llama.cpp for .gguf files, vLLM if installed (default: %(default)s)")  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"),
                        help="of the activations; auto takes BF16 where it is fast")  # fmt: skip
    _prompts(parser)


def formats(parser: argparse.ArgumentParser) -> None:
    """`qat formats`."""
    parser.add_argument("--json", action="store_true", help="print the catalogue as JSON")


def kernels(parser: argparse.ArgumentParser) -> None:
    """`qat kernels`."""
    parser.add_argument(
        "--tokens",
        type=int,
        default=1,
        help="rows of the input: 1 is decoding, many is a prompt (default: %(default)s)",
    )
    parser.add_argument("--rows", type=int, default=4096, help="of the weight (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=4096, help="of the weight (default: %(default)s)")
    parser.add_argument("--input", metavar="FORMAT", help="of quantized inputs (default: inputs in 16 bits)")
    parser.add_argument("--training", action="store_true", help="explain what runs in `qat train` instead")
    parser.add_argument("--json", action="store_true", help="print the answers as JSON")


def analyze(parser: argparse.ArgumentParser) -> None:
    """`qat analyze`."""
    parser.add_argument("model", metavar="MODEL|CONFIG", help="a folder, hub id, .gguf file or embedded:smollm2-135m; "
                        "or a run's YAML file, to measure what its scheme costs each layer")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="with CONFIG: change single keys")
    formats = "candidates (default: 4 bits in groups and 8 bits per channel; names: qat formats)"
    parser.add_argument("--formats", type=lambda text: text.split(","), default=[], metavar="A,B,...", help=formats)
    parser.add_argument("--tokens", type=int, metavar="N", help="with CONFIG: of text (default: 512)")
    parser.add_argument("--all-but", action="store_true", help="with CONFIG: KL saved by leaving one set of layers "
                        "unquantized, not that of quantizing it alone")  # fmt: skip
    parser.add_argument("--no-kl", action="store_true", help="with CONFIG: only the scores that one pass gives")
    parser.add_argument("--most", type=int, default=20, metavar="N", help="weights to print (default: %(default)s)")
    parser.add_argument("--out", type=path, metavar="DIR", help="also write the numbers as JSON, and plots, there")
    parser.add_argument("--json", action="store_true", help="print all weights as JSON")


def assign(parser: argparse.ArgumentParser) -> None:
    """`qat assign`."""
    parser.add_argument("config", help="YAML file of a run, whose layers get formats of their own")
    parser.add_argument("out", type=path, metavar="OUT.yaml", help="the same run with rules for them")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="change single keys of CONFIG")
    parser.add_argument("--bits", type=float, metavar="B", help="budget per weight of the layers that CONFIG quantizes")
    parser.add_argument("--bytes", type=int, metavar="N", help="budget of all weights of the model instead")
    parser.add_argument("--formats", type=lambda text: text.split(","), default=[], metavar="A,B/C,...",
                        help="WEIGHT, WEIGHT/INPUT or bf16 (default: CONFIG's own, 8 bits and bf16)")  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=512, metavar="N", help="of calibration text (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the choice as JSON")
