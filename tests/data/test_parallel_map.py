"""Work in several processes: order, streaming, and what is said when a worker fails or dies."""

from __future__ import annotations

import itertools
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from autossl.data import memory, parallel
from autossl.data.parallel import WorkerError, free_memory, parallel_map, usable_cpus
from autossl.data.problems import InvalidInput, Problem


def slow_square(number: int) -> int:
    time.sleep(0.05 if number == 0 else 0)
    return number**2


@pytest.mark.parametrize("n_workers", [0, 1, 2, 5])
def test_results_come_in_the_order_of_the_items(n_workers: int) -> None:
    assert list(parallel_map(slow_square, range(7), n_workers)) == [0, 1, 4, 9, 16, 25, 36]


def test_no_items_gives_no_results() -> None:
    assert list(parallel_map(slow_square, [], 4)) == []


@pytest.mark.parametrize("n_workers", [0, 2])
def test_an_exception_names_the_item_and_shows_the_traceback_of_the_worker(n_workers: int) -> None:
    def divide_by(number: int) -> float:
        return 1 / number

    with pytest.raises(WorkerError) as caught:
        list(parallel_map(divide_by, [2, 1, 0], n_workers, name_of=lambda number: f"case_{number}"))
    assert caught.value.item == "case_0"
    assert "ZeroDivisionError: division by zero" in str(caught.value)
    assert "return 1 / number" in str(caught.value)
    assert re.search(
        r"\nMemory at that time: (\d+\.\d\d GiB in the worker, )?\d+\.\d\d GiB free\.\n", str(caught.value)
    )
    assert str(caught.value).endswith(
        "What to do: look at the files of this case; -np 0 works without processes; what is finished is kept."
    )


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_user_fault_arrives_as_such_with_its_case(n_workers: int) -> None:
    def refuse(number: int) -> None:
        if number == 1:
            raise InvalidInput(Problem("a hole", "no hole", "fill it", file=Path("a.nii")))

    with pytest.raises(InvalidInput) as caught:
        list(parallel_map(refuse, [1, 2], n_workers, name_of=lambda number: f"case_{number}"))
    (problem,) = caught.value.problems
    assert (problem.case, problem.found, problem.file) == ("case_1", "a hole", Path("a.nii"))


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "killed by SIGTERM"),
        (lambda: os._exit(3), "exit code 3"),
    ],
)
def test_a_killed_worker_is_an_error_and_no_hang(end: Callable[[], None], said: str) -> None:
    def die_on_three(number: int) -> int:
        if number == 3:
            end()
        return number

    with pytest.raises(WorkerError, match=said) as caught:
        list(parallel_map(die_on_three, range(6), 2, name_of=lambda number: f"case_{number}"))
    assert caught.value.item == "case_3"
    assert re.search(
        r"Memory at that time: \d+\.\d\d GiB in the worker, \d+\.\d\d GiB free, \d\.\d s before", str(caught.value)
    )
    assert ("use fewer workers (-np" in str(caught.value)) == (said == "killed by SIGKILL")


def test_the_out_of_memory_killer_is_told_from_other_killers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    events = tmp_path / "memory.events"

    def die(kills: int) -> None:
        partial = tmp_path / str(os.getpid())
        partial.write_text(f"oom 9\noom_kill {kills}\noom_group_kill 0\n")
        partial.replace(events)  # the other worker dies at the same time
        os.kill(os.getpid(), signal.SIGKILL)

    for kills, expected in ((4, False), (6, True)):
        events.write_text("oom 9\noom_kill 4\noom_group_kill 0\n")
        with pytest.raises(WorkerError) as caught:
            list(parallel_map(die, [kills, kills], 2))
        assert ("the system ended 2 process(es) because memory ran out" in caught.value.memory) == expected


@pytest.mark.parametrize("n_workers", [0, 2])
def test_memory_that_runs_out_in_a_worker_comes_with_advice(n_workers: int) -> None:
    with pytest.raises(WorkerError, match="What to do: use fewer workers"):
        list(parallel_map(lambda n: bytes(n), [1, 2**62], n_workers))


def test_no_more_workers_than_memory(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(parallel, "usable_cpus", lambda: 16)
    monkeypatch.setattr(parallel, "free_memory", lambda: 2**30)
    with caplog.at_level(logging.INFO):
        assert parallel.default_workers() == 3  # 0.8 GiB, a quarter each
    assert "3 workers instead of 16: 1.00 GiB of memory are free" in caplog.text
    monkeypatch.setattr(parallel, "free_memory", lambda: 0)
    assert parallel.default_workers() == 1
    monkeypatch.setattr(parallel, "free_memory", lambda: 2**40)
    assert parallel.default_workers() == 16


def test_a_result_that_cannot_be_sent_is_an_error_with_its_item() -> None:
    with pytest.raises(WorkerError, match="pickle") as caught:
        list(parallel_map(lambda number: lambda: number, [1, 2], 2))
    assert caught.value.item in ("1", "2")


def test_large_results_come_through() -> None:
    assert [len(r) for r in parallel_map(lambda n: bytes(n), [3_000_000, 1, 2_000_000], 2)] == [3_000_000, 1, 2_000_000]


def test_items_that_do_not_fit_together_run_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def span(_: int) -> tuple[float, float]:
        start = time.monotonic()
        time.sleep(0.03)
        return start, time.monotonic()

    monkeypatch.setattr(parallel, "free_memory", lambda: 100)
    spans = list(parallel_map(span, range(4), 4, bytes_of=lambda _: 1000))
    assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(spans))

    def meets_the_other(number: int) -> bool:
        (tmp_path / str(number)).touch()
        deadline = time.monotonic() + 60
        while not (tmp_path / str(1 - number)).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return (tmp_path / str(1 - number)).exists()

    # each waits for the other, so one after the other the first would never see the second
    assert list(parallel_map(meets_the_other, range(2), 2, bytes_of=lambda _: 30)) == [True, True]


def test_workers_use_one_thread() -> None:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert list(parallel_map(lambda _: torch.get_num_threads(), range(2), 2)) == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_leaving_early_ends_the_workers() -> None:
    results = parallel_map(lambda n: (time.sleep(60) if n > 1 else None, os.getpid())[1], range(4), 2)
    pid = next(results)
    results.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = f"""
import os, pathlib, time
from autossl.data.parallel import parallel_map
def note(n):
    pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch()
    time.sleep(100)  # in the middle of its work
list(parallel_map(note, range(2), 2))
"""
    parent = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    pids = [int(file.name) for file in tmp_path.iterdir()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    while any(_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_running(pid) for pid in pids)


def _running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_the_machine_has_cpus_and_memory() -> None:
    assert 1 <= usable_cpus() <= 4096
    assert 2**20 < free_memory() < 2**50
