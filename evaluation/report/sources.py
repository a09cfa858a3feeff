"""Values with the place they come from, and looking them up again.

A number of the report is a `Traced`: its value, the file (relative to the workspace, with `*` for several) and a key.
A key is a JSON pointer (RFC 6901), `/classes/liver/mean/dice`, in which a part may also be `*` (every entry) or
`[pool=test]` (entries whose `pool` is `test`). With several values a word comes first and says what is made of them:

    mean /cases/*/liver/dice            mean, median, q1, q3, min, max, sum; undefined ones (null) are left out
    mean-of-means /cases/*/*/dice       mean over the last `*` of the means over the other ones (and files)
    count /cases/[pool=test]            how many there are; `distinct`: how many different ones
    last /*/memory_mb                   of the last file the last one
    hours /*                            of the lines of a log: what its steps took, at their speeds

In names `~ / * [` are written `~0 ~1 ~2 ~3`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from autossl.data.files import read_json
from autossl.data.problems import InvalidInput, Problem

Form = Literal["text", "count", "dice", "points", "plain", "p", "percent", "whole", "figure"]
ESCAPES = {"~": "~0", "/": "~1", "*": "~2", "[": "~3"}
ABSENT = "–"
COMPUTED = "computed: "
"""Begins a key that says in words what is made of a file; such a value is checked by making it again."""
Value = float | int | str | bool | None


@dataclass(frozen=True)
class Traced:
    """A value of the page and where it stands."""

    value: Value
    """None: undefined."""
    source: str
    """File relative to the workspace, with '/'; `*` for several files."""
    key: str
    form: Form = "plain"

    @property
    def text(self) -> str:
        """As the page shows it."""
        return shown(self.value, self.form)

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return self.value is not None

    @property
    def number(self) -> float:
        """The value for a picture; NaN where it is undefined."""
        return float(self.value) if isinstance(self.value, int | float) else math.nan


def shown(value: Value, form: Form) -> str:
    """A value in words; a dash where it is undefined."""
    if value is None:
        return ABSENT
    if isinstance(value, str | bool):
        return str(value)
    texts: dict[Form, Callable[[], str]] = {
        "count": lambda: f"{value:,.0f}",
        "whole": lambda: f"{value:.0f}",
        "dice": lambda: f"{value:.3f}",
        "points": lambda: f"{100 * value:+.2f}",
        "p": lambda: f"{value:.3f}" if value >= 0.001 else "< 0.001",
        "percent": lambda: f"{100 * value:.0f} %",
        "figure": lambda: f"{value:.2f}",
    }
    return texts.get(form, lambda: f"{value:.4g}")().replace("-", "−")


def pointer(*parts: str | int) -> str:
    """The JSON pointer of these names, in which nothing stands for something else."""
    return "".join("/" + "".join(ESCAPES.get(sign, sign) for sign in str(part)) for part in parts)


class Files:
    """The JSON files of a workspace, each read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._read: dict[str, Any] = {}

    def relative(self, path: Path) -> str:
        """As sources name it."""
        return path.relative_to(self.root).as_posix()

    def has(self, source: str) -> bool:
        """Whether the file, or at least one that fits, exists."""
        return bool(self.find(source))

    def find(self, source: str) -> list[str]:
        """The files that fit, sorted."""
        if "*" not in source:
            return [source] if (self.root / source).is_file() else []
        return sorted(self.relative(path) for path in self.root.glob(source) if path.is_file())

    def content(self, source: str) -> Any:
        """Of one file: JSON, or the list of a .jsonl file's whole lines.

        Raises:
            InvalidInput: it is missing or damaged.
        """
        if source not in self._read:
            path = self.root / source
            self._read[source] = _json_lines(path) if source.endswith(".jsonl") else read_json(path)
        return self._read[source]

    def get(self, source: str, *parts: str | int) -> Any:
        """What stands there; None where there is no such file or entry."""
        if not self.has(source):
            return None
        found = list(_entries(self.content(source), [_escaped(part) for part in parts]))
        return found[0][1] if found else None

    def value(self, source: str, key: str) -> Value:
        """What a key says; None where nothing is there.

        Raises:
            InvalidInput: the key makes no sense, or a file is damaged.
        """
        word, place = ("", key) if key.startswith("/") else key.split(" ", 1)
        parts = place.split("/")[1:]
        found = [entry for file in self.find(source) for entry in _entries(self.content(file), parts)]
        if not word and len(found) > 1:
            fix = "write the report again with autossl_report"
            raise InvalidInput(Problem(f"{len(found)} values at {key}", "one", fix, file=self.root / source))
        if not word:
            return found[0][1] if found and not isinstance(found[0][1], dict | list) else None
        if word not in MADE_OF_MANY:
            expected = f"one of {', '.join(MADE_OF_MANY)}"
            raise InvalidInput(Problem(f"the key '{key}'", expected, "write the report again", file=self.root / source))
        return MADE_OF_MANY[word](found)

    def traced(self, source: str, key: str, form: Form = "plain") -> Traced:
        """A value with its place."""
        return Traced(self.value(source, key), source, key, form)


