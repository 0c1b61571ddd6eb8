"""Configuration files and overrides: what is accepted, and what a person is told when something is wrong."""

import errno
import math
import os
import stat
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from qat.config import Strict, load_yaml, override, validate, write_text_atomic
from qat.errors import ConfigError, nearest


class Adam(Strict):
    kind: Literal["adam"] = "adam"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


class Plain(Strict):
    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.0, ge=0, lt=1)


class Layer(Strict):
    match: str
    bits: int = 4


class Settings(Strict):
    name: str
    optimizer: Annotated[Adam | Plain, Field(discriminator="kind")] = Adam()
    layers: tuple[Layer, ...] = ()
    extra: Layer | None = None
    by_name: dict[str, Layer] = {}  # noqa: RUF012  # pydantic copies defaults
    log: bool = True
    mode: Literal["on", "off"] = "on"
    source: Adam | str = "default"


GOOD: dict[str, Any] = {"name": "run", "layers": [{"match": "a"}, {"match": "b", "bits": 8}]}


def problem(data: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(Settings, data, "run.yaml")
    return str(caught.value)


def from_text(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return load_yaml(path)


def test_a_good_mapping_becomes_frozen_settings() -> None:
    settings = validate(Settings, GOOD, "run.yaml")
    assert settings.layers[1] == Layer(match="b", bits=8)
    assert settings.optimizer == Adam()
    with pytest.raises(ValueError, match="frozen"):
        settings.name = "other"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"nmae": 1}, "unknown key 'nmae' (value 1); nearest: name, by_name, mode"),
        (
            {"optimizer": {"kind": "adam", "learn_rate": 1}},
            "unknown key 'optimizer.learn_rate' (value 1); nearest: learning_rate",
        ),
        (
            {"optimizer": {"kind": "sgd", "momentun": 1}},
            "unknown key 'optimizer.momentun' (value 1); nearest: momentum",
        ),
        ({"layers": [{"match": "a"}, {"match": "b", "bit": 3}]}, "unknown key 'layers.1.bit' (value 3); nearest: bits"),
        ({"extra": {"match": "a", "bit": 3}}, "unknown key 'extra.bit' (value 3); nearest: bits"),
        ({"by_name": {"x": {"match": "a", "bit": 3}}}, "unknown key 'by_name.x.bit' (value 3); nearest: bits"),
        ({"layers": [{}]}, "layers.0.match: required, but not given"),
        ({"optimizer": {"kind": "sgd", "momentum": 2}}, "optimizer.momentum: Input should be less than 1 (given 2)"),
        ({"layers": [{"match": "a", "bits": "four"}]}, "layers.0.bits: Input should be a valid integer"),
        ({"optimizer": {"kind": "lion"}}, "'adam', 'sgd'"),
        ({"mode": True}, "mode: Input should be 'on' or 'off' (given True)"),
    ],
)
def test_problems_name_the_path_the_value_and_what_is_allowed(change: dict[str, Any], told: str) -> None:
    message = problem({**GOOD, **change})
    assert message.startswith("run.yaml: ") and "\n" not in message
    assert told in message


def test_every_problem_is_told_at_once() -> None:
    message = problem({"layers": [{}], "colour": "red"})
    assert len(message.splitlines()) == 4
    assert "name: required" in message and "layers.0.match: required" in message and "'colour'" in message


