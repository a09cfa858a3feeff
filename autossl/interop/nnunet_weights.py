"""One network of a checkpoint as nnU-Net v2 holds it: which one may stand for the prediction, and its state dict.

nnU-Net has one U-Net per fold and averages *logits*: over mirrored views, then over tiles, then over folds. A mean of
probabilities (of two networks, say) is something else, also where its networks are passed off as folds: where one
network gives two classes 0.98 and 0.01, the other 0.0001 and 0.6, the mean of the probabilities says the first class,
that of the logits the second. With two classes and two networks both say the same of a tile, but not of two tiles
that are blended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autossl.data.problems import InvalidInput, Problem, nearest
from autossl.inference.checkpoint import FORMAT, read_checkpoint, read_trained_networks
from autossl.networks.build import build_network
from autossl.networks.prediction import Activation, Member, PredictionSpec
from autossl.planners.plans import Architecture, ConfigurationPlan

WRAPPERS = ("module.", "_orig_mod.")
"""Of data-parallel and compiled modules; the names of their weights begin with these."""


@dataclass(frozen=True)
class SingleNetwork:
    """A U-Net that predicts alone, by its logits."""

    member: Member
    """Without head and further decoders."""
    activation: Activation

    @property
    def spec(self) -> PredictionSpec:
        """The prediction of this network alone."""
        return PredictionSpec(members=(self.member,), activation=self.activation, combine="single")


def reason_against(spec: PredictionSpec, mirror_axes: Sequence[int]) -> str | None:
    """Why one U-Net per fold cannot give this prediction; None where it does.

    The logarithm of a single network's softmax differs from its logits by what all classes share, and the logit of
    its sigmoid not at all: without mirroring the mean of one network's probabilities is its prediction by logits.
    """
    member = spec.members[0]
    if len(spec.members) > 1:
        names = " and ".join(one.name for one in spec.members)
        return f"it is the mean of the probabilities of {len(spec.members)} networks ({names})"
    if member.decoders:
        return f"it is the mean of the probabilities of {len(member.decoders) + 1} decoders on one encoder"
    if member.head is not None:
        return f"the head '{member.head}' corrects the network's logits"
    if spec.combine == "mean_probabilities" and mirror_axes:
        return "it is the mean of the probabilities of the mirrored views"
    if spec.combine == "mean_probabilities" and spec.activation == "dirichlet":
        return "it blends the logarithms of probabilities that are no softmax"
    return None


def single_network(path: Path, plan: ConfigurationPlan, wanted: str | None = None) -> SingleNetwork:
    """The network of a checkpoint that predicts alone.

    Args:
        path: of the checkpoint.
        plan: of its run.
        wanted: one of `single_networks`; None: the deployed prediction.

    Raises:
        InvalidInput: the checkpoint is damaged or no such network is in it, or the deployed prediction is more than
            one network, with the reason and the names of those that predict alone.
    """
    known = single_networks(path, plan)
    choices = ", ".join(f"--member {name}" for name in known) or "none"
    if wanted is not None:
        if wanted in known:
            return known[wanted]
        close = f"one of {nearest(wanted, known)}" if known else "no name: the checkpoint holds one network"
        raise InvalidInput(Problem(f"no network '{wanted}' in it", close, f"choose among: {choices}", file=path))
    spec = read_trained_networks(path).spec
    reason = reason_against(spec, plan.mirror_axes)
    if reason is None:
        return SingleNetwork(spec.members[0], spec.activation)
    raise InvalidInput(
        Problem(
            f"what predicts is no single U-Net: {reason}",
            "one PlainConvUNet or ResidualEncoderUNet per fold, whose logits nnU-Net averages",
            f"export one of its networks, which predicts there exactly as it does here alone: {choices}",
            file=path,
        )
    )


def single_networks(path: Path, plan: ConfigurationPlan) -> dict[str, SingleNetwork]:
    """Networks of a checkpoint that predict alone, by name, beside the deployed prediction where that is one of them.

    First the checkpoint's own alternatives, then members of its predictions that are in none of these.

    Raises:
        InvalidInput: the checkpoint is damaged.
    """
    content = read_checkpoint(path)
    deployed = read_trained_networks(path).spec
    others = content.get("alternatives")
    given = others if isinstance(others, dict) else {}
    specs = {name: PredictionSpec.from_json(spec) for name, spec in given.items()}
    found = {
        name: SingleNetwork(spec.members[0], spec.activation)
        for name, spec in specs.items()
        if reason_against(spec, plan.mirror_axes) is None
    }
    for spec in (deployed, *specs.values()):
        for member in spec.members if reason_against(spec, plan.mirror_axes) is not None else ():
            alone = SingleNetwork(member.model_copy(update={"head": None, "decoders": ()}), spec.activation)
            if member.name not in found and alone not in found.values():
                found[member.name] = alone
    return {name: network for name, network in found.items() if network.member.name in content["networks"]}


def single_network_checkpoint(path: Path, network: SingleNetwork) -> dict[str, Any]:
    """A checkpoint of ours that predicts with one network of another checkpoint.

    Raises:
        InvalidInput: the checkpoint is damaged.
    """
    name = network.member.name
    return {
        "format": FORMAT,
        "networks": {name: read_checkpoint(path)["networks"][name]},
        "prediction": network.spec.to_json(),
    }


def nnunet_state(path: Path, network: SingleNetwork, n_channels: int, n_outputs: int) -> dict[str, Tensor]:
    """The weights under every name that nnU-Net's strict loading asks for; names of one tensor share its memory.

    A network that sees some of the channels gets weights of 0 for the others, which changes no output.

    Args:
        path: of the checkpoint.
        network: of `single_network`.
        n_channels: of the images.
        n_outputs: of the logits.

    Raises:
        InvalidInput: the checkpoint is damaged, or the weights are not those of this network.
    """
    weights = read_checkpoint(path)["networks"][network.member.name]
    channels, architecture = network.member.channels, network.member.architecture
    seen = n_channels if channels is None else len(channels)
    module = build_network(architecture, seen, n_outputs, deep_supervision=True, seed=0)
    _load(module, weights, path)
    state = {key: tensor.detach() for key, tensor in module.state_dict().items()}
    return state if channels is None else _with_all_channels(state, architecture, channels, n_channels, n_outputs)


def _load(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    for prefix in WRAPPERS:
        weights = {key.removeprefix(prefix): tensor for key, tensor in weights.items()}
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        found = f"the weights do not fit the network ({'; '.join(lines[1:3]) or lines[0]})"
        expected, fix = "those that the run was trained with", "restore plans.json and dataset.json of the run"
        raise InvalidInput(Problem(found, expected, fix, file=path)) from error


def _with_all_channels(
    state: Mapping[str, Tensor], architecture: Architecture, channels: Sequence[int], n_channels: int, n_outputs: int
) -> dict[str, Tensor]:
    """The state of a network that sees all channels and heeds some."""
    grown: dict[int, Tensor] = {}
    result = dict(state)
    for key in _input_weights(architecture, n_outputs):
        weight = state[key]
        if weight.data_ptr() not in grown:
            whole = weight.new_zeros((len(weight), n_channels, *weight.shape[2:]))
            whole[:, list(channels)] = weight
            grown[weight.data_ptr()] = whole
        result[key] = grown[weight.data_ptr()]
    return result


def _input_weights(architecture: Architecture, n_outputs: int) -> list[str]:
    """Names of the weights whose shape depends on the number of image channels."""
    with torch.device("meta"):
        one, two = (build_network(architecture, n, n_outputs).state_dict() for n in (1, 2))
    return [key for key, tensor in one.items() if tensor.shape != two[key].shape]
