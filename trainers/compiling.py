"""Whether a run trains with compiled networks (torch.compile): as asked, or as a trial on the run's own batches says.

Compiled and eager steps differ in their last bits, so the choice is made once, stands in run.json and holds for all
folds and every resumption of the run.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autossl.data.problems import InvalidInput, Problem

logger = logging.getLogger(__name__)

COMPILE = ("auto", "on", "off")
LARGEST_SHARE = 0.95
"""Of the eager time that a compiled run, compiling included, may take: less of a gain is within the noise."""
LARGEST_DIFFERENCE = 1e-2
"""Between the weights after the trial, as a share of their change in it."""


@dataclass(frozen=True)
class CompileChoice:
    """What was decided, and why."""

    on: bool
    why: str

    def to_json(self) -> dict[str, Any]:
        """For run.json."""
        return {"on": self.on, "why": self.why}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CompileChoice:
        """Of run.json; runs from before this was recorded were not compiled."""
        return cls(bool(content.get("on", False)), str(content.get("why", "")))


@dataclass(frozen=True)
class Trial:
    """A few steps that are thrown away."""

    seconds_per_step: float
    """Of the last ones."""
    seconds_before: float
    """What the first ones took beyond that: compiling, where it is done."""
    weights: torch.Tensor
    """All trained weights afterwards, one after the other."""


def choose_compile(
    asked: str, device: str, steps: int, start: Callable[[], torch.Tensor], trial: Callable[[bool], Trial]
) -> CompileChoice:
    """The choice of a new run.

    Args:
        asked: one of `COMPILE`.
        device: of the training.
        steps: of the run.
        start: the trained weights that a trial begins with.
        trial: runs one, compiled or not.

    Raises:
        InvalidInput: "on" without a compiler, or no such choice.
    """
    if asked not in COMPILE:
        raise InvalidInput(Problem(f"--compile {asked}", f"one of {', '.join(COMPILE)}", "choose one of these"))
    if asked == "off":
        return CompileChoice(False, "not asked for")
    missing = _missing(device)
    if missing and asked == "on":
        raise InvalidInput(Problem(f"--compile on without {missing}", "a compiler", "install it, or leave it out"))
    if asked == "on":
        return CompileChoice(True, "asked for")
    choice = CompileChoice(False, f"there is no {missing}") if missing else _by_trial(steps, start, trial)
    logger.info("networks are %s: %s", "compiled" if choice.on else "not compiled", choice.why)
    return choice


def _by_trial(steps: int, start: Callable[[], torch.Tensor], trial: Callable[[bool], Trial]) -> CompileChoice:
    before, eager = start(), trial(False)
    try:
        compiled = trial(True)
    except Exception as error:  # whatever a compiler fails with, the eager run is there
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        return CompileChoice(False, f"compiling failed ({reason})")
    change = float((eager.weights - before).norm())
    difference = float((compiled.weights - eager.weights).norm()) / max(change, 1e-12)
    if not difference <= LARGEST_DIFFERENCE:
        return CompileChoice(False, f"compiled weights differ by {difference:.2g} of their change in the trial")
    share = (compiled.seconds_per_step * steps + compiled.seconds_before) / (eager.seconds_per_step * steps)
    times = f"{compiled.seconds_per_step:.3g} s a step and {compiled.seconds_before:.3g} s once"
    why = f"{times}, eager {eager.seconds_per_step:.3g} s a step: {share:.2f} of the time in {steps} steps"
    return CompileChoice(share <= LARGEST_SHARE, why)


def _missing(device: str) -> str:
    """What compiling needs and is not there; empty: nothing."""
    if device.startswith("cuda"):
        return "" if importlib.util.find_spec("triton") else "triton"
    if device != "cpu":
        return "compiler for this device"
    names = (os.environ.get("CXX"), "g++", "clang++", "c++", "cl")
    return "" if any(name and shutil.which(name) for name in names) else "C++ compiler"


def compile_parts(parts: Mapping[str, torch.nn.Module]) -> None:
    """Compiles the modules in place; weights and their names stay.

    Each shape is compiled for itself: which shapes came first, and so where a run was interrupted, changes nothing.
    """
    for name, module in parts.items():
        logger.info("compiling %s", name)
        module.compile(dynamic=False)


def weights_of(parts: Mapping[str, torch.nn.Module]) -> torch.Tensor:
    """All weights of the modules, one after the other, on the CPU."""
    values = [value.detach().float().reshape(-1).cpu() for part in parts.values() for value in part.parameters()]
    return torch.cat(values) if values else torch.zeros(0)
