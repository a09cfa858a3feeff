"""What all rows need to know: where both tools, the data and a scratch folder are, and how often to measure."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from autossl.data.case_files import case_files
from autossl.data.files import read_json, write_json

from .processes import Measured, run_measured

OURS = "autossl"
DEFAULTS = "nnunet defaults"
HERE = Path(__file__).parent

Call = Callable[[], dict[str, float]]
"""Runs a tool once and gives what was measured."""


class Row(Protocol):
    """One row of the table. `variants` run in turn; those of nnU-Net compete, the fastest counts."""

    @property
    def bench(self) -> Bench:
        """What the user gave."""

    @property
    def name(self) -> str:
        """In the file of results and for --only."""

    @property
    def what(self) -> str:
        """A sentence."""

    @property
    def target(self) -> dict[str, float]:
        """The most that "time" and "memory" may be, ours over nnU-Net's; what is missing is only told."""

    @property
    def time(self) -> str:
        """Which measured value is the time."""

    def settings(self) -> dict[str, Any]:
        """What must agree for repetitions to belong together, beside threads and variants."""

    def prepare(self) -> None:
        """What both need, not measured; keeps what is there."""

    def variants(self) -> dict[str, Call]:
        """`OURS` first."""

    def same_work(self) -> dict[str, Any]:
        """Whether both did the same, by what the last repetition left behind; the answer is under "same"."""


@dataclass(frozen=True)
class Bench:
    """What the user gave."""

    nnunet: Path
    """A virtual environment with nnunetv2."""
    data: Path
    """Folder of raw datasets."""
    work: Path
    """Scratch folder; what is prepared there is used again."""
    workers: tuple[int, ...] | None = None
    """Numbers of nnU-Net's worker processes to try beside its defaults; None: the row's own."""
    threads: int | None = None
    """Of PyTorch, for both; None: their own choice."""
    cases: int | None = None
    """Of each dataset, to try things out; None: as the row says."""
    device: str = "cpu"

    def environment(self, folder: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Of a command of either tool; nnU-Net's three folders lie in `folder`."""
        kept = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
        kept |= {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        paths = {"raw": "raw", "preprocessed": "nnunet_preprocessed", "results": "nnunet_results"}
        kept |= {f"nnUNet_{name}": str(folder / below) for name, below in paths.items()}
        kept["PATH"] = f"{self.nnunet / 'bin'}{os.pathsep}{kept['PATH']}"
        return kept | dict(more or {})

    def ours(self, command: str) -> str:
        """A command of ours."""
        return str(Path(sys.executable).with_name(command))

    def theirs(self, command: str) -> str:
        """A command of nnU-Net's."""
        return str(self.nnunet / "bin" / command)

    def run(self, command: list[str], folder: Path, more: Mapping[str, str] | None = None) -> Measured:
        """A command of either tool, measured."""
        return run_measured(command, self.environment(folder, more), folder)

    def in_nnunet(self, job: str, task: dict[str, Any], folder: Path, more: Mapping[str, str] | None = None) -> Answer:
        """A job of `in_nnunet.py`, by nnU-Net's interpreter."""
        return self._script([self.theirs("python"), "-P", str(HERE / "in_nnunet.py"), job], task, folder, more)

    def in_autossl(self, job: str, task: dict[str, Any], folder: Path) -> Answer:
        """A job of `in_autossl.py`, by this interpreter."""
        return self._script([sys.executable, "-P", str(HERE / "in_autossl.py"), job], task, folder, None)

    def _script(self, start: list[str], task: dict[str, Any], folder: Path, more: Mapping[str, str] | None) -> Answer:
        asked, answered = folder / "task.json", folder / "answer.json"
        write_json(asked, task | {"threads": self.threads, "device": self.device})
        answered.unlink(missing_ok=True)
        measured = self.run([*start, str(asked), str(answered)], folder, more)
        return Answer(measured, read_json(answered))


@dataclass(frozen=True)
class Answer:
    """Of a job in an interpreter of its own."""

    measured: Measured
    content: dict[str, Any]


def worker_counts(bench: Bench, usual: tuple[int, ...], default: int | None = None) -> list[int]:
    """nnU-Net's worker counts to try beside its defaults, each once."""
    asked = usual if bench.workers is None else bench.workers
    return [count for count in dict.fromkeys(asked) if count != default]


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def copy_dataset(source: Path, raw: Path, n_cases: int | None = None) -> Path:
    """The labeled cases of a dataset in another folder, with a dataset.json that names nnU-Net's reorienting reader.

    Args:
        source: the raw dataset.
        raw: where to make a folder of the same name.
        n_cases: the first by name; None: all.
    """
    folder = raw / source.name
    if folder.exists():
        shutil.rmtree(folder)
    description = read_json(source / "dataset.json")
    ending = description["file_ending"]
    cases = case_files(source / "imagesTr", ending, len(description["channel_names"]))
    labeled = [case for case in cases if (source / "labelsTr" / f"{case}{ending}").is_file()][:n_cases]
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for case in labeled:
        copy_images(folder / "imagesTr", case, cases[case], ending)
        shutil.copyfile(source / "labelsTr" / f"{case}{ending}", folder / "labelsTr" / f"{case}{ending}")
    description["numTraining"] = len(labeled)
    if ending == ".nii.gz":
        description["overwrite_image_reader_writer"] = "NibabelIOWithReorient"
    write_json(folder / "dataset.json", description)
    return folder


def copy_images(folder: Path, case: str, files: tuple[Path, ...], ending: str) -> None:
    """With the channel's number in each name, as nnU-Net wants it."""
    for channel, path in enumerate(files):
        shutil.copyfile(path, folder / f"{case}_{channel:04d}{ending}")
