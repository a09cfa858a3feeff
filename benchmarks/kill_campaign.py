"""Kills planning, preprocessing, training, prediction and whole experiments, and looks whether anything is lost.

Every episode copies a prepared workspace, calls one command, kills it some times on the way, calls it again until it is
done, and compares the whole workspace with that of an unbroken run: weights, memory, logs without times, plans, stored
arrays and predictions, to the bit. Kills are

- *point*: SIGKILL to the whole process group at a point just before or after a write, a sync or a rename;
- *group*: the same at a random moment, as a power cut;
- *main*: SIGKILL to the command alone: its workers must end by themselves;
- *term*, *int*: SIGTERM or SIGINT to the command; it must save, end by itself and say so with exit code 3;
- *preempt*: SIGTERM to the whole group, as clusters send it.

Commands are forked from a process that has imported everything; a share of them are called as installed. Everything is
drawn from the seed and the number of the episode; finished episodes are kept in the folder, so that the script may be
stopped and called again.

    python benchmarks/kill_campaign.py --folder /tmp/kills --kills 200 -o benchmarks/results/kill_campaign.json
    python benchmarks/kill_campaign.py --folder /tmp/kills --sample
"""

from __future__ import annotations

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import argparse
import json
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kills.processes import INTERRUPTED, Ended, preload, start, wait
from kills.scenarios import DATASET, SCENARIOS, Scenario
from kills.state import differences, remnants_of, state_of

from autossl.data.files import write_json
from autossl.data.phantom import PhantomSettings, make_phantom_dataset
from autossl.data.provenance import Written, package_commit
from autossl.evaluation.benchmark.provenance import machine

POINT_SHARE = 0.5
RANDOM_KINDS = {"group": 4, "main": 2, "term": 2, "int": 1, "preempt": 1}
SIGNALS = {"group": "KILL", "main": "KILL", "term": "TERM", "int": "INT", "preempt": "TERM"}
MOST_KILLS = 4
"""Of one episode: what goes on after a kill is killed again."""
INSTALLED_SHARE = 0.04
HANG_S = 600.0
SAMPLE_KILLS = 12


@dataclass(frozen=True)
class Reference:
    """An unbroken run."""

    seconds: float
    points: int
    state: dict[str, str]


