"""Which program computes the networks of a prediction: PyTorch, or on a CPU OpenVINO, which needs less time there.

OpenVINO is given the trained weights as they are and computes in float32. It takes its sums in another order, so its
logits differ from PyTorch's in the last digits (measured: up to 1e-4 at logits of 5). Label maps are equal except where
the two best labels of a voxel are as near to each other as that. Every converted network is compared with PyTorch's
before anything is predicted; where that fails nothing is predicted with it, and `auto` says so and takes PyTorch.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autossl.data.problems import InvalidInput, Problem
from autossl.data.signals import interrupts_wait
from autossl.inference.predictor import Predictor
from autossl.networks.cpu import plain_convolutions
from autossl.networks.prediction import Member

logger = logging.getLogger(__name__)

Backend = Literal["torch", "openvino"]
BACKENDS = ("auto", "torch", "openvino")
"""What can be asked for; `auto` is OpenVINO on a CPU where it is installed, else PyTorch."""
LARGEST_DEVIATION = 1e-3
"""Of a logit, as a share of the largest one (at least 1): far above float32's rounding, far below half precision's."""
TELEMETRY = "openvino_telemetry"


def choose_backend(asked: str, device: str) -> Backend:
    """The backend that will be tried on this device.

    Raises:
        InvalidInput: no such backend; OpenVINO is asked for on another device than the CPU, or is not installed.
    """
    if asked not in BACKENDS:
        raise InvalidInput(Problem(f"backend '{asked}'", f"one of {', '.join(BACKENDS)}", "choose one of these"))
    on_cpu, installed = device.startswith("cpu"), importlib.util.find_spec("openvino") is not None
    if asked == "torch" or (asked == "auto" and not (on_cpu and installed)):
        return "torch"
    if not on_cpu:
        fix = "add --device cpu, or take another backend"
        raise InvalidInput(Problem(f"backend openvino on device {device}", "the CPU, which it is for", fix))
    if not installed:
        fix = "install it (pip install openvino), or predict with --backend torch"
        raise InvalidInput(Problem("backend openvino is not installed", "the package openvino", fix))
    return "openvino"


def on_backend(predictors: Sequence[Predictor], asked: str, n_channels: int) -> tuple[tuple[Predictor, ...], Backend]:
    """The predictors with their networks on the backend, all of them on the same one, and which one that is.

    Args:
        predictors: with networks of PyTorch, on their device.
        asked: one of `BACKENDS`.
        n_channels: of the images.

    Raises:
        InvalidInput: as `choose_backend`; OpenVINO is asked for by name and does not compute what PyTorch computes.
    """
    backend = choose_backend(asked, str(predictors[0].device))
    if backend == "torch":
        return tuple(predictors), backend
    try:
        return tuple(_on_openvino(predictor, n_channels) for predictor in predictors), backend
    except InvalidInput as error:
        if asked != "auto":
            raise
        logger.warning("PyTorch predicts in place of OpenVINO: %s", error.problems[0].found)
    return tuple(predictors), "torch"


def backend_version(backend: Backend) -> str:
    """Of the program that computes."""
    return torch.__version__ if backend == "torch" else str(_openvino().__version__).split("-")[0]


class OpenVinoNetwork:
    """A network that OpenVINO has compiled: a `Network` of the predictor."""

    def __init__(self, request: Any) -> None:
        self._request = request

    def __call__(self, tiles: Tensor) -> Tensor:
        """[N,c,*tile] → logits [N,K,*tile] on the CPU."""
        return torch.from_numpy(self._request.infer([tiles.contiguous().numpy()], share_inputs=True)[0])


def openvino_network(network: nn.Module, sample: Tensor, tile: Sequence[int], batched: bool = False) -> OpenVinoNetwork:
    """The network for one size of tile and PyTorch's number of threads.

    Args:
        network: in evaluation mode, without gradients, on the CPU, giving one tensor of logits; it is left as it is.
        sample: small input [1,c,*S] with which the network is followed and compared.
        tile: shape c,*tile of what it will see.
        batched: whether several tiles come at once, in changing number.

    Raises:
        InvalidInput: OpenVINO cannot take the network, or its logits are not PyTorch's.
    """
    openvino = _openvino()
    if _core(openvino)[1] != os.getpid():  # its threads did not come along: it would wait for them for ever
        raise _refusal("OpenVINO was used before this process was forked")
    with torch.inference_mode():
        expected = network(sample)
    try:
        with interrupts_wait():  # OpenVINO would turn them into errors of its own
            model = _converted(openvino, network, sample)
            found = _compiled(openvino, model, sample.shape)(sample)
            compiled = _compiled(openvino, model, (-1 if batched else 1, *tile))
    except MemoryError:
        raise
    except Exception as error:  # its own kinds have no common parent below this one
        reason = " ".join(str(error).split())[:400]
        raise _refusal(f"OpenVINO cannot take the network ({type(error).__name__}: {reason})") from error
    deviation = float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    if not deviation <= LARGEST_DEVIATION:  # so that what is not finite counts as well
        raise _refusal(f"OpenVINO's logits differ from PyTorch's by {deviation:.2g} of the largest one")
    return compiled


def _on_openvino(predictor: Predictor, n_channels: int) -> Predictor:
    window, device = predictor.window, predictor.device
    batched = window.batch_for(device) > 1
    folds = []
    for members, networks in zip(predictor.members, predictor.folds, strict=True):
        converted = []
        for member, network in zip(members, networks, strict=True):
            if not isinstance(network, nn.Module):
                raise _refusal("OpenVINO takes networks of PyTorch only")
            channels = n_channels if member.channels is None else len(member.channels)
            tile = (channels, *window.patch_size)
            converted.append(openvino_network(network, _sample(member, tile), tile, batched))
        folds.append(converted)
    return Predictor(predictor.spec, folds, predictor.n_outputs, window, device, predictor.members)


def _sample(member: Member, tile: Sequence[int]) -> Tensor:
    """Noise of two voxels per axis at the network's coarsest level, or of the tile where that is smaller."""
    factors = member.architecture.cumulative_strides[-1]
    size = [min(2 * factor, edge) for factor, edge in zip(factors, tile[1:], strict=True)]
    return torch.randn(1, tile[0], *size, generator=torch.Generator().manual_seed(0))


