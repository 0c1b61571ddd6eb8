"""The `qat` command: the one place that may import every part, each only when its command runs.

Results go to stdout (with `--json`, one JSON document and nothing else); progress and warnings go to stderr. A
QatError, or an error of the operating system, ends the command with one readable message and exit status 2, never with
a traceback.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qat.errors import ConfigError, Interrupted, QatError
from qat.terminal import (
    import_library,
    os_error,
    print_anything,
    quiet_libraries,
    refuse_bytes,
    unbreakable_stderr,
    warned,
)

DESCRIPTION = """Train a model in the numbers it will be served in.

  qat train configs/quickstart.yaml               distil the BF16 model into its quantized self
  qat export runs/quickstart OUT                  write a native low-precision checkpoint
  qat verify OUT                                  prove that the files are the trained model, bit for bit
  qat generate OUT "Once upon a time"             try it
  qat serve OUT                                   OpenAI-compatible, on http://127.0.0.1:8000
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    print_anything()
    with unbreakable_stderr():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse stops taking overrides at the first option: `--resume steps=200`
        arguments.overrides += rest
    quiet_libraries()
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, category, *_: f"qat {arguments.command}: {warned(message, category)}\n"
    try:
        refuse_bytes(sys.argv[1:] if argv is None else argv)
        import_library("torch")  # which every command needs
        run: Callable[[argparse.Namespace], int | None] = arguments.run
        return run(arguments) or 0
    except QatError as error:
        print(f"qat {arguments.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"qat {arguments.command}: {os_error(error)}", file=sys.stderr)
        return 2
    except Interrupted as error:
        return int(error.code or 0)
    except KeyboardInterrupt:
        print(f"qat {arguments.command}: interrupted", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = before


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="qat", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add, run, summary) in COMMANDS.items():
        sub = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        add(sub)
        sub.set_defaults(run=run)
    return parser


def _path(text: str) -> Path:
    """A path as typed; shells leave `~` alone in quotes and behind `=`."""
    return Path(text).expanduser()


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


# --- train ----------------------------------------------------------------------------------------


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file of the run (see configs/)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="change a value: steps=200 optim.lr=3e-4")
    parser.add_argument("--resume", action="store_true", help="continue the run from its last saved state, exactly; "
                        "only steps= may grow, and models, texts and the run's folder may have moved")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print coverage, memory and time; train nothing")
    parser.add_argument("--json", action="store_true", help="print the report as JSON on stdout")


def _train(arguments: argparse.Namespace) -> None:
    from qat.trainers.job import load_job

    job = load_job(arguments.config, arguments.overrides)
    if arguments.dry_run:
        from qat.trainers.estimate import estimate
        from qat.trainers.estimate_table import print_estimate

        found = estimate(job)
        if arguments.json:
            _print_json(found.to_dict())
        else:
            from rich.console import Console

            print_estimate(found, Console())
        return
    from qat.kernels.load import load_for_training
    from qat.trainers.run import train

    load_for_training()
    report = train(job, resume_run=arguments.resume, table=not arguments.json)
    if arguments.json:
        _print_json(report)


# --- export and verify ------------------------------------------------------------------------------


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trained", type=_path, metavar="RUN", help="folder of a run")
    parser.add_argument("out", type=_path, metavar="OUT", help="folder to write; must not exist, or be empty")
    layouts = "file layout: compressed-tensors, modelopt or fp8 (default: %(default)s); see docs/export.md"
    parser.add_argument("--target", default="compressed-tensors", help=layouts)
    parser.add_argument("--checkpoint", default="best", help="which of the run's checkpoints (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if an export wrote it")
    _add_moved(parser)


def _add_moved(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH", help="where the model that a run was made from is now, if it moved")


def _export(arguments: argparse.Namespace) -> None:
    from qat.checkpoints.export import export

    out = export(
        arguments.trained,
        arguments.out,
        arguments.target,
        overwrite=arguments.overwrite,
        checkpoint=arguments.checkpoint,
        moved=arguments.model,
    )
    size = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    print(f"{out}: {size / 1e6:.1f} MB of weights for {arguments.target}; check it with: qat verify {out}")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=_path, metavar="DIR", help="an exported checkpoint")
    parser.add_argument("--no-logits", action="store_true", help="skip loading it in plain transformers")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")