@dataclass(frozen=True)
class Attempt:
    """One call that was to be killed."""

    kind: str
    at: float
    """Point, or seconds."""
    workers: int
    installed: bool
    killed: bool
    """False: it was done before."""
    code: int
    seconds: float
    left_behind: int


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the campaign; exit code 1 where anything was lost."""
    arguments = _parser().parse_args(argv)
    began = time.monotonic()
    preload()
    campaign = Campaign(arguments.folder, arguments.seed, arguments.sample, arguments.only)
    campaign.prepare()
    prepared = time.monotonic() - began
    wanted = SAMPLE_KILLS if arguments.sample and arguments.kills is None else arguments.kills or 200
    episodes = campaign.run(wanted)
    content = summary(episodes) | {"seconds_of_this_call": round(time.monotonic() - began, 1)}
    content["seconds_to_prepare"] = round(prepared, 1)
    if arguments.output is not None:
        what = __doc__.splitlines()[0] if __doc__ else ""
        head = {"what": what, "seed": arguments.seed, "machine": machine("cpu")}
        write_json(arguments.output, {**head, **content, "written": Written.now().model_dump(mode="json")})
    print(json.dumps(content, indent=2))
    return 1 if content["lost"] or content["different"] or content["wrong_exit_codes"] else 0


class Campaign:
    """Episodes in a folder.

    Args:
        folder: of the bases, the references, the work and the record of finished episodes.
        seed: of all draws.
        sample: the short form.
        only: names of scenarios; empty: all.
    """

    def __init__(self, folder: Path, seed: int, sample: bool, only: Sequence[str] = ()) -> None:
        self.folder, self._seed = folder, seed
        chosen = [s for s in SCENARIOS if (s.in_sample or not sample) and (not only or s.name in only)]
        self._scenarios = chosen
        self._installed_share = 0.0 if sample else INSTALLED_SHARE
        self._references: dict[str, Reference] = {}
        self._record = folder / "episodes.jsonl"
        self._work = folder / "work" / "workspace"  # always the same: results name their folders

    def prepare(self) -> None:
        """Makes the raw dataset and every unbroken run that is not there yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        made_with = self.folder / "commit.txt"
        if made_with.is_file() and made_with.read_text() != package_commit():
            raise SystemExit(f"{self.folder} was begun with commit {made_with.read_text()}: take a new folder")
        made_with.write_text(package_commit())
        if not self._base(None).exists():
            partial = self._base(None).with_name("partial")
            shutil.rmtree(partial, ignore_errors=True)
            settings = PhantomSettings(DATASET, n_labeled=6, n_unlabeled=3, n_test=3, shape_zyx=(12, 16, 16))
            make_phantom_dataset(partial / "raw", settings)
            partial.rename(self._base(None))
        by_name = {scenario.name: scenario for scenario in SCENARIOS}
        for scenario in self._scenarios:
            chain = [scenario]
            while chain[0].base is not None:
                chain.insert(0, by_name[chain[0].base])
            for link in chain:
                self._refer(link)

    def _base(self, name: str | None) -> Path:
        return self.folder / "bases" / (name or "raw").replace(" ", "_")

    def _restore(self, name: str | None) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        shutil.copytree(self._base(name), self._work)

    def _refer(self, scenario: Scenario) -> None:
        """The unbroken run of a scenario."""
        if scenario.name in self._references:
            return
        path = self.folder / "references" / f"{scenario.name.replace(' ', '_')}.json"
        if not path.is_file():
            self._restore(scenario.base)
            path.parent.mkdir(exist_ok=True)
            count, log = path.with_suffix(".count"), path.with_suffix(".log")
            child = start(scenario.call(self._work, 0), log, None, installed=False, count_in=count)
            ended = _to_the_end(child)
            if ended.code:
                raise RuntimeError(f"'{scenario.name}' fails unbroken (exit code {ended.code}): see {log}")
            base = self._base(scenario.name)
            shutil.rmtree(base, ignore_errors=True)
            shutil.copytree(self._work, base)
            found = Reference(ended.seconds, int(count.read_text()), state_of(self._work))
            path.write_text(json.dumps(asdict(found)))
        self._references[scenario.name] = Reference(**json.loads(path.read_text()))

    def run(self, kills: int) -> list[dict[str, Any]]:
        """Episodes until there were so many kills; those of before count."""
        lines = self._record.read_text().splitlines() if self._record.is_file() else []
        episodes = [json.loads(line) for line in lines]
        while _kills(episodes) < kills:
            episode = self._episode(len(episodes))
            episodes.append(episode)
            with self._record.open("a") as file:
                file.write(json.dumps(episode) + "\n")
            outcome = "; ".join(episode["problems"]) or "as unbroken"
            print(
                f"{_kills(episodes):4d} kills  {episode['scenario']:22s} {episode['seconds']:6.1f} s  {outcome}",
                flush=True,
            )
        return episodes

    def _episode(self, number: int) -> dict[str, Any]:
        draw = random.Random(f"{self._seed} {number}")
        scenario = self._next(number, draw)
        reference = self._references[scenario.name]
        self._restore(scenario.base)
        log = self.folder / "logs" / f"{number:04d}.log"
        log.parent.mkdir(exist_ok=True)
        log.unlink(missing_ok=True)
        began, attempts, problems = time.monotonic(), [], []
        share = 1.0
        for _ in range(draw.randint(1, MOST_KILLS)):
            attempt = self._attempt(scenario, reference, draw, share, log)
            attempts.append(attempt)
            share *= 0.6  # less is left to do
            if not attempt.killed:
                break
        wrong = [a for a in attempts if SIGNALS.get(a.kind) in ("TERM", "INT") and a.code not in (0, INTERRUPTED)]
        ended = _to_the_end(start(scenario.call(self._work, draw.choice((0, 1, 2))), log, None, installed=False))
        if ended.hung or ended.code:
            problems.append(f"lost: {'it hung' if ended.hung else f'exit code {ended.code}'}, see {log}")
        else:
            problems += differences(reference.state, state_of(self._work))
        if problems:
            shutil.copytree(self._work, self.folder / "kept" / f"{number:04d}", dirs_exist_ok=True)
        return {
            "scenario": scenario.name,
            "attempts": [asdict(attempt) for attempt in attempts],
            "lost": bool(ended.hung or ended.code),
            "problems": problems,
            "wrong_exit_codes": [a.code for a in wrong],
            "remnants": len(remnants_of(self._work)),
            "seconds": round(time.monotonic() - began, 2),
        }

    def _next(self, number: int, draw: random.Random) -> Scenario:
        """Each once, then by weight."""
        if number < len(self._scenarios):
            return self._scenarios[number]
        return draw.choices(self._scenarios, [scenario.weight for scenario in self._scenarios])[0]

    def _attempt(
        self, scenario: Scenario, reference: Reference, draw: random.Random, share: float, log: Path
    ) -> Attempt:
        """One call that is killed, unless it is done before."""
        kind = (
            "point" if draw.random() < POINT_SHARE else draw.choices(list(RANDOM_KINDS), list(RANDOM_KINDS.values()))[0]
        )
        workers, installed = draw.choice((0, 0, 1, 2)), draw.random() < self._installed_share and kind == "point"
        if kind == "point":
            each = workers or 1 if scenario.worker_option == "-np" else 1  # its workers share the points
            at: float = draw.randint(1, max(1, round(reference.points * share / each)))
        else:
            at = draw.random() * reference.seconds * share
        words = scenario.call(self._work, workers)
        child = start(words, log, int(at) if kind == "point" else None, installed)
        early = None if kind == "point" else wait(child, at)
        if early is None and kind != "point":
            target = os.killpg if kind in ("group", "preempt") else os.kill
            target(child, getattr(signal, f"SIG{SIGNALS[kind]}"))
        ended = early or _to_the_end(child)
        killed = early is None and ended.code != 0
        return Attempt(
            kind, round(at, 3), workers, installed, killed, ended.code, round(ended.seconds, 2), ended.left_behind
        )


