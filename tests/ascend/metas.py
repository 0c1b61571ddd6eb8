"""torch_npu's own shape rules (`_meta_registrations.py` of its wheel) around the simulated operators: each call that an
engine's code makes is first given to the rule, as tensors without numbers, and result and rule must agree in shape and
type. The rules are not complete: they refuse wrong lengths of scales and widths that differ, but not a bad group."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ENUM = {torch.int8: 1, torch.float16: 5, torch.float32: 6, torch.qint8: 12, torch.bfloat16: 15, torch.quint4x2: 16,
        torch.float8_e4m3fn: 24, torch.float8_e8m0fnu: 293}  # fmt: skip
UNKNOWN = {("npu_grouped_matmul", "x_dtype"): torch.float8_e4m3fn}
"""Arguments that vllm-ascend gives and a rule (of torch_npu 2.14.0) refuses, but the operator's own code takes: types
that tensors have anyway."""
Rule = Callable[..., Any]


def load(path: Path) -> dict[str, Rule]:
    """The rules by operator; `torch_npu` has to be stubbed before."""
    rules: dict[str, Rule] = {}

    def collect(library: Any, name: str, *given: Any, **named: Any) -> Callable[[Rule], Rule]:
        def keep(rule: Rule) -> Rule:
            rules[name] = rule
            return rule

        return keep

    errors = importlib.import_module("torch_npu.utils._error_code")
    vars(errors)["ops_error"] = lambda code: ""
    usual, torch.library.impl = torch.library.impl, collect
    try:
        spec = importlib.util.spec_from_file_location("npu_rules", path)
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    finally:
        torch.library.impl = usual
    return rules


def without_numbers(value: Any) -> Any:
    """A tensor as its shape and type alone, a type as its number."""
    if isinstance(value, list):
        return [without_numbers(each) for each in value]
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return ENUM.get(value, value) if isinstance(value, torch.dtype) else value


@contextmanager
def bytes_alone() -> Iterator[None]:
    """Without torch's own type of FP4, for which rules count numbers: tensors here hold bytes, two numbers to each."""
    own = vars(torch).pop("float4_e2m1fn_x2")
    try:
        yield
    finally:
        vars(torch)["float4_e2m1fn_x2"] = own


def checked(operators: dict[str, Any], rules: dict[str, Rule], seen: set[str]) -> dict[str, Any]:
    """The operators behind their rules; `seen` collects the names of rules that agreed."""

    def behind(name: str, operator: Any) -> Any:
        rule = rules[name]

        def run(*given: Any, **named: Any) -> Any:
            known = {key: one for key, one in named.items() if one is None or UNKNOWN.get((name, key)) is not one}
            with bytes_alone():
                wanted = rule(*map(without_numbers, given), **{key: without_numbers(v) for key, v in known.items()})
            made = operator(*given, **named)
            for one, other in zip(_tuple(made), _tuple(wanted), strict=True):
                if one is None and other is None:  # it writes into what it is given
                    continue
                assert one.shape == other.shape, f"{name}: {tuple(one.shape)}, but torch_npu says {tuple(other.shape)}"
                assert one.dtype == other.dtype, f"{name}: {one.dtype}, but torch_npu says {other.dtype}"
            seen.add(name)
            return made

        return run

    return {name: behind(name, operator) if name in rules else operator for name, operator in operators.items()}


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
