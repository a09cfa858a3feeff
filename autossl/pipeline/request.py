"""What an experiment is asked for, and all of it that can be checked before the dataset is planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from autossl.data.problems import Problems, nearest
from autossl.data.splits import split_name
from autossl.data.workspace import Workspace
from autossl.networks.device import resolve_device
from autossl.pipeline.recommend import TWIN
from autossl.planners.plan_and_preprocess import DEFAULT_PRESET, PLANS_PREFIX
from autossl.planners.presets import PRESETS
from autossl.trainers.registry import make_settings, method_class
from autossl.trainers.setup import TrainRequest

ENGINES = ("local",)


@dataclass(frozen=True)
class ExperimentRequest:
    """What `autossl_run` is asked for; empty or None leaves a decision to the plan."""

    dataset: str
    workspace: Path | None = None
    configurations: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    """Besides the supervised twin, which is always there."""
    preset: str | None = None
    labeled: str | None = None
    """Deployment budget: cases, or a fraction with a point."""
    draw: int = 0
    steps: int | None = None
    hours: float | None = None
    """For everything together."""
    seed: int = 0
    device: str = "auto"
    settings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Method → setting → value, as text."""
    tag: str | None = None
    final: str | None = None
    """Method that predicts in the end, whatever the verdict says."""
    equal_time: bool = False
    """Also train supervised for as long as the slowest method takes."""
    n_label_next: int = 10
    engine: str = "local"
    num_workers: int | None = None
    """Loader processes of a training."""
    num_processes: int | None = None
    """Processes that read and preprocess cases."""

    @property
    def split(self) -> str:
        """Name of the split that everything is trained on."""
        return split_name("deployment", self.labeled, self.draw)


def check_request(request: ExperimentRequest) -> tuple[Workspace, str]:
    """All that can be checked before the dataset is planned; workspace and full name of the dataset.

    Raises:
        InvalidInput: with all problems together.
    """
    problems, workspace = Problems(), Workspace.locate(request.workspace)
    dataset = problems.catch(workspace.find_dataset, request.dataset)
    problems.catch(resolve_device, request.device)
    for name in dict.fromkeys([TWIN, *request.methods, *request.settings, *([request.final] if request.final else [])]):
        method = problems.catch(method_class, name)
        if method is not None:
            problems.catch(make_settings, method, dict(request.settings.get(name, {})))
    if request.preset is not None and request.preset not in PRESETS:
        problems.add(f"preset '{request.preset}'", f"one of {nearest(request.preset, PRESETS)}", "correct --preset")
    if request.engine not in ENGINES:
        problems.add(f"engine '{request.engine}'", f"one of {nearest(request.engine, ENGINES)}", "correct --engine")
    if request.steps is not None and request.hours is not None:
        problems.add("--steps and --hours together", "one of them", "leave one out")
    if request.final is not None and request.methods and request.final not in (TWIN, *request.methods):
        trained = ", ".join((TWIN, *request.methods))
        problems.add(f"--final {request.final}", f"a method that is trained: {trained}", "add it with -m")
    problems.stop()
    return workspace, str(dataset)


def chosen_preset(request: ExperimentRequest, preprocessed_folder: Path) -> str:
    """As asked; else the only one that is planned, else `plain`."""
    planned = [path.stem.removeprefix(PLANS_PREFIX) for path in preprocessed_folder.glob(f"{PLANS_PREFIX}*.json")]
    only = planned[0] if len(planned) == 1 else DEFAULT_PRESET
    return request.preset or only


def train_request(
    request: ExperimentRequest, workspace: Workspace, dataset: str, preset: str, configuration: str, method: str
) -> TrainRequest:
    """What `autossl_train` is asked for a run of the experiment, without its length."""
    return TrainRequest(
        dataset=dataset,
        configuration=configuration,
        folds=("all_folds",),
        method=method,
        workspace=workspace.root,
        preset=preset,
        labeled=request.labeled,
        draw=request.draw,
        budget_kind="deployment" if request.labeled is not None else "benchmark",
        seed=request.seed,
        device=request.device,
        settings=dict(request.settings.get(method, {})),
        tag=request.tag,
        resume=True,
        num_workers=request.num_workers,
    )
