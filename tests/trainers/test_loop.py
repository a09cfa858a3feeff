"""The loop: phases, groups, refreshes, resume, skipped steps; with a small method of two phases."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autossl.networks.prediction import PredictionSpec
from autossl.trainers.base import (
    Batch,
    BatchRequest,
    Job,
    MethodSettings,
    ParameterGroup,
    Parts,
    Phase,
    Progress,
    Refresh,
    SemiSupervisedTrainer,
    StepOutput,
    StreamRequest,
    poly_over_phase,
)
from autossl.trainers.components.ema import EMATeacher
from autossl.trainers.loop import LoopOptions, TrainingDiverged, TrainingInterrupted, TrainingLoop
from autossl.trainers.methods.supervised import Supervised
from autossl.trainers.optimization import PlannedOptimizer, group_optimizers
from autossl.trainers.phases import Timetable
from toys import toy_batch, toy_configuration, toy_job


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it wrote; waiting for a busy disk would take most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class ToySource:
    """Batches as a function of the step; remembers what was asked."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.asked: list[tuple[int, BatchRequest]] = []
        self.reloaded: list[tuple[str, int]] = []

    def batches(self, steps: Sequence[tuple[int, BatchRequest]]) -> ToySource.Stream:
        self.asked += steps
        return ToySource.Stream(toy_batch(self.job, step, r.labeled.count, r.unlabeled.count) for step, r in steps)

    def reload_store(self, store: str, step: int) -> None:
        self.reloaded.append((store, step))

    class Stream:
        """A closable iterator."""

        def __init__(self, batches: Iterator[Batch]) -> None:
            self._batches = batches

        def __iter__(self) -> Iterator[Batch]:
            return self._batches

        def close(self) -> None:
            """Nothing to end."""


class TwoPhases(SemiSupervisedTrainer):
    """Phase one trains a head with AdamW, phase two everything; one refresh; a counter, a buffer and a follower."""

    name = "two_phases"
    title = "made up"
    citation = "none"

    def build(self) -> Parts:
        student = self.job.build_network()
        self.teacher = EMATeacher(student, 0.9)
        head = torch.nn.Conv2d(self.job.schema.n_outputs, self.job.schema.n_outputs, 1)
        torch.nn.init.constant_(head.weight, 0.1)
        torch.nn.init.zeros_(head.bias)
        return Parts(
            trained={"network": student, "head": head},
            followers={"teacher": self.teacher.network},
            memory={"calls": 0, "moment": torch.zeros(3)},
        )

    def phases(self) -> list[Phase]:
        head = ParameterGroup("head", optimizer="adamw", learning_rate=1e-2)
        network = ParameterGroup("network.encoder", factor=poly_over_phase)
        return [
            Phase("head", share=1, groups=(head,)),
            Phase("all", share=3, groups=(head, network), refreshes=(Refresh(0.5, "network", "maps"),)),
        ]

    def request(self, at: Progress) -> BatchRequest:
        unlabeled = 1 if at.phase == "head" else 2
        return BatchRequest(StreamRequest(2), StreamRequest(unlabeled))

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        self.parts.memory["calls"] += 1
        self.parts.memory["moment"] += batch.labeled.image.mean() * torch.rand(3, generator=at.generator("moment"))
        z: Tensor = self.parts.trained["head"](self.parts.trained["network"](batch.labeled.image)[0])
        drawn = torch.rand((), generator=at.generator("loss"))
        return StepOutput(
            {"supervised": self.job.supervised_loss([z], batch.labeled.target, batch.labeled.valid)},
            {"drawn": drawn, "passes": at.pool_passes},
        )

    def after_step(self, at: Progress) -> None:
        self.teacher.update(self.parts.trained["network"], at.step)

    def prediction(self) -> PredictionSpec:
        return self.job.single_network_prediction("network")


def make_loop(
    folder: Path, total: int = 16, method: type[SemiSupervisedTrainer] = TwoPhases, **options: Any
) -> TrainingLoop:
    folder.mkdir(parents=True, exist_ok=True)
    job = toy_job(total_steps=total)
    trainer = method(job, MethodSettings())
    loop_options = LoopOptions(total, log_every=3, checkpoint_every=5, seed=7)
    refreshed: list[tuple[str, int]] = []
    loop = TrainingLoop(
        trainer,
        ToySource(job),
        folder,
        loop_options,
        refresh=lambda refresh, step: refreshed.append((refresh.store, step)),
        **options,
    )
    loop.refreshed = refreshed  # type: ignore[attr-defined]
    return loop


def weights_of(loop: TrainingLoop) -> dict[str, Tensor]:
    modules = {**loop.method.parts.trained, **loop.method.parts.followers}
    return {
        f"{part}.{name}": value.clone()
        for part, module in modules.items()
        for name, value in module.state_dict().items()
    }


