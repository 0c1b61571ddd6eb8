"""Do the tests notice when the arithmetic is wrong? Each mutant changes one line; the tests named with it must fail.

    python tests/mutants.py                     all of them, in copies of this checkout (about 20 minutes on two cores)
    python tests/mutants.py losses evaluate     those whose file or line holds one of these words

Equivalent changes (that no input can tell apart) do not belong here. A survivor is a hole in the tests: write the test,
do not drop the mutant. `test_mutants.py` keeps the lines below true and runs everything under the marker `slow`.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT = 300  # seconds for one mutant; tests that run into it did notice something
_LEFT_OUT = (".git", ".venv*", ".triton*", "runs", "*cache*", "__pycache__", ".hypothesis", "build", "dist")


@dataclass(frozen=True)
class Mutant:
    """`before`, which stands in one place of `file`, becomes `after`; `tests` are pytest's arguments."""

    file: str
    before: str
    after: str
    tests: str

    def __str__(self) -> str:
        return f"{self.file}: {self.before.strip()}  ->  {self.after.strip()}"


# file -> (tests that must notice, [(before, after), ...])
_TABLE: dict[str, list[tuple[str, list[tuple[str, str]]]]] = {
    "qat/element.py": [
        (
            "tests/qat/test_element.py",
            [
                ("return max(self.high, -self.low)", "return max(self.high, self.low)"),
                ("x.clamp_(self.low, self.high)", "x.clamp_(-self.high, self.high * 2)"),
                ("(1.5 * 2.0 ** (23 - self.mantissa_bits))", "(1.5 * 2.0 ** (22 - self.mantissa_bits))"),
                ("binade.clamp_min_(self.min_normal)", "binade.clamp_min_(self.min_normal / 2)"),
                ("(finite < 0).to(torch.int64)", "(finite > 0).to(torch.int64)"),
                ("step * (code if code < half else", "step * (code if code <= half else"),
                ("bias = 2 ** (exponent - 1) - 1", "bias = 2 ** (exponent - 1)"),
                ("torch.where(torch.isnan(x), x, values[", "torch.where(torch.isnan(x), values[0], values["),
            ],
        )
    ],
    "qat/format.py": [
        (
            "tests/qat/test_format.py",
            [
                ("columns % self.group == 0", "columns % self.group <= 1"),
                ("return math.ceil(rows / block_rows),", "return math.floor(rows / block_rows),"),
                ("(32 if self.global_scale else 0)", "(16 if self.global_scale else 0)"),
            ],
        ),
        (
            "tests/qat/test_numerics.py",
            [("(wide if narrow == 1 else narrow + wide) <= 8", "(wide if narrow == 1 else narrow + wide) <= 9")],
        ),
    ],
    "qat/numerics.py": [
        (
            "tests/qat/test_numerics.py",
            [
                ("return scale if self.global_scale is None else scale * self.global_scale",
                 "return scale if self.global_scale is None else scale / self.global_scale"),
                ("value = (bits << 23)", "value = (bits << 22)"),
                ("scale if global_scale is None else scale / global_scale",
                 "scale if global_scale is None else scale * global_scale"),
                ("exponent - (mantissa == 0.5)", "exponent + (mantissa == 0.5)"),
                ("return blocked.abs().amax(dim=(1, 3))", "return blocked.amax(dim=(1, 3))"),
                ("bits = bits + (1 << (22 - element.mantissa_bits))", "bits = bits + (1 << (21 - element.mantissa_bits))"),
                ("exponent = torch.where(amax > 0, exponent, -EXPONENT_BIAS)", "exponent = torch.where(amax >= 0, exponent, -EXPONENT_BIAS)"),
                ("(high - low) / (2**fmt.element.bits - 1)", "(high - low) / (2**fmt.element.bits)"),
                ("low = blocked.amin(dim=(1, 3)).clamp_max(0.0)", "low = blocked.amin(dim=(1, 3))"),
                ("torch.stack(errors).argmin(dim=0)", "torch.stack(errors).argmax(dim=0)"),
            ],
        ),
        (
            "tests/qat/test_format.py",
            [
                ("x.round_().add_(zero)", "x.add_(zero)"),
                ("torch.where(finite, stored.to(torch.float32), torch.nan)", "torch.where(finite, stored.to(torch.float32), 1.0)"),
            ],
        ),
        ("tests/qat/test_qsnr.py", [("return float(-10 * torch.log10(", "return float(10 * torch.log10(")]),
    ],
    "qat/gradients.py": [
        (
            "tests/qat/test_gradients.py",
            [
                ("(blocked_grad * to_blocks(y, fmt)).sum(dim=(1, 3)) / multiplier",
                 "(blocked_grad * to_blocks(y, fmt)).sum(dim=(1, 3)) * multiplier"),
                ("-moved.sum(dim=(1, 3)) * multiplier", "moved.sum(dim=(1, 3)) * multiplier"),
                ("per_block(multiplier / divisor)", "per_block(divisor / multiplier)"),
                ("blocked.abs() > per_block(", "blocked.abs() < per_block("),
                ("masked_fill_(clipped, 0.0)", "masked_fill_(~clipped, 0.0)"),
                ("half - 1 - zero_point", "half - zero_point"),
            ],
        )
    ],
    "qat/ops.py": [
        (
            "tests/qat/test_ops.py",
            [
                ("grad_x = grad @ kept.to(grad.dtype)", "grad_x = grad @ kept.to(grad.dtype).abs()"),
                ("unchanged = needs[0] and estimator == \"ste\" and divisor is None",
                 "unchanged = needs[0] and estimator == \"ste\""),
                ("rows.sum(dim=0).to(ctx.bias_dtype)", "rows.mean(dim=0).to(ctx.bias_dtype)"),
                ("if round_bf16 and not lookup(format).exact_in_bf16:", "if round_bf16 and lookup(format).exact_in_bf16:"),
            ],
        )
    ],
    "qat/activations.py": [
        (
            "tests/qat/test_activations.py",
            [
                ("static * (amax * (1 / element.max))", "amax * (1 / element.max) / static"),
                ("return global_scale_for(amax.detach(), fmt).reciprocal()", "return global_scale_for(amax.detach(), fmt)"),
                ("torch.where(stored == 0, SCALE_ELEMENT.max, stored)", "torch.where(stored == 0, 1.0, stored)"),
                ("y + (through - through.detach())", "y + (through.detach() - through)"),
                ("element.max + 0.5 if element.kind", "element.max + 1.0 if element.kind"),
                ("inside = relative.abs() <= fmt.element.max", "inside = relative.abs() >= fmt.element.max"),
                ("tuple(range(2, x.ndim))", "tuple(range(1, x.ndim))"),
                ("t.clamp(-element.max - 1, element.max)", "t.clamp(-element.max, element.max)"),
            ],
        )
    ],
    "qat/inputs.py": [
        (
            "tests/qat/test_inputs.py",
            [
                ("torch.stack((codes & 0x0F, codes >> 4), dim=-1)", "torch.stack((codes >> 4, codes & 0x0F), dim=-1)"),
                ("factor = factor * static.reciprocal()", "factor = factor * static"),
            ],
        )
    ],
    "qat/layouts.py": [
        (
            "tests/kernels/test_packed_linear.py -k 'not architecture'",
            [
                ("codes = codes ^ (1 << (bits - 1))", "codes = codes ^ (1 << (bits - 2))"),
                ("(tiles >> shifts[:, None]) & (2**bits - 1)", "(tiles >> shifts[:, None]) & (2**bits - 2)"),
            ],
        )
    ],
    "qat/matmul.py": [
        (
            "tests/kernels/test_quantized_matmul.py -k 'not architecture'",
            [
                ("weight.global_scale * input_scale", "weight.global_scale / input_scale"),
                ("y = (x @ w.t()) * global_scale", "y = (x @ w.t()) / global_scale"),
            ],
        )
    ],
    "qat/packed.py": [
        (
            "tests/kernels/test_packed_linear.py -k 'not architecture'",
            [("bad = int((~(torch.isfinite(values) & (values > 0))).sum())", "bad = int((~(torch.isfinite(values) & (values < 0))).sum())")],
        )
    ],
    "qat/rows.py": [
        (
            "tests/qat/test_losses.py",
            [
                ("torch.sub(log_q.exp_(), p, out=room)", "torch.sub(p, log_q.exp_(), out=room)"),
                ("_expectation(p, log_p.sub_(log_q), out=log_p)", "_expectation(p, log_p.add_(log_q), out=log_p)"),
                ("ratio.sub_(loss[:, None])", "ratio.add_(loss[:, None])"),
                ("beta * to_teacher + (1 - beta) * to_student", "beta * to_student + (1 - beta) * to_teacher"),
                ("loss.mul_(temperature**2)", "loss.mul_(temperature)"),
                ("if temperature * scale != 1.0:", "if temperature * scale == 1.0:"),
                ("gradient[ignored] = 0.0", "gradient[ignored] = 1.0"),
            ],
        )
    ],
    "qat/losses.py": [
        (
            "tests/qat/test_losses.py",
            [
                ("(targets.flatten() != IGNORE).nonzero()", "(targets.flatten() != 0).nonzero()"),
                ("return value, logits @ self.weight if wanted[0] else None",
                 "return value, -(logits @ self.weight) if wanted[0] else None"),
                ("else grad.mul_(scale) for grad in grads", "else grad for grad in grads"),
                ("slice(start, start + chunk) for", "slice(start, start + chunk - 1) for"),
                ("else old.add_(summed)", "else old"),
            ],
        )
    ],
    "qat/modules.py": [
        (
            "tests/qat/test_modules.py",
            [
                ("self.start * self.log_scale.exp()", "self.start / self.log_scale.exp()"),
                ("+ (latent - latent.detach())", "+ (latent.detach() - latent)"),
                ("if self._output is None or self._input is None or self._input() is not x:", "if self._output is None:"),
                ("if self._uses >= self.consumers:", "if self._uses > self.consumers:"),
                ("else self.start * self.log_divisor.exp()", "else self.start * self.log_scale.exp()"),
            ],
        )
    ],
    "qat/ranges.py": [
        (
            "tests/qat/test_ranges.py",
            [
                ("better = error < best_error", "better = error > best_error"),
                ("self._amax = max(self._amax, top)", "self._amax = min(self._amax, top)"),
                ("self._amax += self.momentum * (top - self._amax)", "self._amax += self.momentum * top"),
                ("limits[errors.index(min(errors))]", "limits[errors.index(max(errors))]"),
                ("if kl < best_kl:", "if kl > best_kl:"),
                ("difference.mul_(error_weight)", "difference.div_(error_weight)"),
                ("finite_amax(weight) for weight in weights]).amax()", "finite_amax(weight) for weight in weights]).amin()"),
                ("(share < self.percentile / 100).sum()", "(share > self.percentile / 100).sum()"),
            ],
        )
    ],
    "qat/compensate.py": [
        (
            "tests/qat/test_compensate.py",
            [
                ("work[stop:] -= upper[start:stop, stop:].t() @ errors", "work[stop:] += upper[start:stop, stop:].t() @ errors"),
                ("work[column + 1 : stop] -= torch.outer", "work[column + 1 : stop] += torch.outer"),
                ("scales, column // width)", "scales, 0)"),
                ("/ upper[column, column]", "* upper[column, column]"),
            ],
        )
    ],
    "qat/calibration.py": [
        (
            "tests/qat/test_calibration.py",
            [
                ("total.div_(self.counts[path])", "total.div_(len(self.counts))"),
                ("self.counts[path] += len(flat)", "self.counts[path] += 1"),
                ("found = {path: total.div_", "found = {path: -total.div_"),
            ],
        )
    ],
    "qat/transforms.py": [
        (
            "tests/qat/test_transforms.py",
            [
                ("reader.weight.mul_(columns.to(reader.weight))", "reader.weight.div_(columns.to(reader.weight))"),
                ("strength * _log2_rms(mean_square) - (1 - strength)", "strength * _log2_rms(mean_square) + (1 - strength)"),
                ("return 1.0 if bool(nothing.abs().max() > 0) else 0.0", "return 0.0 if bool(nothing.abs().max() > 0) else 1.0"),
                ("bias.div_(factors.to(bias))", "bias.mul_(factors.to(bias))"),
            ],
        )
    ],
    "qat/surgery.py": [
        (
            "tests/qat/test_surgery.py",
            [
                ("alike = rules[other].weight == rules[path].weight", "alike = True"),
                ("parameter.data = data.to(torch.bfloat16).to(data.dtype)", "parameter.data = data.to(torch.float16).to(data.dtype)"),
                ("shared = shared_global_scale([_weight(modules[m]) for m in members], fmt)",
                 "shared = shared_global_scale([_weight(module)], fmt)"),
                ("return sum(m.parameters * m.bits for m in self.modules) / max(total, 1)",
                 "return sum(m.bits for m in self.modules) / max(len(self.modules), 1)"),
                ("made[key].consumers = len(members)", "made[key].consumers = 1"),
            ],
        )
    ],
    "qat/scheme.py": [
        (
            "tests/qat/test_scheme.py",
            [
                ("next((rule for rule in self.rules if rule.matches(path)), None)",
                 "next((rule for rule in reversed(self.rules) if rule.matches(path)), None)"),
                ("re.fullmatch(self.match[3:], path)", "re.search(self.match[3:], path)"),
            ],
        )
    ],
    "qat/config.py": [
        (
            "tests/qat/test_config.py",
            [("int(part) >= len(node)", "int(part) > len(node)"), ("result = copy.deepcopy(data)", "result = data")],
        )
    ],
    "kernels/packed_linear/choose.py": [
        (
            "tests/kernels/test_packed_linear.py -k 'not architecture'",
            [("if tokens <= size), 64)", "if tokens < size), 64)"), ("steps // 4, 8))", "tokens, 8))")],
        )
    ],
    "kernels/quantized_matmul/choose.py": [
        (
            "tests/kernels/test_quantized_matmul.py -k 'not architecture'",
            [
                ("return fmt.block[1] if fmt.block[1] < columns else 0", "return fmt.block[1] if fmt.block[1] <= columns else 0"),
                ("parallel = segments > 1 and", "parallel = segments >= 1 and"),
                ("stage = block_n * (step * wide if plain else 2 * PART)", "stage = block_n * (step if plain else PART)"),
            ],
        )
    ],
    "kernels/fake_quantize/choose.py": [
        (
            "tests/kernels/test_fake_quantize.py -k 'not architecture'",
            [
                ("if 8 * filled[size] <= 9 * columns]", "if 8 * filled[size] >= 9 * columns]"),
                ("return -(-self.columns // self.segment)", "return self.columns // self.segment"),
            ],
        )
    ],
    "kernels/tuned.py": [
        (
            "tests/kernels/test_tuned.py",
            [("if count >= tokens), default=0)", "if count <= tokens), default=0)")],
        )
    ],
    "checkpoints/unpack.py": [
        (
            "tests/checkpoints/test_readers.py",
            [
                ("np.where(exponent == 0, 1 << 22, exponent << 23)", "np.where(exponent == 0, 1 << 22, exponent << 22)"),
                ("(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16", "(bits + 0x8000) >> 16"),
                ("value = value - per_weight(zero)", "value = value + per_weight(zero)"),
                ("rows = np.arange(part.start, part.stop) // block_rows", "rows = np.arange(part.start, part.stop) % block_rows"),
                ("return codes - count // 2 if module.packed", "return codes - count // 2 + 1 if module.packed"),
            ],
        )
    ],
    "checkpoints/readers/compressed_tensors.py": [
        (
            "tests/checkpoints/test_readers.py",
            [
                ("scale = scale / float_values(tensors[\"weight_global_scale\"])", "scale = scale * float_values(tensors[\"weight_global_scale\"])"),
                ("return [group for _, group in sorted(ranked)]", "return [group for _, group in sorted(ranked, reverse=True)]"),
            ],
        )
    ],
    "checkpoints/codes.py": [
        (
            "tests/checkpoints/test_codes.py",
            [
                ("divisor.to(torch.float32).reciprocal()", "divisor.to(torch.float32)"),
                ("return fields ^ (1 << (bits - 1)) if", "return fields ^ (1 << bits) if"),
                ("wide[:, first // 8 + 1] << 8", "wide[:, first // 8 + 1] << 7"),
            ],
        )
    ],
    "checkpoints/targets/compressed_tensors.py": [
        (
            "tests/checkpoints/targets/test_compressed_tensors.py",
            [
                ("q.scales.global_scale.to(\"cpu\").reciprocal()", "q.scales.global_scale.to(\"cpu\")"),
                ("^ (1 << (bits - 1))", "^ (1 << (bits - 2))"),
                ("if matched.isdisjoint(rest) and", "if"),
                ("torch.tensor([rows, columns])", "torch.tensor([columns, rows])"),
            ],
        )
    ],
    "checkpoints/resume.py": [
        (
            "tests/checkpoints/test_resume.py",
            [
                ("torch.set_rng_state(random[\"cpu\"])", "random[\"cpu\"]"),
                ("optimizer.state[parameter][kind] = value.to(", "optimizer.state[parameter][kind] = 0 * value.to("),
                ("return states[-1]", "return states[0]"),
            ],
        )
    ],
    "checkpoints/shards.py": [
        (
            "tests/checkpoints/test_shards.py",
            [
                ("start += len(chunk)", "start += len(chunk) + 1"),
                ("(-self._open[name].dtype.itemsize, name)", "(self._open[name].dtype.itemsize, name)"),
                ("self._spool.tell() + data.nbytes > self._max", "self._spool.tell() > self._max"),
            ],
        )
    ],
    "trainers/packing.py": [
        (
            "tests/trainers/test_packing.py",
            [
                ("np.where(document.learn[1:], document.ids[1:], IGNORE)", "np.where(document.learn[:-1], document.ids[1:], IGNORE)"),
                ("filled + count, number + 1", "filled + count, number"),
                ("return apart / together if together", "return together / apart if together"),
                ("(document_ids[:, 1:] >= 0)", "(document_ids[:, 1:] > 0)"),
            ],
        )
    ],
    "trainers/data.py": [
        (
            "tests/trainers/test_data.py",
            [
                ("+ self.rank * share", "+ self.rank"),
                ("default_rng([seed, epoch])", "default_rng([seed])"),
            ],
        )
    ],
    "trainers/optim.py": [
        (
            "tests/trainers/test_optim.py",
            [
                ("math.cos(math.pi * min(1.0, step / steps))", "math.cos(math.pi * min(1.0, (steps - step) / steps))"),
                ("config.final + (1 - config.final) * cosine", "config.final + config.final * cosine"),
                ("peak = config.scale_lr if kind == \"scale\" else config.lr", "peak = config.lr if kind == \"scale\" else config.scale_lr"),
                ("config.weight_decay if kind == \"weight\" else 0.0", "config.weight_decay if kind != \"weight\" else 0.0"),
                ("(step + 1) / warm", "step / warm"),
            ],
        )
    ],
    "trainers/evaluate.py": [
        (
            "tests/trainers/test_evaluate.py",
            [
                ("log_p.exp() * (log_p - log_q)", "log_q.exp() * (log_q - log_p)"),
                ("total[0] -= log_q", "total[0] += log_q"),
                ("(log_p.argmax(-1) == log_q.argmax(-1))", "(log_p.argmax(-1) != log_q.argmax(-1))"),
                ("(targets != IGNORE).nonzero()", "(targets == targets).nonzero()"),
                ("return (before - after) / gap", "return (after - before) / gap"),
                ("teacher = self.teacher_hidden[index]", "teacher = self.teacher_hidden[0]"),
            ],
        )
    ],
    "trainers/module.py": [
        (
            "tests/trainers/test_module.py",
            [
                ("(whole[\"targets\"] != IGNORE).sum()", "whole[\"targets\"].numel()"),
                ("* self.trainer.accumulate_grad_batches", "* 1"),
                ("part = slice(first, first + self.micro_rows)", "part = slice(0, self.micro_rows)"),
                ("for step in range(self.start, self.stop):", "for step in range(self.stop - self.start):"),
            ],
        )
    ],
    "trainers/callbacks.py": [
        (
            "tests/trainers/test_callbacks.py",
            [
                ("self.values[name].lerp_(parameter.detach(), 1 - decay)", "self.values[name].lerp_(parameter.detach(), decay)"),
                ("decay = min(self.decay, (1 + step) / (10 + step))", "decay = max(self.decay, (1 + step) / (10 + step))"),
                ("scores.kl < self.best[\"kl\"]", "scores.kl > self.best[\"kl\"]"),
                ("if int(row[\"step\"]) <= after]", "if int(row[\"step\"]) < after]"),
                ("0 < self.job.eval.patience <= self.best", "0 < self.job.eval.patience < self.best"),
            ],
        )
    ],
}


