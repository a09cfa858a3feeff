"""The network of a plan: nnU-Net's U-Nets (dynamic-network-architectures) with its initialization.

Names of torch modules in a plan are looked up in a closed table; nothing is imported because a file says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from autossl.data.problems import InvalidInput, Problem, nearest
from autossl.networks.layers import InstanceNorm2d, InstanceNorm3d, LeakyReLU, join_activations
from autossl.planners.plans import NETWORK_CLASSES, Architecture

NETWORKS: dict[str, type[nn.Module]] = {
    NETWORK_CLASSES["plain"]: PlainConvUNet,
    NETWORK_CLASSES["resenc"]: ResidualEncoderUNet,
}
_MODULES: tuple[type[nn.Module], ...] = (
    nn.Conv2d,
    nn.Conv3d,
    InstanceNorm2d,
    InstanceNorm3d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.Dropout2d,
    nn.Dropout3d,
    LeakyReLU,
    nn.ReLU,
)
MODULES_BY_NAME: dict[str, type[nn.Module]] = {
    name: module
    for module in _MODULES
    for name in (f"torch.nn.{module.__name__}", f"{getattr(nn, module.__name__).__module__}.{module.__name__}")
}
"""Both spellings that nnU-Net plans use: `torch.nn.LeakyReLU` and `torch.nn.modules.conv.Conv3d`."""


def build_network(
    architecture: Architecture,
    in_channels: int,
    out_channels: int,
    deep_supervision: bool = True,
    seed: int | None = None,
) -> nn.Module:
    """A freshly initialized network in training mode.

    Args:
        architecture: what a plan says; names of modules come from a closed table.
        in_channels: image channels that the network sees.
        out_channels: channels of logits, `LabelSchema.n_outputs`.
        deep_supervision: True: `net(x)` is the list of logits, full resolution first; False: the full resolution only.
            The heads of all levels exist either way, so the same weights load.
        seed: of the weights; the global generator is left as it was. None draws from the global generator.

    Raises:
        InvalidInput: the plan names a module, or an argument, that no such network has.
    """
    kwargs = _resolved_kwargs(architecture)
    network_class: Any = NETWORKS[architecture.network_class_name]
    with seeded_weights(seed):
        try:
            network: Any = network_class(
                input_channels=in_channels, num_classes=out_channels, deep_supervision=deep_supervision, **kwargs
            )
        except (TypeError, AssertionError, LookupError, ValueError, AttributeError, RuntimeError) as error:
            raise InvalidInput(
                Problem(
                    f"arch_kwargs do not fit {architecture.network_class_name} ({str(error)[:200]})",
                    "the arguments that autossl_plan_and_preprocess writes",
                    "undo the edit of the plan or plan again",
                )
            ) from error
        network.apply(network.initialize)
    join_activations(network)
    return network


@contextmanager
def seeded_weights(seed: int | None) -> Iterator[None]:
    """New weights are drawn from this seed and the global generator is left as it was; None draws from that one."""
    with torch.random.fork_rng(devices=[]) if seed is not None else nullcontext():
        if seed is not None:
            torch.manual_seed(seed)
        yield


def residual_twin(architecture: Architecture) -> Architecture:
    """A residual-encoder U-Net with the stages, strides, kernels and widths of a plain one, and about its cost.

    Two convolutions become one residual block (which has two); the decoder stays. A residual one stays as it is.
    """
    if architecture.network_class_name == NETWORK_CLASSES["resenc"]:
        return architecture
    kwargs = {key: value for key, value in architecture.arch_kwargs.items() if key != "n_conv_per_stage"}
    convolutions = architecture.arch_kwargs["n_conv_per_stage"]
    stages = [convolutions] * kwargs["n_stages"] if isinstance(convolutions, int) else convolutions
    kwargs["n_blocks_per_stage"] = [(count + 1) // 2 for count in stages]
    content = architecture.model_dump(by_alias=True)
    return Architecture.model_validate(
        {**content, "network_class_name": NETWORK_CLASSES["resenc"], "arch_kwargs": kwargs}
    )


def plain_twin(architecture: Architecture) -> Architecture:
    """A plain U-Net with the stages, strides, kernels and widths of a residual one; a plain one stays as it is.

    Two convolutions per stage, as nnU-Net's plain networks have: as many as the blocks hold would not train without
    their skips.
    """
    if architecture.network_class_name == NETWORK_CLASSES["plain"]:
        return architecture
    dropped = ("n_blocks_per_stage", "block", "bottleneck_channels", "stem_channels")
    kwargs = {key: value for key, value in architecture.arch_kwargs.items() if key not in dropped}
    kwargs["n_conv_per_stage"] = [2] * kwargs["n_stages"]
    content = architecture.model_dump(by_alias=True)
    content["_kw_requires_import"] = [key for key in architecture.kw_requires_import if key not in dropped]
    return Architecture.model_validate(
        {**content, "network_class_name": NETWORK_CLASSES["plain"], "arch_kwargs": kwargs}
    )


def other_kind(architecture: Architecture) -> Architecture:
    """The residual network beside a plain one, the plain one beside a residual one."""
    is_plain = architecture.network_class_name == NETWORK_CLASSES["plain"]
    return residual_twin(architecture) if is_plain else plain_twin(architecture)


def set_deep_supervision(network: nn.Module, enabled: bool) -> None:
    """Switches between the list of logits of all levels and the full resolution alone; weights stay."""
    decoder: Any = network.decoder
    decoder.deep_supervision = enabled


def _resolved_kwargs(architecture: Architecture) -> dict[str, Any]:
    """`arch_kwargs` with the dotted names of `kw_requires_import` replaced by modules of the closed table."""
    kwargs = dict(architecture.arch_kwargs)
    problems = []
    for key in architecture.kw_requires_import:
        name = kwargs.get(key)
        if name is None:
            continue
        if name in MODULES_BY_NAME:
            kwargs[key] = MODULES_BY_NAME[name]
            continue
        problems.append(
            Problem(
                f"arch_kwargs.{key} is {name!r}",
                f"one of {nearest(str(name), MODULES_BY_NAME)}",
                "undo the edit of the plan or plan again",
            )
        )
    if problems:
        raise InvalidInput(problems)
    return kwargs