def test_timetable_puts_borders_on_whole_steps() -> None:
    table = Timetable([Phase("a", 1), Phase("b", 2), Phase("c", 1)], 10)
    assert [(s.phase.name, s.start, s.end) for s in table.spans] == [("a", 0, 2), ("b", 2, 8), ("c", 8, 10)]
    at = table.progress(5)
    assert (at.phase, at.fraction, at.phase_fraction) == ("b", 0.5, 0.5)
    assert table.next_border(2) == 8
    with pytest.raises(ValueError, match="'c' gets no step"):
        Timetable([Phase("a", 1000), Phase("b", 1000), Phase("c", 1)], 10)


def test_phases_train_their_groups_and_call_refreshes(tmp_path: Path) -> None:
    loop = make_loop(tmp_path)
    before = weights_of(loop)
    loop._should_stop = lambda: loop.step == 4
    with pytest.raises(TrainingInterrupted):
        loop.run()
    after_head = weights_of(loop)
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after_head[name])}
    assert moved == {"head"}, "phase one trains the head alone (the teacher follows a network that stands still)"
    loop._should_stop = None
    loop.run()
    after = weights_of(loop)
    moved_now = {name for name in after if not torch.equal(after_head[name], after[name])}
    assert any(name.startswith("network.encoder") for name in moved_now)
    assert not any(name.startswith("network.decoder.seg_layers") for name in moved_now), "in no group: not trained"
    assert loop.refreshed == [("maps", 8)]  # type: ignore[attr-defined]
    assert loop.source.reloaded == [("maps", 8)]  # type: ignore[attr-defined]
    assert loop.method.parts.memory["calls"] == 16


def test_requests_follow_the_phase_and_count_passes_over_the_pool(tmp_path: Path) -> None:
    loop = make_loop(tmp_path)
    loop.run()
    asked = loop.source.asked  # type: ignore[attr-defined]
    assert [request.unlabeled.count for _, request in asked] == [1] * 4 + [2] * 12
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 16]
    # steps 0, 1, 2 have drawn 0, 1, 2 patches of a pool of four
    assert lines[0]["measures"]["passes"] == pytest.approx((0 + 1 + 2) / 3 / 4)
    assert (tmp_path / "progress.png").stat().st_size > 5000


@pytest.mark.parametrize("stop_at", [3, 4, 8, 11])
def test_stop_and_resume_equals_an_unbroken_run(tmp_path: Path, stop_at: int) -> None:
    whole = make_loop(tmp_path / "whole")
    whole.run()
    first = make_loop(tmp_path / "broken")
    first._should_stop = lambda: first.step == stop_at
    with pytest.raises(TrainingInterrupted, match=f"after step {stop_at}"):
        first.run()
    state = torch.load(tmp_path / "broken" / "checkpoint_latest.pth", weights_only=True)
    second = make_loop(tmp_path / "broken")
    second.load_state(state)
    second.run()
    expected, got = weights_of(whole), weights_of(second)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert torch.equal(whole.method.parts.memory["moment"], second.method.parts.memory["moment"])
    assert second.method.parts.memory["calls"] == 16
    deterministic = ("step", "phase", "losses", "measures", "learning_rate", "gradient_norm")
    logs = [
        [{key: json.loads(line)[key] for key in deterministic} for line in (tmp_path / name / "log.jsonl").open()]
        for name in ("whole", "broken")
    ]
    assert logs[0] == logs[1]
    final = torch.load(tmp_path / "broken" / "checkpoint_final.pth", weights_only=True)
    assert final["progress"]["step"] == 16
    assert not (tmp_path / "broken" / "checkpoint_latest.pth").exists()


def test_workers_that_end_with_the_signal_to_stop_lose_nothing(tmp_path: Path) -> None:
    """A cluster sends SIGTERM to all processes of a job: the batch that is waited for never comes."""
    whole = make_loop(tmp_path / "whole")
    whole.run()
    broken = make_loop(tmp_path / "broken")
    batches = broken.source.batches
    asked: list[bool] = []

    def ending(steps: Sequence[tuple[int, BatchRequest]]) -> ToySource.Stream:
        def stream() -> Iterator[Batch]:
            for (step, _), batch in zip(steps, batches(steps), strict=True):
                if step == 7:
                    asked.append(True)
                    raise RuntimeError("a worker died")
                yield batch

        return ToySource.Stream(stream())

    broken.source.batches = ending  # type: ignore[method-assign]
    broken._should_stop = lambda: bool(asked)
    with pytest.raises(TrainingInterrupted, match="after step 7"):
        broken.run()
    resumed = make_loop(tmp_path / "broken")
    resumed.load_state(torch.load(tmp_path / "broken" / "checkpoint_latest.pth", weights_only=True))
    resumed.run()
    assert all(torch.equal(value, weights_of(resumed)[name]) for name, value in weights_of(whole).items())
    failing = make_loop(tmp_path / "failing")
    failing.source.batches = ending  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="a worker died"):
        failing.run()


