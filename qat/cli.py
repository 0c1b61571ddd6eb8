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
from typing import Any

from qat import options, terminal
from qat.errors import ConfigError, Interrupted, QatError
from qat.text import size

DESCRIPTION = """Train a model in the numbers it will be served in.

  qat train configs/quickstart.yaml --dry-run     see what would be quantized, and what it takes
  qat train configs/quickstart.yaml               distil the BF16 model into its quantized self
  qat export runs/quickstart OUT                  write a native low-precision checkpoint
  qat verify OUT                                  prove that the files are the trained model, bit for bit
  qat generate OUT "Once upon a time"             try it
  qat serve OUT                                   OpenAI-compatible, on http://127.0.0.1:8000

A run is one YAML file, a folder runs/NAME and a report. Formats: qat formats. Tutorials: docs/tutorials.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status, unless it is the whole process (no `argv`) and can end that at once."""
    terminal.print_anything()
    with terminal.unbreakable_stderr(), terminal.rarely_collecting():
        status = _main(argv)
    return terminal.leave(status) if argv is None else status


def _main(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse stops taking overrides at the first option: `--resume steps=200`
        arguments.overrides += rest
    terminal.quiet_libraries()
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, category, *_: (
        f"qat {arguments.command}: {terminal.warned(message, category)}\n"
    )
    try:
        terminal.refuse_bytes(sys.argv[1:] if argv is None else argv)
        terminal.import_library("torch")  # which every command needs
        run: Callable[[argparse.Namespace], int | None] = arguments.run
        return run(arguments) or 0
    except QatError as error:
        print(f"qat {arguments.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"qat {arguments.command}: {terminal.os_error(error)}", file=sys.stderr)
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


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


# --- train and teacher ----------------------------------------------------------------------------


def _train(arguments: argparse.Namespace) -> int | None:
    from qat.trainers import strategy
    from qat.trainers.job import load_job

    job = load_job(arguments.config, arguments.overrides)
    if arguments.dry_run:
        from qat.trainers.estimate import estimate
        from qat.trainers.estimate_table import print_estimate

        result = estimate(job)
        if arguments.json:
            _print_json(result.to_dict())
        else:
            print_estimate(result)
        return None
    if strategy.must_launch(job):
        flags = ["--resume"] * arguments.resume + ["--json"] * arguments.json
        return strategy.launch(job, ["train", *flags, arguments.config, *arguments.overrides])
    from qat.kernels.load import load_for_training
    from qat.trainers.run import train

    load_for_training()
    report = train(job, resume_run=arguments.resume, table=not arguments.json)
    if arguments.json and strategy.is_first(job):
        _print_json(report)
    return None


def _teacher(arguments: argparse.Namespace) -> None:
    from qat.trainers.job import load_job
    from qat.trainers.memory import keep_freed_blocks
    from qat.trainers.written import lines, write

    keep_freed_blocks()
    written = write(load_job(arguments.config, arguments.overrides))
    if arguments.json:
        _print_json([one.to_dict() for one in written])
    else:
        print(*lines(written), sep="\n")


# --- export and verify ------------------------------------------------------------------------------


def _export(arguments: argparse.Namespace) -> None:
    from qat.checkpoints.export import export

    how = {name: getattr(arguments, name) for name in ("overwrite", "checkpoint", "pack_tables")}
    out = export(arguments.trained, arguments.out, arguments.target, moved=arguments.model, **how)
    stored = size(sum(path.stat().st_size for path in ([out] if out.is_file() else out.rglob("*.safetensors"))))
    print(f"{out}: {stored} of weights for {arguments.target}; check it with: qat verify {out}")


def _verify(arguments: argparse.Namespace) -> int:
    from qat.checkpoints.simulated import engine_checks
    from qat.checkpoints.verify import verify
    from qat.checkpoints.verify_file import verify_file

    engine, file = arguments.engine, arguments.folder.is_file() or arguments.folder.suffix == ".gguf"
    if engine and file:
        raise ConfigError(f"--engine simulates what reads folders; {arguments.folder} is a file: leave --engine out")
    logits = not arguments.no_logits
    report = (
        verify_file(arguments.folder, logits=logits)
        if file
        else verify(arguments.folder, logits=logits, more=engine_checks(engine))
    )
    if arguments.json:
        _print_json(report.to_dict())
    else:
        for check in report.checks:
            print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}")
        print("all checks passed" if report.ok else "the checkpoint does NOT pass")
    return 0 if report.ok else 1


def _convert(arguments: argparse.Namespace) -> None:
    from qat.checkpoints.blobs import convert

    description = convert(arguments.folder, arguments.out, arguments.layout)
    if arguments.json:
        return _print_json(description)
    count = len(description["tensors"])
    print(
        f"{arguments.out}: {count} blobs, each put back into its plain order and compared; no public engine loads them"
    )


# --- eval and generate ------------------------------------------------------------------------------


def _eval(arguments: argparse.Namespace) -> None:
    from qat.engines.prompts import asked
    from qat.trainers.inspect import evaluate_folder

    texts, tasks = arguments.text or [], arguments.tasks or []
    result = evaluate_folder(
        arguments.folder, arguments.teacher, texts, arguments.tokens, tasks, arguments.model, arguments.device,
        arguments.activation_rule, asked(arguments.prompt_attention),
    )  # fmt: skip
    if arguments.json:
        _print_json(result)
        return
    for row in result["rows"]:
        kl = "" if row["kl"] is None else f"  KL to teacher {row['kl']:.4f}  top-1 agreement {row['top1']:.1%}"
        ppl = "beyond measure" if row["ppl"] is None else f"{row['ppl']:.2f}"
        print(f"{row['name']}: NLL {row['nll']:.4f}  perplexity {ppl}{kl}  ({row['tokens']} tokens)")
    for task, metrics in result.get("tasks", {}).items():
        print(f"{task}: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


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
    from qat.engines import llama_cpp
    from qat.engines.graphs import Decoding
    from qat.engines.prompts import asked
    from qat.engines.transformers import load_packed
    from qat.trainers.memory import keep_freed_blocks

    how = {"temperature": arguments.temperature, "seed": arguments.seed, "chat": arguments.chat}
    others = {"--dense": arguments.dense, "--model": arguments.model, "--device": arguments.device != "auto",
              "--prompt-attention": arguments.prompt_attention}  # fmt: skip
    if llama_cpp.chosen(arguments.folder, arguments.engine, [name for name, given in others.items() if given]):
        return llama_cpp.generate(arguments.folder, arguments.prompt, arguments.tokens, **how)
    keep_freed_blocks()
    generate(
        arguments.folder, arguments.prompt, arguments.tokens, device=arguments.device, moved=arguments.model,
        load_export=None if arguments.dense else load_packed,
        make_cache=lambda model, positions: Decoding(model).cache(positions),
        prepare=asked(arguments.prompt_attention), **how,
    )  # fmt: skip


# --- serve ------------------------------------------------------------------------------------------


def _serve(arguments: argparse.Namespace) -> None:
    from qat.engines.serve import serve
    from qat.trainers.memory import keep_freed_blocks

    keep_freed_blocks()
    serve(
        options.path(arguments.folder),
        arguments.engine,
        arguments.host,
        arguments.port,
        arguments.device,
        arguments.dtype,
        arguments.served_model_name or [arguments.folder],
        arguments.prompt_attention,
    )


# --- analyze ----------------------------------------------------------------------------------------


def _analyze(arguments: argparse.Namespace) -> None:
    from qat.trainers.analyze import analyze, lines, write

    if arguments.most < 1:
        raise ConfigError(f"--most {arguments.most} must be positive")
    if arguments.model.endswith((".yaml", ".yml")):
        return _sensitivity(arguments)
    if arguments.overrides or arguments.tokens is not None or arguments.all_but or arguments.no_kl:
        raise ConfigError("--tokens, --all-but, --no-kl and a.b=c go with a run's YAML file; a model has no scheme")
    result = analyze(arguments.model, arguments.formats)
    pictures = write(result, arguments.out) if arguments.out else []
    if arguments.json:
        _print_json(result.to_dict())
        return
    print(*lines(result, arguments.most), sep="\n")
    if pictures:
        print("written: " + ", ".join(map(str, pictures)))


def _sensitivity(arguments: argparse.Namespace) -> None:
    from qat.trainers.job import load_job
    from qat.trainers.sensitivity import TOKENS, analyze_job, write

    if arguments.formats:
        raise ConfigError("--formats goes with a model; the formats of a run stand in its scheme")
    if arguments.no_kl and arguments.all_but:
        raise ConfigError("--all-but says which KL is measured, and --no-kl that none is")
    tokens = TOKENS if arguments.tokens is None else arguments.tokens
    job = load_job(arguments.model, arguments.overrides)
    result = analyze_job(job, tokens, kl=not arguments.no_kl, others=arguments.all_but)
    written = write(result, arguments.out) if arguments.out else []
    if arguments.json:
        return _print_json(result.to_dict())
    print(*result.lines(arguments.most), sep="\n")
    if written:
        print("written: " + ", ".join(map(str, written)))


def _assign(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from qat.trainers.assign import assign, write
    from qat.trainers.job import load_job

    job = load_job(arguments.config, arguments.overrides)
    found = assign(
        job,
        bits=arguments.bits,
        size=arguments.bytes,
        formats=arguments.formats,
        tokens=arguments.tokens,
        console=Console(stderr=True),
    )
    write(found, arguments.out)
    if arguments.json:
        return _print_json(found.to_dict())
    print(*found.lines(), f"written: {arguments.out}", sep="\n")


# --- formats ----------------------------------------------------------------------------------------


def _formats(arguments: argparse.Namespace) -> None:
    from qat.numbers.catalog import CATALOG

    rows = [
        {
            "name": fmt.name,
            "element": " or ".join(element.name for element in fmt.elements),
            "max": fmt.element.max,
            "block": list(fmt.block),
            "scale": fmt.scale.name,
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


def _kernels(arguments: argparse.Namespace) -> None:
    from qat.kernels.explain import explain_all, explain_all_training, lines, training_lines

    sizes = (arguments.tokens, arguments.rows, arguments.columns)
    if arguments.training:
        if arguments.input or sizes != (1, 4096, 4096):
            raise ConfigError("--training goes by format alone: leave out --tokens, --rows, --columns and --input")
        every = explain_all_training()
        return _print_json(every) if arguments.json else print(*training_lines(every), sep="\n")
    if min(sizes) < 1:
        raise ConfigError(f"--tokens, --rows and --columns must be positive; given {sizes}")
    answers = explain_all(*sizes, arguments.input)
    return _print_json(answers) if arguments.json else print(*lines(answers, sizes, arguments.input), sep="\n")


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], Any], str]] = {
    "train": (options.train, _train, "run quantization-aware training or distillation from a YAML file"),
    "teacher": (options.teacher, _teacher, "ask a job's teacher now: for its text, and for the cache of its answers"),
    "eval": (options.evaluate, _eval, "evaluate a run, an export or a model: KL to the teacher, NLL, top-1 agreement"),
    "export": (options.export, _export, "write a trained run as a native low-precision checkpoint"),
    "verify": (options.verify, _verify, "check an exported checkpoint against the trained model, bit for bit"),
    "convert": (options.convert, _convert, "write an export as raw tensors in the orders that a device reads"),
    "generate": (options.generate, _generate, "continue a prompt on this machine, streaming, and print tokens/s"),
    "analyze": (options.analyze, _analyze, "say which weights of a model lose most in which format"),
    "assign": (options.assign, _assign, "choose formats layer by layer under a budget of bits, as a run's YAML"),
    "serve": (options.serve, _serve, "serve a model over HTTP, OpenAI-compatible, its weights packed"),
    "formats": (options.formats, _formats, "list the number formats"),
    "kernels": (options.kernels, _kernels, "say which kernel multiplies with packed weights here, and why"),
}

if __name__ == "__main__":
    sys.exit(main())
