"""A bar on a terminal, plain lines elsewhere, and neither for short work or on stdout."""

import io
import re
import sys

import pytest

from qat.checkpoints import progress as module
from qat.checkpoints.progress import Meter, counted, progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called inside a test: pytest puts its own streams back after the fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return stream


@pytest.mark.parametrize(("delay", "shown"), [(60.0, False), (-1.0, True)])
def test_only_slow_work_is_shown_and_only_on_stderr(
    delay: float, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "QUIET_SECONDS", delay)
    screen = terminal(monkeypatch)
    with progress("counting words", 3) as advance:
        for _ in range(3):
            advance(1)
    assert capsys.readouterr().out == "" and ("counting words" in screen.getvalue()) == shown


def test_the_bar_is_removed_when_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal(monkeypatch)
    monkeypatch.setattr(module, "QUIET_SECONDS", -1.0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), progress("failing", None) as advance:
            advance(1)
            raise ZeroDivisionError
    assert module._display.bars is None


def test_evaluating_inside_training_shares_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two live displays at once are an error in rich before 14.1."""
    screen = terminal(monkeypatch)
    monkeypatch.setattr(module, "QUIET_SECONDS", -1.0)
    training = Meter("training", 10)
    training.advance(1)
    with progress("evaluating", 2) as advance:
        advance(1)
        assert module._display.bars is not None and len(module._display.bars.tasks) == 2
    training.say("step 1: held-out KL 0.5")
    training.close()
    assert module._display.bars is None and "held-out KL 0.5" in screen.getvalue()


def test_without_a_terminal_a_line_comes_from_time_to_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    monkeypatch.setenv("FORCE_COLOR", "1")  # some CI services set it, and a log is no terminal
    meter = Meter("writing teacher", 8000, unit="tokens", done=800)
    for _ in range(72):
        now += 1.0
        meter.advance(100, "loss 2.5")
    meter.close()
    meter.close()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 4, "after 10, 40 and 70 seconds, and at the end"
    assert lines[0] == "writing teacher: 1,800 of 8,000 tokens (22%), 100/s, 1:02 left, loss 2.5"
    assert re.fullmatch(r"writing teacher: 8,000 of 8,000 tokens \(100%\), 100/s, 1:12 so far, loss 2.5", lines[-1])


def test_short_work_and_failed_work_say_nothing_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(counted("abc", "reading", 3)) == ["a", "b", "c"]
    monkeypatch.setattr(module, "FIRST_LINE_SECONDS", -1.0)
    with pytest.raises(ZeroDivisionError), progress("failing", None) as advance:
        advance(1)
        raise ZeroDivisionError
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("failing: 1, "), "no last line that looks like success"
