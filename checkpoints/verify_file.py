"""Proof, on a GGUF file itself, that it is complete and holds the model that was trained: `gguf`'s own dequantization
gives the trained weights bit for bit, and plain transformers, which has a third one, computes the same logits."""

import gc
import io
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from qat.checkpoints.hf import quiet
from qat.checkpoints.layouts.gguf.load import load_file, misread_phi3, parts
from qat.checkpoints.layouts.gguf.read import GgufFile, above_of
from qat.checkpoints.layouts.reader import digest
from qat.checkpoints.progress import progress
from qat.checkpoints.record import RECORD_VERSION
from qat.checkpoints.verify import Check, Problem, VerifyReport
from qat.errors import CheckpointError, UnsupportedError
from qat.text import some

_UNREAD = ("MXFP4", "NVFP4")  # types that plain transformers (5.23) does not know
_ABOVE = (GGMLQuantizationType.NVFP4,)  # types whose tensors have others with what multiplies whole matrices
_UNSCALED = {"gemma2": 256, "gemma3": 256}  # width of a head that it takes for every model's, where it scales scores


def verify_file(path: Path, logits: bool = True, tokens: int = 64) -> VerifyReport:
    """Check a GGUF file, ours or another tool's; then what was trained is not known, and only its form is checked.

    Args:
        path: the file.
        logits: also load it with plain transformers and compare logits with our own reading of it, in float32.
        tokens: length of the sequence for that.
    """
    try:
        file = GgufFile(path)
        version = None if file.record is None else file.record.get("record_version")
        if version not in (None, RECORD_VERSION):
            raise CheckpointError(f"{path}: record_version {version}; this release reads {RECORD_VERSION}")
    except (CheckpointError, UnsupportedError) as error:
        return VerifyReport(str(path), [Check("complete", False, str(error))])
    checks = [Check("complete", True, f"{len(file.tensors)} tensors of {file.arch}, all whole")]
    tests: list[tuple[str, Callable[[], str]]] = [
        ("tensors", lambda: _tensors(file)),
        ("scales", lambda: _scales(file)),
        ("weights", lambda: _weights(file)),
    ]
    if logits:
        tests.append(("transformers", lambda: _logits(file, tokens)))
    with progress(f"verifying {path.name}", len(tests), "checks") as advance:
        for name, test in tests:
            try:
                checks.append(Check(name, True, test()))
            except (Problem, CheckpointError, UnsupportedError) as error:
                checks.append(Check(name, False, str(error)))
            except Exception as error:  # a damaged file can make a reader raise anything
                checks.append(Check(name, False, f"{type(error).__name__}: {error}"))
            advance(1)
    return VerifyReport(str(path), checks)


def _tensors(file: GgufFile) -> str:
    if file.record is None:
        return "skipped: the file has no qat.record, so another tool wrote it"
    factors = file.record.get("rope_factors", {"rope_freqs.weight"} & file.tensors.keys())  # unsaid by older releases
    wanted = {entry["tensor"] for entry in parts(file.record).values()} | set(factors)
    wanted |= {above_of(name) for name in wanted if name in file.tensors and file.tensors[name].tensor_type in _ABOVE}
    problems = [f"{name} is missing" for name in sorted(wanted - file.tensors.keys())]
    problems += [f"{name} is unknown" for name in sorted(file.tensors.keys() - wanted)]
    if problems:
        raise Problem(f"tensors do not fit: {some(problems, joint='; ')}")
    kinds = sorted({tensor.tensor_type.name for tensor in file.tensors.values()})
    return f"{len(wanted)} tensors as recorded, stored as {', '.join(kinds)}"


def _scales(file: GgufFile) -> str:
    problems = [f"{name}: {bad} are zero or not finite" for name in file.tensors if (bad := file.bad_scales(name))]
    if problems:
        raise Problem(f"bad scales: {some(problems, joint='; ')}")
    return "block scales are finite and not zero"


def _weights(file: GgufFile) -> str:
    """Every tensor is, bit for bit, the one the trained model computed with."""
    if file.record is None:
        return "skipped: the trained weights are not known"
    problems, stacks = [], dict[str, Tensor]()
    entries = parts(file.record)
    with progress("comparing weights", len(entries), "tensors") as advance:
        for name, entry in entries.items():
            stored = entry["tensor"]
            if stored not in stacks:
                stacks = {stored: file.value(stored)}
            value = stacks[stored] if "expert" not in entry else stacks[stored][entry["expert"]]
            if digest(value) != entry["sha256"]:
                problems.append(f"{name} is not the trained tensor")
            advance(1)
    for name, sha256 in file.record.get("rope_factors", {}).items():
        if digest(file.value(name)) != sha256:
            problems.append(f"{name} is not what the model's rotation is made of")
    if problems:
        raise Problem(f"the file differs from the trained model: {some(problems, joint='; ')}")
    modules = len(file.record["modules"])
    return f"{modules} dequantized weights and {len(entries) - modules} other tensors equal the trained model"


def _logits(file: GgufFile, tokens: int) -> str:
    """Plain transformers computes the very same logits as our reading of the file."""
    if file.record is None:
        return "skipped: another tool's file is read by transformers alone"
    unread = {tensor.tensor_type.name for tensor in file.tensors.values()} & {*_UNREAD}
    if unread:
        return f"skipped: transformers does not read {', '.join(sorted(unread))}"
    usual = _UNSCALED.get(file.arch)
    if usual is not None and file.facts.get(f"{file.arch}.attention.key_length") != usual:
        return f"skipped: transformers takes query_pre_attn_scalar of every {file.arch} file for {usual}"
    if file.arch == "phi3" and (what := misread_phi3(file, tokens)):
        return f"skipped: transformers {what}"
    ids = (torch.arange(tokens) * 7919 + 13).remainder(_rows(file, "model.embed_tokens.weight"))[None]
    theirs, ours = _run(lambda: _plain(file.path), ids), _run(lambda: load_file(file.path, opened=file), ids)
    difference = float((theirs.double() - ours.double()).abs().max())
    detail = f"largest logit difference {difference} over {tokens} tokens"
    if difference != 0.0:
        raise Problem(f"plain transformers disagrees: {detail}")
    return f"{detail}, in float32"


def _rows(file: GgufFile, name: str) -> int:
    assert file.record is not None
    return int(file.stored(parts(file.record)[name]["tensor"]).shape[-1])


def _run(load: Callable[[], Any], ids: Tensor) -> Tensor:
    """Logits of a model that is dropped again, so that two never lie in memory together."""
    with torch.inference_mode(), quiet(), redirect_stderr(io.StringIO()):  # that reader's bar is not to be turned off
        logits: Tensor = load()(input_ids=ids, use_cache=False).logits
    gc.collect()
    return logits


def _plain(path: Path) -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return loaded.eval()
