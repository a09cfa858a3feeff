"""A fault that many cases share is said once, with all their names."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError, model_validator

from autossl.data.problems import InvalidInput, Problem, schema_faults


def problem(case: str | None, found: str = "too dark") -> Problem:
    return Problem(found, "light", "lamp", case=case, file=Path(f"{case}.nii") if case else None)


def test_few_cases_have_a_line_each() -> None:
    lines = str(InvalidInput([problem(case) for case in "abc"])).splitlines()
    assert lines[0] == "3 problems:"
    assert lines[1] == "- case a, a.nii: too dark. Expected: light. What to do: lamp."
    assert len(lines) == 4


def test_many_cases_with_one_fault_share_a_line_and_keep_their_names_and_the_others_stay_apart() -> None:
    problems = [problem(case) for case in "abcd"] + [problem("e", "too loud"), problem(None), problem(None)]
    error = InvalidInput(problems)
    lines = str(error).splitlines()
    assert len(error.problems) == 7
    assert lines[0] == "7 problems:"
    shared = "- 4 cases (a, b, c, d), the first file a.nii: too dark. Expected: light. What to do: lamp."
    assert shared not in lines  # two faults of no case are the same words: nothing may hide them
    without_place = str(InvalidInput([problem(case) for case in "abcd"] + [problem("e", "too loud")])).splitlines()
    assert without_place[1:] == [shared, "- case e, e.nii: too loud. Expected: light. What to do: lamp."]


def test_what_a_terminal_would_obey_is_shown_as_its_code() -> None:
    odd = Problem("a name 'x\x1b[2J'", "lines:\n  one", "rename it", file=Path("a\nb\udcff\u202e.nii"))
    assert str(odd) == ("a\\nb\\udcff\\u202e.nii: a name 'x\\x1b[2J'. Expected: lines:\n  one. What to do: rename it.")
    assert str(InvalidInput([odd, odd])).isascii()


class Inner(BaseModel):
    number: int


class Outer(BaseModel):
    inner: list[Inner]
    low: int = 0
    high: int = 1

    @model_validator(mode="after")
    def _ordered(self) -> Outer:
        if self.low >= self.high:
            raise ValueError("low must be below high")
        return self


def test_faults_of_a_schema_name_their_place_and_say_no_word_of_the_library() -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"inner": [{"number": 1}, {"number": "x"}], "low": []})
    first, second = schema_faults(caught.value)
    assert first.startswith("inner.1.number: Input should be a valid integer")
    assert second.startswith("low: ")
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"inner": [], "low": 2})
    assert schema_faults(caught.value) == ["low must be below high"]
    assert schema_faults(caught.value, "the plan") == ["the plan: low must be below high"]
