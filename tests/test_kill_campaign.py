"""A dozen kills of the campaign that benchmarks/kill_campaign.py runs at length."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).resolve().parents[1] / "benchmarks" / "kill_campaign.py"


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked from one that has imported everything")
def test_nothing_is_lost_by_a_dozen_kills(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    call = [sys.executable, str(CAMPAIGN), "--folder", str(tmp_path / "kills"), "--sample", "-o", str(output)]
    ended = subprocess.run(call, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    figures = json.loads(output.read_text())
    assert figures["kills"] >= 12
    assert (figures["lost"], figures["different"], figures["wrong_exit_codes"]) == (0, 0, 0)
    assert set(figures["kills_by_command"]) & {"plan", "preprocess"}
    assert any(name.startswith("train") for name in figures["kills_by_command"])


def test_a_lost_or_different_end_is_told(tmp_path: Path) -> None:
    """What finds nothing in two hundred kills must be able to find something."""
    sys.path.insert(0, str(CAMPAIGN.parent))
    try:
        from kills.state import differences, state_of
    finally:
        sys.path.remove(str(CAMPAIGN.parent))
    import torch

    def write(folder: Path, weight: float, seconds: float) -> None:
        folder.mkdir()
        torch.save({"weight": torch.full((3,), weight)}, folder / "checkpoint_final.pth")
        (folder / "log.jsonl").write_text(json.dumps({"loss": 0.5, "steps_per_second": seconds}) + "\n")
        (folder / ".partial-1-checkpoint.pth").write_text("")

    for name, weight, seconds in (("one", 1.0, 3.0), ("slower", 1.0, 4.0), ("other", 1.0000001, 3.0)):
        write(tmp_path / name, weight, seconds)
    one, slower, other = (state_of(tmp_path / name) for name in ("one", "slower", "other"))
    assert set(one) == {"checkpoint_final.pth", "log.jsonl"}
    assert differences(one, slower) == []
    assert differences(one, other) == ["differs: checkpoint_final.pth"]
    assert differences(one, {"log.jsonl": one["log.jsonl"], "more": ""}) == [
        "missing: checkpoint_final.pth",
        "not expected: more",
    ]
