"""The table of mutants is true of the code as it stands; running them all takes long (`slow`)."""

import ast

import pytest

from tests import mutants


@pytest.mark.parametrize("mutant", mutants.mutants(), ids=str)
def test_mutant_changes_one_line_and_is_still_python(mutant: mutants.Mutant) -> None:
    assert "\n" not in mutant.before + mutant.after
    text = mutants.mutated(mutant)
    original = (mutants.ROOT / mutant.file).read_text(encoding="utf-8")
    assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(original))
    assert (mutants.ROOT / mutant.tests.split()[0]).is_file()


def test_there_are_enough_of_them() -> None:
    assert len(set(map(str, mutants.mutants()))) == len(mutants.mutants()) >= 80


@pytest.mark.slow
def test_every_mutant_is_noticed() -> None:
    assert mutants.main([]) == 0
