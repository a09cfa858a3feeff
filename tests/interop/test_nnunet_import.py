"""Models of nnU-Net as runs of ours: what is taken over, what is refused, and that nothing foreign is executed."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import tiny_plans, write_tiny_images

from autossl.data.image_io import read_label
from autossl.data.problems import InvalidInput
from autossl.data.torch_files import refused_names
from autossl.inference.predict import predict
from autossl.inference.request import PredictRequest
from autossl.interop.foreign_checkpoint import STAND_INS, read_foreign_checkpoint
from autossl.interop.nnunet_import import ImportRequest, ImportResult, import_nnunet
from autossl.interop.nnunet_plans import imported_plans, resolved_configuration
from autossl.interop.nnunet_source import models_in, stays_inside
from autossl.networks.build import build_network
from autossl.planners.plans import Architecture

DATASET = "Dataset004_Somewhere"
NAME = "nnUNetTrainer__nnUNetPlans__3d_fullres"
ENV = "AUTOSSL_NNUNET_ENV"
THEIRS = """
import sys, torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
torch.set_num_threads(1)
model, images, out = sys.argv[1:]
predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
predictor.initialize_from_trained_model_folder(model, (0, 1))
predictor.predict_from_files_sequential(images, out, save_probabilities=False)
"""
"""nnUNetv2_predict without its worker processes, which take longer to start than this takes."""
Change = Callable[[dict[str, Any]], None]


def architecture() -> Architecture:
    (plan,) = tiny_plans().configurations.values()
    return plan.architecture


def real_checkpoint(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """As nnUNetTrainer.save_checkpoint writes it: NumPy scalars in the log, an optimizer, a device."""
    network = build_network(architecture(), 1, 3, seed=seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.99)
    return {
        "network_weights": network.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.25)], "ema_fg_dice": [np.float32(0.5)], "count": np.int64(-3)},
        "_best_ema": np.float64(0.25),
        "current_epoch": 2,
        "init_args": {"configuration": "3d_fullres", "fold": 0, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 2),
    } | changes


def nnunet_plans(change: Change | None = None) -> dict[str, Any]:
    content = json.loads(json.dumps(tiny_plans().to_nnunet_json()))
    content["plans_name"] = "nnUNetPlans"
    if change is not None:
        change(content)
    return content


def write_model(folder: Path, plans: Change | None = None, folds: tuple[str, ...] = ("0", "1"), **changes: Any) -> Path:
    model = folder / NAME
    model.mkdir(parents=True)
    (model / "plans.json").write_text(json.dumps(nnunet_plans(plans)))
    labels = {"background": 0, "organ": 1, "tumor": 2}
    description = {"channel_names": {"0": "MR"}, "labels": labels, "file_ending": ".nii.gz", "numTraining": 7}
    (model / "dataset.json").write_text(json.dumps(description))
    for number, fold in enumerate(folds):
        (model / f"fold_{fold}").mkdir()
        torch.save(real_checkpoint(number, **changes), model / f"fold_{fold}" / "checkpoint_final.pth")
    return model


def imported(source: Path, workspace: Path, **options: Any) -> ImportResult:
    return import_nnunet(ImportRequest(source, DATASET, workspace, **options))


def zipped(folder: Path, path: Path, **more: bytes) -> Path:
    """As nnUNetv2_export_model_to_zip does: everything deflated, names below the results folder."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"{DATASET}/{file.relative_to(folder.parent).as_posix()}")
        for name, content in more.items():
            archive.writestr(name, content)
    return path


def test_weights_plans_and_mirroring_are_taken_over(tmp_path: Path) -> None:
    result = imported(write_model(tmp_path), tmp_path / "w")
    model = result.model
    assert model.folder.relative_to(tmp_path / "w").as_posix() == (
        f"results/{DATASET}/imported/3d_fullres__nnUNetPlans__nnunet__seed-0"
    )
    assert (model.folds, model.plan.mirror_axes, model.plans.orientation) == (("0", "1"), (0, 2), "RAS")
    assert (model.run.method, model.run.total_steps, result.origin) == ("nnunet", 500, tiny_plans().dataset_name)
    for fold in model.folds:
        stored = torch.load(model.checkpoint(fold), weights_only=True)["networks"]["network"]
        original = build_network(architecture(), 1, 3, seed=int(fold)).state_dict()
        assert stored.keys() == original.keys()
        assert all(torch.equal(stored[name], original[name]) for name in original)


def test_the_run_predicts_the_mean_logits_of_the_folds(tmp_path: Path) -> None:
    run = imported(write_model(tmp_path), tmp_path / "w").model.folder
    images = write_tiny_images(tmp_path / "images", ["a"])
    predict(PredictRequest(images, tmp_path / "out", model=run, device="cpu"))
    found, _, _ = read_label(tmp_path / "out" / "a.nii.gz")
    assert set(np.unique(found)) <= {0, 1, 2}


