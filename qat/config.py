"""How a YAML file becomes checked objects: the strict pydantic base, dotted overrides, and errors a person can act on.

Every config class derives from `Strict` and lives beside the code it configures. Unknown keys are errors with the
three nearest names; nothing is read from the environment, and there is no inheritance or interpolation between files.
"""

import copy
import os
import re
import secrets
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


class _Loader(yaml.SafeLoader):
    """YAML as people read it: `on`, `off`, `yes` and `no` are words, 3e-4 is a number, and no key is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the parent does, after checking the keys."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in (_BOOL, _FLOAT)]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


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
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, but holds {type(data).__name__}")
    return data


def override(data: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Return `data` with `a.b=c` assignments applied; `c` is read as YAML, list items are reached by index.

    Whether the key exists is decided by validation afterwards, so a typo gets the same message as in a file.
    """
    result = copy.deepcopy(data)
    for assignment in assignments:
        key, sign, text = assignment.partition("=")
        if not sign or not key:
            raise ConfigError(f"override {assignment!r} is not of the form key.subkey=value")
        node: Any = result
        *parents, last = key.split(".")
        for part in parents:
            node = _step(node, part, key)
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {assignment!r}: the value is not valid YAML: {error}") from error
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
    path, owners = _locate(cls, problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = {name for owner in owners for name in owner.model_fields}
        return f"unknown key {path!r} (value {problem['input']!r}); nearest: {nearest(path.rpartition('.')[2], known)}"
    if problem["type"] == "missing":
        return f"{path}: required, but not given"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: {message} (given {problem['input']!r})" if path else message


def _locate(cls: type[BaseModel], loc: tuple[Any, ...]) -> tuple[str, list[type[BaseModel]]]:
    """The path a user would write for a pydantic error location, and the model classes that could own its last key.

    Parts of the location that only say which member of a union was tried are left out.
    """
    path, owners, inside = [], [cls], [cls]
    for part in loc:
        member = [model for model in inside if part in _tags(model)]
        if member:
            inside = member
            continue
        path.append(str(part))
        owners = inside
        fields = [model.model_fields[part] for model in inside if part in model.model_fields]
        if fields:  # otherwise an index or a key of a mapping, which leads to the same models
            inside = [model for field in fields for model in _models_in(field.annotation)]
    return ".".join(path), owners


def _tags(model: type[BaseModel]) -> set[str]:
    """What pydantic calls a member of a union: its class name or the value of its discriminating Literal."""
    literals = [f.annotation for f in model.model_fields.values() if typing.get_origin(f.annotation) is typing.Literal]
    values = {value for literal in literals for value in typing.get_args(literal) if isinstance(value, str)}
    return ({model.__name__} | values) - set(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (list, tuple, dict, typing.Union, types.UnionType, typing.Annotated):
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []


def write_text_atomic(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees the old content or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # not by tempfile, which ignores the umask
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
