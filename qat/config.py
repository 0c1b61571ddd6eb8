"""How a YAML file becomes checked objects: the strict pydantic base, dotted overrides, and errors a person can act on.

Every config class derives from `Strict` and lives beside the code it configures. Unknown keys are errors with the
three nearest names; nothing is read from the environment, and there is no inheritance or interpolation between files.
"""

import os
import tempfile
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from qat.errors import ConfigError, nearest

ModelT = TypeVar("ModelT", bound="Strict")


class Strict(BaseModel):
    """Base of all configuration: unknown keys are refused, values are frozen, defaults are validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping.

    Raises:
        ConfigError: the file is missing, is not YAML, or its top level is not a mapping.
    """
    if not path.is_file():
        beside = nearest(path.name, (p.name for p in path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
        hint = f"; nearest in {path.parent}: {beside}" if beside else ""
        raise ConfigError(f"no config file at {path}{hint}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, but holds {type(data).__name__}")
    return data


def override(data: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Return `data` with `a.b=c` assignments applied; `c` is read as YAML, list items are reached by index.

    Whether the key exists is decided by validation afterwards, so a typo gets the same message as in a file.
    """
    result = yaml.safe_load(yaml.safe_dump(data))
    for assignment in assignments:
        key, sign, text = assignment.partition("=")
        if not sign or not key:
            raise ConfigError(f"override {assignment!r} is not of the form key.subkey=value")
        node: Any = result
        *parents, last = key.split(".")
        for part in parents:
            node = _step(node, part, key)
        value = yaml.safe_load(text)
        if isinstance(node, list):
            node[_index(node, last, key)] = value
        else:
            node[last] = value
    return dict(result)


def _step(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, key)]
    if part not in node or node[part] is None:
        node[part] = {}
    child = node[part]
    if not isinstance(child, dict | list):
        raise ConfigError(f"override {key}: {part!r} holds the value {child!r}, which has no keys below it")
    return child


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"override {key}: {part!r} must be an index from 0 to {len(node) - 1}")
    return int(part)


def validate(cls: type[ModelT], data: dict[str, Any], origin: str) -> ModelT:
    """Build `cls` from `data`; every problem becomes one line with its path, the value given and what is allowed."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        lines = [_explain(cls, problem) for problem in error.errors()]
        raise ConfigError(f"{origin}: " + ("\n  ".join(["", *lines]) if len(lines) > 1 else lines[0])) from None


def _explain(cls: type[BaseModel], problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        owner = _class_at(cls, problem["loc"][:-1])
        known = list(owner.model_fields) if owner else []
        return f"unknown key {path!r} (value {problem['input']!r}); nearest: {nearest(str(problem['loc'][-1]), known)}"
    if problem["type"] == "missing":
        return f"{path}: required, but not given"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: {message} (given {problem['input']!r})" if path else message


def _class_at(cls: type[BaseModel], loc: tuple[Any, ...]) -> type[BaseModel] | None:
    """Follow a pydantic error location through nested models, lists and optionals to the model class it names."""
    current: Any = cls
    for part in loc:
        if isinstance(part, str) and isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(part)
            current = _model_in(field.annotation) if field else current
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, tuple, dict, typing.Union, types.UnionType, typing.Annotated):
        for argument in typing.get_args(annotation):
            found = _model_in(argument)
            if found is not None:
                return found
    return None


def write_text_atomic(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees the old content or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
