"""What benchmarks/versus_nnunet.py makes of its measurements; both tools are made up here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from /proc")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("versus", "versus_nnunet")]:
        del sys.modules[name]


@dataclass
class MadeUpRow:
    """Seconds per call of each variant, and a record of the calls."""

    seconds: dict[str, list[float]]
    bench: Any
    called: list[str] = field(default_factory=list)
    size: int = 1
    samples: int = 50
    same: bool = True
    name: str = "made_up"
    what: str = "nothing"
    target: dict[str, float] = field(default_factory=lambda: {"time": 0.5})
    time: str = "wall_s"

    def settings(self) -> dict[str, Any]:
        return {"size": self.size}

    def prepare(self) -> None:
        self.called.append("prepare")

    def variants(self) -> dict[str, Callable[[], dict[str, float]]]:
        return {name: lambda name=name: self.run(name) for name in self.seconds}  # type: ignore[misc]

    def same_work(self) -> dict[str, Any]:
        self.called.append("compare")
        return {"same": self.same}

    def run(self, variant: str) -> dict[str, float]:
        done = self.called.count(variant)
        self.called.append(variant)
        wall = self.seconds[variant][done]
        if wall < 0:
            raise KeyboardInterrupt
        return {"wall_s": wall, "peak_pss_mb": 100 * wall, "others_cpu_s": 0.0, "samples": self.samples}


def made_up_row(seconds: dict[str, list[float]], **more: Any) -> MadeUpRow:
    bench = import_module("versus.bench").Bench(nnunet=Path("e"), data=Path("d"), work=Path("w"))
    return MadeUpRow(seconds, bench, **more)


def measured(row: MadeUpRow, path: Path, repeats: int, now: dict[str, Any] | None = None, again: bool = False) -> Any:
    results = import_module("versus.results").Results(path, now or {"cpu": "this"})
    import_module("versus_nnunet").measure(row, results, repeats, again)
    return json.loads(path.read_text())["rows"][row.name]


def test_memory_of_children_counts_also_of_those_in_a_session_of_their_own(tmp_path: Path) -> None:
    child = "import time; held = b'x' * 80_000_000; time.sleep(2)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    alone = "import time; time.sleep(0.3)"
    run = import_module("versus.processes").run_measured
    both, one = (run([sys.executable, "-S", "-c", code], {}, tmp_path) for code in (parent, alone))
    assert both.peak_pss_mb > 80_000_000 / 2**20 + one.peak_pss_mb
    assert both.peak_pss_mb < 80_000_000 / 2**20 + one.peak_pss_mb + 40
    assert both.wall_s >= 2


def test_memory_that_processes_share_counts_once(tmp_path: Path) -> None:
    code = "import os, time; held = b'x' * 80_000_000; os.fork(); time.sleep(2)"
    found = import_module("versus.processes").run_measured([sys.executable, "-S", "-c", code], {}, tmp_path)
    assert 80_000_000 / 2**20 < found.peak_pss_mb < 1.5 * 80_000_000 / 2**20


def test_processor_time_of_children_counts_and_a_failed_command_says_what_it_said(tmp_path: Path) -> None:
    processes = import_module("versus.processes")
    busy = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"
    found = processes.run_measured([sys.executable, "-S", "-c", parent], {}, tmp_path)
    assert found.cpu_s >= 0.4
    with pytest.raises(processes.CommandFailed, match="ended with 3:\nno such thing"):
        processes.run_measured([sys.executable, "-c", "print('no such thing'); exit(3)"], {}, tmp_path)


def test_medians_are_compared_with_the_fastest_of_the_other(tmp_path: Path) -> None:
    seconds = {"autossl": [1.0, 9.0, 2.0], "nnunet defaults": [5.0, 5.0, 5.0], "nnunet 1 workers": [1.0, 4.0, 4.5]}
    row = measured(made_up_row(seconds), tmp_path / "f.json", 3)
    assert row["figures"]["nnunet_fastest"] == "nnunet 1 workers"
    assert row["figures"]["ratios"] == {"time": 0.5, "memory": 0.5}
    assert row["figures"]["reached"] is True
    lines = import_module("versus.results").table({"made_up": row})
    assert lines[1][:6] == ["made_up", "2.00 s, 200 MB", "4.00 s, 400 MB", "1 workers", "0.500", "0.500"]


@pytest.mark.parametrize(("samples", "reached"), [(9, False), (10, True)])
def test_memory_of_runs_too_short_to_sample_is_no_figure(tmp_path: Path, samples: int, reached: bool) -> None:
    target = {"time": 0.5, "memory": 0.5}
    row = made_up_row({"autossl": [1.0], "nnunet defaults": [2.0]}, samples=samples, target=target)
    found = measured(row, tmp_path / "f.json", 1)
    assert found["figures"]["reached"] is reached
    assert ("memory" in found["figures"]["ratios"]) is reached
    line = import_module("versus.results").table({"made_up": found})[1]
    assert line[1:3] == (["1.00 s, 100 MB", "2.00 s, 200 MB"] if reached else ["1.00 s, - MB", "2.00 s, - MB"])


@pytest.mark.parametrize(("same", "target", "reached"), [(True, 0.49, False), (False, 0.5, False), (True, 0.5, True)])
def test_a_target_is_reached_by_the_same_work_only(tmp_path: Path, same: bool, target: float, reached: bool) -> None:
    row = made_up_row({"autossl": [1.0], "nnunet defaults": [2.0]}, same=same, target={"time": target})
    assert measured(row, tmp_path / "f.json", 1)["figures"]["reached"] is reached


def test_tools_run_in_turn_and_every_second_time_in_the_reverse_order(tmp_path: Path) -> None:
    row = made_up_row({"autossl": [1.0] * 3, "nnunet defaults": [2.0] * 3})
    measured(row, tmp_path / "f.json", 3)
    first, second = ["autossl", "nnunet defaults"], ["nnunet defaults", "autossl"]
    assert row.called == ["prepare", *first, "compare", *second, *first]


def test_what_is_measured_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    cut_off = made_up_row({"autossl": [1.0, 1.0], "nnunet defaults": [2.0, -1.0]})
    with pytest.raises(KeyboardInterrupt):
        measured(cut_off, path, 3)
    resumed = made_up_row({"autossl": [3.0] * 3, "nnunet defaults": [4.0] * 3})
    row = measured(resumed, path, 3)
    assert [run["wall_s"] for run in row["runs"]["autossl"]] == [1.0, 3.0, 3.0]
    assert [run["wall_s"] for run in row["runs"]["nnunet defaults"]] == [2.0, 4.0, 4.0]
    third = made_up_row({"autossl": [5.0] * 3, "nnunet defaults": [6.0] * 3})
    assert measured(third, path, 3) == row
    assert not third.called
    anew = measured(third, path, 3, again=True)
    assert [run["wall_s"] for run in anew["runs"]["autossl"]] == [5.0] * 3


def test_repetitions_under_other_conditions_are_not_put_together(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    measured(made_up_row({"autossl": [1.0], "nnunet defaults": [2.0]}), path, 1)
    elsewhere = made_up_row({"autossl": [3.0] * 2, "nnunet defaults": [4.0] * 2})
    assert measured(elsewhere, path, 1, {"cpu": "another"})["conditions"] == {"cpu": "this"}
    row = measured(elsewhere, path, 2, {"cpu": "another"})
    assert [run["wall_s"] for run in row["runs"]["autossl"]] == [3.0, 3.0]
    assert row["conditions"] == {"cpu": "another"}


def test_other_settings_are_refused(tmp_path: Path) -> None:
    seconds = {"autossl": [1.0], "nnunet defaults": [2.0]}
    measured(made_up_row(seconds), tmp_path / "f.json", 1)
    with pytest.raises(SystemExit, match="'size': 1.*'size': 2.*--again"):
        measured(made_up_row(seconds, size=2), tmp_path / "f.json", 1)
    with pytest.raises(SystemExit, match="nnunet 4 workers"):
        measured(made_up_row(seconds | {"nnunet 4 workers": [1.0]}), tmp_path / "f.json", 1)


def test_a_copied_dataset_has_the_first_labeled_cases_alone(tmp_path: Path) -> None:
    source = tmp_path / "Dataset001_Few"
    for name in ("a", "b", "c", "d"):
        for folder, file in (("imagesTr", f"{name}.nii.gz"), ("labelsTr", f"{name}.nii.gz")):
            (source / folder).mkdir(parents=True, exist_ok=True)
            (source / folder / file).write_text(name)
    (source / "labelsTr" / "b.nii.gz").unlink()
    description = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "one": 1}, "numTraining": 4}
    (source / "dataset.json").write_text(json.dumps(description | {"file_ending": ".nii.gz"}))
    folder = import_module("versus.bench").copy_dataset(source, tmp_path / "raw", 2)
    assert sorted(path.name for path in (folder / "imagesTr").iterdir()) == ["a_0000.nii.gz", "c_0000.nii.gz"]
    assert sorted(path.name for path in (folder / "labelsTr").iterdir()) == ["a.nii.gz", "c.nii.gz"]
    written = json.loads((folder / "dataset.json").read_text())
    assert written["numTraining"] == 2
    assert written["overwrite_image_reader_writer"] == "NibabelIOWithReorient"


def test_slabs_of_a_file_are_its_rows(tmp_path: Path) -> None:
    logits = np.arange(3 * 7 * 2 * 5).reshape(3, 7, 2, 5).astype(np.float16)
    np.save(tmp_path / "logits.npy", logits)
    slabs = import_module("versus.in_autossl")._slabs(tmp_path / "logits.npy", 3)
    found = [(slab.start, slab.logits[0].numpy().copy()) for slab in slabs]
    assert [start for start, _ in found] == [0, 3, 6]
    assert np.array_equal(np.concatenate([rows for _, rows in found], axis=1), logits.astype(np.float32))


def test_blobs_are_smooth_and_of_every_class(tmp_path: Path) -> None:
    import_module("versus.export_row").write_blobs(tmp_path / "logits.npy", (20, 30, 40), 4, [4.0, 4.0, 4.0])
    labels = np.load(tmp_path / "logits.npy").argmax(0)
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    assert (labels[:, :, 1:] == labels[:, :, :-1]).mean() > 0.8