def mutants(words: list[str] | None = None) -> list[Mutant]:
    """All mutants, or those whose file or line holds one of the words."""
    found = [
        Mutant(file, before, after, tests)
        for file, groups in _TABLE.items()
        for tests, pairs in groups
        for before, after in pairs
    ]
    return [m for m in found if not words or any(word in str(m) for word in words)]


def mutated(mutant: Mutant) -> str:
    """The file's text with the change.

    Raises:
        ValueError: the line does not stand in the file exactly once.
    """
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    if text.count(mutant.before) != 1:
        raise ValueError(f"{mutant.file} holds {mutant.before!r} {text.count(mutant.before)} times, not once")
    return text.replace(mutant.before, mutant.after)


# --- running --------------------------------------------------------------------------------------


def _run(mutant: Mutant, changed: bool, log: Path) -> None:
    """In a process of its own: the tests in a copy of the checkout; the exit status is pytest's."""
    import shlex

    with tempfile.TemporaryDirectory(prefix="qat-mutant-") as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))
        if changed:
            (copy / mutant.file).write_text(mutated(mutant), encoding="utf-8")
        os.chdir(copy)
        os.environ["PYTHONPATH"] = str(copy)
        sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
        with log.open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            import pytest

            status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(mutant.tests)]))
        os.chdir("/")
    os._exit(status)


