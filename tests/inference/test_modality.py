"""Prediction from one modality alone: which files are needed, which network sees them, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import make_constant, tiny_plans, write_tiny_images, write_tiny_run

from autossl.cli.predict import main
from autossl.data.case_files import modality_files
from autossl.data.files import read_json, write_json
from autossl.data.image_io import read_image, read_label
from autossl.data.problems import InvalidInput
from autossl.inference.checkpoint import FORMAT, read_trained_networks, separate_channels
from autossl.inference.model_folder import read_model
from autossl.inference.predict import predict
from autossl.inference.request import PredictRequest
from autossl.networks.build import build_network
from autossl.networks.prediction import Member, PredictionSpec

PLANS = tiny_plans(3)
ARCHITECTURE = PLANS.configurations["3d_fullres"].architecture
NAMES = ("T1pre", "FLAIR", "T1post")
FLAIR, T1POST = 1, 2


def spec_of(*channels: int) -> PredictionSpec:
    members = tuple(Member(name=f"network_{c}", architecture=ARCHITECTURE, channels=(c,)) for c in channels)
    return PredictionSpec(members=members, combine="single" if len(members) == 1 else "mean_probabilities")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two folds of two networks: that of FLAIR says label 1, that of T1post label 5; folds differ in the better one."""
    folder = write_tiny_run(tmp_path / "run", ("0", "1"), PLANS)
    description = read_json(folder / "dataset.json")
    names = {str(number): name for number, name in enumerate(NAMES)}
    write_json(folder / "dataset.json", description | {"channel_names": names, "channel_groups": {"T1": [0, 2]}})
    for fold, better in (("0", FLAIR), ("1", T1POST)):
        write_fold(folder, fold, {FLAIR: 1, T1POST: 2}, better)
    return folder


def write_fold(folder: Path, fold: str, outputs: dict[int, int | None], better: int) -> None:
    networks = {}
    for channel, output in outputs.items():
        network = build_network(ARCHITECTURE, 1, 3, seed=channel)
        if output is not None:
            make_constant(network, output, 20.0 if channel == FLAIR else 19.0)
        networks[f"network_{channel}"] = network.state_dict()
    alternatives = {
        "modality_1": spec_of(FLAIR).to_json(),
        "modality_2": spec_of(T1POST).to_json(),
        "mean": spec_of(FLAIR, T1POST).to_json(),
    }
    content = {
        "format": FORMAT,
        "networks": networks,
        "prediction": spec_of(better).to_json(),
        "alternatives": alternatives,
    }
    torch.save(content, folder / f"fold_{fold}" / "checkpoint_final.pth")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_tiny_images(tmp_path / "images", ["a", "b"], 3)


@pytest.fixture
def request_of(model: Path, images: Path, tmp_path: Path) -> Any:
    def make(**options: Any) -> PredictRequest:
        return PredictRequest(
            **({"input": images, "output": tmp_path / "out", "model": model, "device": "cpu"} | options)
        )

    return make


def keep(images: Path, *channels: int) -> None:
    """Removes the files of the other channels."""
    for path in images.iterdir():
        if not any(path.name.endswith(f"_{channel:04d}.nii.gz") for channel in channels):
            path.unlink()


def labels_in(folder: Path, case: str = "a") -> set[int]:
    return set(np.unique(read_label(folder / f"{case}.nii.gz", "RAS")[0]).tolist())


# ------------------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("name, channel, label", [("FLAIR", 1, 1), ("flair", 1, 1), ("T1post", 2, 5), ("2", 2, 5)])
def test_its_files_are_enough_and_its_network_predicts(
    name: str, channel: int, label: int, request_of: Any, images: Path
) -> None:
    keep(images, channel)
    request = request_of(modality=name)
    result = predict(request)
    assert result.predicted == ("a", "b")
    assert result.folds == ("0", "1")
    assert labels_in(request.output) == {label}
    assert json.loads((request.output / "prediction.json").read_text())["modality"] == NAMES[channel]
    image = read_image([images / f"a_{channel:04d}.nii.gz"], "RAS")
    geometry = read_label(request.output / "a.nii.gz", "RAS")[2]
    assert replace(geometry, stored_dtype=image.geometry.stored_dtype) == image.geometry


