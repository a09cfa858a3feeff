r"""Spoils images, labels, descriptions, tables, plans, checkpoints and archives, and looks how autossl takes them.

Every input is drawn from the seed and its number, written into a copy of a sound workspace, and read by the commands
that a user would call (plan and preprocess, install, predict), in a forked process with two gigabytes of memory beyond
what the process has, 30 seconds of time, and a watch on what is written and called. It has to end in success or in a
message with code 2. Inputs that are finished stay in the folder, so that the script may be stopped and called again;
what was a fault is kept there with its message.

    python benchmarks/fuzz_campaign.py --folder /tmp/fuzz --inputs 5400 --processes 2 \
        -o benchmarks/results/fuzz_campaign.json --page SECURITY.md
    python benchmarks/fuzz_campaign.py --folder /tmp/fuzz --only 17 --keep
"""

from __future__ import annotations

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLOSC_NTHREADS"), "1")
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import argparse
import json
import math
import platform
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fuzzing.materials import Materials, make_materials
from fuzzing.page import write_figures
from fuzzing.trial import KINDS, RESULT, STAGES, Outcome, kind_of, run_trial

from autossl.data.files import atomic_write, write_json
from autossl.data.provenance import Written

SECONDS = 30.0
"""Of the processor's time, so that other work on the machine does not count."""
WALL_PER_CPU = 10
"""Where a process waits instead of working."""
LOG = "inputs.jsonl"
POLL_S = 0.005


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing, writes the summary; 1 where there are faults."""
    arguments = _parser().parse_args(argv)
    folder: Path = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    materials = Materials(folder / "sound")
    _in_child(lambda: make_materials(materials.folder))  # this process stays without threads, to be forked
    before = materials.digest()
    done = {} if arguments.only is not None else _finished(folder, arguments.seed)
    numbers = [arguments.only] if arguments.only is not None else range(arguments.inputs)
    todo = [number for number in numbers if number not in done]
    started = time.monotonic()
    for outcome in _outcomes(todo, arguments, materials):
        done[outcome.number] = outcome
        if arguments.only is None:
            with (folder / LOG).open("a") as log:
                log.write(json.dumps({"seed": arguments.seed, **asdict(outcome)}) + "\n")
        if outcome.is_fault or arguments.only is not None:
            print(
                f"{outcome.number} {outcome.kind} ({outcome.mutation}), {outcome.stage}: {outcome.end}", outcome.codes
            )
            print(outcome.message)
        if len(done) % 200 == 0:
            print(
                f"{len(done)} of {arguments.inputs}, {len(todo) / (time.monotonic() - started):.2f} in sight per second"
            )
    took = time.monotonic() - started
    chosen = [done[number] for number in numbers]
    summary = summarize(chosen, arguments.seed)
    summary["sound files unchanged"] = materials.digest() == before
    if todo:
        summary["inputs per second"] = round(len(todo) / took, 2)
    print(json.dumps({key: value for key, value in summary.items() if key != "faults"}, indent=2))
    if arguments.output is not None:
        write_json(arguments.output, summary)
    if arguments.page is not None:
        write_figures(arguments.page, summary)
    return 1 if summary["faults"] or not summary["sound files unchanged"] else 0


def summarize(outcomes: Sequence[Outcome], seed: int) -> dict[str, Any]:
    """Counts by kind, stage and end; every fault by name."""
    past = sum(outcome.stage != "reader" for outcome in outcomes)
    return {
        "inputs": len(outcomes),
        "seed": seed,
        "past the reader": past,
        "share past the reader": round(past / max(1, len(outcomes)), 3),
        "by kind and stage": {
            kind: {stage: sum((o.kind, o.stage) == (kind, stage) for o in outcomes) for stage in STAGES}
            for kind in KINDS
        },
        "ends": dict(Counter(outcome.end for outcome in outcomes)),
        "different mutations": len({(outcome.kind, outcome.mutation) for outcome in outcomes}),
        "most processor seconds": round(max((outcome.processor_seconds for outcome in outcomes), default=0), 2),
        "processor seconds": round(sum(outcome.processor_seconds for outcome in outcomes), 1),
        "most megabytes": max((outcome.megabytes for outcome in outcomes), default=0),
        "limits": {"processor seconds": SECONDS, "seconds": SECONDS * WALL_PER_CPU, "gigabytes": 2},
        "faults": [asdict(outcome) for outcome in outcomes if outcome.is_fault],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "written": Written.now().model_dump(mode="json"),
    }


def _outcomes(todo: Sequence[int], arguments: argparse.Namespace, materials: Materials) -> Iterator[Outcome]:
    """As the processes end; up to `--processes` at a time."""
    waiting = list(reversed(todo))
    running: dict[int, tuple[int, Path, float]] = {}
    while waiting or running:
        while waiting and len(running) < arguments.processes:
            number = waiting.pop()
            folder = arguments.folder.absolute() / f"input_{number}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            process = _fork(lambda n=number, f=folder: _limited(n, f, arguments, materials))
            running[process] = (number, folder, time.monotonic())
        for process, (number, folder, started) in list(running.items()):
            ended, status = os.waitpid(process, os.WNOHANG)
            seconds = time.monotonic() - started
            hangs = not ended and seconds > arguments.seconds * WALL_PER_CPU
            if hangs:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            if ended or hangs:
                del running[process]
                hangs = hangs or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU)
                yield _outcome(number, folder, "hang" if hangs else f"killed, status {status}", seconds, arguments)
        time.sleep(POLL_S)


def _limited(number: int, folder: Path, arguments: argparse.Namespace, materials: Materials) -> None:
    """Ends by SIGXCPU where the limit of time is reached."""
    seconds = math.ceil(arguments.seconds + time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))  # at the second one SIGKILL would come
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    run_trial(number, arguments.seed, materials, folder)


def _outcome(number: int, folder: Path, end: str, seconds: float, arguments: argparse.Namespace) -> Outcome:
    """What the process wrote; or how it was ended."""
    if (folder / RESULT).exists():
        outcome = Outcome(**json.loads((folder / RESULT).read_text()))
    else:
        told = (folder / "err").read_text(errors="replace")[-2000:] if (folder / "err").exists() else ""
        outcome = Outcome(number, kind_of(number), "unknown", end=end.split(",")[0], message=f"{end}\n{told}")
    outcome.seconds = round(seconds, 3)
    if not (outcome.is_fault or arguments.keep):
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def _fork(work: Any) -> int:
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    try:
        work()
    finally:
        os._exit(0)


def _in_child(work: Any) -> None:
    process = os.fork()
    if process:
        if os.waitpid(process, 0)[1]:
            raise SystemExit("the sound files could not be made")
        return
    try:
        work()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def _finished(folder: Path, seed: int) -> dict[int, Outcome]:
    """Of the log; a last line that was cut off is left out and removed."""
    path = folder / LOG
    found, kept = {}, []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        kept.append(line)
        if entry.pop("seed") == seed:
            found[entry["number"]] = Outcome(**entry)
    if path.exists():
        with atomic_write(path) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept))
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="for the work; finished inputs are found again there"
    )
    parser.add_argument("--inputs", type=int, default=5400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the processor, after which an input hangs")
    parser.add_argument("--only", type=int, help="one input by its number, with its messages")
    parser.add_argument("--keep", action="store_true", help="the folders of all inputs, not of faults alone")
    parser.add_argument("-o", "--output", type=Path, help="JSON with the figures")
    parser.add_argument("--page", type=Path, help="Markdown page whose figures are replaced: SECURITY.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