def _converted(openvino: ModuleType, network: nn.Module, sample: Tensor) -> Any:
    """OpenVINO's model of the network, for inputs of any size.

    A function is followed, not the module: that takes a tenth of the time, for the names of its parts are not kept.
    """
    root = logging.getLogger()
    level = root.level
    try:
        with warnings.catch_warnings(), torch.no_grad(), plain_convolutions(network):
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(lambda image: network(image), sample, check_trace=False)
            return openvino.convert_model(traced)
    finally:
        root.setLevel(level)  # converting silences the warnings of everybody


def _compiled(openvino: ModuleType, model: Any, shape: Sequence[int]) -> OpenVinoNetwork:
    model.reshape(list(shape))
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",  # else it computes in bfloat16 where the processor can
        "EXECUTION_MODE_HINT": "ACCURACY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    core, _ = _core(openvino)
    return OpenVinoNetwork(core.compile_model(model, "CPU", settings).create_infer_request())


@lru_cache(maxsize=1)
def _core(openvino: ModuleType) -> tuple[Any, int]:
    """One for the whole process, never let go of, and the number of the process.

    Its CPU plugin gives the thread in which it begins a stack for signals. Where it ends in another thread that stack
    is unmapped and stays in use: the next signal ends the process.
    """
    return openvino.Core(), os.getpid()


def _openvino() -> ModuleType:
    """The package, imported without its telemetry: importing it would send word of that to its makers.

    Raises:
        InvalidInput: it is there and cannot be imported.
    """
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    before = {TELEMETRY: sys.modules[TELEMETRY]} if TELEMETRY in sys.modules else {}
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # Python's sign for "not there"
    try:
        import openvino
    except (ImportError, OSError) as error:
        raise _refusal(f"the package openvino cannot be imported ({error})") from error
    finally:
        del sys.modules[TELEMETRY]
        sys.modules.update(before)
    return openvino


def _refusal(found: str) -> InvalidInput:
    return InvalidInput(Problem(found, "a network that it computes as PyTorch does", "predict with --backend torch"))