def test_overrides_reach_nested_keys_lists_and_missing_parents() -> None:
    changes = [
        "optimizer.kind=adam",
        "optimizer.learning_rate=3e-4",
        "layers.1.bits=2",
        "extra.match=x",
        "name=other",
        "optimizer.betas=[0.9, 0.99]",
    ]
    settings = validate(Settings, override(GOOD, changes), "run.yaml")
    assert isinstance(settings.optimizer, Adam)
    assert (settings.optimizer.learning_rate, settings.optimizer.betas) == (3e-4, (0.9, 0.99))
    assert (settings.layers[1].bits, settings.extra, settings.name) == (2, Layer(match="x"), "other")
    assert GOOD["layers"][1]["bits"] == 8  # the original is untouched
    assert override(GOOD, ["name=a=b"])["name"] == "a=b"
    assert override(GOOD, ["layers.0={match: z}"])["layers"][0] == {"match": "z"}
    assert override(GOOD, ["extra="])["extra"] is None
    assert override(GOOD, ["name=a", "name=b"])["name"] == "b"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("name", "override 'name' is not of the form key.subkey=value"),
        ("=3", "override '=3' is not of the form"),
        ("layers.2.bits=3", "override layers.2.bits: '2' must be an index from 0 to 1"),
        ("layers.7.bits=3", "override layers.7.bits: '7' must be an index from 0 to 1"),
        ("layers.first=3", "override layers.first: 'first' must be an index from 0 to 1"),
        ("name.sub=3", "override name.sub: 'name' holds the value 'run', which has no keys below it"),
        ("layers=[1", "override 'layers=[1': the value is not valid YAML"),
    ],
)
def test_bad_overrides_say_why(change: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(GOOD, [change])
    assert told in str(caught.value)


def test_an_override_with_a_typo_gets_the_same_message_as_a_file() -> None:
    assert "unknown key 'extra.bit' (value 1); nearest: bits" in problem(override(GOOD, ["extra.bit=1"]))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(t, float(t)) for t in ("3e-4", "1E5", "+2e+3", "-1e-2", "1.5", "-.5", "2.", "6.02e23", ".5e1")],
        *[(t, t) for t in ("on", "off", "yes", "no", "y", "On", "e4", "1e", "1.2.3", "3e-4x", "int4_g64", ".")],
        *[
            ("true", True),
            ("False", False),
            ("12", 12),
            ("-3", -3),
            ("0x1F", 31),
            ("null", None),
            ("~", None),
            ("'1'", "1"),
        ],
        *[(".inf", math.inf), ("-.inf", -math.inf), ("[1, 2e-1]", [1, 0.2]), ("{a: on}", {"a": "on"})],
    ],
)
def test_scalars_mean_what_they_look_like(tmp_path: Path, text: str, value: Any) -> None:
    for data in (from_text(tmp_path, f"key: {text}\n"), override({}, [f"key={text}"])):
        assert data == {"key": value}
        assert type(data["key"]) is type(value)


def test_on_fits_a_word_and_a_switch(tmp_path: Path) -> None:
    settings = validate(Settings, from_text(tmp_path, "name: no\nmode: off\nlog: off\n"), "job.yaml")
    assert (settings.name, settings.mode, settings.log) == ("no", "off", False)


def test_a_key_given_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)job\.yaml is not valid YAML.*'lr' is given twice.*line 4"):
        from_text(tmp_path, "optimizer:\n  lr: 1\n  beta: 2\n  lr: 3\n")
    assert from_text(tmp_path, "a: {lr: 1}\nb: {lr: 2}\n") == {"a": {"lr": 1}, "b": {"lr": 2}}


def test_files_that_are_no_mapping_or_no_yaml_or_not_there(tmp_path: Path) -> None:
    for text, told in (
        ("- 1\n", "must hold a mapping of keys, but holds list"),
        ("", "holds NoneType"),
        ("a: [", "not valid YAML"),
    ):
        with pytest.raises(ConfigError, match=told):
            from_text(tmp_path, text)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_yaml(tmp_path / "bytes.yaml")
    (tmp_path / "quickstart.yaml").touch()
    with pytest.raises(ConfigError, match=r"no config file at .*quickstrat\.yaml; nearest in .*: quickstart\.yaml"):
        load_yaml(tmp_path / "quickstrat.yaml")
    with pytest.raises(ConfigError, match="no config file at"):
        load_yaml(tmp_path / "nowhere" / "a.yaml")


def test_no_object_is_ever_built_from_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        from_text(tmp_path, "a: !!python/object/apply:os.system ['true']\n")


def test_nearest_names_come_best_first() -> None:
    assert nearest("nvpf4", ["mxfp8", "nvfp4", "int8", "nvint4"], 2) == "nvfp4, nvint4"
    assert nearest("x", []) == ""


def test_small_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "report.json"
    write_text_atomic(path, "old ±")
    for umask in (0o022, 0o002, 0o077):
        before = os.umask(umask)
        try:
            write_text_atomic(path, "new ±")
        finally:
            os.umask(before)
        assert path.read_text(encoding="utf-8") == "new ±"
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_text_atomic(path, "half")
    assert path.read_text(encoding="utf-8") == "new ±"
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
