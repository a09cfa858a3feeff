"""What OpenVINO computes is what PyTorch computes; where it is not, nobody predicts with it unawares."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import tiny_plans, write_tiny_images, write_tiny_run
from torch import Tensor, nn

from autossl.data.image_io import read_label
from autossl.data.problems import InvalidInput
from autossl.inference import backends
from autossl.inference.backends import choose_backend, on_backend, openvino_network
from autossl.inference.model_folder import read_model
from autossl.inference.predict import predict
from autossl.inference.predictor import Predictor, Window
from autossl.inference.request import PredictRequest
from autossl.networks.build import residual_twin
from autossl.networks.prediction import Member, PredictionSpec, SharedDecoder, build_member, member_parts
from toys import toy_architecture, toy_configuration, toy_schema

KINDS = ("one network", "residual", "mean of two", "two decoders", "refine head", "one channel", "regions")


def members_of(kind: str, dims: int) -> tuple[Member, ...]:
    plain = toy_architecture(dims, (4, 8), anisotropic=dims == 3)
    one = Member(name="a", architecture=plain)
    return {
        "residual": (Member(name="a", architecture=residual_twin(plain)),),
        "mean of two": (one, Member(name="b", architecture=residual_twin(plain))),
        "two decoders": (
            Member(
                name="a",
                architecture=plain,
                decoders=(SharedDecoder(name="d", upsampling="linear"), SharedDecoder(name="e", upsampling="nearest")),
            ),
        ),
        "refine head": (Member(name="a", architecture=plain, head="refine"),),
        "one channel": (Member(name="a", architecture=plain, channels=(1,)),),
    }.get(kind, (one,))


def predictor_of(kind: str, dims: int) -> Predictor:
    """Two channels, two classes or regions, patches of 8 or 16 that do not fill the image evenly."""
    schema = toy_schema(regions=kind == "regions")
    patch = (8, 8, 16)[-dims:]
    plan = toy_configuration(dims, 2, patch_size=patch, architecture=toy_architecture(dims), mirror_axes=(0, 1))
    combine: Any = "mean_probabilities" if kind in ("mean of two", "two decoders") else "single"
    activation: Any = "sigmoid" if kind == "regions" else "softmax"
    spec = PredictionSpec(members=members_of(kind, dims), combine=combine, activation=activation)
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Any] = {}
    for member in spec.members:
        for name, part in member_parts(member, build_member(member, 2, schema.n_outputs, activation)).items():
            state = part.state_dict()
            weights[name] = {k: v + 0.2 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
    return Predictor.from_state_dicts(spec, [weights], plan, schema, Window.of(plan))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_prediction_gives_the_same_labels(kind: str, dims: int) -> None:
    predictor = predictor_of(kind, dims)
    image = torch.randn(2, 9, 13, 21, generator=torch.Generator().manual_seed(1))
    expected, before = predictor.logits(image), logging.getLogger().level
    (converted,), used = on_backend([predictor], "openvino", 2)
    assert used == "openvino"
    assert logging.getLogger().level == before, "OpenVINO silences the whole process"
    found = converted.logits(image)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    labels = [logits > 0 if kind == "regions" else logits.argmax(0) for logits in (expected, found)]
    assert torch.equal(*labels)
    assert len(labels[0].unique()) > 1
    assert torch.equal(converted.logits(image), found), "the same bits each time"
    assert torch.equal(predictor.logits(image), expected), "PyTorch's networks stay as they are"


def test_it_computes_in_float32_with_pytorchs_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    convolution = nn.Conv2d(1, 2, 3, padding=1).eval().requires_grad_(False)
    network = openvino_network(convolution, torch.randn(1, 1, 8, 8), (1, 16, 16))
    compiled = network._request.get_compiled_model()
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1  # left alone it takes every core
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"


class _Sorted(nn.Module):
    """Nothing that a network of ours does, and nothing that OpenVINO can follow."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.linalg.qr(image)[0]


