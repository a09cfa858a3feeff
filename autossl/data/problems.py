"""What is wrong with an input, said so that its owner can mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Problem:
    """One fault: what was found, what was expected, what to do; with its case and file where it has them."""

    found: str
    expected: str
    fix: str
    case: str | None = None
    file: Path | None = None

    def __str__(self) -> str:
        place = ", ".join(part for part in (f"case {self.case}" if self.case else "", str(self.file or "")) if part)
        return f"{place + ': ' if place else ''}{self.found}. Expected: {self.expected}. What to do: {self.fix}."


class InvalidInput(ValueError):
    """Raised with all the problems of an input at once; commands print it and exit with code 2."""

    def __init__(self, problems: Problem | Sequence[Problem], title: str = "") -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        lines = [str(problem) for problem in self.problems]
        if title or len(lines) > 1:
            lines = [title or f"{len(lines)} problems:"] + [f"- {line}" for line in lines]
        super().__init__("\n".join(lines))


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid names, the most similar first, as text for an error message."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    if not names:
        return "none exist"
    return ", ".join(close + [other for other in names if other not in close][: max(0, 12 - len(close))])