def test_the_network_sees_the_modality_as_it_was_trained_to(model: Path, request_of: Any, images: Path) -> None:
    """The same labels as by hand, from all files or its own alone, and not those of another channel."""
    for fold in ("0", "1"):
        write_fold(model, fold, {FLAIR: None, T1POST: None}, T1POST)
    options = {"modality": "FLAIR", "folds": ("0",)}
    first = request_of(**options)
    predict(first)
    keep(images, FLAIR)
    second = replace(first, output=first.output.with_name("second"))
    predict(second)
    written = [read_label(request.output / "b.nii.gz", "RAS")[0] for request in (first, second)]
    np.testing.assert_array_equal(*written)
    assert len(np.unique(written[0])) > 1
    for path in images.iterdir():
        path.rename(path.with_name(path.name.replace("_0001", "_0002")))
    other = request_of(modality="T1post", folds=("0",), output=first.output.with_name("other"))
    predict(other)
    assert not np.array_equal(read_label(other.output / "b.nii.gz", "RAS")[0], written[0])


def test_a_single_channel_may_go_without_a_number(request_of: Any, images: Path) -> None:
    keep(images, FLAIR)
    for path in images.iterdir():
        path.rename(path.with_name(path.name.replace("_0001", "")))
    request = request_of(modality="FLAIR")
    assert predict(request).predicted == ("a", "b")
    assert labels_in(request.output) == {1}


def test_several_channels_make_a_modality(model: Path, request_of: Any, images: Path) -> None:
    keep(images, FLAIR, T1POST)
    request = request_of(modality="FLAIR+T1post")
    predict(request)
    assert json.loads((request.output / "prediction.json").read_text())["modality"] == "FLAIR+T1post"
    assert separate_channels(model / "fold_0" / "checkpoint_final.pth") == [{1}, {2}, {1, 2}]


def test_files_of_other_channels_are_passed_over_and_said(request_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    request = request_of(modality="T1post")
    predict(request)
    assert labels_in(request.output) == {5}
    assert "4 files of channels other than 0002 are passed over" in caplog.text


def test_without_a_modality_each_fold_asks_its_better_network(request_of: Any, images: Path) -> None:
    first, second, both = (
        request_of(folds=folds, output=images.with_name("-".join(folds))) for folds in (("0",), ("1",), ("0", "1"))
    )
    for request in (first, second, both):
        predict(request)
    assert [labels_in(request.output) for request in (first, second)] == [{1}, {5}]
    assert labels_in(both.output) == {1}, "the mean of logits 20 and 19"


def test_resuming_keeps_to_the_modality(request_of: Any) -> None:
    request = request_of(modality="FLAIR")
    predict(request)
    assert predict(replace(request, resume=True)).skipped == ("a", "b")
    for other in ("T1post", None):
        with pytest.raises(InvalidInput, match="modality was 'FLAIR', now it is"):
            predict(replace(request, resume=True, modality=other))
    record = json.loads((request.output / "prediction.json").read_text())
    del record["modality"]  # as versions before wrote it, which had all channels
    (request.output / "prediction.json").write_text(json.dumps(record))
    with pytest.raises(InvalidInput, match="modality was None, now it is 'FLAIR'"):
        predict(replace(request, resume=True))


def test_a_supervised_network_of_one_channel(model: Path, request_of: Any, images: Path) -> None:
    content = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=True)
    content |= {"prediction": spec_of(T1POST).to_json(), "alternatives": {}}
    torch.save(content, model / "fold_0" / "checkpoint_final.pth")
    keep(images, T1POST)
    request = request_of(modality="T1post", folds=("0",))
    predict(request)
    assert labels_in(request.output) == {5}
    with pytest.raises(InvalidInput, match=r"no network of this model sees FLAIR alone\. Expected: one of T1post"):
        predict(request_of(modality="FLAIR", folds=("0",)))


