"""An exported run is what nnU-Net v2 asks for, predicts as the run does, and tells nothing of its cases."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from tiny_model import DATASET, tiny_plans, write_tiny_run
from torch import Tensor, nn

from autossl.cli import export_nnunet as command
from autossl.data.files import read_json, write_json
from autossl.data.problems import InvalidInput
from autossl.data.provenance import Written
from autossl.inference.checkpoint import FORMAT
from autossl.inference.inference_plan import InferencePlan, LabelBudget, PlanMember, write_inference_plan
from autossl.inference.model_folder import read_model
from autossl.inference.postprocess import Rule
from autossl.inference.postprocessing_plan import read_postprocessing
from autossl.inference.predictor import Predictor, Window
from autossl.interop.nnunet_export import (
    NnunetExportRequest,
    NnunetExportResult,
    export_nnunet,
    plans_name_of,
    reader_of,
)
from autossl.interop.nnunet_weights import (
    nnunet_state,
    reason_against,
    single_network,
    single_network_checkpoint,
    single_networks,
)
from autossl.networks.build import MODULES_BY_NAME, build_network, residual_twin
from autossl.networks.prediction import Member, PredictionSpec, SharedDecoder
from autossl.planners.plans import Plans
from toys import toy_architecture, toy_schema

LABELS = {"background": 0, "organ": 1, "tumor": 2}
CLASSES = {"PlainConvUNet": PlainConvUNet, "ResidualEncoderUNet": ResidualEncoderUNet}


def trained(folder: Path, plans: Plans | None = None, folds: Any = ("0",), **changes: Any) -> Path:
    """A finished run; changes of its dataset.json, and of run.json under "run"."""
    write_tiny_run(folder, folds, plans, **changes.pop("run", {}))
    write_json(folder / "dataset.json", read_json(folder / "dataset.json") | {"labels": LABELS} | changes)
    return folder


def exported(run: Path | str, output: Path, **more: Any) -> NnunetExportResult:
    return export_nnunet(NnunetExportRequest(run, output, **more))


def rewrite(run: Path, spec: PredictionSpec, networks: dict[str, Any], **more: Any) -> Path:
    """Fold 0 predicts in another way; returns its checkpoint."""
    path = run / "fold_0" / "checkpoint_final.pth"
    states = {name: getattr(net, "state_dict", lambda net=net: net)() for name, net in networks.items()}
    torch.save({"format": FORMAT, "networks": states, "prediction": spec.to_json(), **more}, path)
    return path


def built(folder: Path, configuration: str, n_outputs: int = 3) -> nn.Module:
    """The network that nnU-Net builds from plans.json, with the weights that it loads strictly."""
    architecture = read_json(folder / "plans.json")["configurations"][configuration]["architecture"]
    names = architecture["_kw_requires_import"]
    kwargs = {
        key: MODULES_BY_NAME[value] if key in names and value is not None else value
        for key, value in architecture["arch_kwargs"].items()
    }
    channels = len(read_json(folder / "dataset.json")["channel_names"])
    kind = CLASSES[architecture["network_class_name"].rpartition(".")[2]]
    network = kind(input_channels=channels, num_classes=n_outputs, deep_supervision=False, **kwargs)
    network.load_state_dict(weights(folder), strict=True)
    return network.eval()


def weights(folder: Path, fold: str = "0") -> dict[str, Tensor]:
    content = torch.load(folder / f"fold_{fold}" / "checkpoint_final.pth", weights_only=True)
    return content["network_weights"]


# ------------------------------------------------------------------------------------------------ what nnU-Net reads


def test_every_key_that_prediction_needs_is_there(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", folds=("0", "1"))
    result = exported(run, tmp_path / "out")
    assert result.folder == tmp_path / "out" / DATASET / "nnUNetTrainer__autossl_tiny_supervised_seed-0__3d_fullres"
    for fold in ("0", "1"):
        content = torch.load(result.folder / f"fold_{fold}" / "checkpoint_final.pth", weights_only=True)
        assert content["trainer_name"] == "nnUNetTrainer"
        assert content["init_args"] == {"configuration": "3d_fullres"}
        assert content["inference_allowed_mirroring_axes"] == (0,)
    plans = read_json(result.folder / "plans.json")
    assert plans["image_reader_writer"] == "NibabelIOWithReorient"
    assert plans["plans_name"] == result.plans_name == "autossl_tiny_supervised_seed-0"
    assert plans["transpose_forward"] == plans["transpose_backward"] == [0, 1, 2]
    assert set(plans["foreground_intensity_properties_per_channel"]["0"]) >= {"mean", "std"}
    configuration = plans["configurations"]["3d_fullres"]
    kinds = ("data", "seg", "probabilities")
    expected = {"preprocessor_name", "patch_size", "spacing", "normalization_schemes", "use_mask_for_norm"}
    expected |= {f"resampling_fn_{kind}{end}" for kind in kinds for end in ("", "_kwargs")}
    assert expected <= set(configuration)
    assert set(configuration["architecture"]) == {"network_class_name", "arch_kwargs", "_kw_requires_import"}
    assert configuration["architecture"]["network_class_name"].startswith("dynamic_network_architectures.")
    assert read_json(result.folder / "dataset.json") == {
        "channel_names": {"0": "MR"},
        "labels": LABELS,
        "file_ending": ".nii.gz",
    }
    assert result.predict_arguments == (
        *("-d", DATASET, "-c", "3d_fullres", "-tr", "nnUNetTrainer"),
        *("-p", "autossl_tiny_supervised_seed-0", "-f", "0", "1"),
    )


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_weights_load_strictly_and_give_the_same_logits(tmp_path: Path, dims: int, residual: bool) -> None:
    plain = toy_architecture(dims, (2, 4))
    plans = tiny_plans(dims=dims, architecture=residual_twin(plain) if residual else plain)
    run = trained(tmp_path / "run", plans)
    result = exported(run, tmp_path / "out")
    (configuration,) = plans.configurations
    ours = build_network(plans.configurations[configuration].architecture, 1, 3, deep_supervision=False, seed=0).eval()
    patch = torch.randn(2, 1, *(8,) * dims)
    with torch.inference_mode():
        assert torch.equal(built(result.folder, configuration)(patch), ours(patch))


def test_every_name_of_a_tensor_is_there_and_its_memory_once(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    state = weights(exported(run, tmp_path / "out").folder)
    assert state["encoder.stages.0.0.convs.0.conv.weight"].data_ptr() == (
        state["decoder.encoder.stages.0.0.convs.0.all_modules.0.weight"].data_ptr()
    )
    assert "decoder.seg_layers.0.weight" in state
    distinct = {tensor.data_ptr(): tensor.nbytes for tensor in state.values()}
    assert len(distinct) < len(state) / 2
    stored = torch.load(run / "fold_0" / "checkpoint_final.pth", weights_only=True)["networks"]["student"]
    assert set(stored) == set(state)


def test_wrappers_of_compiled_and_parallel_modules_leave_no_trace(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    plan = read_model(run).plan
    path = run / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=True)
    state = content["networks"]["student"]
    content["networks"]["student"] = {f"module._orig_mod.{key}": tensor for key, tensor in state.items()}
    torch.save(content, path)
    got = nnunet_state(path, single_network(path, plan), 1, 3)
    assert set(got) == set(state)
    assert all(torch.equal(got[key], state[key]) for key in state)
    content["networks"]["student"].popitem()
    torch.save(content, path)
    with pytest.raises(InvalidInput, match="the weights do not fit the network .*restore plans.json"):
        nnunet_state(path, single_network(path, plan), 1, 3)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("channels", [(2,), (2, 0), (1, 2, 0)])
def test_a_network_of_some_channels_ignores_the_others(
    tmp_path: Path, channels: tuple[int, ...], residual: bool
) -> None:
    plain = toy_architecture(3, (2, 4))
    architecture = residual_twin(plain) if residual else plain
    run = trained(tmp_path / "run", tiny_plans(n_channels=3, architecture=architecture))
    network = build_network(architecture, len(channels), 3, deep_supervision=False, seed=5).eval()
    member = Member(name="one", architecture=architecture, channels=channels)
    rewrite(run, PredictionSpec(members=(member,)), {"one": network})
    result = exported(run, tmp_path / "out")
    image = torch.randn(1, 3, 8, 8, 8)
    with torch.inference_mode():
        there = built(result.folder, "3d_fullres")(image)
        assert torch.allclose(there, network(image[:, list(channels)]), atol=1e-4)
        image[:, [c for c in range(3) if c not in channels]] += 100
        assert torch.equal(built(result.folder, "3d_fullres")(image), there)
    assert any("heeds some of the channels" in note for note in result.notes)


def test_an_empty_list_of_mirror_axes_becomes_none(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", tiny_plans(mirror_axes=()))
    folder = exported(run, tmp_path / "out").folder
    content = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert content["inference_allowed_mirroring_axes"] is None


def test_names_hold_no_double_underscore(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", run={"tag": "a__b/c", "method": "x"})
    assert plans_name_of(read_model(run), "network__a") == "autossl_tiny_x_a_b_c_network_a_seed-0"
    assert len(exported(run, tmp_path / "out").folder.name.split("__")) == 3


@pytest.mark.parametrize(
    ("orientation", "ending", "reader"),
    [
        ("RAS", ".nii.gz", "NibabelIOWithReorient"),
        ("RAS", ".mha", "SimpleITKIOWithReorient"),
        ("native", ".png", "NaturalImage2DIO"),
        ("native", ".nii.gz", "SimpleITKIO"),
    ],
)
def test_the_reader_gives_the_orientation_of_the_plan(orientation: str, ending: str, reader: str) -> None:
    assert reader_of(tiny_plans(orientation=orientation), ending) == reader


def test_regions_keep_their_order(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    run = trained(tmp_path / "run", labels=labels, regions_class_order=[1, 2])
    architecture = read_model(run).plan.architecture
    spec = PredictionSpec(members=(Member(name="one", architecture=architecture),), activation="sigmoid")
    rewrite(run, spec, {"one": build_network(architecture, 1, 2, seed=0)})
    folder = exported(run, tmp_path / "out").folder
    content = read_json(folder / "dataset.json")
    assert (list(content["labels"]), content["regions_class_order"]) == (list(labels), [1, 2])
    assert len(weights(folder)["decoder.seg_layers.0.weight"]) == 2


@pytest.mark.parametrize(("ignore", "kept"), [(3, True), (9, False)])
def test_an_ignore_label_stays_where_nnunet_can_have_it(tmp_path: Path, ignore: int, kept: bool) -> None:
    run = trained(tmp_path / "run", labels=LABELS | {"ignore": ignore})
    labels = read_json(exported(run, tmp_path / "out").folder / "dataset.json")["labels"]
    assert labels == LABELS | ({"ignore": ignore} if kept else {})


# --------------------------------------------------------------------------------------------- what may be exported


def member(name: str = "a", **more: Any) -> Member:
    return Member(name=name, architecture=toy_architecture(3, (2, 4)), **more)


DECODER = SharedDecoder(name="other", upsampling="nearest")
MEAN = "mean_probabilities"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (PredictionSpec(members=(member(),)), None),
        (PredictionSpec(members=(member(),), activation="dirichlet"), None),
        (PredictionSpec(members=(member(), member("b")), combine=MEAN), r"mean of the probabilities of 2 networks \(a"),
        (PredictionSpec(members=(member(decoders=(DECODER,)),), combine=MEAN), "2 decoders on one encoder"),
        (PredictionSpec(members=(member(head="refine"),)), "head 'refine' corrects"),
        (PredictionSpec(members=(member(),), combine=MEAN), "of the mirrored views"),
        (PredictionSpec(members=(member(),), combine=MEAN, activation="dirichlet"), "of the mirrored views"),
    ],
)
def test_what_is_no_single_network_has_a_reason(spec: PredictionSpec, reason: str | None) -> None:
    found = reason_against(spec, mirror_axes=(0,))
    assert found is None if reason is None else found is not None
    if reason is not None:
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(found)


def test_one_network_without_mirroring_predicts_the_same_by_its_logits() -> None:
    plans = tiny_plans(mirror_axes=())
    plan, schema = plans.configuration("3d_fullres"), toy_schema(2)
    network = build_network(plan.architecture, 1, 3, seed=3)
    image = torch.randn(1, 11, 9, 14)
    probabilities = []
    for combine in ("single", MEAN):
        spec = PredictionSpec(members=(Member(name="a", architecture=plan.architecture),), combine=combine)
        assert reason_against(spec, plan.mirror_axes) is None
        predictor = Predictor.from_state_dicts(spec, [{"a": network.state_dict()}], plan, schema, Window.of(plan))
        probabilities.append(predictor.logits(image).softmax(0))
    assert torch.allclose(*probabilities, atol=1e-6)
    assert reason_against(spec.model_copy(update={"activation": "dirichlet"}), ()) is not None


def test_folds_are_no_mean_of_probabilities() -> None:
    one, other = torch.tensor([0.98, 0.01, 0.01]), torch.tensor([0.0001, 0.6, 0.3999])
    assert int((one + other).argmax()) == 0
    assert int((one.log() + other.log()).argmax()) == 1


def two_networks(run: Path) -> Path:
    """As co-training deploys: the mean of two networks, each of which is an alternative."""
    trained(run)
    architecture = read_model(run).plan.architecture
    members = tuple(Member(name=f"network_{key}", architecture=architecture) for key in "ab")
    alone = {m.name: PredictionSpec(members=(m,)).to_json() for m in members}
    networks = {m.name: build_network(architecture, 1, 3, seed=seed) for seed, m in enumerate(members, 7)}
    rewrite(run, PredictionSpec(members=members, combine=MEAN), networks, alternatives=alone)
    return run


def test_two_networks_are_refused_with_those_that_can_go_alone(tmp_path: Path) -> None:
    run = two_networks(tmp_path / "run")
    wanted = "mean of the probabilities of 2 networks .*alone: --member network_a, --member network_b"
    with pytest.raises(InvalidInput, match=wanted):
        exported(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InvalidInput, match="no network 'network_c' in it.*choose among: --member network_a"):
        exported(run, tmp_path / "out", member="network_c")


def test_one_of_two_networks_predicts_as_it_does_here_alone(tmp_path: Path) -> None:
    run = two_networks(tmp_path / "run")
    result = exported(run, tmp_path / "out", member="network_b")
    assert result.plans_name == "autossl_tiny_supervised_network_b_seed-0"
    path, plan = run / "fold_0" / "checkpoint_final.pth", read_model(run).plan
    alone = path.with_name("alone.pth")  # the weights are mapped from the file, which must not be written to
    torch.save(single_network_checkpoint(path, single_network(path, plan, "network_b")), alone)
    alone.replace(path)
    predictor = read_model(run).load_predictor(Window.of(plan, mirror=False))
    patch = torch.randn(1, 8, 8, 8)
    with torch.inference_mode():
        there = built(result.folder, "3d_fullres")(patch[None])[0]
    assert torch.allclose(there, predictor.logits(patch), atol=1e-4)


def test_networks_that_are_no_alternative_are_found_among_the_members(tmp_path: Path) -> None:
    run = two_networks(tmp_path / "run")
    path, plan = run / "fold_0" / "checkpoint_final.pth", read_model(run).plan
    content = torch.load(path, weights_only=True)
    del content["alternatives"]
    torch.save(content, path)
    assert list(single_networks(path, plan)) == ["network_a", "network_b"]
    headed = PredictionSpec(members=(Member(name="network_a", architecture=plan.architecture, head="refine"),))
    parts = {"network_a": content["networks"]["network_a"], "network_a_refine": {"weight": torch.ones(1)}}
    rewrite(run, headed, parts)
    assert single_network(path, plan, "network_a").member.head is None


def test_labels_with_gaps_are_refused(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", labels={"background": 0, "organ": 1, "tumor": 5})
    with pytest.raises(InvalidInput, match=r"the label values 0, 1, 5.*writes the number of the output"):
        exported(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folds_of_different_networks_are_refused(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", folds=("0", "1"))
    wider = toy_architecture(3, (3, 4))
    spec = PredictionSpec(members=(Member(name="one", architecture=wider),))
    rewrite(run, spec, {"one": build_network(wider, 1, 3)})
    with pytest.raises(InvalidInput, match="folds of different architectures"):
        exported(run, tmp_path / "out")
    plans = read_json(exported(run, tmp_path / "out", folds=("0",)).folder / "plans.json")
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    assert architecture["arch_kwargs"]["features_per_stage"] == [3, 4]


# ------------------------------------------------------------------------------------------------- files and folders


def final_model(tmp_path: Path, runs: tuple[str, ...]) -> Path:
    """results/DATASET/default with an inference plan that has a rule; returns the workspace."""
    split = tmp_path / "there" / "results" / DATASET / "default"
    for name in runs:
        trained(split / name, training=[{"image": "./imagesTr/Smith.nii.gz"}])
        fold = {"labeled": ["Smith"], "validation": [], "unlabeled": [], "hidden_test": [], "excluded": {}}
        write_json(split / name / "run.json", read_json(split / name / "run.json") | {"folds": {"0": fold}})
    plan = InferencePlan(
        dataset=DATASET,
        split="default",
        members=tuple(PlanMember(run=f"{DATASET}/default/{name}", folds=("0",)) for name in runs),
        combine="single" if len(runs) == 1 else MEAN,
        postprocessing=(Rule(kind="keep_largest", class_name="organ"),),
        why="Smith says so",
        labels=LabelBudget(n_cases=1, n_patients=1),
        written=Written.now(),
    )
    write_inference_plan(split / "inference_plan.json", plan)
    return tmp_path / "there"


def test_rules_travel_as_json_and_no_case_does(tmp_path: Path) -> None:
    workspace = final_model(tmp_path, ("a",))
    result = exported(DATASET, tmp_path / "out", workspace=workspace, archive=True)
    rules = read_postprocessing(result.folder / "postprocessing.json")
    assert rules.rules == (Rule(kind="keep_largest", class_name="organ"),)
    assert rules.label_schema is not None
    assert result.has_rules
    for path in result.folder.rglob("*"):
        assert path.is_dir() or b"Smith" not in path.read_bytes()
    assert read_json(result.folder / "autossl.json")["labels"] == {"n_cases": 1, "n_patients": 1}


def test_the_mean_of_two_runs_is_refused(tmp_path: Path) -> None:
    workspace = final_model(tmp_path, ("a", "b"))
    with pytest.raises(InvalidInput, match=r"probabilities of 2 runs.*default/a, .*default/b\); nnUNetv2_ensemble"):
        exported(DATASET, tmp_path / "out", workspace=workspace)


def test_the_archive_unpacks_into_a_folder_of_results(tmp_path: Path) -> None:
    result = exported(trained(tmp_path / "run"), tmp_path / "out", archive=True)
    assert result.archive is not None
    with zipfile.ZipFile(result.archive) as archive:
        archive.extractall(tmp_path / "elsewhere")
    name = result.folder.relative_to(tmp_path / "out")
    there = {p.relative_to(tmp_path / "elsewhere") for p in (tmp_path / "elsewhere").rglob("*") if p.is_file()}
    assert there == {name / p.relative_to(result.folder) for p in result.folder.rglob("*") if p.is_file()}
    assert len(there) == 4
    assert torch.equal(
        *(weights(f)["decoder.seg_layers.0.bias"] for f in (result.folder, tmp_path / "elsewhere" / name))
    )


def test_only_earlier_exports_are_replaced(tmp_path: Path) -> None:
    run, out = trained(tmp_path / "run"), tmp_path / "out"
    folder = exported(run, out).folder
    (folder / "left.txt").write_text("from before")
    with pytest.raises(InvalidInput, match="it is there already.*--overwrite"):
        exported(run, out)
    assert (folder / "left.txt").exists()
    exported(run, out, overwrite=True)
    assert not (folder / "left.txt").exists()
    assert (folder / "fold_0" / "checkpoint_final.pth").exists()
    (folder / "autossl.json").unlink()
    with pytest.raises(InvalidInput, match="not exported by autossl.*never replaced"):
        exported(run, out, overwrite=True)
    assert [path.name for path in out.iterdir()] == [DATASET]


def test_the_command_says_how_to_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = two_networks(tmp_path / "run")
    assert command.main(["-q", str(run), str(tmp_path / "out"), "--member", "network_a", "--zip", "-f", "0"]) == 0
    said = capsys.readouterr().out
    assert f"nnUNet_results={tmp_path / 'out'} nnUNetv2_predict -i IMAGES -o OUTPUT -d {DATASET}" in said
    assert "-p autossl_tiny_supervised_network_a_seed-0 -f 0" in said
    assert "for nnUNetv2_install_pretrained_model_from_zip" in said
    assert command.main(["-q", str(run), str(tmp_path / "other")]) == 2
    assert "--member network_b" in capsys.readouterr().err
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == '["out", "run"]'
