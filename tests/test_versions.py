"""The versions that `make test-versions` tests: one line of the Makefile each, and the lower bounds that users read."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_oldest_versions_tested_are_the_lower_bounds() -> None:
    text = (ROOT / "Makefile").read_text()
    pins = dict(re.findall(r"(\w+)==+([\d.]+)", re.search(r"^oldest := (.*)$", text, re.MULTILINE)[1]))
    bounds = dict(re.findall(r'^ *"(\w+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert pins.keys() == {"torch", "triton", "transformers"}
    for name, version in pins.items():
        assert (version + ".").startswith(bounds[name] + "."), f"{name}: {version} tested, {bounds[name]} promised"