def _verify(arguments: argparse.Namespace) -> int:
    from qat.checkpoints.verify import verify

    report = verify(arguments.folder, logits=not arguments.no_logits)
    if arguments.json:
        _print_json(report.to_dict())
    else:
        for check in report.checks:
            print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}")
        print("all checks passed" if report.ok else "the checkpoint does NOT pass")
    return 0 if report.ok else 1


# --- eval and generate ------------------------------------------------------------------------------


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=_path, metavar="DIR", help="a run, an exported checkpoint, or a plain model")
    parser.add_argument("--teacher", help="model to compare with (default: what DIR was made from)")
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", help="text, as data.source (default: the shipped held-out text)"
    )
    _add_moved(parser)
    parser.add_argument("--tokens", type=int, default=8192, help="how much text to read (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="lm-eval tasks (pip install 'qat-native[eval]')")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")


def _eval(arguments: argparse.Namespace) -> None:
    from qat.trainers.inspect import evaluate_folder

    texts, tasks = arguments.text or [], arguments.tasks or []
    found = evaluate_folder(
        arguments.folder, arguments.teacher, texts, arguments.tokens, tasks, arguments.model, arguments.device
    )
    if arguments.json:
        _print_json(found)
        return
    for row in found["rows"]:
        kl = "" if row["kl"] is None else f"  KL to teacher {row['kl']:.4f}  top-1 agreement {row['top1']:.1%}"
        ppl = "beyond measure" if row["ppl"] is None else f"{row['ppl']:.2f}"
        print(f"{row['name']}: NLL {row['nll']:.4f}  perplexity {ppl}{kl}  ({row['tokens']} tokens)")
    for task, metrics in found.get("tasks", {}).items():
        print(f"{task}: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=_path, metavar="DIR", help="a run, an exported checkpoint, or a plain model")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens to write (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default), else 0.01 to 100")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    _add_moved(parser)
    parser.add_argument("--dense", action="store_true", help="unpack an export's weights once, as `qat eval` does")


def _generate(arguments: argparse.Namespace) -> None:
    from qat.trainers.inspect import generate

    if arguments.tokens < 1:
        raise ConfigError(f"--tokens {arguments.tokens} must be positive")
    if arguments.temperature != 0 and not 0.01 <= arguments.temperature <= 100:
        raise ConfigError(f"--temperature {arguments.temperature}: 0 (greedy), or a number from 0.01 to 100")
    if not 0 <= arguments.seed < 1 << 63:
        raise ConfigError(f"--seed {arguments.seed}: a whole number from 0, of 63 bits")
    if not arguments.prompt:
        raise ConfigError("the prompt is empty; give a text to continue")
    from qat.engines.cache import quantized_cache
    from qat.engines.transformers import load_packed
    from qat.trainers.memory import keep_freed_blocks

    keep_freed_blocks()
    generate(
        arguments.folder,
        arguments.prompt,
        arguments.tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        chat=arguments.chat,
        device=arguments.device,
        load_export=None if arguments.dense else load_packed,
        make_cache=quantized_cache,
        moved=arguments.model,
    )


# --- serve ------------------------------------------------------------------------------------------


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="an exported checkpoint, or a plain model")
    parser.add_argument("--served-model-name", action="append", metavar="NAME",
                        help="what requests call the model (default: DIR as given); may be repeated")  # fmt: skip
    parser.add_argument("--engine", choices=("auto", "transformers", "vllm"), default="auto",
                        help="auto takes vLLM where it is installed (default: %(default)s)")  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"),
                        help="of the activations; auto takes BF16 where it is fast")  # fmt: skip


def _serve(arguments: argparse.Namespace) -> None:
    from qat.engines.serve import serve
    from qat.trainers.memory import keep_freed_blocks

    keep_freed_blocks()
    serve(
        _path(arguments.folder),
        arguments.engine,
        arguments.host,
        arguments.port,
        arguments.device,
        arguments.dtype,
        arguments.served_model_name or [arguments.folder],
    )


# --- formats ----------------------------------------------------------------------------------------


def _add_formats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the catalogue as JSON")