def test_a_zip_gives_the_same_run_and_the_same_model_is_there_already(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    first = imported(zipped(model, tmp_path / "m.zip", **{f"{DATASET}/x/postprocessing.pkl": b"?"}), tmp_path / "w")
    assert not first.already
    again = imported(model, tmp_path / "w")
    assert again.already
    assert again.model.folder == first.model.folder
    names = sorted(path.name for path in first.model.folder.parent.parent.rglob("*") if path.is_file())
    assert names == ["checkpoint_final.pth", "checkpoint_final.pth", "dataset.json", "plans.json", "run.json"]
    with pytest.raises(InvalidInput, match=r"another model was imported there.*--tag"):
        imported(model, tmp_path / "w", folds=("0",))
    assert imported(model, tmp_path / "w", folds=("0",), overwrite=True).model.folds == ("0",)


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/evil", "C:/evil", "a\\..\\evil", "..", "a//b", "a/./b", "a\0b", ""]
)
def test_names_that_leave_the_target(name: str) -> None:
    assert not stays_inside(name)


def test_a_zip_with_a_path_that_leaves_the_target_is_refused_as_a_whole(tmp_path: Path) -> None:
    source = zipped(write_model(tmp_path), tmp_path / "m.zip", **{"../evil.json": b"{}"})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidInput, match=r"\.\./evil\.json"):
        imported(source, tmp_path / "w")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_zip_that_unpacks_to_far_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path, folds=("0",))
    with (model / "fold_0" / "checkpoint_final.pth").open("wb") as file:
        file.truncate(70 << 20)
    with pytest.raises(InvalidInput, match="at most 20 times as many"):
        imported(zipped(model, tmp_path / "m.zip"), tmp_path / "w")
    assert not (tmp_path / "w").exists()


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_what_would_be_executed_is_named_and_not_executed(tmp_path: Path) -> None:
    model = write_model(tmp_path, logging={"a": Evil(tmp_path / "evil"), "b": np.zeros(2)}, folds=("0",))
    with pytest.raises(InvalidInput, match=r"executed: .*numpy\._core\.multiarray\._reconstruct.*pathlib"):
        imported(model, tmp_path / "w")
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("value", [np.float64(0.1), np.float16(2), np.int8(-5), np.uint64(2**63), np.bool_(True)])
def test_numpy_scalars_become_plain_numbers(tmp_path: Path, value: Any) -> None:
    torch.save({"value": value}, tmp_path / "c.pth")
    assert refused_names(tmp_path / "c.pth", STAND_INS) == []
    found = read_foreign_checkpoint(tmp_path / "c.pth")["value"]
    assert found == value.item()
    assert type(found) is type(value.item())


@pytest.mark.parametrize("value", [np.datetime64("2020-01-01"), np.str_("x"), np.void(b"abcd"), np.complex64(1j)])
def test_other_numpy_scalars_are_refused(tmp_path: Path, value: Any) -> None:
    torch.save({"value": value}, tmp_path / "c.pth", pickle_protocol=2)
    with pytest.raises(InvalidInput, match="cannot be read|execute"):
        read_foreign_checkpoint(tmp_path / "c.pth")


def test_a_plain_pickle_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "c.pth").write_bytes(pickle.dumps(Evil(tmp_path / "evil")))
    with pytest.raises(InvalidInput, match="does not end as a zip file"):
        read_foreign_checkpoint(tmp_path / "c.pth")
    assert not (tmp_path / "evil").exists()


def configuration(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["configurations"]["3d_fullres"]
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(image_reader_writer="Tiff3DIO"), "image_reader_writer is 'Tiff3DIO'"),
        (lambda c: c.update(label_manager="Mine"), "label_manager is 'Mine'"),
        (lambda c: configuration(c).update(previous_stage="3d_lowres"), "second stage of a cascade"),
        (lambda c: configuration(c).update(preprocessor_name="Mine"), "preprocessor_name is 'Mine'"),
        (lambda c: configuration(c).update(resampling_fn_data="resample_torch_fornnunet"), "resample_torch_fornnunet"),
        (lambda c: configuration(c)["resampling_fn_data_kwargs"].update(order_z=1), "order_z 0"),
        (lambda c: configuration(c)["resampling_fn_probabilities_kwargs"].update(order=3), "probabilities_kwargs"),
        (lambda c: configuration(c)["architecture"].update(network_class_name="os.system"), "os.system"),
        (lambda c: configuration(c)["architecture"]["arch_kwargs"].update(conv_op="os.system"), "os.system"),
        (lambda c: configuration(c)["architecture"]["arch_kwargs"].update(features_per_stage=[4, 6]), "has the shape"),
        (lambda c: configuration(c).update(normalization_schemes=["Mine"]), "Mine is unknown"),
        (lambda c: c["configurations"].clear(), "no configuration '3d_fullres'"),
    ],
)
def test_what_would_predict_otherwise_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        imported(write_model(tmp_path, change, folds=("0",)), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_inherited_configurations_and_plans_of_the_first_releases() -> None:
    inherited = {"a": {"inherits_from": "b", "x": 1}, "b": {"x": 2, "y": 3}}
    assert resolved_configuration(inherited, "a") == {"x": 1, "y": 3}
    with pytest.raises(InvalidInput, match="inherit from each other"):
        resolved_configuration({"a": {"inherits_from": "b"}, "b": {"inherits_from": "a"}}, "a")

    def flat(content: dict[str, Any]) -> None:
        plan = configuration(content)
        kwargs = plan.pop("architecture")["arch_kwargs"]
        plan |= {
            "UNet_class_name": "PlainConvUNet",
            "UNet_base_num_features": 2,
            "unet_max_num_features": 4,
            "n_conv_per_stage_encoder": kwargs["n_conv_per_stage"],
            "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"],
            "conv_kernel_sizes": kwargs["kernel_sizes"],
            "pool_op_kernel_sizes": kwargs["strides"],
        }

    for change in (None, flat):
        plans = imported_plans(nnunet_plans(change), "3d_fullres", (), DATASET, "p", 10)
        kwargs = plans.configuration("3d_fullres").architecture.arch_kwargs
        assert kwargs == architecture().arch_kwargs


