"""The example package beside this file: found once it is installed, trained, and what the documentation shows."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import family
from autossl.cli.methods import main as show_methods
from autossl.data.phantom import PhantomSettings, make_phantom_dataset
from autossl.planners.plan_and_preprocess import PlanRequest, plan_and_preprocess
from autossl.planners.plan_experiment import PlanOptions
from autossl.trainers.base import Progress, SemiSupervisedTrainer
from autossl.trainers.registry import METHODS, method_class
from autossl.trainers.train import TrainRequest, train
from toys import toy_batch, toy_job

FOLDER = Path(__file__).parent
PACKAGE = FOLDER / "autossl_pi_model.py"
PAGE = FOLDER.parents[1] / "docs" / "add_a_method.md"
PHANTOM = PhantomSettings(n_labeled=5, n_unlabeled=2, n_test=0, shape_zyx=(8, 16, 16))


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As pip leaves it: the module on the path, and a dist-info with the entry points of pyproject.toml."""
    groups = re.findall(r'\[project\.entry-points\."(.+?)"\]\n((?:.+ = ".+"\n)+)', _text("pyproject.toml"))
    assert [group for group, _ in groups] == ["autossl.methods"]
    info = tmp_path / "site" / "autossl_pi_model-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: autossl-pi-model\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("".join(f"[{g}]\n" + lines.replace('"', "") for g, lines in groups))
    (info.parent / PACKAGE.name).write_text(_text(PACKAGE.name), encoding="utf-8")
    monkeypatch.syspath_prepend(str(info.parent))
    yield
    sys.modules.pop(PACKAGE.stem, None)


def _text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def pi_model(**settings: float) -> SemiSupervisedTrainer:
    method = method_class("pi_model")
    return method(toy_job(), method.Settings(**settings))


def test_the_page_shows_the_files_as_they_are() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"```python\n(.*?)```", page, re.DOTALL) == [_text(PACKAGE.name)]
    assert re.findall(r"```toml\n(.*?)```", page, re.DOTALL) == [_text("pyproject.toml")]
    assert len(_text(PACKAGE.name).splitlines()) < 60


def test_it_is_found_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert "pi_model" not in METHODS
    assert method_class("pi_model").name == "pi_model"
    show_methods(["pi_model"])
    shown = capsys.readouterr().out
    assert "Π-model" in shown
    assert "lambda_max" in shown


def test_it_trains_and_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autossl.trainers.training_log.draw_progress", lambda path, lines: None)
    make_phantom_dataset(tmp_path / "raw", PHANTOM)
    options = PlanOptions(preset="nano", configurations=("2d",))
    plan_and_preprocess(PlanRequest(PHANTOM.name, tmp_path, options, n_workers=1))
    result = train(
        TrainRequest(
            PHANTOM.name, "2d", ("0",), method="pi_model", workspace=tmp_path, steps=2, device="cpu", num_workers=0
        )
    )
    assert result.folder.name == "2d__nano__pi_model__seed-0"
    assert result.folds[0].validation is not None


def test_closed_form() -> None:
    """No noise: nothing to agree on. Two classes apart, (1, 0) against (0, 1): the mean of 1, 1 and 0 is 2 / 3."""
    at, silent = Progress(100, 100), pi_model(noise=0.0)
    assert silent.losses(toy_batch(silent.job), at).losses["consistency"].item() == 0
    method = pi_model(lambda_max=0.5)
    batch = toy_batch(method.job)
    certain = torch.full((2 + 4, 3, 16, 16), -60.0)
    certain[:4, 0], certain[4:, 1] = 60.0, 60.0
    method.parts.trained["network"] = _Answers(certain)
    output = method.losses(batch, at)
    assert float(output.measures["consistency"]) == pytest.approx(2 / 3)
    assert output.losses["consistency"].item() == pytest.approx(0.5 * 2 / 3)


class _Answers(torch.nn.Module):
    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [self.logits]


def test_the_target_carries_no_gradient() -> None:
    method = pi_model()
    logits = torch.randn(2 + 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    method.parts.trained["network"] = _Answers(logits)
    method.losses(toy_batch(method.job), Progress(100, 100)).losses["consistency"].backward()
    assert logits.grad is not None
    assert (logits.grad[2:4] != 0).any()
    assert (logits.grad[4:] == 0).all()


def test_it_passes_what_every_method_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The family tests run over installed packages too; here those that no other test of this file covers."""
    monkeypatch.setattr("autossl.trainers.training_log.draw_progress", lambda path, lines: None)
    monkeypatch.setitem(family.METHODS, "pi_model", method_class("pi_model"))
    steps, identities = (_test_file(name) for name in ("test_family", "test_family_identities"))
    for kind in family.KINDS:
        steps.test_three_steps("pi_model", kind, tmp_path / kind)
    steps.test_every_trained_parameter_learns_in_its_phase_and_nothing_else_does("pi_model", tmp_path / "gradients")
    steps.test_save_load_and_go_on_equals_going_on("pi_model", tmp_path / "resume")
    identities.test_weights_of_zero_are_the_supervised_loss_of_the_same_networks("pi_model")
    identities.test_without_unlabeled_cases("pi_model", tmp_path / "twin")
    identities.test_what_stands_at_invalid_voxels_does_not_matter("pi_model", regions=True)


def _test_file(name: str) -> ModuleType:
    path = FOLDER.parent / "trainers" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"_{name}_for_the_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
