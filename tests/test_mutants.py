"""The table of mutants is true of the code as it stands; running them all takes long (`slow`)."""

import ast
import platform
import subprocess

import pytest

from qat.kernels.compiler import ISAS, compiler
from tests import mutants


def meaning(file: str, text: str) -> str:
    """What tells two programs apart: a tree of Python; the text of C that compiles, where there is a compiler."""
    if file.endswith(".py"):
        return ast.dump(ast.parse(text))
    cc, folder = compiler(), (mutants.ROOT / file).parent
    if cc is not None and platform.machine() == "x86_64":
        command = [cc, "-fsyntax-only", *ISAS["avx2"], f"-I{folder}", "-xc", "-"]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return text


@pytest.mark.parametrize("mutant", mutants.mutants(), ids=str)
def test_mutant_changes_one_line_and_is_still_a_program(mutant: mutants.Mutant) -> None:
    assert "\n" not in mutant.before + mutant.after
    text = mutants.mutated(mutant)
    original = (mutants.ROOT / mutant.file).read_text(encoding="utf-8")
    assert meaning(mutant.file, text) != meaning(mutant.file, original)
    assert (mutants.ROOT / mutant.tests.split()[0]).is_file()


def test_there_are_enough_of_them() -> None:
    assert len(set(map(str, mutants.mutants()))) == len(mutants.mutants()) >= 80


@pytest.mark.slow
def test_every_mutant_is_noticed() -> None:
    assert mutants.main([]) == 0