def test_readers_decide_the_orientation() -> None:
    for reader, orientation in (("NibabelIOWithReorient", "RAS"), ("SimpleITKIO", "native")):
        content = nnunet_plans(lambda c, reader=reader: c.update(image_reader_writer=reader))  # type: ignore[misc]
        assert imported_plans(content, "3d_fullres", (), DATASET, "p", 10).orientation == orientation


def test_without_axes_in_the_checkpoint_nothing_is_mirrored(tmp_path: Path) -> None:
    model = write_model(tmp_path, folds=("0",), inference_allowed_mirroring_axes=None)
    assert imported(model, tmp_path / "w").model.plan.mirror_axes == ()


def test_of_several_models_one_is_chosen(tmp_path: Path) -> None:
    names = [f"D/{c}/{file}" for c in ("t__p__2d", "t__p__3d") for file in ("plans.json", "dataset.json")]
    names += ["D/t__p__2d/fold_0/checkpoint_final.pth", "D/t__p__3d/fold_10/checkpoint_final.pth"]
    names += ["D/t__p__3d/fold_2/checkpoint_final.pth", "D/other/fold_0/checkpoint_final.pth"]
    two, three = models_in(names)
    assert (two.root, list(two.folds), three.root, list(three.folds)) == (
        "D/t__p__2d",
        ["0"],
        "D/t__p__3d",
        ["2", "10"],
    )
    model = write_model(tmp_path / "results", folds=("0",))
    model.rename(model.with_name("a__b__c"))
    write_model(tmp_path / "results", folds=("0",))
    with pytest.raises(InvalidInput, match="2 models fit.*--select"):
        imported(tmp_path / "results", tmp_path / "w")
    assert imported(tmp_path / "results", tmp_path / "w", select="a__b").model.folds == ("0",)


def test_splits_tell_which_cases_were_seen(tmp_path: Path) -> None:
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ["b", "a"], "val": ["c"]}] * 2))
    run = imported(write_model(tmp_path), tmp_path / "w", splits=tmp_path / "splits_final.json").model.run
    assert (run.folds["1"].labeled, run.folds["1"].validation) == (("a", "b"), ("c",))
    (tmp_path / "splits_final.json").write_text("[]")
    with pytest.raises(InvalidInput, match="0 folds, none numbered 0, 1"):
        imported(tmp_path / NAME, tmp_path / "w", splits=tmp_path / "splits_final.json", tag="other")


@pytest.mark.skipif(ENV not in os.environ, reason=f"{ENV} names no environment with nnunetv2")
def test_the_real_program_predicts_the_same(tmp_path: Path) -> None:
    """Random weights on noise, the hardest case: labels are close calls everywhere."""
    model = write_model(tmp_path)
    images = write_tiny_images(tmp_path / "images", ["a", "b"], shape=(20, 24, 22))
    run = imported(model, tmp_path / "w").model.folder
    predict(PredictRequest(images, tmp_path / "ours", model=run, device="cpu"))
    command = [Path(os.environ[ENV]) / "bin" / "python", "-c", THEIRS, model, images, tmp_path / "theirs"]
    folders = {f"nnUNet_{name}": str(tmp_path) for name in ("raw", "preprocessed", "results")}
    (tmp_path / "theirs").mkdir()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **folders})
    for case in ("a", "b"):
        ours, theirs = (read_label(tmp_path / who / f"{case}.nii.gz")[0] for who in ("ours", "theirs"))
        assert len(np.unique(theirs)) > 1, "else nothing is compared"
        assert np.mean(ours == theirs) >= 0.999
