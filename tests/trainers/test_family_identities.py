"""What every method of the registry must equal: the labeled-only objective, the twin, and itself."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autossl.inference.predictor import Predictor, Window
from autossl.trainers.base import Batch, MethodSettings, Progress, SemiSupervisedTrainer, StepOutput
from autossl.trainers.methods.supervised import Supervised
from family import (
    METHODS,
    NAMES,
    Condition,
    beyond_supervised,
    each_phase,
    family_batch,
    loop_of,
    make,
    run_soundly,
    trained_parameters,
    weights_of,
    zeroed,
)

LABELS_AND_REGIONS = [
    pytest.param(name, regions, id=f"{name}-{'regions' if regions else 'labels'}")
    for name in NAMES
    for regions in (False, True)
    if not (regions and METHODS[name].needs.softmax_only)
]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops draw their log when they end; that takes longer than a toy run."""
    monkeypatch.setattr("autossl.trainers.training_log.draw_progress", lambda path, lines: None)


def gradients(method: SemiSupervisedTrainer, terms: list[torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """Of the sum of the terms, by the parameters' dotted names; None where it does not reach."""
    parameters = trained_parameters(method)
    terms = [term for term in terms if term.requires_grad]
    found = torch.autograd.grad(
        torch.stack(terms).sum(), list(parameters.values()), retain_graph=True, allow_unused=True
    )
    return dict(zip(parameters, found, strict=True))


def assert_equal_gradients(
    first: dict[str, torch.Tensor | None], second: dict[str, torch.Tensor | None], rename: tuple[str, str] = ("", "")
) -> None:
    """Bit for bit; no gradient and one of zeros are alike."""
    for key, theirs in second.items():
        mine = first[key.replace(*rename, 1)]
        reference = mine if mine is not None else theirs
        if reference is None:
            continue
        zero = torch.zeros_like(reference)
        assert torch.equal(zero if mine is None else mine, zero if theirs is None else theirs), key


def counterpart(method: SemiSupervisedTrainer, twin: SemiSupervisedTrainer) -> str:
    """Name of the trained part that begins with the weights of the twin's network."""
    wanted = twin.parts.trained["network"].state_dict()
    for name, module in method.parts.trained.items():
        weights = module.state_dict()
        if list(weights) == list(wanted) and all(torch.equal(weights[key], wanted[key]) for key in wanted):
            return name
    raise AssertionError(f"{method.name} has no network that begins as that of supervised does")


def twin_of(method: SemiSupervisedTrainer) -> Supervised:
    """The supervised run with the same job."""
    return Supervised(method.job, MethodSettings())


# ------------------------------------------------------------------------------------------- the labeled-only objective


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_zero_leave_the_supervised_terms_alone(name: str) -> None:
    method = make(METHODS[name], **zeroed(METHODS[name]))
    if name != "supervised":
        assert method.unsupervised_weights, "the class must name the settings that turn its terms off"
    for at, batch in each_phase(method):
        output = method.losses(batch, at)
        beyond = {key: term.detach() for key, term in beyond_supervised(output).items()}
        assert all(float(term) == 0 for term in beyond.values()), beyond
        labeled = [term for key, term in output.losses.items() if key not in beyond]
        if labeled:
            assert_equal_gradients(gradients(method, list(output.losses.values())), gradients(method, labeled))


@pytest.mark.parametrize("name", [name for name in NAMES if not METHODS[name].changes_supervised])
def test_weights_of_zero_are_the_supervised_loss_of_the_same_networks(name: str) -> None:
    """Methods with supervised terms of their own have a test of their own for them."""
    method = make(METHODS[name], **zeroed(METHODS[name]))
    networks = [part for part in method.parts.trained.values() if hasattr(part, "encoder")]
    for at, batch in each_phase(method):
        output = method.losses(batch, at)
        labeled = batch.labeled
        expected = [method.job.supervised_loss(net(labeled.image), labeled.target, labeled.valid) for net in networks]
        total = torch.stack(list(output.losses.values())).sum()
        assert total.item() == pytest.approx(sum(loss.item() for loss in expected), rel=1e-6)
        if method.reduces_to_supervised and len(networks) == 1:
            assert torch.equal(total, expected[0]), "not the twin's step to the last bit"
            assert_equal_gradients(gradients(method, [total]), gradients(method, [expected[0]]))


@pytest.mark.parametrize("name", NAMES)
def test_without_unlabeled_cases(name: str, tmp_path: Path) -> None:
    """The labeled-only objective trains soundly; where the class says so it is the supervised run, bit for bit."""
    method = make(METHODS[name], n_unlabeled=0)
    for at, _ in each_phase(method):
        assert method.request(at).unlabeled.count == 0
    twin = twin_of(method)
    same = counterpart(method, twin) if method.reduces_to_supervised else None
    run_soundly(method, tmp_path / "method")
    if same is None:
        return
    run_soundly(twin, tmp_path / "twin")
    expected = twin.parts.trained["network"].state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in method.parts.trained[same].state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_unlabeled_patches_is_harmless(name: str, tmp_path: Path) -> None:
    """Cases exist, but a step brought none."""
    run_soundly(make(METHODS[name]), tmp_path, Condition(counts=(2, 0)))


# ------------------------------------------------------------------------------------------------ what must not matter


def step_of(method: SemiSupervisedTrainer, batch: Batch, at: Progress) -> dict[str, torch.Tensor]:
    """Terms and gradients of one call."""
    output: StepOutput = method.losses(batch, at)
    terms = {f"loss {key}": term.detach() for key, term in output.losses.items()}
    found = gradients(method, list(output.losses.values()))
    return {**terms, **{key: value for key, value in found.items() if value is not None}}


def assert_same_step(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first), [
        key for key in first if not torch.equal(first[key], second[key])
    ]


@pytest.mark.parametrize(("name", "regions"), LABELS_AND_REGIONS)
def test_what_stands_at_invalid_voxels_does_not_matter(name: str, regions: bool) -> None:
    """Targets under the ignore label, and pseudo-labels outside the image, say something else: nothing changes."""
    clean, poisoned = (
        Condition(ignored=True, small_images=True),
        Condition(ignored=True, small_images=True, poison=True),
    )
    runs = []
    for condition in (clean, poisoned):
        method = make(METHODS[name], regions=regions, ignore=True)
        steps = {}
        for at, _ in each_phase(method):
            batch = family_batch(method, method.request(at), at.step, condition)
            steps |= {f"{at.step} {key}": value for key, value in step_of(method, batch, at).items()}
        runs.append(steps)
    assert_same_step(*runs)


@pytest.mark.parametrize("name", NAMES)
def test_draws_come_from_the_step_and_not_from_global_generators(name: str) -> None:
    runs = []
    for seed in (1, 2):
        method = make(METHODS[name])
        steps = {}
        for at, batch in each_phase(method):
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            steps |= {f"{at.step} {key}": value for key, value in step_of(method, batch, at).items()}
        runs.append(steps)
    assert_same_step(*runs)


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_left_as_they_are(name: str) -> None:
    method = make(METHODS[name])
    for at, batch in each_phase(method):
        copy = family_batch(method, method.request(at), at.step)
        method.losses(batch, at)
        for mine, theirs in ((batch.labeled, copy.labeled), (batch.unlabeled, copy.unlabeled)):
            if mine is None or theirs is None:
                continue
            for one, other in zip((*mine.views, *mine.valids), (*theirs.views, *theirs.valids), strict=True):
                assert torch.equal(one, other)
            for one, other in zip(mine.targets or (), theirs.targets or (), strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_reading_a_method_does_not_change_it(name: str) -> None:
    """Requests, phases and predictions are asked for at any time, also ahead of time."""
    method = make(METHODS[name])
    before = weights_of(method)
    for at, _ in each_phase(method):
        assert method.request(at) == method.request(at)
    assert [phase.name for phase in method.phases()] == [phase.name for phase in method.phases()]
    assert method.prediction() == method.prediction()
    after = weights_of(method)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(("name", "regions"), LABELS_AND_REGIONS)
def test_what_is_deployed_predicts_from_the_saved_weights(name: str, regions: bool, tmp_path: Path) -> None:
    method = make(METHODS[name], regions=regions)
    networks = loop_of(method, tmp_path).state()["networks"]
    plan, schema = method.job.configuration, method.job.schema
    image = np.random.default_rng(0).normal(size=(plan.n_channels, *(1, *plan.patch_size)[-3:])).astype(np.float32)
    for spec in (method.prediction(), *method.alternative_predictions().values()):
        predictor = Predictor.from_state_dicts(spec, [networks], plan, schema, Window.of(plan, mirror=False), "cpu")
        logits = predictor.logits(image)
        assert logits.shape == (schema.n_outputs, *image.shape[1:])
        assert bool(torch.isfinite(logits).all())
    assert isinstance(method.parts.trained, dict)
    assert all(isinstance(part, nn.Module) for part in method.parts.trained.values())