def test_the_command(model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(images, T1POST)
    arguments = ["-i", str(images), "-o", str(tmp_path / "out"), "--model", str(model), "--device", "cpu", "--quiet"]
    assert main([*arguments, "--modality", "T1post"]) == 0
    assert labels_in(tmp_path / "out") == {5}
    capsys.readouterr()
    assert main([*arguments, "--modality", "T1pre", "--overwrite"]) == 2
    assert "sees T1pre alone. Expected: one of" in " ".join(capsys.readouterr().err.split())


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "name, message",
    [
        ("T2", r"'T2' is unknown\. Expected: one of"),
        ("T1pre", "no network of this model sees T1pre alone. Expected: one of (FLAIR|T1post), "),
        ("T1", "no network of this model sees T1 alone"),
    ],
)
def test_modalities_that_the_model_does_not_know(name: str, message: str, request_of: Any) -> None:
    request = request_of(modality=name)
    with pytest.raises(InvalidInput, match=message):
        predict(request)
    assert not request.output.exists()


def test_a_model_whose_networks_see_everything(request_of: Any, tmp_path: Path) -> None:
    whole = write_tiny_run(tmp_path / "whole", ("0",), PLANS)
    with pytest.raises(InvalidInput, match=r"every network of supervised sees all channels.*--set channels=1"):
        predict(request_of(model=whole, modality="1"))
    with pytest.raises(InvalidInput, match="nothing in it predicts from the channels"):
        read_model(whole).load_predictor(None, "cpu", (1,))  # type: ignore[arg-type]


def test_missing_channels_without_a_modality_name_the_way_out(request_of: Any, images: Path, tmp_path: Path) -> None:
    keep(images, FLAIR)
    with pytest.raises(InvalidInput, match=r"missing 0000, 0002.*--modality: FLAIR, T1post, FLAIR\+T1post"):
        predict(request_of(folds=("0",)))
    with pytest.raises(InvalidInput, match="missing 0000, 0002") as error:
        predict(request_of(model=write_tiny_run(tmp_path / "whole", ("0",), PLANS)))
    assert "--modality" not in str(error.value)


def test_files_of_another_channel_are_not_taken_for_it(request_of: Any, images: Path) -> None:
    keep(images, 0)
    request = request_of(modality="FLAIR")
    with pytest.raises(InvalidInput, match=r"channels 0000, not all of 0001\. Expected: files named CASE_0001"):
        predict(request)
    assert not request.output.exists()


def test_all_faults_of_a_folder_are_listed(images: Path) -> None:
    keep(images, FLAIR, T1POST)
    (images / "a_0001.nii.gz").unlink()
    (images / "b_0002.nii.gz").rename(images / "bare.nii.gz")
    with pytest.raises(InvalidInput) as error:
        modality_files(images, ".nii.gz", (1, 2))
    assert [problem.case for problem in error.value.problems] == [None, "a", "b"]
    with pytest.raises(InvalidInput, match="does not exist"):
        modality_files(images / "none", ".nii.gz", (1,))
    for path in images.iterdir():
        path.unlink()
    with pytest.raises(InvalidInput, match="no file ends with"):
        modality_files(images, ".nii.gz", (1,))


def test_a_modality_in_the_order_that_was_asked_for(images: Path) -> None:
    files = modality_files(images, ".nii.gz", (2, 0))
    assert [path.name for path in files["a"]] == ["a_0002.nii.gz", "a_0000.nii.gz"]
    assert list(files) == ["a", "b"]


def test_alternatives_are_read_only_where_they_are_asked_for(model: Path) -> None:
    path = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=True)
    torch.save(content | {"alternatives": {"odd": {"members": []}}}, path)
    assert read_trained_networks(path).spec == spec_of(FLAIR)
    with pytest.raises(InvalidInput, match="members"):
        read_trained_networks(path, (1,))
