"""The sliding window against closed forms and against a plain full-size reference."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput
from autossl.inference.predictor import Network, Predictor, Window
from autossl.inference.tiles import tile_starts, tile_weights
from autossl.networks.build import build_network
from autossl.networks.prediction import Member, PredictionSpec
from autossl.planners.plans import NETWORK_CLASSES, Architecture, ConfigurationPlan

SCHEMA = LabelSchema({"background": (0,), "organ": (1,), "tumor": (2,)})


def small_architecture(dims: int) -> Architecture:
    return Architecture(
        network_class_name=NETWORK_CLASSES["plain"],
        arch_kwargs={
            "n_stages": 2,
            "features_per_stage": [2, 4],
            "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
            "kernel_sizes": [[3] * dims] * 2,
            "strides": [[1] * dims, [2] * dims],
            "n_conv_per_stage": [1, 1],
            "n_conv_per_stage_decoder": [1],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
    )


def small_plan(patch: tuple[int, ...], n_channels: int = 1, mirror_axes: tuple[int, ...] = ()) -> ConfigurationPlan:
    return ConfigurationPlan(
        data_identifier="data",
        batch_size=2,
        patch_size=patch,
        median_image_size_in_voxels=patch,
        spacing=(1.0,) * len(patch),
        normalization_schemes=("ZScoreNormalization",) * n_channels,
        use_mask_for_norm=(False,) * n_channels,
        architecture=small_architecture(len(patch)),
        batch_dice=False,
        mirror_axes=mirror_axes,
        labeled_batch_size=2,
        unlabeled_batch_size=2,
    )


def spec_of(n_members: int = 1, **changes: Any) -> PredictionSpec:
    members = tuple(Member(name=f"network{i}", architecture=small_architecture(3)) for i in range(n_members))
    combine: Any = "single" if n_members == 1 else "mean_probabilities"
    return PredictionSpec(members=members, combine=combine, **changes)


def constant(*values: float) -> Network:
    def network(tiles: Tensor) -> Tensor:
        return torch.tensor(values).view(1, -1, *[1] * (tiles.ndim - 2)).expand(len(tiles), -1, *tiles.shape[2:])

    return network


def copies(n_outputs: int) -> Network:
    return lambda tiles: tiles[:, :1].repeat(1, n_outputs, *[1] * (tiles.ndim - 2))


def reference(network: Network, image: Tensor, patch: tuple[int, int, int], step: float = 0.5) -> Tensor:
    """Full-size sums of weighted tiles, as plainly as possible."""
    weights = torch.from_numpy(tile_weights(patch).copy())
    n_outputs = network(torch.zeros(1, len(image), *patch)).shape[1]
    sums, total = torch.zeros(n_outputs, *image.shape[1:]), torch.zeros(image.shape[1:])
    for start in product(*(tile_starts(n, t, step) for n, t in zip(image.shape[1:], patch, strict=True))):
        z, y, x = (slice(s, s + t) for s, t in zip(start, patch, strict=True))
        sums[:, z, y, x] += network(image[None, :, z, y, x])[0] * weights
        total[z, y, x] += weights
    return sums / total


@pytest.mark.parametrize("shape", [(12, 13, 9), (3, 5, 20), (8, 8, 8), (1, 1, 1)])
@pytest.mark.parametrize("patch", [(8, 8, 8), (8, 8)])
def test_a_constant_network_gives_constant_logits(shape: tuple[int, int, int], patch: tuple[int, ...]) -> None:
    predictor = Predictor(spec_of(), [[constant(1.5, -2.0)]], 2, Window(patch, (0, 1)))
    logits = predictor.logits(torch.rand(1, *shape))
    assert logits.shape == (2, *shape)
    torch.testing.assert_close(logits[0], torch.full(shape, 1.5))
    torch.testing.assert_close(logits[1], torch.full(shape, -2.0))


@pytest.mark.parametrize("patch, axes", [((8, 8, 8), (0, 1, 2)), ((8, 8, 8), (1,)), ((6, 10), (0, 1)), ((6, 10), ())])
def test_a_network_that_copies_its_input_gives_the_image_back(patch: tuple[int, ...], axes: tuple[int, ...]) -> None:
    image = torch.randn(1, 11, 7, 21)
    predictor = Predictor(spec_of(), [[copies(2)]], 2, Window(patch, axes, tiles_at_once=3))
    torch.testing.assert_close(predictor.logits(image)[1], image[0])


def test_mirroring_averages_over_every_combination_of_its_axes() -> None:
    def ramp(tiles: Tensor) -> Tensor:  # grows along z and, ten times as fast, along x
        z, x = torch.arange(8.0).view(-1, 1, 1), torch.arange(8.0)
        return (z + 10 * x).expand(len(tiles), 1, *tiles.shape[2:])

    image = torch.zeros(1, 8, 8, 8)
    only_z = Predictor(spec_of(), [[ramp]], 1, Window((8, 8, 8), (0,))).logits(image)[0]
    expected = (3.5 + 10 * torch.arange(8.0)).expand(8, 8, 8)
    torch.testing.assert_close(only_z, expected)
    both = Predictor(spec_of(), [[ramp]], 1, Window((8, 8, 8), (0, 2))).logits(image)[0]
    torch.testing.assert_close(both, torch.full((8, 8, 8), 38.5))


@pytest.mark.parametrize("shape", [(30, 10, 12), (8, 21, 8), (17, 9, 31)])
@pytest.mark.parametrize("at_once", [1, 3, 64])
@pytest.mark.parametrize("step", [0.5, 1.0])
def test_streaming_equals_the_full_size_sums(shape: tuple[int, int, int], at_once: int, step: float) -> None:
    network = build_network(small_architecture(3), 1, 3, deep_supervision=False, seed=0).eval()
    image = torch.randn(1, *shape)
    predictor = Predictor(spec_of(), [[network]], 3, Window((8, 8, 8), (), step, at_once))
    with torch.no_grad():
        expected = reference(network, image, (8, 8, 8), step)
    torch.testing.assert_close(predictor.logits(image), expected, rtol=1e-4, atol=1e-5)


def test_small_images_lie_in_the_middle_of_the_patch() -> None:
    def row(tiles: Tensor) -> Tensor:
        return torch.arange(8.0).view(-1, 1, 1).expand(len(tiles), 1, *tiles.shape[2:])

    logits = Predictor(spec_of(), [[row]], 1, Window((8, 8, 8))).logits(torch.zeros(1, 3, 8, 8))
    assert logits[0, :, 0, 0].tolist() == [2, 3, 4]  # 5 rows are missing: 2 before, 3 behind


def test_2d_networks_see_every_slice_for_itself() -> None:
    network = build_network(small_architecture(2), 1, 2, deep_supervision=False, seed=0).eval()
    image = torch.randn(1, 5, 16, 12)
    predictor = Predictor(spec_of(), [[network]], 2, Window((8, 8)))
    whole = predictor.logits(image)
    for z in range(5):
        torch.testing.assert_close(predictor.logits(image[:, z : z + 1])[:, 0], whole[:, z], rtol=1e-4, atol=1e-5)


def test_slabs_come_in_order_and_hold_no_more_rows_than_a_patch() -> None:
    predictor = Predictor(spec_of(), [[copies(2)]], 2, Window((8, 8, 8), tiles_at_once=1))
    image = torch.randn(1, 40, 8, 8)
    position = 0
    for slab in predictor.slabs(image):
        assert slab.start == position
        assert slab.logits.shape[2] <= 8
        torch.testing.assert_close(slab.logits[0, 0], image[0, position : position + slab.logits.shape[2]])
        position += slab.logits.shape[2]
    assert position == 40


def test_logits_are_averaged_over_folds_or_kept_apart() -> None:
    predictor = Predictor(spec_of(), [[constant(1.0, 0.0)], [constant(4.0, 2.0)]], 2, Window((8, 8, 8)))
    image = torch.zeros(1, 8, 8, 9)
    torch.testing.assert_close(predictor.logits(image)[0], torch.full((8, 8, 9), 2.5))
    slab = next(predictor.slabs(image, per_fold=True))
    assert slab.logits[:, 0, 0, 0, 0].tolist() == pytest.approx([1, 4])


def test_members_probabilities_are_averaged_before_the_logarithm() -> None:
    first, second = torch.tensor([3.0, 0.0]), torch.tensor([-1.0, 0.0])
    predictor = Predictor(spec_of(2), [[constant(*first.tolist()), constant(*second.tolist())]], 2, Window((8, 8, 8)))
    mean = (first.softmax(0) + second.softmax(0)) / 2
    torch.testing.assert_close(predictor.logits(torch.zeros(1, 8, 8, 8))[:, 0, 0, 0], mean.log())


def test_region_probabilities_are_averaged_and_go_back_to_logits() -> None:
    spec = spec_of(2, activation="sigmoid")
    predictor = Predictor(spec, [[constant(2.0), constant(-1.0)]], 1, Window((8, 8, 8)))
    mean = (1 / (1 + math.exp(-2)) + 1 / (1 + math.exp(1))) / 2
    assert predictor.logits(torch.zeros(1, 8, 8, 8))[0, 0, 0, 0].item() == pytest.approx(math.log(mean / (1 - mean)))


def test_a_member_gets_its_channels_in_its_order() -> None:
    member = Member(name="late", architecture=small_architecture(3), channels=(2, 0))
    predictor = Predictor(PredictionSpec(members=(member,)), [[lambda tiles: tiles]], 2, Window((8, 8, 8)))
    image = torch.randn(3, 9, 8, 8)
    torch.testing.assert_close(predictor.logits(image), image[[2, 0]])


def test_networks_from_weights_equal_the_networks_and_leave_them_alone() -> None:
    plan = small_plan((8, 8, 8))
    network = build_network(plan.architecture, 1, 3, seed=3)  # in training mode, with deep supervision
    states = {"network0": {f"_orig_mod.{key}": value for key, value in network.state_dict().items()}}
    predictor = Predictor.from_state_dicts(spec_of(), [states], plan, SCHEMA)
    image = torch.randn(1, 8, 8, 8)
    torch.testing.assert_close(predictor.logits(image), network(image[None])[0][0].detach(), rtol=1e-4, atol=1e-5)
    assert network.training
    before = predictor.logits(image)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(predictor.logits(image), before)


@pytest.mark.parametrize(
    "changes, patch, n_channels, message",
    [
        ({"activation": "sigmoid"}, (8, 8, 8), 1, "activation sigmoid"),
        ({}, (8, 8), 1, "networks of 3 dimensions"),
        ({}, (8, 8, 8), 2, "weights of 'network0' do not fit"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    changes: dict[str, Any], patch: tuple[int, ...], n_channels: int, message: str
) -> None:
    states = {"network0": build_network(small_architecture(3), 1, 3, seed=0).state_dict()}
    with pytest.raises(InvalidInput, match=message):
        Predictor.from_state_dicts(spec_of(**changes), [states], small_plan(patch, n_channels), SCHEMA)


def test_missing_weights_are_named() -> None:
    with pytest.raises(InvalidInput, match="'network0'; there are teacher"):
        Predictor.from_state_dicts(spec_of(), [{"teacher": {}}], small_plan((8, 8, 8)), SCHEMA)


def test_output_that_is_not_finite_is_an_error_not_a_label() -> None:
    image = np.zeros((1, 8, 8, 8), dtype=np.float32)
    image[0, 4, 4, 4] = np.nan
    with pytest.raises(InvalidInput, match="not finite"):
        Predictor(spec_of(), [[copies(2)]], 2, Window((8, 8, 8))).logits(image)


def test_steps_outside_of_a_tile_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"step size 1\.5"):
        Window((8, 8, 8), step_size=1.5)


@pytest.mark.parametrize("at_once, n_calls", [(1, 4), (2, 5)])
def test_tiles_of_one_value_are_computed_once_where_tiles_are_predicted_alone(at_once: int, n_calls: int) -> None:
    network = build_network(small_architecture(3), 2, 2, deep_supervision=False, seed=0).eval()
    calls: list[int] = []

    def counted(tiles: Tensor) -> Tensor:
        calls.append(len(tiles))
        return network(tiles)

    image = torch.zeros(2, 8, 8, 72)  # 9 tiles of 8 along x
    image[0, ..., :32] = -1.5  # 4 tiles of (-1.5, 0)
    image[:, ..., 40:48] = torch.randn(2, 8, 8, 8)  # one that is not constant, between tiles of (0, 0)
    image[1, ..., 64:] = 2.0
    predictor = Predictor(spec_of(), [[counted]], 2, Window((8, 8, 8), (), 1.0, at_once))
    found = predictor.logits(image)
    assert len(calls) == n_calls
    assert max(calls) == at_once
    with torch.no_grad():
        expected = torch.cat([network(image[None, ..., x : x + 8])[0] for x in range(0, 72, 8)], -1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(predictor.logits(image), found), "the tile that is kept is of the very same bits"


def test_a_constant_tile_is_not_taken_for_that_of_other_folds() -> None:
    predictor = Predictor(spec_of(), [[constant(1.0, 0.0)], [constant(3.0, 0.0)]], 2, Window((8, 8, 8), (), 1.0, 1))
    image = torch.zeros(1, 8, 8, 8)
    assert predictor.logits(image)[0].unique().tolist() == pytest.approx([2.0])
    assert next(predictor.slabs(image, per_fold=True)).logits[:, 0, 0, 0, 0].tolist() == pytest.approx([1.0, 3.0])
