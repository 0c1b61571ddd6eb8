"""Proof, on the files themselves, that a checkpoint is complete, well-formed and the model that was trained.

Each check stands alone and says what it found. The strongest two: every weight, unpacked by an independent reader, has
the digest that the training forward pass had; and plain transformers computes exactly the logits that we do.
"""

import gc
import hashlib
import io
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qat.checkpoints.caches import attention_paths, stored_caches
from qat.checkpoints.exported import load_exported
from qat.checkpoints.hf import quiet
from qat.checkpoints.layouts import ExportedFolder, bits, open_export
from qat.checkpoints.layouts.reader import PlainLoading, digest
from qat.checkpoints.names import StoredNames, missing_names, skeleton, stored_names, tables
from qat.checkpoints.peft import peft_reads, with_peft
from qat.checkpoints.progress import progress
from qat.checkpoints.record import RECORD, read_record
from qat.errors import CheckpointError
from qat.float32 import float32_names
from qat.text import some

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZE_TOLERANCE = 0.02
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class Check:
    """One statement about a checkpoint, whether it holds, and what was found."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """All checks of one folder."""

    folder: str
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": self.ok, **asdict(self)}


class Problem(Exception):
    """What a check found wrong."""


class _Subject:
    """The checkpoint under test, with what several checks need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.exported: ExportedFolder = open_export(folder)
        self.record = read_record(folder)

    @cached_property
    def model(self) -> "PreTrainedModel":
        from transformers import AutoConfig

        with quiet():
            config = AutoConfig.from_pretrained(self.folder)
            return skeleton(config)

    @cached_property
    def stored(self) -> StoredNames:
        """What the files' tensors, quantized layers taken as dense, are to the architecture."""
        return stored_names(self.model, self.exported.dense_names)

    @cached_property
    def dense(self) -> dict[str, Tensor]:
        """Every tensor of the architecture by checkpoint name, without data."""
        return self.stored.tensors

    @cached_property
    def in_float32(self) -> set[str]:
        """Checkpoint names of what the architecture keeps in float32."""
        own = float32_names(self.model)
        return {name for name, place in self.stored.origins.items() if place in own}

    @cached_property
    def copied(self) -> set[str]:
        """Tensors that the exporter copied because the architecture does not load them."""
        recorded = set(self.record["tensors"]) if self.record else set()
        return recorded - self.dense.keys() - self.exported.quantized_names

    @cached_property
    def head(self) -> str | None:
        """Checkpoint path of the output layer."""
        head, paths = self.model.get_output_embeddings(), self.stored.paths
        return next((paths[path] for path, m in self.model.named_modules() if m is head and path in paths), None)