def _formats(arguments: argparse.Namespace) -> None:
    from qat.numbers.catalog import CATALOG

    rows = [
        {
            "name": fmt.name,
            "element": " or ".join(element.name for element in fmt.elements),
            "max": fmt.element.max,
            "block": list(fmt.block),
            "scale": fmt.scale,
            "scale_rule": fmt.scale_rule,
            "global_scale": fmt.global_scale,
            "zero_point": fmt.zero_point,
            "bits_per_weight": round(fmt.bits_per_weight(4096, 4096), 4),
            "source": fmt.source,
        }
        for fmt in CATALOG.values()
    ]
    if arguments.json:
        _print_json(rows)
        return
    print(f"{'name':<20}{'element':<20}{'largest':>8}  {'block':<14}{'scale':<16}{'bits/weight':>11}")
    for row in rows:
        block = "x".join(str(n) if n else "all" for n in row["block"])  # type: ignore[attr-defined]  # a list here
        scale = f"{row['scale']} {row['scale_rule']}"
        extra = " +tensor scale" if row["global_scale"] else " +zero point" if row["zero_point"] else ""
        print(
            f"{row['name']:<20}{row['element']:<20}{row['max']:>8.4g}  {block:<14}{scale:<16}"
            f"{row['bits_per_weight']:>11.3f}{extra}"
        )
    print("\nblock: rows x columns that share a scale; bits/weight with scales, for a 4096 x 4096 matrix")


# --- kernels ----------------------------------------------------------------------------------------


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=1, help="of the product to explain (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=4096, help="of the weight (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=4096, help="of the weight (default: %(default)s)")
    parser.add_argument("--input", metavar="FORMAT", help="of quantized inputs (default: inputs in 16 bits)")
    parser.add_argument("--training", action="store_true", help="explain what runs in `qat train` instead")
    parser.add_argument("--json", action="store_true", help="print the answers as JSON")


def _kernels(arguments: argparse.Namespace) -> None:
    from qat.kernels.explain import explain_all

    sizes = (arguments.tokens, arguments.rows, arguments.columns)
    if arguments.training:
        if arguments.input or sizes != (1, 4096, 4096):
            raise ConfigError("--training goes by format alone: leave out --tokens, --rows, --columns and --input")
        return _training_kernels(arguments.json)
    if min(sizes) < 1:
        raise ConfigError(f"--tokens, --rows and --columns must be positive; given {sizes}")
    answers = explain_all(*sizes, arguments.input)
    if arguments.json:
        _print_json(answers)
        return
    inputs = f"{sizes[0]} token(s) in {arguments.input or '16 bits'}"
    print(f"{inputs} times packed weights of {sizes[1]} x {sizes[2]}:")
    for answer in answers:
        print(f"{answer['format']:<20}{answer['kernel']:<11}{answer['why']}")
    where = ", on GPUs" if arguments.input else ""
    print(f"\nof {answers[0]['operator']}, which `qat generate` and `qat serve` run{where}")


def _training_kernels(as_json: bool) -> None:
    from qat.kernels.explain import explain_training
    from qat.numbers.catalog import CATALOG

    answers = {name: explain_training(name) for name in CATALOG}
    if as_json:
        return _print_json(answers)
    print("what `qat train` runs here, by format and operator:")
    for name, told in answers.items():
        kinds: dict[tuple[str, str], list[str]] = {}
        for operator, answer in told.items():
            kinds.setdefault((answer["kernel"], answer["why"]), []).append(operator.removeprefix("qat::"))
        for (kernel, why), operators in kinds.items():
            print(f"{name:<20}{kernel:<11}{', '.join(operators)}: {why}")


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], Any], str]] = {
    "train": (_add_train, _train, "run quantization-aware training or distillation from a YAML file"),
    "eval": (_add_eval, _eval, "judge a run, an export or a model: KL to the teacher, NLL, top-1 agreement"),
    "export": (_add_export, _export, "write a trained run as a native low-precision checkpoint"),
    "verify": (_add_verify, _verify, "check an exported checkpoint against the trained model, bit for bit"),
    "generate": (_add_generate, _generate, "continue a prompt on this machine, streaming, and print tokens/s"),
    "serve": (_add_serve, _serve, "serve a model over HTTP, OpenAI-compatible, its weights packed"),
    "formats": (_add_formats, _formats, "list the number formats"),
    "kernels": (_add_kernels, _kernels, "say which kernel multiplies with packed weights here, and why"),
}

if __name__ == "__main__":
    sys.exit(main())
