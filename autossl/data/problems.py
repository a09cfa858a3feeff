"""What is wrong with an input, said so that its owner can mend it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import ValidationError

Result = TypeVar("Result")

MANY_CASES = 4
"""From so many cases on with the same fault they are named in one line."""


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
        text = f"{self.found}. Expected: {self.expected}. What to do: {self.fix}."
        return f"{printable(place) + ': ' if place else ''}{printable(text, lines=True)}"


class InvalidInput(ValueError):
    """Raised with all the problems of an input at once; commands print it and exit with code 2."""

    def __init__(self, problems: Problem | Sequence[Problem], title: str = "") -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        lines = _lines(self.problems)
        if title or len(lines) > 1:
            lines = [title or f"{len(self.problems)} problems:"] + [f"- {line}" for line in lines]
        super().__init__("\n".join(lines))


def schema_faults(error: ValidationError, whole: str = "") -> list[str]:
    """What pydantic found wrong, each as "place: message".

    Args:
        error: Of a model.
        whole: Stands for the place of a fault that lies in no single field; empty: the message alone.
    """
    faults = []
    for fault in error.errors(include_url=False):
        place = ".".join(str(part) for part in fault["loc"]) or whole
        message = fault["msg"].removeprefix("Value error, ")
        faults.append(f"{place}: {message}" if place else message)
    return faults


class Problems:
    """Gathers what is wrong, so that it is reported together."""

    def __init__(self) -> None:
        self._found: dict[Problem, None] = {}

    def add(self, found: str, expected: str, fix: str, file: Path | None = None) -> None:
        """One more."""
        self._found[Problem(found, expected, fix, file=file)] = None

    def catch(self, function: Callable[..., Result], *arguments: Any) -> Result | None:
        """What the function gives; None where it raised `InvalidInput`, whose problems are kept."""
        try:
            return function(*arguments)
        except InvalidInput as error:
            self._found |= dict.fromkeys(error.problems)
            return None

    def stop(self, title: str = "") -> None:
        """Raises what was gathered, if anything."""
        if self._found:
            raise InvalidInput(list(self._found), title=title)


def _lines(problems: Sequence[Problem]) -> list[str]:
    """One line per fault; cases that share one word for word share a line, so that the reader sees what differs."""
    groups: dict[tuple[str, str, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.found, problem.expected, problem.fix), []).append(problem)
    lines = []
    for (found, expected, fix), same in groups.items():
        if len(same) < MANY_CASES or not all(problem.case for problem in same):
            lines += [str(problem) for problem in same]
            continue
        cases = list(dict.fromkeys(str(problem.case) for problem in same))
        first = next((problem.file for problem in same if problem.file), None)
        place = f"{len(cases)} cases ({', '.join(cases)})" + (f", the first file {first}" if first else "")
        text = f"{found}. Expected: {expected}. What to do: {fix}."
        lines.append(f"{printable(place)}: {printable(text, lines=True)}")
    return lines


def printable(text: str, lines: bool = False) -> str:
    """Text from others; what a terminal would obey, or cannot show, is written as its code. `lines` keeps line ends."""
    if text.isprintable():
        return text
    kept = "\n" if lines else ""
    return "".join(sign if sign.isprintable() or sign == kept else ascii(sign)[1:-1] for sign in text)


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid names, the most similar first, as text for an error message."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    if not names:
        return "none exist"
    return ", ".join(close + [other for other in names if other not in close][: max(0, 12 - len(close))])
