"""Every method of the registry on every kind of plan and batch: three steps must be sound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autossl.trainers.base import SemiSupervisedTrainer
from autossl.trainers.components.banks import ClassMoments
from family import (
    KINDS,
    METHODS,
    NAMES,
    Condition,
    beyond_supervised,
    each_phase,
    loop_of,
    make,
    never_supervised,
    run_soundly,
    trained_parameters,
    weights_of,
    without_effect,
)

CONDITIONS = {
    "one patch of each": Condition(counts=(1, 1)),
    "all background": Condition(background=True),
    "a missing class": Condition(missing_class=True),
    "images smaller than the patch": Condition(small_images=True),
}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops draw their log when they end; that takes longer than a toy run."""
    monkeypatch.setattr("autossl.trainers.training_log.draw_progress", lambda path, lines: None)


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in NAMES for kind in KINDS if KINDS[kind].dims in METHODS[name].needs.dims]
)
def test_three_steps(name: str, kind: str, tmp_path: Path) -> None:
    method = METHODS[name]
    run_soundly(make(method, KINDS[kind]), tmp_path)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", NAMES)
def test_odd_batches(name: str, condition: str, tmp_path: Path) -> None:
    run_soundly(make(METHODS[name]), tmp_path, CONDITIONS[condition])


@pytest.mark.parametrize("name", NAMES)
def test_ignore_label(name: str, tmp_path: Path) -> None:
    run_soundly(make(METHODS[name], ignore=True), tmp_path, Condition(ignored=True))


@pytest.mark.parametrize("name", [name for name in NAMES if not METHODS[name].needs.softmax_only])
def test_regions(name: str, tmp_path: Path) -> None:
    method = METHODS[name]
    run_soundly(make(method, regions=True, ignore=True), tmp_path, Condition(ignored=True, small_images=True))


@pytest.mark.parametrize("weight_and_bias", [(0.0, 60.0), (0.0, 0.0)], ids=["certain", "uniform"])
@pytest.mark.parametrize("name", NAMES)
def test_certain_and_uniform_predictions(name: str, weight_and_bias: tuple[float, float], tmp_path: Path) -> None:
    """What the segmentation heads say: always background, for sure; or nothing at all."""
    method = make(METHODS[name])
    weight, bias = weight_and_bias
    for module in (*method.parts.trained.values(), *method.parts.followers.values()):
        for head in _segmentation_heads(module):
            nn.init.constant_(head.weight, weight)
            nn.init.zeros_(head.bias)
            with torch.no_grad():
                head.bias[0] = bias
    run_soundly(method, tmp_path)


def _segmentation_heads(module: nn.Module) -> list[Any]:
    return [head for name, head in module.named_modules() if name.rsplit(".", 1)[0].endswith("seg_layers")]


# ---------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", NAMES)
def test_every_trained_parameter_learns_in_its_phase_and_nothing_else_does(name: str, tmp_path: Path) -> None:
    kinds = [None, *(kind for kind in KINDS if KINDS[kind].dims in METHODS[name].needs.dims)]
    missing: set[str] = set()
    for index, kind in enumerate(kinds):  # a term may find nothing to act on in patches of one kind
        found = _without_gradient(make(METHODS[name], KINDS[kind] if kind else None, total=None), tmp_path / str(kind))
        missing = missing & found if index else found
        if not missing:
            break
    assert not missing, f"trained in a phase that gives them no gradient: {sorted(missing)}"


def _without_gradient(method: SemiSupervisedTrainer, folder: Path) -> set[str]:
    """Runs the method; "phase: parameter" of those that are trained there and learn nothing."""
    learned: dict[str, set[str]] = {}
    given: list[torch.Tensor] = []

    def watch(batch: Any) -> None:
        """Pseudo-labels that could take a gradient."""
        for confidence in (batch.unlabeled.pseudo_confidences if batch.unlabeled else None) or ():
            given.append(confidence.requires_grad_())

    loop = loop_of(method, folder, on_batch=watch)
    parameters = trained_parameters(method)
    for key, parameter in parameters.items():

        def note(tensor: torch.Tensor, key: str = key) -> None:
            phase = loop.timetable.spans[loop._entered].phase.name
            learned.setdefault(phase, set())
            if tensor.grad is not None and bool((tensor.grad != 0).any()):
                learned[phase].add(key)

        parameter.register_post_accumulate_grad_hook(note)
    loop.run()
    expected = set(parameters) - never_supervised(method) - without_effect(method)
    in_some_group: set[str] = set()
    missing: set[str] = set()
    for span in loop.timetable.spans:
        prefixes = [group.prefix for group in span.phase.groups] if span.phase.groups is not None else [""]
        trained = {key for key in parameters if any(not p or key == p or key.startswith(p + ".") for p in prefixes)}
        in_some_group |= trained
        missing |= {f"{span.phase.name}: {key}" for key in (expected & trained) - learned[span.phase.name]}
    assert in_some_group == set(parameters), "in no group of any phase"
    for part, follower in method.parts.followers.items():
        for key, parameter in follower.named_parameters():
            assert not parameter.requires_grad, f"{part}.{key} follows, it is not trained"
            assert parameter.grad is None, f"{part}.{key}"
    _assert_no_graph(method)
    assert all(tensor.grad is None for tensor in given), "a gradient reached the pseudo-labels"
    return missing


