"""The checks of unimatch's specification that are its own; see test_weak_to_strong for what it shares with fixmatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autossl.trainers.base import Batch, MethodSettings, Progress, StepOutput
from autossl.trainers.methods import unimatch
from autossl.trainers.methods.supervised import Supervised
from autossl.trainers.methods.unimatch import UniMatch, UniMatchSettings
from toys import toy_architecture, toy_batch, toy_configuration, toy_job

BEYOND = ["strong_1", "strong_2", "features"]


def trainer(n_unlabeled: int = 4, dims: int = 2, **settings: Any) -> UniMatch:
    configuration = toy_configuration(dims, architecture=toy_architecture(dims, (8, 12, 16)))
    return UniMatch(toy_job(n_unlabeled=n_unlabeled, configuration=configuration), UniMatchSettings(**settings))


def step(method: UniMatch, fraction: float = 1.0, batch: Batch | None = None) -> StepOutput:
    return method.losses(batch or toy_batch(method.job), Progress(step=int(100 * fraction), total=100))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Tensor], list[Tensor]]]:
    """(feature maps, logits) of each pass of the decoder: the clean one, then the perturbed one."""
    passes: list[tuple[list[Tensor], list[Tensor]]] = []
    original = unimatch.decode

    def keep(network: torch.nn.Module, skips: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        z, features = original(network, skips)
        passes.append((skips, z))
        return z, features

    monkeypatch.setattr(unimatch, "decode", keep)
    return passes


def test_without_dropout_the_perturbed_view_is_the_weak_one(decoded: list[Any]) -> None:
    step(trainer(feature_dropout=0))
    (_, clean), (_, perturbed) = decoded
    assert len(clean) == len(perturbed)
    for weak, features in zip(clean, perturbed, strict=True):
        assert (weak[2:] - features).abs().max() < 1e-5


def test_half_of_the_channels_of_each_map_are_dropped_and_the_rest_doubled(decoded: list[Any]) -> None:
    step(trainer(), batch=toy_batch(toy_job(), n_unlabeled=40))
    (clean, _), (perturbed, _) = decoded
    masks = []
    for before, after in zip(clean, perturbed, strict=True):
        before = before[2:]
        dropped = (after == 0).flatten(2).all(2)
        assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.06)
        assert torch.equal(after, torch.where(dropped[:, :, None, None], 0, 2 * before))
        assert not torch.equal(dropped[0], dropped[1]), "each patch draws for itself"
        masks.append(dropped[:, :8])
    assert not torch.equal(masks[0], masks[1]), "each map draws for itself"


def test_only_the_deepest_stages_are_perturbed_where_asked(decoded: list[Any]) -> None:
    step(trainer(fp_stages=1))
    (clean, _), (perturbed, _) = decoded
    same = [torch.equal(before[2:], after) for before, after in zip(clean, perturbed, strict=True)]
    assert same == [True, True, False]
    decoded.clear()
    step(trainer(fp_stages=9))
    (clean, _), (perturbed, _) = decoded
    assert not any(torch.equal(before[2:], after) for before, after in zip(clean, perturbed, strict=True))


@pytest.mark.parametrize("streams, expected", [(2, [0.25, 0.25, 0.5]), (1, [0.5, 0.5])])
def test_weights_of_the_streams_add_up_to_one(
    streams: int, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = trainer(streams=streams)
    monkeypatch.setattr(method.weak_to_strong, "loss", lambda z, view: z[0].sum() * 0 + 1)
    output = step(method)
    terms = [term.item() for name, term in output.losses.items() if name != "supervised"]
    assert terms == pytest.approx(expected)
    assert sum(terms) == pytest.approx(1.0)
    names = [name for name in output.losses if name != "supervised"]
    assert [float(output.measures[f"{name}_weight"]) for name in names] == pytest.approx(expected)
    assert [float(output.measures[name]) for name in names] == [1.0] * len(names)


def test_the_two_strong_views_differ_in_intensity_and_box_and_share_partners(monkeypatch: pytest.MonkeyPatch) -> None:
    method, without_boxes = trainer(cutmix_p=1), trainer(cutmix_p=0)
    views = []
    original = method.weak_to_strong.strong_view

    def keep(*arguments: Any) -> Any:
        views.append(original(*arguments))
        return views[-1]

    monkeypatch.setattr(method.weak_to_strong, "strong_view", keep)
    batch = toy_batch(method.job, n_unlabeled=3)
    assert batch.unlabeled is not None
    weak = without_boxes.weak_to_strong.weak_view(batch.unlabeled, torch.zeros(3, 3, 16, 16))
    first, second = (
        without_boxes.weak_to_strong.strong_view(weak, batch.labeled, Progress(0, 1), name) for name in BEYOND[:2]
    )
    assert not torch.equal(first.image, second.image)
    batch.unlabeled.views = (torch.arange(3.0).view(3, 1, 1, 1).expand(-1, 1, 16, 16).clone(),)
    step(method, batch=batch)
    assert not torch.equal(views[0].image, views[1].image), "constant images: the boxes differ"
    for first, second in zip(views[0].image, views[1].image, strict=True):
        assert torch.equal(first.unique(), second.unique()), "the partners do not"


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", BEYOND)
def test_every_stream_reaches_encoder_and_decoder(name: str, dims: int) -> None:
    method = trainer(dims=dims, threshold=0.1)
    network = method.parts.trained["network"]
    step(method).losses[name].backward()
    first = next(network.encoder.parameters())  # type: ignore[union-attr]
    head = network.decoder.seg_layers[-1].weight  # type: ignore[union-attr,index]
    for parameter in (first, head):
        assert parameter.grad is not None  # type: ignore[union-attr]
        assert parameter.grad.abs().sum() > 0  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("fraction, settings", [(1.0, {"lambda_max": 0.0}), (0.01, {})])
def test_zero_weight_is_the_twin_bit_for_bit(fraction: float, settings: dict[str, Any]) -> None:
    method = trainer(**settings)
    twin = Supervised(method.job, MethodSettings())
    batch = toy_batch(method.job)
    mine, theirs = step(method, fraction, batch), twin.losses(batch, Progress(50, 100))
    assert list(mine.losses) == ["supervised"]
    assert torch.equal(mine.losses["supervised"], theirs.losses["supervised"])


def test_the_supervised_term_is_the_twins_beside_unlabeled_patches() -> None:
    method = trainer()
    batch = toy_batch(method.job)
    theirs = Supervised(method.job, MethodSettings()).losses(batch, Progress(50, 100)).losses["supervised"].item()
    assert step(method, batch=batch).losses["supervised"].item() == pytest.approx(theirs, rel=1e-5)


def test_no_unlabeled_case_is_the_twin() -> None:
    method = trainer(n_unlabeled=0)
    assert method.request(Progress(0, 1)).unlabeled.count == 0
    assert list(step(method, batch=toy_batch(method.job, n_unlabeled=0)).losses) == ["supervised"]


def test_voxels_outside_the_image_do_not_count() -> None:
    method = trainer(threshold=0.1)
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    batch.unlabeled.valids = (torch.zeros_like(batch.unlabeled.valid),)
    output = step(method, batch=batch)
    assert [output.losses[name].item() for name in BEYOND] == [0, 0, 0]


def test_the_network_predicts() -> None:
    assert [member.name for member in trainer().prediction().members] == ["network"]
