"""What of a trained run leaves the house: what predicts, and nothing of the cases it was trained on.

Texts and numbers go through lists of what may travel, not of what may not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autossl.data.archive_files import REFUSE
from autossl.data.description import DatasetDescription
from autossl.data.problems import InvalidInput, Problem
from autossl.data.runs import RunSpec
from autossl.inference.checkpoint import FORMAT, read_checkpoint, read_trained_networks, separate_channels
from autossl.networks.prediction import Member, PredictionSpec, build_member, member_parts
from autossl.planners.plans import ConfigurationPlan, Plans

RUN_FIELDS = (
    "dataset",
    "configuration",
    "preset",
    "method",
    "tag",
    "seed",
    "plans_hash",
    "settings",
    "changed_settings",
    "total_steps",
    "extended_at",
    "labeled_batch_size",
    "unlabeled_batch_size",
    "initial_weights",
    "threads",
    "device",
    "versions",
)
"""Of run.json; the cases of the folds, what was measured of them, and keys that we do not know stay here."""
DESCRIPTION_FIELDS = ("channel_names", "labels", "file_ending", "regions_class_order", "channel_groups")
"""Of dataset.json; MSD's lists every case."""
PATH_LEFT_OUT = "(a path, left out)"
MAX_LAYERS = 64
"""Per stage of a network that is installed; nnU-Net's have 2 to 6."""
_PATH = re.compile(r"(^|[\s\"'(=])(~?/|\.{1,2}/|[A-Za-z]:[\\/]|\\\\)\S")


def deployed_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint without what does not predict: optimizers, followers, memories, logs.

    Predictions from one modality alone (`--modality`) stay, with their networks. Weights are copies of the same bits;
    what was shared between names is shared again.

    Raises:
        InvalidInput: as `read_trained_networks`.
    """
    content = read_checkpoint(path)
    deployed = read_trained_networks(path).spec
    others = content.get("alternatives")
    parsed = {
        name: PredictionSpec.from_json(spec) for name, spec in (others if isinstance(others, dict) else {}).items()
    }
    alone = {name: spec for name, spec in parsed.items() if spec.channels is not None}
    for spec in alone.values():
        read_trained_networks(path, spec.channels)
    names = [name for spec in (deployed, *alone.values()) for member in spec.members for name in member.parts]
    copies: dict[Any, Tensor] = {}
    networks = {name: _copied(content["networks"][name], copies) for name in dict.fromkeys(names)}
    result = {"format": FORMAT, "networks": networks, "prediction": deployed.to_json()}
    return result | ({"alternatives": {name: spec.to_json() for name, spec in alone.items()}} if alone else {})


def shared_run(spec: RunSpec, split: str) -> RunSpec:
    """run.json as it travels; `split` is the name of the folder that it will lie in."""
    kept = {name: _without_paths(getattr(spec, name)) for name in RUN_FIELDS}
    return RunSpec.model_validate(kept | {"split": split})


def shared_description(description: DatasetDescription) -> DatasetDescription:
    """dataset.json as it travels."""
    content = description.to_json()
    return DatasetDescription.model_validate({key: content[key] for key in DESCRIPTION_FIELDS if key in content})


def shared_plans(plans: Plans, configuration: str, names: Collection[str]) -> Plans:
    """Plans as they travel: every decision, so that their hash stays, and the reasons that name no case.

    Args:
        plans: of the run.
        configuration: that the run was trained with, named where it is missing.
        names: of cases and patients.
    """
    plans.configuration(configuration)
    return plans.model_copy(update={"why": {key: text for key, text in plans.why.items() if is_public(text, names)}})


def is_public(text: str, names: Collection[str]) -> bool:
    """Whether a text names no case, no patient and no place on a machine.

    Cautious: of cases that are named "12", every text with that number counts as naming one.
    """
    if _PATH.search(text):
        return False
    parts = "|".join(re.escape(name) for name in names if name)
    return not parts or not re.search(rf"(?<![A-Za-z0-9])(?:{parts})(?![A-Za-z0-9])", text, flags=re.IGNORECASE)


def check_weights(path: Path, plan: ConfigurationPlan, n_outputs: int) -> None:
    """Whether the networks of a checkpoint from elsewhere are what plan and labels ask for, without building them.

    So that predicting takes no more memory for weights than the file holds.

    Raises:
        InvalidInput: weights that are missing, of another shape, no plain numbers, or larger than what is stored.
    """
    problems: list[str] = []
    for channels in (None, *separate_channels(path)):
        trained = read_trained_networks(path, channels)
        for member in trained.spec.members:
            network = _network_without_weights(member, plan, n_outputs, trained.spec, path)
            for name, module in member_parts(member, network).items():
                problems += _state_faults(name, module.state_dict(), trained.networks[name])
    if problems:
        expected = "the weights of the network that the plan describes"
        raise InvalidInput([Problem(found, expected, REFUSE, file=path) for found in dict.fromkeys(problems)])


def _copied(state: Mapping[str, Tensor], copies: dict[Any, Tensor]) -> dict[str, Tensor]:
    result = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if key not in copies:
            copies[key] = tensor.detach().clone(memory_format=torch.contiguous_format)
        result[name] = copies[key]
    return result


def _without_paths(value: Any) -> Any:
    """Settings may hold the path of a file of weights."""
    if isinstance(value, dict):
        return {key: _without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(entry) for entry in value]
    return PATH_LEFT_OUT if isinstance(value, str) and ("/" in value or "\\" in value) else value


def _network_without_weights(
    member: Member, plan: ConfigurationPlan, n_outputs: int, spec: PredictionSpec, path: Path
) -> nn.Module:
    """Shapes alone, which take no memory, of a network whose description comes from elsewhere."""
    for key, value in member.architecture.arch_kwargs.items():
        numbers = value if isinstance(value, list | tuple) else [value]
        if key.startswith("n_") and any(isinstance(number, int) and number > MAX_LAYERS for number in numbers):
            expected = f"at most {MAX_LAYERS} layers per stage"
            raise InvalidInput(Problem(f"{key} is {str(value)[:50]}", expected, REFUSE, file=path))
    try:
        with torch.device("meta"):
            return build_member(member, plan.n_channels, n_outputs, spec.activation)
    except InvalidInput as error:
        raise InvalidInput([replace(problem, file=path) for problem in error.problems]) from error
    except (ValueError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        found = f"the network {member.name!r} cannot be built ({str(error)[:200]})"
        raise InvalidInput(Problem(found, "a network as plans describe it", REFUSE, file=path)) from error


def _state_faults(name: str, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    if set(wanted) != set(given):
        differing = sorted(set(wanted) ^ set(given))
        return [f"network {name!r}: {len(differing)} weights missing or too many ({differing[0]!r})"]
    faults = []
    for key, tensor in given.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if tensor.shape != wanted[key].shape or not plain:
            faults.append(f"network {name!r}: {key!r} has the shape {tuple(tensor.shape)}")
        elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            faults.append(f"network {name!r}: {key!r} claims more numbers than are stored")
    return faults
