"""The bar stays away from short work and from stdout."""

import pytest

from qat.checkpoints import progress as module
from qat.checkpoints.progress import progress


@pytest.mark.parametrize(("delay", "shown"), [(60.0, False), (-1.0, True)])
def test_only_slow_work_is_shown_and_only_on_stderr(
    delay: float, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "QUIET_SECONDS", delay)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    with progress("counting words", 3) as advance:
        for _ in range(3):
            advance(1)
    out, err = capsys.readouterr()
    assert out == "" and ("counting words" in err) == shown


def test_the_bar_is_removed_when_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUIET_SECONDS", -1.0)
    for _ in range(2):  # a bar left running would refuse the second one
        with pytest.raises(ZeroDivisionError), progress("failing", None) as advance:
            advance(1)
            raise ZeroDivisionError