def _statuses(jobs: list[tuple[Mutant, bool]], at_once: int) -> Iterator[tuple[Mutant, bool, int | None, float, str]]:
    """(mutant, changed, pytest's status or None after `LIMIT`, seconds, output) in the order in which they end."""
    context = multiprocessing.get_context("fork")  # what is imported here need not be imported again
    logs = Path(tempfile.mkdtemp(prefix="qat-mutants-"))
    running: dict[Any, tuple[Mutant, bool, Path, float]] = {}
    waiting = list(jobs)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                mutant, changed = waiting.pop(0)
                log = logs / f"{len(waiting)}.log"
                process = context.Process(target=_run, args=(mutant, changed, log))
                process.start()
                running[process] = (mutant, changed, log, time.monotonic())
            wait([process.sentinel for process in running], timeout=1)
            for process in list(running):
                mutant, changed, log, began = running[process]
                seconds = time.monotonic() - began
                if process.exitcode is None and seconds > LIMIT:
                    process.kill()
                    process.join()
                    del running[process]
                    yield mutant, changed, None, seconds, log.read_text(errors="replace")
                elif process.exitcode is not None:
                    del running[process]
                    yield mutant, changed, process.exitcode, seconds, log.read_text(errors="replace")
    finally:
        for process in running:
            process.kill()
        shutil.rmtree(logs, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the mutants; 0 if the tests noticed all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutants whose file or line holds one of these")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    chosen = mutants(parsed.words)
    for mutant in chosen:
        mutated(mutant)
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", WANDB_MODE="offline")
    import lightning  # noqa: F401 # imported once, before the forks: it takes longer than most tests
    import transformers  # noqa: F401 # likewise

    began = time.monotonic()
    sound = {m.tests: m for m in chosen}.values()
    bad = [(m, text) for m, _, status, _, text in _statuses([(m, False) for m in sound], parsed.jobs) if status != 0]
    for mutant, text in bad:
        print(f"{mutant.tests} does not pass as it is:\n{text[-2000:]}")
    if bad:
        return 2
    print(f"{len(sound)} sets of tests pass unchanged ({time.monotonic() - began:.0f} s)", flush=True)
    began, survivors = time.monotonic(), []
    ends = _statuses([(m, True) for m in chosen], parsed.jobs)
    for number, (mutant, _, status, seconds, text) in enumerate(ends, start=1):
        words = {0: "SURVIVED", 1: "noticed", 2: "noticed", None: f"noticed (no end in {LIMIT} s)"}
        if status not in words:
            print(text[-2000:])
        if status not in words or status == 0:
            survivors.append(mutant)
        left = (time.monotonic() - began) / number * (len(chosen) - number)
        print(f"[{number}/{len(chosen)}, {left:.0f} s left] {words.get(status, f'pytest ended with {status}')} "
              f"in {seconds:.0f} s: {mutant}", flush=True)  # fmt: skip
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants were noticed in {time.monotonic() - began:.0f} s")
    for mutant in survivors:
        print(f"not noticed by {mutant.tests}: {mutant}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