def verify(folder: Path, logits: bool = True, tokens: int = 64, more: Mapping[str, Any] | None = None) -> VerifyReport:
    """Check an exported checkpoint of any target.

    Args:
        folder: ours (with qat.json), or another tool's; then the comparison with the trained weights is left out.
        logits: also load it with plain transformers and compare logits with our own reading of it, in BF16.
        tokens: length of the sequence for that.
        more: further checks by name, which are given the subject and say what they found, or raise.

    Raises:
        CheckpointError: there is no such folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    checks: list[Check] = []
    try:
        subject = _Subject(folder)
        subject.exported.reader.verify_complete()
        checks.append(Check("complete", True, f"{len(subject.exported.reader.shards)} safetensors files, all whole"))
    except Exception as error:  # a damaged file can make a reader raise anything
        return VerifyReport(str(folder), [Check("complete", False, _message(error))])
    tests: list[tuple[str, Any]] = [*CHECKS.items(), *(more or {}).items()]
    if logits:
        tests.append(("transformers", lambda subject: _logits(subject, tokens)))
    with progress(f"verifying {folder.name}", len(tests), "checks") as advance:
        for name, test in tests:
            try:
                checks.append(Check(name, True, test(subject)))
            except Exception as error:  # as above; the other checks still run
                checks.append(Check(name, False, _message(error)))
            advance(1)
    return VerifyReport(str(folder), checks)


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, Problem | CheckpointError) else f"{type(error).__name__}: {error}"


def _require(problems: list[str], what: str) -> None:
    if problems:
        raise Problem(f"{what}: {some(problems, joint='; ')}")


def _tensors(subject: _Subject) -> str:
    """Names, types and shapes are those of the architecture and of the layout, no more and no less."""
    exported = subject.exported
    wanted: dict[str, tuple[str | None, tuple[int, ...]]] = {}
    for name, tensor in subject.dense.items():
        shape, path = tuple(tensor.shape), exported.weights.get(name)
        if path is not None:
            specs = exported.expected_tensors(exported.modules[path], *exported.oriented(shape))
            wanted.update({exported.tensor_name(path, key): spec for key, spec in specs.items()})
        elif name in exported.names:
            wanted[name] = (_type_of(subject, name, tensor), shape)
    wanted |= {name: (None, exported.reader.info(name).shape) for name in exported.cache_names & exported.names}
    missing = {*missing_names(subject.model, subject.stored, exported.dense_names), *(wanted.keys() - exported.names)}
    problems = [f"{name} is missing" for name in sorted(missing)]
    problems += [f"{name} is unknown" for name in sorted(exported.names - wanted.keys() - subject.copied)]
    for name in sorted(wanted.keys() & exported.names):
        info, (code, shape) = exported.reader.info(name), wanted[name]
        if info.code != (code or info.code) or info.shape != shape:
            problems.append(f"{name} is {info.code}{list(info.shape)}, not {code}{list(shape)}")
    _require(problems, "tensors do not fit")
    return f"{len(exported.names)} tensors, {len(exported.modules)} quantized layers"


def _type_of(subject: _Subject, name: str, tensor: Tensor) -> str | None:
    """The safetensors type that an unquantized tensor must have; None for any, where another tool chose."""
    if not tensor.is_floating_point() or (name in subject.in_float32 and subject.record is None):
        return None
    return "F32" if name in subject.in_float32 else subject.exported.dense_type


def _scales(subject: _Subject) -> str:
    """Every scale is a finite positive number."""
    problems, count = [], 0
    for name in sorted(subject.exported.quantized_names):
        if not any(name.endswith(subject.exported.tensor_name("", key)) for key in subject.exported.SCALES):
            continue
        scale, count = subject.exported.reader.get(name), count + 1
        if bad := bits.bad_scales(scale):
            problems.append(f"{name}: {bad} of {scale.numel()} are zero, negative or not finite")
    _require(problems, "bad scales")
    return f"{count} scale tensors are finite and positive"


def _weights(subject: _Subject) -> str:
    """Every tensor is, bit for bit, the one the trained model computed with."""
    if subject.record is None:
        return f"skipped: there is no {RECORD}, so the trained weights are not known"
    exported, modules, others = subject.exported, subject.record["modules"], subject.record["tensors"]
    problems = [f"{path} is not quantized as recorded" for path in sorted(modules.keys() ^ exported.modules.keys())]
    with progress("comparing weights", len(modules), "layers") as advance:
        for path in sorted(modules.keys() & exported.modules.keys()):
            weight = exported.dense(path)
            if list(weight.shape) != modules[path]["shape"] or digest(weight) != modules[path]["sha256"]:
                problems.append(f"{path}{exported.DENSE} is not the trained weight")
            advance(1)
    for name, recorded in others.items():
        if name not in exported.names or digest(exported.reader.get(name)) != recorded:
            problems.append(f"{name} is not the tensor that was exported")
    _require(problems, "files differ from the trained model")
    return f"{len(modules)} unpacked weights and {len(others)} other tensors equal the trained model, bit for bit"


def _fused(subject: _Subject) -> str:
    """Layers that engines merge agree in everything that has only one value after merging."""
    exported, problems = subject.exported, []
    groups = [members for members in exported.fused if any(path in exported.modules for path in members)]
    for members in groups:
        modules = [exported.modules.get(path) for path in members]
        schemes = {repr((m.format, m.weights, m.input, m.rotation)) if m else "dense" for m in modules}
        if len(schemes) > 1:
            problems.append(f"{', '.join(members)} are quantized differently")
            continue
        tensor_wide = modules[0] is not None and modules[0].weights["strategy"] == "tensor"
        for key in (key for key in exported.SCALES if tensor_wide or key != exported.SCALE):
            own = (exported.tensor_name(path, key) for path in members)
            names = [name for name in own if name in exported.names]
            if len({float(exported.reader.get(name)) for name in names}) > 1:
                problems.append(f"{', '.join(names)} differ")
    _require(problems, "engines would merge unequal layers")
    return f"{len(groups)} fused sets agree"


def _targets(subject: _Subject) -> str:
    """Every matrix is either quantized and targeted by one group, or dense and ignored."""
    exported, problems, quantized = subject.exported, [], 0
    modules = subject.stored.modules
    matrices = {n.removesuffix(".weight") for n, t in subject.dense.items() if t.ndim == 2 and n.endswith(".weight")}
    matrices |= exported.modules.keys()
    tied = subject.stored.tied_to(exported.modules)
    for head, table in tied.items():
        exported.check_tied(head, table)
    unpacked = tables(subject.model, subject.stored) - exported.modules.keys()
    packed = exported.modules.keys() | tied.keys()
    for path in sorted(matrices - unpacked):
        for name in dict.fromkeys(
            (path, modules.get(path, path))
        ):  # engines go by the file, transformers by its modules
            groups, ignored = exported.matching_groups(name), exported.ignored(name)
            if path not in packed:
                problems += [] if ignored else [f"{name} is dense, but not in `ignore`"]
            elif ignored or len(groups) != 1:
                problems.append(f"{name} is quantized, but " + ("ignored" if ignored else f"in {len(groups)} groups"))
        quantized += path in packed
    _require(problems, "config.json does not describe the tensors")
    return f"{quantized} quantized and {len(matrices - unpacked) - quantized} ignored matrices"


def _size(subject: _Subject) -> str:
    """Quantized layers take the bytes that their format promises."""
    exported, promised, weights = subject.exported, 0.0, 0
    stored = sum(info.stop - info.start for info in map(exported.reader.info, exported.quantized_names))
    for name, path in exported.weights.items():
        tensor = subject.dense[name]
        shape = exported.oriented(tuple(tensor.shape))
        promised += exported.theoretical_bits(exported.modules[path], *shape) * tensor.numel() / 8
        weights += tensor.numel()
    detail = f"{8 * stored / weights:.4f} bits per quantized weight, {8 * promised / weights:.4f} in theory"
    _require([detail] if abs(stored / promised - 1) > SIZE_TOLERANCE else [], "size is off")
    return detail


def _companions(subject: _Subject) -> str:
    """Tokenizer, templates and configurations travelled along, unchanged."""
    if subject.record is None:
        files = {path.name for path in subject.folder.iterdir()}
        absent = [] if files & set(_TOKENIZERS) else ["a tokenizer"]
        absent += [name for name in ("generation_config.json",) if name not in files]
        _require(absent, "missing")
        return "tokenizer and generation_config.json are there"
    problems = []
    for name, recorded in subject.record["files"].items():
        path = subject.folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != recorded:
            problems.append(f"{name} was changed")
    _require(problems, "other files")
    return f"{len(subject.record['files'])} files as exported"


def _tied(subject: _Subject) -> str:
    """The flag about tied embeddings agrees with the tensors."""
    config = subject.model.config.get_text_config()
    tied, head = bool(getattr(config, "tie_word_embeddings", False)), subject.head
    stored = any(name.startswith(f"{head}.weight") for name in subject.exported.names)
    problem = f"tie_word_embeddings is {str(tied).lower()}, but {head} is {'' if stored else 'not '}stored"
    _require([problem] if head and tied == stored else [], "output layer")
    return f"tie_word_embeddings is {str(tied).lower()}, as stored"


def _caches(subject: _Subject) -> str:
    """Every attention layer has the scales of its cache, and they are those of the trained model."""
    exported, recorded = subject.exported, (subject.record or {}).get("caches") or {}
    given = stored_caches(exported)
    if not given:
        _require([f"{path} is recorded, but not stored" for path in recorded], "caches")
        return "caches are not quantized"
    attention = attention_paths(subject.model, subject.stored)
    everywhere = set(attention.values()) if exported.caches else given.keys() & set(attention.values())
    problems = [f"{path} has no scales" for path in sorted(everywhere - given.keys())]
    problems += [f"{path} is no attention layer" for path in sorted(given.keys() - set(attention.values()))]
    for path, roles in recorded.items():
        for role, (fmt, _) in given.get(path, {}).items():
            if fmt.name != roles[role]["format"]:
                problems.append(f"the {role} of {path} is {fmt.name}, not {roles[role]['format']}")
    _require(problems, "caches")
    where = "scales are stored" if exported.caches else f"only {RECORD} says so"
    formats = dict.fromkeys(fmt.name for roles in given.values() for fmt, _ in roles.values())
    return f"{len(given)} layers cache {', '.join(formats)}; {where}"


CHECKS: dict[str, Callable[[_Subject], str]] = {
    "tensors": _tensors,
    "scales": _scales,
    "weights": _weights,
    "fused": _fused,
    "targets": _targets,
    "size": _size,
    "companions": _companions,
    "tied": _tied,
    "caches": _caches,
}


def _logits(subject: _Subject, tokens: int) -> str:
    """Plain transformers computes the very same logits as our reading of the files."""
    how = subject.exported.plain_loading(subject.model, subject.stored)
    return f"skipped: {how.obstacle}" if how.obstacle else _compare(subject, tokens, how)


def _compare(subject: _Subject, tokens: int, how: PlainLoading) -> str:
    vocabulary = subject.model.config.get_text_config().vocab_size
    ids = (torch.arange(tokens) * 7919 + 13).remainder(vocabulary)[None]
    with_adapter = peft_reads(subject.folder)
    with redirect_stderr(io.StringIO()):  # compressed-tensors draws three progress bars
        theirs = _run(lambda: _plain(subject, how, with_adapter), ids)
    ours = _run(
        lambda: load_exported(
            subject.folder,
            "compressed_tensors",
            torch.bfloat16,
            quantize_inputs=how.quantizes_inputs,
            expert_inputs=False,  # as theirs
            caches=how.quantizes_inputs and bool(subject.exported.caches),  # not what only our record says
            adapter=with_adapter,
        ),
        ids,
    )
    difference = float((theirs.double() - ours.double()).abs().max())
    what = "the adapter of peft beside it, " if with_adapter else ""
    detail = f"{how.remark}{what}largest logit difference {difference} over {tokens} tokens"
    _require([] if difference == 0.0 else [detail], "plain transformers disagrees")
    return detail


def _run(load: Callable[[], "PreTrainedModel"], ids: Tensor) -> Tensor:
    """Logits of a model that is dropped again, so that two never lie in memory together."""
    with torch.inference_mode(), quiet():
        logits: Tensor = load()(input_ids=ids, use_cache=False).logits
    gc.collect()
    return logits


def _plain(subject: _Subject, how: PlainLoading, with_adapter: bool) -> "PreTrainedModel":
    from transformers import AutoConfig, AutoModelForCausalLM

    loading: Any = AutoModelForCausalLM
    origin: dict[str, Any] = {"pretrained_model_name_or_path": subject.folder, "local_files_only": True, **how.options}
    if how.state is not None:
        config = AutoConfig.from_pretrained(subject.folder)
        del config.quantization_config
        loading = type(subject.model)
        origin = {"pretrained_model_name_or_path": None, "config": config, "state_dict": how.state()}
        origin["dtype"] = torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that an option was passed on top of config.json
        model: PreTrainedModel = loading.from_pretrained(**origin)
    if how.transforms:
        from compressed_tensors.transform import TransformConfig, apply_transform_config

        apply_transform_config(model, TransformConfig.model_validate(how.transforms))
    return (with_peft(model, subject.folder) if with_adapter else model).eval()
