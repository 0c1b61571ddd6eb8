"""README.md and the pages of docs/ say what is so: the support matrix, the examples, links, keys and commands."""

import re
from pathlib import Path

import pytest
import yaml

from qat.checkpoints.layouts import TARGETS, holders, support
from qat.cli import COMMANDS
from qat.config import validate
from qat.errors import ConfigError
from qat.numbers.catalog import CATALOG
from qat.scheme import OLD_KEYS
from qat.trainers.job import Job, load_job
from tests.tutorials import ROOT, blocks

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BEGIN, END = "<!-- begin: tests/test_readme.py -->\n", "<!-- end -->\n"
USUAL = (
    ("nvfp4", "nvfp4"),
    ("mxfp4", "mxfp4"),
    ("mxfp8", "mxfp8"),
    ("fp8_channel", "fp8_token"),
    ("fp8_b128", "fp8_g128"),
    ("int8_channel", "int8_token"),
    ("int4_g64", None),
    ("nvfp4", None),
)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def matrix() -> str:
    """Who loads the usual pairs: by the default layout, or by another one, which is then named."""
    lines = ["| weights | inputs | layouts | " + " | ".join(support.ENGINES) + " |", "|---" * 7 + "|"]
    for weight, input in USUAL:
        able = sorted(holders(CATALOG[weight], CATALOG[input] if input else None), key=list(TARGETS).index)
        rows = [support.find(TARGETS[name].ROWS, CATALOG[weight], CATALOG[input] if input else None) for name in able]
        cells = []
        for engine in range(len(support.ENGINES)):
            says = [(row.cells[engine].loads, name) for row, name in zip(rows, able, strict=True) if row]
            loads, name = next((pair for pair in says if pair[0] in ("exact", "yes")), says[0])
            cells.append(loads if name == able[0] or loads not in ("exact", "yes") else f"{loads} ({name})")
        inputs = f"`{input}`" if input else "16 bits"
        lines.append("| " + " | ".join([f"`{weight}`", inputs, ", ".join(able), *cells]) + " |")
    return "\n".join(lines) + "\n"


def test_the_support_matrix_is_what_the_layouts_say() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0] == matrix(), f"paste this into {README.name}:\n{matrix()}"


def test_the_yaml_is_a_job(tmp_path: Path) -> None:
    (text,) = [text for language, _, text in blocks(README) if language == "yaml"]
    (tmp_path / "mine.yaml").write_text(text)
    assert load_job(tmp_path / "mine.yaml").steps == 200


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            name, _, anchor = target.partition("#")
            linked = (page.parent / name).resolve() if name else page
            assert linked.exists(), f"{page.name} links to {target}"
            if anchor:
                assert anchor in anchors(linked), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@every_page
def test_commands_keys_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    shown = [*re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL), *re.findall(r"`([^`\n]+)`", text)]
    for command in re.findall(r"(?:^|\$ )qat ([a-z]+)\b", "\n".join(shown), re.MULTILINE):
        assert command in COMMANDS, f"{page.name}: qat {command}"
    for key in OLD_KEYS:
        assert f"scheme.{key}" not in text, f"{page.name} names scheme.{key}, a key of earlier releases"
    for path in re.findall(
        r"`((?:qat|kernels|checkpoints|engines|trainers|tests|benchmarks|configs)/[\w./-]+\.\w+)`", text
    ):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


@every_page
def test_schemes_that_are_shown_are_schemes(page: Path) -> None:
    for text in re.findall(r"^```yaml[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        shown = yaml.safe_load(text)
        small = {"name": "x", "model": {"id": "x"}, "steps": 1, "scheme": {"rules": []}}
        try:
            validate(Job, {**small, **shown}, page.name)
        except ConfigError as error:
            pytest.fail(str(error))