_Entry = tuple[tuple[str, ...], Any]
"""Names that stood for `*`, and what is there."""


def _entries(content: Any, parts: Sequence[str]) -> Iterator[_Entry]:
    if not parts:
        yield (), content
        return
    part, rest = parts[0], parts[1:]
    children = _children(content)
    if part == "*":
        for name, child in children.items():
            for names, value in _entries(child, rest):
                yield (name, *names), value
    elif part.startswith("["):
        name, _, wanted = part[1:-1].partition("=")
        for child_name, child in children.items():
            if isinstance(child, dict) and str(child.get(name)) == wanted:
                for names, value in _entries(child, rest):
                    yield (child_name, *names), value
    elif _plain(part) in children:
        yield from _entries(children[_plain(part)], rest)


def _children(content: Any) -> dict[str, Any]:
    if isinstance(content, dict):
        return content
    return {str(number): value for number, value in enumerate(content)} if isinstance(content, list) else {}


def _plain(part: str) -> str:
    for sign, written in reversed(ESCAPES.items()):
        part = part.replace(written, sign)
    return part


def _escaped(part: str | int) -> str:
    return pointer(part)[1:]


def _json_lines(path: Path) -> list[Any]:
    """A line that is just being written is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


# ----------------------------------------------------------------------------------------------------- made of several


def _numbers(found: Sequence[_Entry]) -> list[float]:
    return [float(value) for _, value in found if isinstance(value, int | float) and not isinstance(value, bool)]


def _of_numbers(function: Callable[[list[float]], float]) -> Callable[[Sequence[_Entry]], Value]:
    def apply(found: Sequence[_Entry]) -> Value:
        numbers = _numbers(found)
        return function(numbers) if numbers else None

    return apply


def mean(numbers: Sequence[float]) -> float:
    """Arithmetic, rounded once."""
    return math.fsum(numbers) / len(numbers)


def quantile(numbers: Sequence[float], share: float) -> float:
    """Linear between neighbors, as NumPy's default."""
    ordered = sorted(numbers)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _mean_of_means(found: Sequence[_Entry]) -> Value:
    groups: dict[str, list[_Entry]] = {}
    for names, value in found:
        groups.setdefault(names[-1], []).append((names, value))
    means = [mean(numbers) for own in groups.values() if (numbers := _numbers(own))]
    return mean(means) if means else None


def _hours(found: Sequence[_Entry]) -> Value:
    """Files follow one another: where the step falls, another log begins."""
    seconds, before = 0.0, 0
    for _, line in found:
        step, speed = line["step"], line["steps_per_second"]
        seconds += (step - before if step > before else step) / speed
        before = step
    return seconds / 3600 if found else None


MADE_OF_MANY: dict[str, Callable[[Sequence[_Entry]], Value]] = {
    "mean": _of_numbers(mean),
    "median": _of_numbers(statistics.median),
    "q1": _of_numbers(lambda numbers: quantile(numbers, 0.25)),
    "q3": _of_numbers(lambda numbers: quantile(numbers, 0.75)),
    "min": _of_numbers(min),
    "max": _of_numbers(max),
    "sum": _of_numbers(math.fsum),
    "mean-of-means": _mean_of_means,
    "count": lambda found: len(found),
    "distinct": lambda found: len({str(value) for _, value in found}),
    "last": lambda found: found[-1][1] if found else None,
    "hours": _hours,
}
