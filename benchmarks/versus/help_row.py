"""Start-up: a command's --help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .bench import DEFAULTS, OURS, Bench, Call


@dataclass(frozen=True)
class HelpRow:
    """One command of each tool that is for the same."""

    bench: Bench
    ours: str
    theirs: str
    target: dict[str, float] = field(default_factory=lambda: {"time": 1 / 8})
    time: str = "wall_s"

    @property
    def name(self) -> str:
        """`help_` and the command."""
        return f"help_{self.ours.removeprefix('autossl_')}"

    @property
    def what(self) -> str:
        """A sentence."""
        return f"{self.ours} --help against {self.theirs} --help"

    def settings(self) -> dict[str, Any]:
        """The commands."""
        return {"commands": [self.ours, self.theirs]}

    def prepare(self) -> None:
        """Nothing but a folder to run in."""
        self.bench.work.mkdir(parents=True, exist_ok=True)

    def variants(self) -> dict[str, Call]:
        """One each."""
        commands = {OURS: self.bench.ours(self.ours), DEFAULTS: self.bench.theirs(self.theirs)}
        return {name: self._call(command) for name, command in commands.items()}

    def same_work(self) -> dict[str, Any]:
        """Both printed their help, or the run would have failed."""
        return {"same": True}

    def _call(self, command: str) -> Call:
        return lambda: self.bench.run([command, "--help"], self.bench.work).to_json()


def help_rows(bench: Bench) -> list[HelpRow]:
    """Of the three commands that users of both call most."""
    names = ("plan_and_preprocess", "train", "predict")
    return [HelpRow(bench, f"autossl_{name}", f"nnUNetv2_{name}") for name in names]