def _assert_no_graph(method: SemiSupervisedTrainer) -> None:
    for key, value in method.parts.memory.items():
        tensors = list(value.state_dict().values()) if isinstance(value, nn.Module) else [value]
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                assert not tensor.requires_grad, f"memory {key} is part of a graph"
                assert tensor.grad is None, f"memory {key} has a gradient"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "supervised"])
def test_terms_beyond_the_supervised_ones_are_there_and_move_the_weights(name: str) -> None:
    kinds = [None, *(kind for kind in KINDS.values() if kind.dims in METHODS[name].needs.dims)]
    moved: dict[str, float] = {}
    for kind in kinds:  # a term may find nothing to act on in patches of one kind
        method = make(METHODS[name], kind)
        _leave_the_start(method)
        for at, batch in each_phase(method):
            terms = beyond_supervised(method.losses(batch, at))
            parameters = list(trained_parameters(method).values())
            for key, term in terms.items():
                if not term.requires_grad:
                    continue
                found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
                size = sum(float(gradient.abs().sum()) for gradient in found if gradient is not None)
                moved[key] = max(moved.get(key, 0.0), size)
        if moved and all(size > 0 for size in moved.values()):
            break
    assert moved, "no term comes from anything but labels"
    assert all(size > 0 for size in moved.values()), f"terms in name only: {moved}"


@torch.no_grad()
def _leave_the_start(method: SemiSupervisedTrainer) -> None:
    """Outputs that begin as equal, or as zero, teach each other nothing yet, and neither do moments of nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trained_parameters(method).values():
        parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    for moments in method.parts.memory.values():
        if isinstance(moments, ClassMoments):
            moments.mean += torch.randn(moments.mean.shape, generator=generator)
            moments.count += 1000
            if moments.kind == "diag":
                moments.cov += 1


@pytest.mark.parametrize("name", [name for name in NAMES if name != "supervised"])
def test_the_share_of_the_gradient_is_measured_and_changes_no_bit(name: str, tmp_path: Path) -> None:
    silent, measured = make(METHODS[name]), make(METHODS[name])
    loop_of(silent, tmp_path / "silent", share_every=0).run()
    loop_of(measured, tmp_path / "measured", share_every=1).run()
    before, after = weights_of(silent), weights_of(measured)
    assert all(torch.equal(before[key], after[key]) for key in before)
    lines = [json.loads(line) for line in (tmp_path / "measured" / "log.jsonl").read_text().splitlines()]
    shares = [line["gradient_share"] for line in lines if line["gradient_share"]]
    assert shares, "no step had an unsupervised term with a gradient"
    for share in shares:
        assert set(share) > {"total"}
        assert all(0 <= value < 1 for value in share.values()), share
    assert max(share["total"] for share in shares) > 0


# ---------------------------------------------------------------------------------------------------- stop and resume


@pytest.mark.parametrize("name", NAMES)
def test_save_load_and_go_on_equals_going_on(name: str, tmp_path: Path) -> None:
    """Stopped in the first phase, at every border and behind it; all that a run consists of is equal to the bit."""
    first = make(METHODS[name])
    total = first.job.total_steps
    whole = loop_of(first, tmp_path / "whole")
    whole.run()
    borders = [span.start for span in whole.timetable.spans]
    stops = sorted({1, *borders, *(border + 1 for border in borders)} - {0, *range(total, total + 2)})
    latest = tmp_path / "broken" / "checkpoint_latest.pth"
    for stop in [*stops, None]:
        method = make(METHODS[name])
        loop = loop_of(method, tmp_path / "broken")
        if latest.is_file():
            loop.load_state(torch.load(latest, weights_only=True))
        if stop is None:
            loop.run()
            break
        loop._should_stop = lambda loop=loop, stop=stop: loop.step == stop
        with pytest.raises(Exception, match=f"stopped after step {stop}"):
            loop.run()
    states = [torch.load(tmp_path / n / "checkpoint_final.pth", weights_only=True) for n in ("whole", "broken")]
    _assert_same(states[0], states[1], name)


def _assert_same(first: Any, second: Any, path: str) -> None:
    assert type(first) is type(second), path
    if isinstance(first, dict):
        assert list(first) == list(second), path
        for key in first:
            _assert_same(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), path
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            _assert_same(one, other, f"{path}[{index}]")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), path
    else:
        assert first == second, path
