"""Compiled training: what auto decides, and from what."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from autossl.data.problems import InvalidInput
from autossl.trainers import compiling
from autossl.trainers.compiling import CompileChoice, Trial, choose_compile

STEPS = 1000


def trials(eager: float, compiled: float, once: float, difference: float = 0.0) -> Callable[[bool], Trial]:
    def trial(on: bool) -> Trial:
        weights = torch.tensor([3.0, 4.0 + (difference if on else 0.0)])  # a change of 5
        return Trial(compiled, once, weights) if on else Trial(eager, 0.0, weights)

    return trial


def chosen(trial: Callable[[bool], Trial], asked: str = "auto", device: str = "cpu") -> CompileChoice:
    return choose_compile(asked, device, STEPS, lambda: torch.zeros(2), trial)


@pytest.mark.parametrize(
    "eager, compiled, once, on",
    [
        (0.1, 0.08, 10.0, True),  # 90 of 100 s
        (0.1, 0.08, 16.0, False),  # 96 of 100 s: within the noise
        (0.1, 0.08, 60.0, False),  # compiling costs more than it saves
        (0.1, 0.12, 0.0, False),
    ],
)
def test_auto_counts_compiling_against_the_steps_of_the_run(
    eager: float, compiled: float, once: float, on: bool
) -> None:
    choice = chosen(trials(eager, compiled, once))
    assert choice.on is on
    assert f"eager {eager:.3g} s a step: {(compiled * STEPS + once) / (eager * STEPS):.2f}" in choice.why


@pytest.mark.parametrize("difference, on", [(0.04, True), (0.06, False), (float("nan"), False)])
def test_auto_wants_the_same_weights(difference: float, on: bool) -> None:
    choice = chosen(trials(0.1, 0.01, 0.0, difference))
    assert choice.on is on
    assert on or "of their change" in choice.why


def test_auto_does_without_where_compiling_fails() -> None:
    def failing(on: bool) -> Trial:
        if on:
            raise RuntimeError("no header\nand more")
        return Trial(0.1, 0.0, torch.ones(2))

    assert chosen(failing) == CompileChoice(False, "compiling failed (RuntimeError: no header)")


def test_without_a_compiler_auto_says_so_and_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert chosen(trials(1, 0, 0)) == CompileChoice(False, "there is no C++ compiler")
    with pytest.raises(InvalidInput, match=r"--compile on without C\+\+ compiler"):
        chosen(trials(1, 0, 0), "on")
    with pytest.raises(InvalidInput, match="--compile maybe"):
        chosen(trials(1, 0, 0), "maybe")


def test_nothing_is_tried_where_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_missing", lambda device: "")

    def never(on: bool) -> Trial:
        raise AssertionError("a trial")

    assert chosen(never, "on").on
    assert not chosen(never, "off").on


def test_runs_of_before_were_not_compiled() -> None:
    assert not CompileChoice.from_json({}).on
    choice = CompileChoice(True, "asked for")
    assert CompileChoice.from_json(choice.to_json()) == choice


def test_every_shape_is_compiled_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: given.append(options))
    compiling.compile_parts({"a": torch.nn.Linear(1, 1), "b": torch.nn.Linear(1, 1)})
    assert given == [{"dynamic": False}] * 2