def test_what_it_cannot_take_is_refused_by_name_and_left_to_pytorch_by_auto(
    caplog: pytest.LogCaptureFixture,
) -> None:
    predictor = predictor_of("one network", 2)
    predictor = Predictor(predictor.spec, [[_Sorted()]], 2, predictor.window)
    with pytest.raises(InvalidInput, match="OpenVINO cannot take the network") as caught:
        on_backend([predictor], "openvino", 2)
    assert "--backend torch" in caught.value.problems[0].fix
    with caplog.at_level(logging.WARNING, "autossl"):
        assert on_backend([predictor], "auto", 2) == ((predictor,), "torch")
    assert "PyTorch predicts in place of OpenVINO: OpenVINO cannot take the network" in caplog.text


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_other_logits_than_pytorchs_are_noticed(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    original = backends._converted

    def spoiled(openvino: Any, network: nn.Module, sample: Tensor) -> Any:
        other = copy.deepcopy(network)
        with torch.no_grad():
            for value in other.parameters():
                value.mul_(factor)
        return original(openvino, other, sample)

    monkeypatch.setattr(backends, "_converted", spoiled)
    predictor = predictor_of("one network", 2)
    with pytest.raises(InvalidInput, match="logits differ from PyTorch's by"):
        on_backend([predictor], "openvino", 2)
    assert on_backend([predictor], "auto", 2)[1] == "torch"


def test_which_backend_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [choose_backend(asked, "cpu") for asked in backends.BACKENDS] == ["openvino", "torch", "openvino"]
    assert choose_backend("auto", "cuda:1") == "torch"
    with pytest.raises(InvalidInput, match="backend openvino on device cuda"):
        choose_backend("openvino", "cuda")
    with pytest.raises(InvalidInput, match="backend 'onnx'"):
        choose_backend("onnx", "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_backend("auto", "cpu") == "torch"
    with pytest.raises(InvalidInput, match="openvino is not installed"):
        choose_backend("openvino", "cpu")


def test_importing_it_reports_nothing_to_its_makers() -> None:
    code = """
import sys
from autossl.inference.backends import _openvino
import importlib.util
assert importlib.util.find_spec("openvino_telemetry"), "the package comes with openvino"
openvino = _openvino()
loaded = [name for name in sys.modules if name.startswith("openvino_telemetry")]
assert not loaded, loaded
assert openvino.convert_model
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_folders_say_what_computed_them_and_go_on_with_it(tmp_path: Path) -> None:
    request = PredictRequest(
        input=write_tiny_images(tmp_path / "images", ["a", "b"]),
        output=tmp_path / "openvino",
        model=write_tiny_run(tmp_path / "run", ("0", "1")),
        device="cpu",
    )
    by_openvino = predict(request)
    by_torch = predict(replace(request, output=tmp_path / "torch", backend="torch"))
    assert by_openvino.backend.startswith("openvino 20")
    assert by_torch.backend == f"torch {torch.__version__} on cpu"
    for case in "ab":
        first, second = (read_label(folder / f"{case}.nii.gz")[0] for folder in (by_openvino.output, by_torch.output))
        np.testing.assert_array_equal(first, second)
        assert len(np.unique(first)) > 1
    record = json.loads((by_openvino.output / "prediction.json").read_text())
    assert record["backend"] == "openvino"
    assert by_openvino.backend.split()[1] == record["versions"]["openvino"]
    (by_torch.output / "b.nii.gz").unlink()
    again = replace(request, output=by_torch.output, resume=True)
    with pytest.raises(InvalidInput, match="backend was 'torch', now it is 'openvino'"):
        predict(replace(again, backend="openvino"))
    assert predict(again).backend == by_torch.backend


def test_networks_of_checkpoints_stay_with_pytorch_unless_asked(tmp_path: Path) -> None:
    model = read_model(write_tiny_run(tmp_path / "run", plans=tiny_plans(dims=2, orientation="native")))
    assert isinstance(model.load_predictor(Window.of(model.plan)).folds[0][0], nn.Module)


def test_a_signal_after_a_network_ended_in_another_thread_is_handled() -> None:
    """With faulthandler on, signals are handled on the stack that OpenVINO had replaced."""
    program = """
import faulthandler, os, signal, threading
import torch
from autossl.inference.backends import openvino_network
faulthandler.enable()
sample = torch.zeros(1, 1, 8, 8)
network = torch.nn.Conv2d(1, 2, 3).eval().requires_grad_(False)
held = [openvino_network(network, sample, sample.shape[1:])]
thread = threading.Thread(target=held.clear)
thread.start()
thread.join()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, "handled"), done.stderr


def test_an_interruption_while_converting_is_no_reason_for_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO calls back into Python and turns whatever is raised there into an error of its own."""
    original = backends._converted

    def as_openvino_does(*given: Any) -> Any:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise RuntimeError("Converting input model KeyboardInterrupt") from error
        return original(*given)

    monkeypatch.setattr(backends, "_converted", as_openvino_does)
    sample = torch.zeros(1, 1, 8, 8)
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            openvino_network(nn.Conv2d(1, 2, 3).eval().requires_grad_(False), sample, sample.shape[1:])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked there")
def test_a_fork_of_a_process_that_used_it_is_told_and_does_not_wait_for_ever() -> None:
    program = """
import os, sys
import torch
from autossl.data.problems import InvalidInput
from autossl.inference.backends import openvino_network
sample = torch.zeros(1, 1, 8, 8)
network = torch.nn.Conv2d(1, 2, 3).eval().requires_grad_(False)
openvino_network(network, sample, sample.shape[1:])
child = os.fork()
if child == 0:
    try:
        openvino_network(network, sample, sample.shape[1:])
    except InvalidInput as error:
        os._exit(7 if "before this process was forked" in str(error) else 8)
    os._exit(9)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 7, done.stderr
