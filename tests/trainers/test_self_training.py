"""The checks of self_training's specification: through `losses()` and through the loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput
from autossl.trainers.base import (
    Batch,
    MethodSettings,
    Progress,
    Refresh,
    SemiSupervisedTrainer,
    StepOutput,
    StreamRequest,
)
from autossl.trainers.loop import LoopOptions, TrainingInterrupted, TrainingLoop
from autossl.trainers.methods.self_training import SelfTraining, SelfTrainingSettings
from autossl.trainers.methods.supervised import Supervised
from autossl.trainers.phases import Timetable
from autossl.trainers.registry import make_settings
from toys import toy_batch, toy_job, toy_schema, toy_stream

# ------------------------------------------------------------------------------------------------------------- one step


def trainer(n_unlabeled: int = 4, total: int = 12, schema: LabelSchema | None = None, **settings: Any) -> SelfTraining:
    job = toy_job(n_unlabeled=n_unlabeled, total_steps=total, schema=schema or toy_schema())
    return SelfTraining(job, SelfTrainingSettings(**settings))


def pseudo_batch(method: SelfTraining, seed: int = 0, weights: tuple[float, float] | None = None) -> Batch:
    """Pseudo-labels that are true and certain."""
    batch = toy_batch(method.job, seed)
    truth = toy_stream(method.job, 2, seed + 1, labeled=True)
    ones = torch.ones_like(truth.valid, dtype=torch.float32)
    batch.unlabeled = replace(
        truth,
        targets=None,
        pseudo_labels=truth.targets,
        pseudo_confidences=(ones,),
        pseudo_weights=None if weights is None else torch.tensor(weights),
    )
    return batch


def in_round(number: int, step: int = 6, total: int = 12) -> Progress:
    return Progress(step=step, total=total, phase=f"round_{number}", phase_start=4, phase_end=8)


def step(method: SelfTraining, batch: Batch, at: Progress | None = None) -> StepOutput:
    return method.losses(batch, at or in_round(1))


@pytest.mark.parametrize("regions", [False, True])
def test_a_perfect_teacher_is_supervised_training_on_all_cases(regions: bool) -> None:
    method = trainer(schema=toy_schema(regions=regions), intensity_scale=1.0)
    batch = pseudo_batch(method)
    assert batch.unlabeled is not None
    assert batch.unlabeled.pseudo_labels is not None
    target = torch.zeros(2, 1, 16, 16, dtype=torch.int64)
    target[0, :, :5], target[0, :, 8:] = 1, 2
    target[1, :, 4:10], target[1, :, 12:] = 2, 1
    batch.unlabeled.pseudo_labels = (torch.cat([target > 0, target == 2], 1).float() if regions else target,)
    output = step(method, batch)
    z = method.parts.trained["network"](batch.unlabeled.image)
    expected = method.job.supervised_loss(z, batch.unlabeled.pseudo_labels[0], batch.unlabeled.valid)
    assert output.losses["pseudo"].item() == pytest.approx(expected.item(), abs=1e-6)
    alone = Supervised(method.job, MethodSettings())
    alone.parts.trained["network"].load_state_dict(method.parts.trained["network"].state_dict())
    labeled = alone.losses(batch, in_round(1)).losses["supervised"]
    assert output.losses["supervised"].item() == pytest.approx(labeled.item(), abs=1e-6)
    assert float(output.measures["kept_share"]) == 1
    assert float(output.measures["dice_share"]) == 1


def test_weights_of_term_and_patches_multiply() -> None:
    method, batch = trainer(intensity_scale=1.0), None
    batch = pseudo_batch(method)
    whole = step(method, batch).losses["pseudo"].item()
    half = step(method, pseudo_batch(method, weights=(0.5, 0.5)))
    assert half.losses["pseudo"].item() == pytest.approx(whole / 2, rel=1e-6)
    assert float(half.measures["patch_weight"]) == 0.5
    double = step(trainer(intensity_scale=1.0, lambda_pseudo=2.0), batch)
    assert double.losses["pseudo"].item() == pytest.approx(2 * whole, rel=1e-6)
    assert double.measures["pseudo_weight"] == 2
    assert float(double.measures["pseudo"]) == pytest.approx(whole, rel=1e-6)


def ignore(batch: Batch, rows: slice, columns: slice) -> None:
    assert batch.unlabeled is not None
    assert batch.unlabeled.pseudo_confidences is not None
    batch.unlabeled.pseudo_confidences[0][rows, :, :, columns] = 0


def test_labels_of_ignored_voxels_say_nothing() -> None:
    method = trainer()
    batch, other = pseudo_batch(method), pseudo_batch(method)
    for changed in (batch, other):
        ignore(changed, slice(None), slice(8, None))
    assert other.unlabeled is not None
    assert other.unlabeled.pseudo_labels is not None
    other.unlabeled.pseudo_labels[0][..., 8:] = 2
    first, second = step(method, batch), step(method, other)
    assert first.losses["pseudo"].item() == second.losses["pseudo"].item()
    assert float(first.measures["kept_share"]) == 0.5


def test_fully_ignored_patches_cost_nothing_and_give_no_gradient() -> None:
    method = trainer()
    batch = pseudo_batch(method)
    ignore(batch, slice(None), slice(None))
    output = step(method, batch)
    assert output.losses["pseudo"].item() == 0
    output.losses["pseudo"].backward()
    gradients = [p.grad for p in method.parts.trained["network"].parameters() if p.grad is not None]
    assert all((gradient == 0).all() for gradient in gradients)


def test_voxels_outside_the_image_are_not_kept() -> None:
    method = trainer()
    batch = pseudo_batch(method)
    assert batch.unlabeled is not None
    batch.unlabeled.valids = (torch.zeros_like(batch.unlabeled.valid),)
    assert step(method, batch).losses["pseudo"].item() == 0


def test_soft_weights_are_confidences_and_thresholds_cut_between_voxels() -> None:
    confidence = torch.tensor([0.0, 0.3, 0.49, 128 / 255, 0.9])
    kept = {}
    for name in ("ignore", "weight"):
        method = trainer(filter=name)
        batch = pseudo_batch(method)
        assert batch.unlabeled is not None
        batch.unlabeled.pseudo_confidences = (confidence.repeat(2, 1, 16, 1),)
        batch.unlabeled.valids = (torch.ones(2, 1, 16, 5, dtype=torch.bool),)
        kept[name] = method._kept(batch.unlabeled)[0, 0, 0]
    assert kept["ignore"].tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(kept["weight"], confidence)


def test_the_pseudo_half_is_seen_under_stronger_intensities_the_labeled_half_is_not() -> None:
    seen: list[Tensor] = []
    batches = {}
    for scale in (1.0, 1.5, 2.0):
        method = trainer(intensity_scale=scale)
        hook = method.parts.trained["network"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        batches[scale] = pseudo_batch(method)
        step(method, batches[scale])
        hook.remove()
    plain, scaled, strong = seen
    assert all(torch.equal(x[:2], batches[1.0].labeled.image) for x in seen)
    unlabeled = batches[1.0].unlabeled
    assert unlabeled is not None
    assert torch.equal(plain[2:], unlabeled.image)
    assert (strong[2:] - plain[2:]).abs().max() > 0.05
    assert torch.allclose(scaled[2:] - plain[2:], (strong[2:] - plain[2:]) / 2, atol=1e-6)


def test_zero_weight_no_pseudo_labels_and_no_unlabeled_data_are_the_twin_bit_for_bit() -> None:
    twin = Supervised(toy_job(), MethodSettings())
    for method, batch in (
        (trainer(lambda_pseudo=0), pseudo_batch(trainer())),
        (trainer(), toy_batch(toy_job(), n_unlabeled=0)),
        (trainer(n_unlabeled=0), toy_batch(toy_job(), n_unlabeled=0)),
    ):
        mine, theirs = step(method, batch), twin.losses(batch, in_round(1))
        assert list(mine.losses) == ["supervised"]
        assert torch.equal(mine.losses["supervised"], theirs.losses["supervised"])
    for method in (trainer(lambda_pseudo=0), trainer(n_unlabeled=0), trainer(n_unlabeled=0, mode="online")):
        assert [phase.name for phase in method.phases()] == ["train"]
        assert method.phases()[0].refreshes == ()
        assert list(method.parts.followers) == []
        assert method.request(Progress(99, 100, "train")).unlabeled.count == 0


def test_gradients_reach_the_student_alone() -> None:
    method = trainer()
    step(method, pseudo_batch(method)).losses["pseudo"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parts.trained["network"].parameters())
    for follower in method.parts.followers.values():
        assert all(p.grad is None and not p.requires_grad for p in follower.parameters())


# ------------------------------------------------------------------------------------------------------------ timetable


def test_rounds_share_the_steps_and_begin_with_a_refresh() -> None:
    method = trainer()
    table = Timetable(method.phases(), 12)
    assert [(s.phase.name, s.start, s.end) for s in table.spans] == [
        ("round_0", 0, 4),
        ("round_1", 4, 8),
        ("round_2", 8, 12),
    ]
    assert [at for at, _ in table.refreshes] == [4, 8]
    first, second = (refresh for _, refresh in table.refreshes)
    assert first.rules is not None
    assert second.rules is not None
    assert (first.part, first.rules.kept_share, first.rules.reliable_share) == ("network", 0.7, 0.5)
    assert (second.part, second.rules.kept_share, second.rules.reliable_share) == ("network", 0.8, 1.0)
    assert (first.stability_parts, second.stability_parts) == (("early", "middle"), ())
    assert [span.phase.reinitialize for span in table.spans] == [(), ("network",), ("network",)]
    assert [phase.reinitialize for phase in trainer(init="teacher").phases()] == [(), (), ()]
    json.dumps([vars(refresh.rules) for _, refresh in table.refreshes])


def test_settings_reach_the_rules() -> None:
    settings = {"rho": "0.6,0.95", "theta_min": "0.4", "filter": "weight", "reliable_share": "0.25", "rounds": "3"}
    more = {"stability": "mirroring", "plausibility": "0", "stop_agreement": "0.9"}
    method = SelfTraining(toy_job(), make_settings(SelfTraining, {**settings, **more}))
    refreshes = [refresh for phase in method.phases() for refresh in phase.refreshes]
    rules = [refresh.rules for refresh in refreshes if refresh.rules is not None]
    assert [rule.kept_share for rule in rules] == [0.6, 0.95, 0.95]
    assert [rule.reliable_share for rule in rules] == [0.25, 1, 1]
    assert {(r.smallest_threshold, r.voxel_filter, r.plausibility, r.stop_agreement) for r in rules} == {
        (0.4, "weight", False, 0.9)
    }
    assert all(refresh.stability_parts == () for refresh in refreshes)
    assert list(method.parts.followers) == ["previous"]
    with pytest.raises(InvalidInput, match="rho"):
        make_settings(SelfTraining, {"rho": "0.7,1.2"})


def test_online_refreshes_with_the_moving_average_and_never_ends_early() -> None:
    method = trainer(mode="online", total=20)
    (phase,) = method.phases()
    assert [(r.at, r.part) for r in phase.refreshes] == [(0.4, "teacher"), (0.6, "teacher"), (0.8, "teacher")]
    rules = [refresh.rules for refresh in phase.refreshes if refresh.rules is not None]
    assert [rule.kept_share for rule in rules] == [0.7, 0.8, 0.9]
    assert [rule.stop_agreement for rule in rules] == [None] * 3
    table = Timetable(method.phases(), 20)
    asked = [method.request(table.progress(at)).unlabeled for at in range(20)]
    assert [request.count for request in asked] == [0] * 8 + [2] * 12
    assert list(method.alternative_predictions()) == ["teacher"]


@pytest.mark.parametrize("total", range(3, 40))
def test_no_step_asks_for_pseudo_labels_before_they_are_made(total: int) -> None:
    for mode in ("rounds", "online"):
        method = trainer(mode=mode, total=total)
        table = Timetable(method.phases(), total)
        first = table.refreshes[0][0]
        for at in range(total):
            assert (method.request(table.progress(at)).unlabeled.count > 0) == (at >= first)


def test_requests_of_rounds_and_of_the_last_share_with_labels_alone() -> None:
    method = trainer(total=60, finetune=0.1)
    table = Timetable(method.phases(), 60)
    counts = [method.request(table.progress(at)).unlabeled.count for at in range(60)]
    assert counts == [0] * 20 + ([2] * 18 + [0] * 2) * 2
    assert method.request(table.progress(20)).unlabeled == StreamRequest(2, sampler="pseudo_foreground", store="pseudo")
    online = trainer(total=60, finetune=0.1, mode="online")
    table = Timetable(online.phases(), 60)
    assert [online.request(table.progress(at)).unlabeled.count for at in range(60)] == [0] * 24 + [2] * 30 + [0] * 6


def test_full_rounds_multiply_the_steps() -> None:
    def steps(**settings: Any) -> int:
        return SelfTraining.total_steps(100, SelfTrainingSettings(**settings))

    assert (steps(), steps(full_rounds=True), steps(full_rounds=True, rounds=4)) == (100, 300, 500)
    assert steps(full_rounds=True, mode="online") == 100
    assert Supervised.total_steps(100, MethodSettings()) == 100


# ------------------------------------------------------------------------------------------------------------- the loop


class PseudoSource:
    """Labeled patches as a function of the step; pseudo-labeled ones where they are asked for."""

    def __init__(self, method: SemiSupervisedTrainer) -> None:
        self.method = method
        self.reloaded: list[tuple[str, int]] = []

    def batches(self, steps: Any) -> Any:
        def make(at: int, request: Any) -> Batch:
            batch = pseudo_batch(self.method, at) if request.unlabeled.count else None  # type: ignore[arg-type]
            return batch or toy_batch(self.method.job, at, n_unlabeled=0)

        return _Closable(make(at, request) for at, request in steps)

    def reload_store(self, store: str, step: int) -> None:
        self.reloaded.append((store, step))


class _Closable:
    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __iter__(self) -> Any:
        return self._batches

    def close(self) -> None:
        """Nothing to end."""


def loop_of(
    method: SemiSupervisedTrainer,
    folder: Path,
    total: int,
    refresh: Callable[[Refresh, int], bool | None] | None = None,
    **options: Any,
) -> TrainingLoop:
    folder.mkdir(parents=True, exist_ok=True)
    loop_options = LoopOptions(total, log_every=1, checkpoint_every=1000, seed=7)
    return TrainingLoop(
        method, PseudoSource(method), folder, loop_options, refresh=refresh or (lambda refresh, step: None), **options
    )


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autossl.trainers.training_log.draw_progress", lambda path, lines: None)


def test_round_0_is_a_supervised_run_of_its_length_bit_for_bit(tmp_path: Path) -> None:
    alone = loop_of(Supervised(toy_job(total_steps=4), MethodSettings()), tmp_path / "alone", 4)
    alone.run()
    method, seen = trainer(), []
    network = method.parts.trained["network"]

    def refresh(asked: Refresh, at: int) -> None:
        seen.append((at, weights(network), weights(method.parts.followers["previous"])))

    loop_of(method, tmp_path / "rounds", 12, refresh).run()
    (first, at_4, previous), (second, at_8, _) = seen
    assert (first, second) == (4, 8)
    assert same(at_4, weights(alone.method.parts.trained["network"])), "predicted with what round 0 has trained"
    assert same(at_4, previous)
    assert not same(at_8, at_4)
    lines = [json.loads(line) for line in (tmp_path / "rounds" / "log.jsonl").open()]
    rates = [line["learning_rate"]["network"] for line in lines]
    assert rates == pytest.approx([0.01 * (1 - step / 4) ** 0.9 for step in (0, 1, 2, 3)] * 3)
    assert same(weights(method.parts.followers["previous"]), at_8), "the copy of the round before the last"


def test_rounds_begin_from_scratch_unless_the_teacher_goes_on(tmp_path: Path) -> None:
    for init in ("scratch", "teacher"):
        method = trainer(init=init)
        network, before, after = method.parts.trained["network"], [], []
        initial = weights(network)
        method.on_phase = lambda phase, at, n=network, a=after: a.append(weights(n))  # type: ignore[method-assign]
        loop_of(method, tmp_path / init, 12, lambda r, at, n=network, b=before: b.append(weights(n))).run()
        assert same(after[0], initial)
        assert [same(old, new) for old, new in zip(before, after[1:], strict=True)] == [init == "teacher"] * 2
        if init == "scratch":
            assert not any(same(a, b) for a, b in ((initial, after[1]), (after[1], after[2])))


def test_no_unlabeled_case_and_zero_weight_give_the_whole_supervised_run(tmp_path: Path) -> None:
    twin = loop_of(Supervised(toy_job(total_steps=6), MethodSettings()), tmp_path / "twin", 6)
    twin.run()
    for index, options in enumerate(({"n_unlabeled": 0}, {"lambda_pseudo": 0}, {"n_unlabeled": 0, "mode": "online"})):
        loop = loop_of(trainer(total=6, **options), tmp_path / str(index), 6)  # type: ignore[arg-type]
        loop.run()
        assert same(weights(loop.method.parts.trained["network"]), weights(twin.method.parts.trained["network"]))


def test_copies_are_made_at_a_third_and_two_thirds(tmp_path: Path) -> None:
    method, seen = trainer(total=18), {}
    network, followers = method.parts.trained["network"], method.parts.followers

    def note(done: int, total: int, losses: dict[str, float]) -> None:
        seen[done] = weights(network)

    loop_of(method, tmp_path, 18, on_progress=note).run()
    assert same(weights(followers["early"]), seen[2])
    assert same(weights(followers["middle"]), seen[4]), "of round 0, and they stay: only round 1 chooses by them"


def test_a_skipped_step_at_the_end_of_a_round_or_at_a_copy_loses_nothing() -> None:
    method = trainer()
    for number, phase in ((0, (0, 4)), (1, (4, 8))):
        for at in range(*phase):
            if at in (0, 3, 7):  # not taken: the weights stay, and nothing is called
                continue
            with torch.no_grad():
                next(method.parts.trained["network"].parameters()).fill_(float(at))
            method.after_step(Progress(at, 12, f"round_{number}", *phase))
    copies = {name: next(part.parameters()).flatten()[0].item() for name, part in method.parts.followers.items()}
    assert copies == {"early": 1.0, "middle": 2.0, "previous": 6.0}


def test_online_the_moving_average_is_what_predicts_and_what_is_copied(tmp_path: Path) -> None:
    method, average, seen = trainer(mode="online", total=20), {}, []
    teacher = method.parts.followers["teacher"]

    def note(done: int, total: int, losses: dict[str, float]) -> None:
        average[done] = weights(teacher)

    def refresh(asked: Refresh, at: int) -> None:
        part = {**method.parts.trained, **method.parts.followers}[asked.part]
        seen.append((at, asked.part, same(weights(part), average[at])))

    loop = loop_of(method, tmp_path, 20, refresh, on_progress=note)
    loop.run()
    assert seen == [(8, "teacher", True), (12, "teacher", True), (16, "teacher", True)]
    assert loop.source.reloaded == [("pseudo", 8), ("pseudo", 12), ("pseudo", 16)], "and at no other step"  # type: ignore[attr-defined]
    assert same(weights(method.parts.followers["early"]), average[3])
    assert same(weights(method.parts.followers["middle"]), average[5])
    assert not same(weights(teacher), weights(method.parts.trained["network"]))


def test_a_refresh_may_end_the_run_with_the_model_as_it_is(tmp_path: Path) -> None:
    method, seen = trainer(), []
    network = method.parts.trained["network"]

    def refresh(asked: Refresh, at: int) -> bool:
        seen.append(weights(network))
        return at == 8

    loop_of(method, tmp_path, 12, refresh).run()
    final = torch.load(tmp_path / "checkpoint_final.pth", weights_only=True)
    assert final["progress"]["step"] == 8
    assert same(final["networks"]["network"], seen[1])
    assert not (tmp_path / "checkpoint_latest.pth").exists()


def test_a_refresh_that_is_killed_comes_back_with_the_same_weights(tmp_path: Path) -> None:
    """No checkpoint is due before the end: the loop writes one when a refresh begins."""
    seen: list[dict[str, Tensor]] = []

    def refresh(method: SelfTraining, kill: bool) -> Callable[[Refresh, int], None]:
        def called(asked: Refresh, at: int) -> None:
            seen.append(weights(method.parts.trained["network"]))
            if kill:
                raise KeyboardInterrupt

        return called

    first, second = trainer(), trainer()
    with pytest.raises(KeyboardInterrupt):
        loop_of(first, tmp_path, 12, refresh(first, kill=True)).run()
    loop = loop_of(second, tmp_path, 12, refresh(second, kill=False))
    loop.load_state(torch.load(tmp_path / "checkpoint_latest.pth", weights_only=True))
    assert loop.step == 4
    loop.run()
    assert len(seen) == 3
    assert same(seen[0], seen[1])


@pytest.mark.parametrize(("mode", "stop_at"), [("rounds", 2), ("rounds", 4), ("rounds", 6), ("online", 3)])
def test_stop_and_resume_equals_an_unbroken_run(tmp_path: Path, mode: str, stop_at: int) -> None:
    whole = loop_of(trainer(mode=mode), tmp_path / "whole", 12)
    whole.run()
    first = loop_of(trainer(mode=mode), tmp_path / "broken", 12)
    first._should_stop = lambda: first.step == stop_at
    with pytest.raises(TrainingInterrupted):
        first.run()
    second = loop_of(trainer(mode=mode), tmp_path / "broken", 12)
    second.load_state(torch.load(tmp_path / "broken" / "checkpoint_latest.pth", weights_only=True))
    second.run()
    modules = {**whole.method.parts.trained, **whole.method.parts.followers}
    others = {**second.method.parts.trained, **second.method.parts.followers}
    assert all(same(weights(modules[name]), weights(others[name])) for name in modules)
    assert whole.method.parts.memory == second.method.parts.memory