def _to_the_end(child: int) -> Ended:
    ended = wait(child, HANG_S, limit=HANG_S)
    if ended is None:
        raise RuntimeError("a wait with a limit ends")
    return ended


def _kills(episodes: Sequence[Mapping[str, Any]]) -> int:
    return sum(attempt["killed"] for episode in episodes for attempt in episode["attempts"])


def summary(episodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a campaign."""
    attempts = [(e["scenario"], a) for e in episodes for a in e["attempts"] if a["killed"]]
    kinds = Counter(attempt["kind"] for _, attempt in attempts)
    seconds = sum(episode["seconds"] for episode in episodes)
    return {
        "episodes": len(episodes),
        "kills": len(attempts),
        "at_points_share": round(kinds["point"] / max(1, len(attempts)), 3),
        "kills_by_kind": dict(sorted(kinds.items())),
        "kills_by_command": dict(sorted(Counter(name for name, _ in attempts).items())),
        "kills_of_installed_commands": sum(attempt["installed"] for _, attempt in attempts),
        "kills_with_workers": sum(attempt["workers"] > 0 for _, attempt in attempts),
        "lost": sum(episode["lost"] for episode in episodes),
        "different": sum(bool(episode["problems"]) and not episode["lost"] for episode in episodes),
        "wrong_exit_codes": sum(len(episode["wrong_exit_codes"]) for episode in episodes),
        "left_behind_processes": sum(attempt["left_behind"] for _, attempt in attempts),
        "remnants_of_killed_writes": sum(episode["remnants"] for episode in episodes),
        "problems": [{"scenario": e["scenario"], "problems": e["problems"][:8]} for e in episodes if e["problems"]],
        "seconds_per_kill": round(seconds / max(1, len(attempts)), 2),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for everything it makes; kept, to go on from")
    parser.add_argument("--kills", type=int, help="how many (default: 200; of a sample 12)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", action="store_true", help="a short one: fewer commands, none as installed")
    parser.add_argument("--only", nargs="*", default=[], metavar="COMMAND", help=f"of {[s.name for s in SCENARIOS]}")
    parser.add_argument("-o", "--output", type=Path, help="JSON with the figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
