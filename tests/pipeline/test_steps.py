"""Steps, what they were made from, and the engine that runs them."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from autossl.data.problems import InvalidInput
from autossl.pipeline import engine as engines
from autossl.pipeline.engine import Event, StepFailed, engine_named
from autossl.pipeline.lock import experiment_lock
from autossl.pipeline.steps import Estimate, Ledger, Report, Step, check_order, file_name, find_step, total_of

Events = list[tuple[str, str]]


def writes(path: Path, text: str, calls: list[str] | None = None) -> Callable[[Report], None]:
    def run(report: Report) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        report(1, 2, {})
        if calls is not None:
            calls.append(path.name)

    return run


def run_all(tmp_path: Path, steps: list[Step], devices: tuple[str, ...] = ("cpu",)) -> Events:
    events: Events = []

    def tell(event: Event) -> None:
        if event.state != "going on":
            events.append((event.step.name, event.state))

    engine_named("local", devices, tmp_path / "logs").run(steps, Ledger(tmp_path / "steps", tmp_path), tell)
    return events


@pytest.fixture(autouse=True)
def shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are run as they are, without the way of an installed command."""
    monkeypatch.setattr(engines, "child_words", lambda pipe, words: words)
    monkeypatch.setattr(engines, "LOOK_EVERY_S", 0.01)


# ------------------------------------------------------------------------------------------------------------- ledger


def test_a_step_is_done_while_its_outputs_are_there_and_its_inputs_are_the_same(tmp_path: Path) -> None:
    first, second, calls = tmp_path / "a.json", tmp_path / "b.txt", list[str]()
    first.write_text('{"x": 1, "written": "today"}')

    def steps(**parameters: Any) -> list[Step]:
        return [Step("b", (first,), (second,), writes(second, "b", calls), parameters=parameters)]

    assert run_all(tmp_path, steps()) == [("b", "started"), ("b", "done")]
    assert run_all(tmp_path, steps()) == [("b", "there")]
    first.write_text('{"written": "tomorrow", "x": 1}')  # the same content, written again
    assert run_all(tmp_path, steps()) == [("b", "there")]
    first.write_text('{"x": 2}')
    assert run_all(tmp_path, steps()) == [("b", "started"), ("b", "done")]
    assert run_all(tmp_path, steps(methods=["cps"]))[-1] == ("b", "done")
    second.unlink()
    assert run_all(tmp_path, steps(methods=["cps"]))[-1] == ("b", "done")
    assert calls == ["b.txt"] * 4


def test_what_was_made_from_inputs_of_before_is_made_again(tmp_path: Path) -> None:
    source, output = tmp_path / "a.txt", tmp_path / "b.txt"
    source.write_text("1")

    def run(report: Report) -> None:
        output.write_text(source.read_text())
        source.write_text("2")  # somebody changes it meanwhile

    step = Step("b", (source,), (output,), run)
    run_all(tmp_path, [step])
    assert not Ledger(tmp_path / "steps", tmp_path).is_done(step)


def test_a_step_may_have_to_hold_besides(tmp_path: Path) -> None:
    held = [True]
    step = Step("b", (), (tmp_path / "b",), writes(tmp_path / "b", ""), holds=lambda: held[0])
    run_all(tmp_path, [step])
    ledger = Ledger(tmp_path / "steps", tmp_path)
    assert ledger.is_done(step)
    held[0] = False
    assert not ledger.is_done(step)


def test_an_experiment_that_was_moved_is_still_done(tmp_path: Path) -> None:
    def at(root: Path) -> Step:
        return Step("b", (root / "a",), (root / "b",), writes(root / "b", ""))

    old = tmp_path / "old"
    old.mkdir()
    (old / "a").write_text("x")
    run_all(old, [at(old)])
    new = old.rename(tmp_path / "new")
    assert run_all(new, [at(new)]) == [("b", "there")]