def test_reinitialize_gives_fresh_weights_at_the_border(tmp_path: Path) -> None:
    class Restart(Supervised):
        name = "restart"

        def phases(self) -> list[Phase]:
            return [Phase("one"), Phase("two", reinitialize=("network",))]

    loop = make_loop(tmp_path, total=4, method=Restart)
    initial = weights_of(loop)
    loop._should_stop = lambda: loop.step == 2
    with pytest.raises(TrainingInterrupted):
        loop.run()
    trained = weights_of(loop)
    loop._refresh_and_enter_phase()
    fresh = weights_of(loop)
    weight = next(name for name in fresh if name.endswith("conv.weight"))
    assert not torch.equal(fresh[weight], trained[weight])
    assert not torch.equal(fresh[weight], initial[weight]), "another draw than the first"
    assert not any(entry.optimizer.state for entry in loop._optimizers), "momentum starts anew"


def test_a_phase_with_another_weight_decay_keeps_the_momentum_and_takes_its_own_decay() -> None:
    parts = Supervised(toy_job(), Supervised.Settings()).parts
    phases = [Phase("p", groups=(ParameterGroup("network", weight_decay=decay),)) for decay in (0.1, 0.2)]
    (first,) = group_optimizers(parts, phases[0])
    for parameter in first.parameters:
        parameter.grad = torch.ones_like(parameter)
    first.optimizer.step()
    (second,) = group_optimizers(parts, phases[1], [first])
    assert second.optimizer.param_groups[0]["weight_decay"] == 0.2
    momentum = [state["momentum_buffer"] for state in second.optimizer.state.values()]
    assert momentum
    for buffer, before in zip(momentum, first.optimizer.state.values(), strict=True):
        assert torch.equal(buffer, before["momentum_buffer"])


def test_the_plan_gives_the_rate_and_the_momentum_of_groups_that_do_not_name_a_rate(tmp_path: Path) -> None:
    configuration = toy_configuration().model_copy(update={"learning_rate": 0.05, "momentum": 0.9})
    method = Supervised(toy_job(configuration=configuration), Supervised.Settings())
    loop = TrainingLoop(method, ToySource(method.job), tmp_path, LoopOptions(4, seed=3))
    loop._refresh_and_enter_phase()
    (entry,) = loop._optimizers
    assert entry.set_rate(Progress(0, 4)) == 0.05
    assert entry.optimizer.param_groups[0]["momentum"] == 0.9
    named = Phase("p", groups=(ParameterGroup("network", "adamw", learning_rate=1e-4),))
    (entry,) = group_optimizers(method.parts, named, planned=PlannedOptimizer(0.05, 0.9))
    assert entry.set_rate(Progress(0, 4)) == 1e-4


def test_the_plans_rate_is_never_given_to_adamw() -> None:
    with pytest.raises(ValueError, match="'head': adamw takes a learning rate of its own"):
        ParameterGroup("head", "adamw")


class NotFinite(Supervised):
    """A term that is infinite in chosen steps."""

    name = "not_finite"
    bad_term = "extra"
    bad_steps: range = range(0)

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        output = super().losses(batch, at)
        bad = float("inf") if at.step in self.bad_steps else 1.0
        value = output.losses["supervised"] * bad
        output.losses = {"supervised": output.losses["supervised"], **output.losses, self.bad_term: value}
        return output


def test_an_unsupervised_term_that_is_not_finite_is_dropped_and_counted(tmp_path: Path) -> None:
    class Once(NotFinite):
        bad_steps = range(2, 4)

    loop = make_loop(tmp_path, total=6, method=Once)
    loop.run()
    assert loop._dropped_terms == {"extra": 2}
    assert loop.skipped_steps == 0
    assert all(torch.isfinite(value).all() for value in weights_of(loop).values())


def test_a_supervised_term_that_is_not_finite_takes_no_step(tmp_path: Path) -> None:
    class Label(NotFinite):
        bad_term = "supervised"
        bad_steps = range(1, 3)

    loop = make_loop(tmp_path, total=3, method=Label)
    loop._should_stop = lambda: loop.step == 1
    with pytest.raises(TrainingInterrupted):
        loop.run()
    after_one = weights_of(loop)
    loop._should_stop = None
    loop.run()
    assert loop.skipped_steps == 2
    assert all(torch.equal(value, after_one[name]) for name, value in weights_of(loop).items())


def test_a_term_that_stays_bad_stops_the_run_with_its_name(tmp_path: Path) -> None:
    class Always(NotFinite):
        bad_steps = range(1000)

    with pytest.raises(TrainingDiverged, match="'extra' was inf in 20 steps in a row"):
        make_loop(tmp_path, total=30, method=Always).run()


def test_a_group_without_parameters_is_refused(tmp_path: Path) -> None:
    class Nothing(Supervised):
        name = "nothing"

        def phases(self) -> list[Phase]:
            return [Phase("one", groups=(ParameterGroup("netwrk"),))]

    with pytest.raises(ValueError, match="no trained parameter starts with 'netwrk'"):
        make_loop(tmp_path, method=Nothing).run()


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, total=60, method=Supervised)
    loop.run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["losses"]["supervised"] < 0.6 * lines[0]["losses"]["supervised"]
