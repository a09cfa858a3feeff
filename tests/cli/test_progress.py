"""Away from a terminal progress is a line now and then, on standard error, with the time left."""

from __future__ import annotations

import re

import pytest

from autossl.cli import progress
from autossl.cli.progress import CommandProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_now_and_then_with_the_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with CommandProgress() as bars:
        update = bars.part("training")
        for done in range(101):
            clock[0] = 2.0 * done
            update(done, 100, {"loss": 0.12345})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training: 15 of 100, about 2 min 50 s left  loss 0.123"
    assert lines[-1] == "training: 100 of 100 in 3 min 20 s  loss 0.123"
    assert len(lines) == 7


def test_a_part_that_starts_again_counts_its_own_time(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with CommandProgress() as bars:
        update = bars.part("validation")
        for start in (0.0, 1000.0):
            for done in (0, 1, 2, 2):
                clock[0] = start + 5 * done
                update(done, 2)
    assert capsys.readouterr().err.splitlines() == ["validation: 2 of 2 in 10 s"] * 2


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with CommandProgress(quiet=True) as bars:
        bars.part("cases")(5, 5)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_a_bar_moves_and_log_lines_stay_readable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    with CommandProgress() as bars:
        update = bars.part("cases")
        update(1, 4)
        update(4, 4, {"Dice": 0.5})
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "cases" in shown
    assert "4/4" in shown
    assert "Dice 0.5" in shown