def test_lists_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    a = Step("a", (tmp_path / "2",), (tmp_path / "1",), writes(tmp_path / "1", ""))
    b = Step("b", (), (tmp_path / "2",), writes(tmp_path / "2", ""))
    check_order([b, a])
    with pytest.raises(ValueError, match="'a' needs .*2, which a later step makes"):
        check_order([a, b])
    with pytest.raises(ValueError, match="the same name: b"):
        check_order([b, b])
    with pytest.raises(ValueError, match="a function or a command"):
        Step("c", (), ())
    with pytest.raises(InvalidInput, match="no step 'c'.*one of: a, b"):
        find_step([a, b], "c")
    with pytest.raises(InvalidInput, match="engine 'lokal'.*local"):
        engine_named("lokal", ("cpu",), tmp_path)
    assert file_name("train 2d mean_teacher fold 0") == "train_2d_mean_teacher_fold_0"
    assert (total_of([1.0, None, 2.0]), total_of([None])) == (3.0, None)


def test_a_missing_input_is_named_with_the_step_that_should_have_made_it(tmp_path: Path) -> None:
    first = Step("a", (), (tmp_path / "1",), writes(tmp_path / "1", ""), is_done=lambda: True)
    second = Step("b", (tmp_path / "1",), (tmp_path / "2",), writes(tmp_path / "2", ""))
    with pytest.raises(RuntimeError, match="'b' needs .*1, which is not there although step 'a' is done"):
        run_all(tmp_path, [first, second])


# ------------------------------------------------------------------------------------------------------------- engine


def command(output: Path, code: str = "", seconds: float = 0.0) -> Callable[[str], list[str]]:
    """A process that notes when it ran, and on which device."""

    def words(device: str) -> list[str]:
        text = (
            f"import pathlib, time\nbegan = time.time()\ntime.sleep({seconds})\n{code}\n"
            f"pathlib.Path({str(output)!r}).write_text(f'{device} {{began}} {{time.time()}}')"
        )
        return [sys.executable, "-SE", "-c", text]

    return words


def ran(path: Path) -> tuple[str, float, float]:
    device, began, ended = path.read_text().split()
    return device, float(began), float(ended)


def trainings(tmp_path: Path, codes: Mapping[str, str] | None = None, seconds: float = 0.15) -> list[Step]:
    """Two runs of two folds, and what is made of them."""
    codes, steps = codes or {}, []
    for name in ("a0", "a1", "b0", "b1"):
        output = tmp_path / name
        made = command(output, codes.get(name, ""), seconds)
        steps.append(Step(name, (), (output,), command=made, alone_in=tmp_path / name[0]))
    return [*steps, Step("end", tuple(tmp_path / s.name for s in steps), (tmp_path / "e",), writes(tmp_path / "e", ""))]


def test_one_device_runs_one_command_after_the_other(tmp_path: Path) -> None:
    assert run_all(tmp_path, trainings(tmp_path, seconds=0.02))[-1] == ("end", "done")
    times = [ran(tmp_path / name) for name in ("a0", "a1", "b0", "b1")]
    assert {device for device, _, _ in times} == {"cpu"}
    assert all(one[2] <= other[1] for one, other in itertools.pairwise(times))
    assert run_all(tmp_path, trainings(tmp_path)) == [(name, "there") for name in ("a0", "a1", "b0", "b1", "end")]


def test_several_devices_share_the_commands_but_never_the_folds_of_a_run(tmp_path: Path) -> None:
    def meets(own: str, other: str) -> str:
        """Ends only when both have begun."""
        there = f"pathlib.Path({str(tmp_path)!r}, 'begun_{other}').exists()"
        return (
            f"pathlib.Path({str(tmp_path)!r}, 'begun_{own}').touch()\nuntil = time.time() + 60\n"
            f"while not {there} and time.time() < until: time.sleep(0.01)\nassert {there}"
        )

    run_all(tmp_path, trainings(tmp_path, {"a0": meets("a", "b"), "b0": meets("b", "a")}, 0.0), ("cuda:0", "cuda:1"))
    a0, a1, b0, b1 = (ran(tmp_path / name) for name in ("a0", "a1", "b0", "b1"))
    assert {a0[0], b0[0]} == {"cuda:0", "cuda:1"}
    assert a0[2] <= a1[1]
    assert b0[2] <= b1[1]


