"""spcl: what is alike, how much a pair counts, what each phase trains, and that the contrast acts."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from autossl.networks.features import encode
from autossl.trainers.base import Batch, Job, MethodSettings, Progress, StreamBatch
from autossl.trainers.components.contrast import Rows, mean_over_anchors, pair_losses, self_paced_weights, sup_con
from autossl.trainers.methods.spcl import (
    PRETRAINING,
    SEMI_SUPERVISED,
    SelfPacedContrast,
    SelfPacedContrastSettings,
    tolerance,
    warm_up_and_poly,
)
from autossl.trainers.methods.supervised import Supervised
from autossl.trainers.phases import Timetable
from autossl.trainers.setup import median_case_shape
from family import loop_of
from toys import toy_configuration, toy_job, toy_stream

SLICES = 24.0
"""Of the median case: eight bins."""
POSITIONS = (0.05, 0.3, 0.32, 0.9)
PATIENTS = ("p0", "p1", "p0", "p1")


def job_2d(**changes: Any) -> Job:
    job = toy_job(total_steps=40)
    known = {"median_case_shape": (SLICES, 16.0, 16.0), "attribute_values": {"patient": 3, "phase": 2}}
    return replace(job, **{**known, **changes})


def make(job: Job | None = None, **settings: Any) -> SelfPacedContrast:
    return SelfPacedContrast(job if job is not None else job_2d(), SelfPacedContrastSettings(**settings))


def at_step(method: SelfPacedContrast, step: int) -> Progress:
    return Timetable(method.phases(), method.job.total_steps, seed=3).progress(step)


def patches(
    method: SelfPacedContrast, seed: int = 0, places: tuple[float, ...] = POSITIONS, patients: Any = PATIENTS
) -> StreamBatch:
    """Unlabeled patches at these places of their cases, in two views."""
    stream = toy_stream(method.job, len(places), seed, labeled=False, views=2)
    centers = torch.tensor([[place, 0.5, 0.5] for place in places])
    rows = tuple({"patient": patient, "phase": f"{i % 2}"} if patient else {} for i, patient in enumerate(patients))
    return replace(stream, centers=centers, attributes=rows)


def batch_of(method: SelfPacedContrast, seed: int = 0, **options: Any) -> Batch:
    return Batch(toy_stream(method.job, 2, seed, labeled=True), patches(method, seed, **options))


def embeddings(method: SelfPacedContrast, kind: str, stream: StreamBatch) -> Tensor:
    """As the method makes them; call before `losses` for the same running moments."""
    moments = method.parts.memory["pooled"]
    kept = {name: value.clone() for name, value in moments.state_dict().items()}
    f = encode(method.parts.trained["network"], torch.cat(stream.views))[-1]
    e = method.parts.trained[f"project_{kind}"](method._standardized(f))
    moments.load_state_dict(kept)
    return e


# --------------------------------------------------------------------------------------------------------------- pace


def test_weights_of_pairs() -> None:
    values = torch.tensor([0.0, 1.0, 2.0, 5.0], requires_grad=True)
    assert self_paced_weights(values, 4.0).tolist() == [1, 0.75, 0.5, 0]
    assert self_paced_weights(values, 4.0, "hard").tolist() == [1, 1, 1, 0]
    assert self_paced_weights(torch.tensor([4.0]), 4.0, "hard").tolist() == [1]
    assert not self_paced_weights(values, 4.0).requires_grad
    with pytest.raises(ValueError, match="positive tolerance"):
        self_paced_weights(values, 0.0)


@pytest.mark.parametrize("mode", ["linear", "hard"])
def test_the_weights_minimize_what_they_are_the_minimum_of(mode: Any) -> None:
    gamma, grid = 3.0, torch.linspace(0, 1, 1001)
    regular = gamma * (grid.square() / 2 - grid) if mode == "linear" else -gamma * grid
    for value in (0.1, 1.0, 2.9, 3.5):
        best = grid[(grid * value + regular).argmin()]
        found = self_paced_weights(torch.tensor(value), gamma, mode)
        assert found.item() == pytest.approx(best.item(), abs=1e-3)


def test_tolerance_grows_with_the_root_of_the_phase() -> None:
    assert tolerance(0, 4, 60) == 4
    assert tolerance(0.25, 4, 60) == 32
    assert tolerance(1, 4, 60) == 60
    more = tolerance(0, 4, 60, candidates=59**2)
    assert more == pytest.approx(8)
    assert tolerance(1, 4, 60, candidates=300) == pytest.approx(60)
    assert tolerance(0, 4, 60, candidates=1) > 0


def test_a_mislabeled_pair_counts_least_and_late() -> None:
    e = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [-1.0, 0.2], [-1.0, 0.0]]), dim=1
    )
    pairs = pair_losses(Rows(e, torch.tensor([0, 0, 0, 0, 1])), tau=0.07)  # the fourth looks like the fifth

    def weights(u: float) -> Tensor:
        return self_paced_weights(pairs.values, tolerance(u, 4, 60))[0, 1:4]

    assert weights(0.5).argmin() == 2
    assert weights(0.01)[:2].min() > 0.5
    assert weights(0.2)[2] < 0.5
    assert weights(0.5)[2] < 0.5
    assert weights(1.0)[2] > 0.5


def test_no_gradient_through_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    e = torch.nn.functional.normalize(torch.randn(6, 4, generator=generator), dim=1).requires_grad_(True)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    pairs = pair_losses(Rows(e, labels), 0.5)
    loss = mean_over_anchors(pairs, self_paced_weights(pairs.values, 3.0))
    constant = self_paced_weights(pairs.values.detach(), 3.0)
    by_hand = (torch.where(pairs.positive, constant * pairs.values, 0).sum(1) / 2).mean()
    found, expected = (torch.autograd.grad(value, e, retain_graph=True)[0] for value in (loss, by_hand))
    assert torch.allclose(found, expected, atol=1e-7)
    assert found.abs().sum() > 0


def test_no_gradient_through_the_weights_of_the_method() -> None:
    method = make(labels="patient", gamma_start=3.0, gamma_end=3.0)
    batch, at = batch_of(method), at_step(method, 39)
    assert batch.unlabeled is not None
    pairs = pair_losses(Rows(embeddings(method, "patient", batch.unlabeled), torch.tensor([0, 1] * 4)), 0.07)
    w = torch.where(pairs.positive, (1 - pairs.values.detach() / 3).clamp(min=0), 0)
    assert len(w[pairs.positive].unique()) > 2
    by_hand = 0.1 * (w * pairs.values).sum() / w.sum()  # as many positives for all
    parameters = list(method.parts.trained["project_patient"].parameters())
    expected = torch.autograd.grad(by_hand, parameters)
    found = torch.autograd.grad(method.losses(batch, at).losses["contrast_patient"], parameters)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ what is alike


@pytest.mark.parametrize(
    ("changes", "settings", "kinds"),
    [
        ({}, {}, ("position", "patient", "phase")),
        ({"attribute_values": {"patient": 3}}, {}, ("position", "patient")),
        ({"attribute_values": {"patient": 3, "phase": 1}}, {}, ("position", "patient")),
        (
            {"attribute_values": {"patient": 3, "site": 2}},
            {"phase_attribute": "site"},
            ("position", "patient", "phase"),
        ),
        ({"median_case_shape": (1.0, 16.0, 16.0)}, {}, ("patient", "phase")),
        ({"median_case_shape": None, "attribute_values": {"patient": 1}}, {}, ("instance",)),
        ({}, {"labels": "position"}, ("position",)),
        ({}, {"labels": "instance,patient"}, ("instance", "patient")),
        ({"n_unlabeled": 0}, {}, ()),
        ({"n_unlabeled": 0}, {"labeled_only": True}, ("position", "patient", "phase")),
        ({}, {"lambda_pre": 0, "lambda_contrast": 0}, ()),
        ({}, dict(SelfPacedContrast.ablation), ("position", "patient", "phase")),
    ],
)
def test_labels_that_the_data_tell(changes: Any, settings: Any, kinds: tuple[str, ...]) -> None:
    method = make(job_2d(**changes), **settings)
    assert method.kinds == kinds
    assert set(method.parts.trained) == {"network", *(f"project_{kind}" for kind in kinds)}


def test_unknown_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="labels"):
        make(labels="position,scanner")


def test_positions_are_bins_of_the_slices() -> None:
    method = make()
    assert method.bins.counts == (8, 1, 1)
    assert method._labels(patches(method))["position"].values.tolist() == [0, 2, 2, 7]


def test_slices_of_the_median_case() -> None:
    plans: Any = SimpleNamespace(original_median_shape_after_transp=(7, 300, 280))
    flat = toy_configuration(2, median_image_size_in_voxels=(150.0, 140.0))
    deep = toy_configuration(3, median_image_size_in_voxels=(12.0, 150.0, 140.0))
    assert median_case_shape(plans, flat) == (7, 150, 140)
    assert median_case_shape(plans, deep) == (12, 150, 140)


# ----------------------------------------------------------------------------------------------------------- requests


def test_the_first_phase_sees_all_cases_and_no_label() -> None:
    method = make()
    request = method.request(at_step(method, 0))
    assert request.labeled.count == 0
    assert request.unlabeled.count == method.job.labeled_batch_size + method.job.unlabeled_batch_size
    assert request.unlabeled.includes_labeled
    assert request.unlabeled.views == 2
    assert not request.unlabeled.shared_geometry
    assert request.unlabeled.sampler == "uniform"


def test_the_second_phase_has_the_twins_labeled_patches() -> None:
    method = make()
    at = at_step(method, 10)
    request, twin = method.request(at), Supervised(method.job, MethodSettings()).request(at)
    assert at.phase == SEMI_SUPERVISED
    assert request.labeled == twin.labeled
    assert request.unlabeled.count == method.job.unlabeled_batch_size
    assert request.unlabeled.views == 2
    assert not request.unlabeled.includes_labeled


def test_axes_that_tell_the_position_are_not_mirrored() -> None:
    """Of the contrasted patches; the labeled ones stay those of the twin."""
    job = replace(toy_job(3, total_steps=40), median_case_shape=(64.0, 16.0, 48.0), attribute_values={"patient": 3})
    for step in (0, 20):
        request = make(job).request(at_step(make(job), step))
        assert request.unlabeled.unmirrored_axes == (0, 2)
        assert request.labeled.unmirrored_axes == ()
        assert make(job, labels="patient").request(at_step(make(job), step)).unlabeled.unmirrored_axes == ()
        assert make().request(at_step(make(), step)).unlabeled.unmirrored_axes == (), "slices are no axis of a 2D patch"


def test_without_unlabeled_cases_the_labeled_ones_are_contrasted_if_asked() -> None:
    method = make(job_2d(n_unlabeled=0), labeled_only=True)
    first, second = method.request(at_step(method, 0)), method.request(at_step(method, 20))
    assert first.unlabeled.includes_labeled
    assert second.unlabeled.includes_labeled
    assert second.unlabeled.count == method.job.unlabeled_batch_size
    plain = make(job_2d(n_unlabeled=0))
    assert [phase.name for phase in plain.phases()] == [SEMI_SUPERVISED]
    assert plain.request(at_step(plain, 0)).unlabeled.count == 0


# -------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("step", [0, 9, 10, 39])
@pytest.mark.parametrize(("mode", "normalized"), [("linear", True), ("linear", False), ("hard", True), ("off", True)])
def test_the_loss_written_out(step: int, mode: str, normalized: bool) -> None:
    method = make(labels="position,patient", self_pacing=mode, correct_grad=normalized, gamma_start=2.0)
    at, batch = at_step(method, step), batch_of(method)
    weight = 1.0 if step < 10 else 0.1
    u = (step + 1) / 10 if step < 10 else (step - 9) / 30
    assert batch.unlabeled is not None
    expected = {}
    for kind, end, labels in (("position", 60, [0, 2, 2, 7]), ("patient", 50, [0, 1, 0, 1])):
        e = embeddings(method, kind, batch.unlabeled).detach()
        total, anchors, weights = 0.0, 0, []
        two = labels * 2
        gamma_0 = 2.0 * math.log(7) / math.log(59)
        gamma = gamma_0 + (end - gamma_0) * math.sqrt(u)
        for i in range(8):
            others = [j for j in range(8) if j != i]
            denominator = sum(math.exp(float(e[i] @ e[j]) / 0.07) for j in others)
            values = [-math.log(math.exp(float(e[i] @ e[j]) / 0.07) / denominator) for j in others if two[j] == two[i]]
            w = {
                "linear": [max(1 - value / gamma, 0) for value in values],
                "hard": [float(value <= gamma) for value in values],
                "off": [1.0] * len(values),
            }[mode]
            weights += w
            total += sum(a * b for a, b in zip(w, values, strict=True)) / len(values)
            anchors += 1
        mean = sum(weights) / len(weights)
        expected[f"contrast_{kind}"] = total / anchors / (max(mean, 1e-3) if normalized else 1)
    output = method.losses(batch, at)
    for name, value in expected.items():
        assert output.measures[name] == pytest.approx(value, rel=2e-4, abs=1e-6)
        assert output.losses[name].item() == pytest.approx(weight * value, rel=2e-4, abs=1e-6)
    assert output.measures["contrast_weight"] == weight
    assert ("supervised" in output.losses) == (step >= 10)


def test_a_wide_tolerance_is_plain_contrast() -> None:
    method = make(labels="position", gamma_start=1e9, gamma_end=1e9)
    batch = batch_of(method)
    assert batch.unlabeled is not None
    e = embeddings(method, "position", batch.unlabeled)
    output = method.losses(batch, at_step(method, 0))
    plain = sup_con(e, torch.tensor([0, 2, 2, 7] * 2), 0.07)
    assert output.losses["contrast_position"].item() == pytest.approx(plain.item(), rel=1e-5)
    assert float(output.measures["position_pair_weight"]) == pytest.approx(1)


def test_without_pacing_every_pair_counts_alike() -> None:
    """The ablation; with pacing hard pairs count less."""
    paced, plain = make(labels="patient"), make(labels="patient", **SelfPacedContrast.ablation)
    batch = batch_of(paced)
    first, second = (method.losses(batch, at_step(method, 0)) for method in (paced, plain))
    assert float(first.measures["patient_pair_weight"]) < 1
    assert float(second.measures["patient_pair_weight"]) == 1
    assert "patient_gamma" not in second.measures
    assert not torch.equal(first.losses["contrast_patient"], second.losses["contrast_patient"])


def test_pairs_that_are_all_too_hard_leave_nothing() -> None:
    method = make(labels="patient", gamma_start=1e-6, gamma_end=1e-6)
    output = method.losses(batch_of(method), at_step(method, 0))
    assert output.losses["contrast_patient"].item() == 0
    assert output.measures["patient_pairs_used"] == 0
    assert output.losses["contrast_patient"].requires_grad


def test_a_patch_and_its_other_view_are_not_paced() -> None:
    method = make(labels="instance", gamma_start=1e-6, gamma_end=1e-6)
    batch = batch_of(method)
    assert batch.unlabeled is not None
    e = embeddings(method, "instance", batch.unlabeled)
    output = method.losses(batch, at_step(method, 0))
    plain = sup_con(e, torch.arange(4).repeat(2), 0.07)
    assert output.losses["contrast_instance"].item() == pytest.approx(plain.item(), rel=1e-5)


def test_one_label_for_all_is_left_out_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    method = make(labels="patient")
    batch = batch_of(method, patients=("p0",) * 4)
    with caplog.at_level(logging.INFO, logger="autossl.trainers.methods.spcl"):
        for step in (0, 1):
            output = method.losses(batch, at_step(method, step))
            assert output.losses["contrast_patient"].item() == 0
            assert output.losses["contrast_patient"].requires_grad
    assert len([record for record in caplog.records if "one patient only" in record.message]) == 1


def test_unknown_labels_are_negatives_and_nobodys_positive() -> None:
    method = make(labels="patient", self_pacing="off", bank_size=0)
    known = batch_of(method, patients=("p0", "p1", None, None))
    assert known.unlabeled is not None
    e = embeddings(method, "patient", known.unlabeled)
    output = method.losses(known, at_step(method, 0))
    assert float(output.measures["patient_anchors"]) == 0.5
    expected = []
    for i, j in ((0, 4), (4, 0), (1, 5), (5, 1)):
        others = torch.tensor([a for a in range(8) if a != i])
        expected.append(torch.logsumexp(e[i] @ e[others].T / 0.07, 0) - e[i] @ e[j] / 0.07)
    assert output.losses["contrast_patient"].item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


def test_the_labels_change_the_loss() -> None:
    """Patches that are moved to another place are pulled together with others."""
    method = make(labels="position", self_pacing="off", bank_size=0)
    here = method.losses(batch_of(method), at_step(method, 0)).losses["contrast_position"]
    method = make(labels="position", self_pacing="off", bank_size=0)
    there = method.losses(batch_of(method, places=(0.05, 0.9, 0.32, 0.3)), at_step(method, 0)).losses[
        "contrast_position"
    ]
    assert here.item() != pytest.approx(there.item(), rel=1e-4)


@pytest.mark.parametrize("phase", [0, 20])
def test_a_network_that_is_not_finite_is_seen_and_remembered_by_nobody(phase: int) -> None:
    method = make()
    batch = batch_of(method)
    method.losses(batch, at_step(method, phase))
    method.after_step(at_step(method, phase))
    before = {
        key: value.clone() for memory in method.parts.memory.values() for key, value in memory.state_dict().items()
    }
    with torch.no_grad():
        next(method.parts.trained["network"].encoder.parameters()).fill_(math.nan)
    output = method.losses(batch, at_step(method, phase))
    assert all(not torch.isfinite(term) for term in output.losses.values())
    method.after_step(at_step(method, phase))
    after = {key: value for memory in method.parts.memory.values() for key, value in memory.state_dict().items()}
    assert all(torch.equal(before[key], after[key]) for key in before)


# ------------------------------------------------------------------------------------------------------- the features


def test_features_are_standardized_before_they_are_projected() -> None:
    """The means of normalized maps hardly differ: as they are, all patches would look the same to a projector."""
    method = make(labels="instance")
    f = 3 + 0.1 * torch.randn(64, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    f.requires_grad_(True)
    found = method._standardized(f)
    pooled = f.detach().flatten(2).mean(2)
    expected = (pooled - pooled.mean(0)) / pooled.std(0, correction=0)
    assert torch.allclose(found, expected, atol=0.05)
    found[0].sum().backward()
    assert f.grad is not None
    assert f.grad[1:].abs().sum() == 0, "no gradient through the moments"


# ------------------------------------------------------------------------------------------------------------ the bank


def test_the_bank_keeps_first_views_of_steps_that_were_taken() -> None:
    method = make(labels="patient")
    batch, at = batch_of(method, patients=("p0", "p1", None, "p0")), at_step(method, 0)
    assert batch.unlabeled is not None
    e = embeddings(method, "patient", batch.unlabeled)
    method.losses(batch, at)
    assert len(method.parts.memory["bank_patient"].everything().rows) == 0
    method.after_step(at)
    kept = method.parts.memory["bank_patient"].everything()
    assert torch.allclose(kept.rows, e[:4].detach())
    assert not kept.rows.requires_grad
    assert kept.labels[:, 1].tolist() == [1, 1, 0, 1]
    assert kept.labels[0, 0] == kept.labels[3, 0] != kept.labels[1, 0]


def test_the_bank_remembers_few_steps() -> None:
    job = job_2d()
    per_step = job.labeled_batch_size + job.unlabeled_batch_size
    assert make(job).parts.memory["bank_patient"].everything().rows.shape[1] > 0
    assert make(job, bank_size=1000).parts.memory["bank_patient"].size == 8 * per_step
    assert make(job, bank_size=3).parts.memory["bank_patient"].size == 3


def test_rows_of_the_bank_are_positives_and_candidates() -> None:
    method = make(labels="patient", self_pacing="off")
    first, second = batch_of(method, 0), batch_of(method, 1)
    method.losses(first, at_step(method, 0))
    method.after_step(at_step(method, 0))
    stored = method.parts.memory["bank_patient"].everything()
    assert second.unlabeled is not None
    e = embeddings(method, "patient", second.unlabeled)
    labels = torch.tensor([0, 1, 0, 1])
    expected = sup_con(e, labels.repeat(2), 0.07, Rows(stored.rows, labels))
    alone = sup_con(e, labels.repeat(2), 0.07)
    found = method.losses(second, at_step(method, 1)).losses["contrast_patient"].item()
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert found != pytest.approx(alone.item(), rel=1e-3)


def test_a_single_patch_has_the_bank_for_company() -> None:
    method = make(labels="patient,instance")
    for step in (0, 1):
        batch = Batch(toy_stream(method.job, 1, step, labeled=True), patches(method, step, (0.5,), (f"p{step}",)))
        output = method.losses(batch, at_step(method, step))
        method.after_step(at_step(method, step))
        assert all(torch.isfinite(term) for term in output.losses.values())
    assert output.losses["contrast_patient"].item() > 0
    assert output.losses["contrast_instance"].item() > 0
    assert method.parts.memory["bank_instance"].everything().labels[:, 1].tolist() == [0, 0], "negatives only"


# -------------------------------------------------------------------------------------------------------------- phases


def test_what_each_phase_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autossl.trainers.training_log.draw_progress", lambda path, lines: None)
    method = make(replace(job_2d(), total_steps=8))
    network: Any = method.parts.trained["network"]
    begin = {name: value.clone() for name, value in network.named_parameters()}
    loop = loop_of(method, tmp_path)
    loop._should_stop = lambda: loop.step == 2
    with pytest.raises(Exception, match="stopped after step 2"):
        loop.run()
    moved = {name for name, value in network.named_parameters() if not torch.equal(value, begin[name])}
    assert moved
    assert all(name.startswith("encoder.") for name in moved), "the decoder stays as it was"


@pytest.mark.parametrize("step", [0, 20])
def test_the_contrast_reaches_encoder_and_its_projector_alone(step: int) -> None:
    method = make()
    output = method.losses(batch_of(method), at_step(method, step))
    names, parameters = zip(
        *(
            (f"{part}.{name}", p)
            for part, module in method.parts.trained.items()
            for name, p in module.named_parameters()
        ),
        strict=True,
    )
    for kind in method.kinds:
        found = torch.autograd.grad(output.losses[f"contrast_{kind}"], parameters, retain_graph=True, allow_unused=True)
        reached = {name for name, gradient in zip(names, found, strict=True) if gradient is not None}
        assert {name.split(".")[0] for name in reached} == {"network", f"project_{kind}"}
        assert all(".decoder." not in name for name in reached)
        assert any(name.startswith("network.encoder.") for name in reached)


def test_learning_rates_begin_again_in_each_phase() -> None:
    method = make(replace(job_2d(), total_steps=400))
    first, second = ((phase.groups or ())[0] for phase in method.phases())
    assert first.learning_rate is second.learning_rate is None, "the plan's"
    rates = [first.factor(at_step(method, step)) for step in range(100)]
    assert rates[0] == pytest.approx(0.5 / 5)
    assert rates.index(max(rates)) == 4, "5 % of the phase"
    assert rates[50] == pytest.approx(0.5 * 0.5**0.9)
    assert second.factor(at_step(method, 100)) == pytest.approx(1)
    assert second.factor(at_step(method, 250)) == pytest.approx(0.5**0.9)
    assert warm_up_and_poly(Progress(0, 4, PRETRAINING, 0, 1)) == 0.5, "a phase of one step still moves"


def test_without_contrast_it_is_the_twin() -> None:
    method = make(lambda_pre=0, lambda_contrast=0)
    twin = Supervised(method.job, MethodSettings())
    assert [phase.name for phase in method.phases()] == [SEMI_SUPERVISED]
    at, batch = at_step(method, 5), batch_of(method)
    assert method.request(at).unlabeled.count == 0
    mine, theirs = method.losses(batch, at), twin.losses(batch, at)
    assert list(mine.losses) == ["supervised"]
    assert torch.equal(mine.losses["supervised"], theirs.losses["supervised"])


def test_without_pretraining_the_whole_run_is_semi_supervised() -> None:
    method = make(lambda_pre=0)
    assert [phase.name for phase in method.phases()] == [SEMI_SUPERVISED]
    assert "contrast_position" in method.losses(batch_of(method), at_step(method, 0)).losses


def test_the_supervised_term_is_that_of_the_twin() -> None:
    method = make()
    twin = Supervised(method.job, MethodSettings())
    batch, at = batch_of(method), at_step(method, 20)
    assert torch.allclose(
        method.losses(batch, at).losses["supervised"], twin.losses(batch, at).losses["supervised"], rtol=1e-6
    )


def test_training_pulls_patches_of_one_place_together() -> None:
    """Coarse stripes lie below, fine ones above: after some steps the embeddings tell which is which."""
    method = make(labels="position", bank_size=0)
    network: Any = method.parts.trained["network"]
    parameters = [*network.encoder.parameters(), *method.parts.trained["project_position"].parameters()]
    optimizer = torch.optim.Adam(parameters, 1e-2)
    ramp = torch.linspace(-3, 3, 16)
    stripes = torch.stack([(n * ramp).sin() for n in (1, 1, 4, 4)])[:, None, :, None]

    def batch(seed: int) -> Batch:
        found = patches(method, seed, (0.1, 0.1, 0.9, 0.9))
        views = tuple(view + 3 * stripes for view in found.views)
        return Batch(toy_stream(method.job, 0, 0, labeled=True), replace(found, views=views))

    for step in range(30):
        output = method.losses(batch(step), at_step(method, 9))
        optimizer.zero_grad()
        output.losses["contrast_position"].backward()
        optimizer.step()
    similarity = torch.zeros(8, 8)
    for seed in range(100, 104):
        unseen = batch(seed).unlabeled
        assert unseen is not None
        e = embeddings(method, "position", unseen).detach()
        similarity += e @ e.T / 4
    assert similarity[0, 1] > similarity[0, 2] + 0.3
    assert similarity[2, 3] > similarity[1, 3] + 0.3