def test_a_command_that_fails_stops_what_needs_it_and_nothing_else(tmp_path: Path) -> None:
    steps = trainings(tmp_path, {"a0": "print('the reason why'); raise SystemExit(3)"}, 0.0)
    with pytest.raises(StepFailed, match=r"a0 ended with exit code 3; .*a0\.log ends with:\n(.*\n)*the reason why"):
        run_all(tmp_path, steps)
    assert [path.exists() for path in map(tmp_path.joinpath, ("a1", "b0", "b1", "e"))] == [False, True, True, False]
    assert run_all(tmp_path, trainings(tmp_path, {}, 0.0))[-1] == ("end", "done")


def test_a_command_that_leaves_no_file_has_failed(tmp_path: Path) -> None:
    step = Step("a", (), (tmp_path / "a",), command=lambda device: [sys.executable, "-SE", "-c", ""])
    with pytest.raises(StepFailed, match="a ended without its files"):
        run_all(tmp_path, [step])


def test_an_interrupt_ends_the_commands(tmp_path: Path) -> None:
    note = "import signal, sys\nsignal.signal(15, lambda *_: (print('state saved', flush=True), sys.exit(3)))\n"
    words = [sys.executable, "-SE", "-c", f"{note}print('ready', flush=True)\nimport time\ntime.sleep(20)"]
    step = Step("a", (), (tmp_path / "a",), command=lambda device: words, progress=lambda: (1, 2))
    log = tmp_path / "logs" / "a.log"

    def interrupt(event: Event) -> None:
        if event.state == "going on" and event.done:
            until = time.monotonic() + 10
            while "ready\n" not in log.read_text() and time.monotonic() < until:
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine_named("local", ("cpu",), tmp_path / "logs").run([step], Ledger(tmp_path / "s", tmp_path), interrupt)
    assert log.read_text().endswith("state saved\n")


def test_events_say_which_step_of_how_many_and_the_time_left(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    steps = [
        Step(path.name, (), (path,), writes(path, ""), estimate=lambda s=seconds: Estimate(s))
        for path, seconds in zip(paths, (10.0, None, 30.0), strict=True)
    ]
    events: list[Event] = []
    engine_named("local", ("cpu",), tmp_path).run(steps, Ledger(tmp_path / "steps", tmp_path), events.append)
    assert [(e.number, e.n_steps, e.state, e.seconds_left) for e in events if e.step.name != "b"] == [
        (1, 3, "started", 40.0),
        (1, 3, "going on", 40.0),
        (1, 3, "done", 30.0),
        (3, 3, "started", 30.0),
        (3, 3, "going on", 30.0),
        (3, 3, "done", None),
    ]


# --------------------------------------------------------------------------------------------------------------- lock


def test_the_lock_waits_and_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "x" / ".lock"
    with (
        experiment_lock(path),
        pytest.raises(InvalidInput, match=rf"process {os.getpid()} .* works on this split") as caught,
    ):
        experiment_lock(path, wait_s=0.1).__enter__()
    assert str(path) in str(caught.value)
    with experiment_lock(path, wait_s=0.1) as descriptor:
        assert descriptor is not None


def test_the_lock_is_held_by_what_inherited_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with experiment_lock(path) as descriptor:
        assert descriptor is not None
        kept = os.dup(descriptor)  # as a training that outlives its experiment
    try:
        with pytest.raises(InvalidInput), experiment_lock(path, wait_s=0.1):
            pass
    finally:
        os.close(kept)
    with experiment_lock(path, wait_s=0.1):
        pass
