"""What a benchmark is asked for, and which runs that makes; every check before anything is run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from autossl.data.problems import Problems, nearest
from autossl.data.runs import RunSpec, fold_state, read_run, run_folder, spec_differences
from autossl.data.workspace import Workspace
from autossl.networks.device import resolve_device
from autossl.planners.plan_and_preprocess import find_plans
from autossl.trainers.registry import make_settings, method_class
from autossl.trainers.setup import RunSetup, TrainRequest, resolve

TWIN = "supervised"
ABLATION = "ablation"
"""The variant of every method without what makes it itself; `SemiSupervisedTrainer.ablation` says which settings."""
Role = Literal["twin", "method", "full labels"]
ALL_FOLDS = "all_folds"


@dataclass(frozen=True)
class BenchmarkRequest:
    """What `autossl_benchmark` is asked for."""

    dataset: str
    configuration: str
    methods: tuple[str, ...]
    """Besides the supervised twin, which is always there. "method:variant" is a row with settings of its own."""
    workspace: Path | None = None
    labeled: tuple[str, ...] = ()
    """Benchmark budgets; empty: all labels, beside the cases that have none."""
    draws: tuple[int, ...] = (0,)
    folds: tuple[str, ...] = ("0",)
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    """None: the plan's."""
    preset: str | None = None
    device: str = "auto"
    settings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Method, or method:variant → setting → value, as text. Variants take those of their method as well."""
    full_labels: bool = False
    """Also `supervised` with all labels, in the same folds and with the same seeds."""
    jobs: int = 1
    num_workers: int | None = None


@dataclass(frozen=True)
class RowKey:
    """One row of the table: a way of training, over its draws, folds and seeds."""

    role: Role
    method: str
    """With its variant, if it is one."""
    labeled: str | None
    """Budget; None: all labels."""

    def __str__(self) -> str:
        return f"{self.method}, {self.labeled or 'all'} labels"


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """One training of one fold that the table needs."""

    row: RowKey
    draw: int | None
    """None where there is no budget."""
    fold: str
    seed: int
    spec: RunSpec
    folder: Path
    """Of the run; other folds may lie beside this one."""
    asked_steps: int
    """A method may multiply them: its rounds may get all of them each."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """As given."""

    @property
    def fold_folder(self) -> Path:
        """Where this fold is trained."""
        return self.folder / f"fold_{self.fold}"

    @property
    def summary(self) -> Path:
        """Written last: the scores of the validation cases."""
        return self.fold_folder / "validation" / "summary.json"

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to be done: trained, predicted and scored."""
        return fold_state(self.fold_folder) == "finished" and self.summary.is_file()

    def __str__(self) -> str:
        draw = "" if self.draw is None else f"draw {self.draw}, "
        return f"{self.row}, {draw}fold {self.fold}, seed {self.seed}"


@dataclass(frozen=True)
class BenchmarkPlan:
    """A checked request: all the runs of the table, those of the twin first."""

    request: BenchmarkRequest
    workspace: Workspace
    runs: tuple[PlannedRun, ...]
    setups: tuple[RunSetup, ...]
    """One per budget and draw, and one for all labels; of the twin, with all the folds."""

    @property
    def rows(self) -> list[RowKey]:
        """In the order of the table: per budget the twin and the methods, at the end full labels."""
        return list(dict.fromkeys(run.row for run in self.runs))

    @property
    def dataset(self) -> str:
        """Full name."""
        return self.setups[0].raw.name

    @property
    def preset(self) -> str:
        """Of the plans."""
        return self.setups[0].plans.preset

    @property
    def steps(self) -> int:
        """Asked for, of every run."""
        return self.runs[0].asked_steps

    @property
    def device(self) -> str:
        """Where everything is trained."""
        return self.setups[0].device

    @property
    def one_thread_each(self) -> bool:
        """Several trainings side by side on a CPU get one thread each."""
        return self.request.jobs > 1 and self.device == "cpu"

    @property
    def classes(self) -> list[str]:
        """Foreground classes or regions, in output order."""
        return list(self.setups[0].schema.foreground)

    @cached_property
    def patients(self) -> dict[str, str]:
        """Case → patient."""
        return {case.id: case.patient for case in self.setups[0].raw.cases}

    @property
    def name(self) -> str:
        """Of the benchmark: configuration, preset, budgets, draws, folds and steps. Methods and seeds may grow."""
        request = self.request
        budgets = "-".join(request.labeled) or "all"
        draws = f"_draw-{'-'.join(map(str, request.draws))}" if request.labeled else ""
        folds = "-".join(dict.fromkeys(run.fold for run in self.runs))
        return f"{request.configuration}__{self.preset}__labeled-{budgets}{draws}__fold-{folds}__steps-{self.steps}"


def plan_benchmark(request: BenchmarkRequest) -> BenchmarkPlan:
    """Looks up and checks everything; writes nothing but splits that are drawn the first time.

    Raises:
        InvalidInput: with all problems together: unknown names, folds and settings, budgets that cannot be met, needs
            of a method that the data does not meet, runs on disk that were made with another specification.
    """
    problems = Problems()
    request = _without_repeats(request)
    _check_methods(request, problems)
    _check_place(request, problems)
    problems.stop()
    twins = [problems.catch(_resolve, request, ("all",), TWIN, *budget) for budget in _budgets(request)]
    problems.stop()
    request = replace(request, folds=_folds(request, [twin for twin in twins if twin], problems))
    problems.stop()
    runs, setups = [], []
    for key, budget, draw in _rows(request):
        setup = problems.catch(_resolve, request, request.folds, key.method, budget, draw)
        if setup is not None:
            runs += _runs_of(setup, key, draw, request)
            setups += [setup] if key.role != "method" else []
    problems.stop()
    _refuse_other_runs(runs, problems)
    problems.stop("made with another specification, so not comparable; nothing was run:")
    workspace = Workspace.locate(request.workspace)
    return BenchmarkPlan(request, workspace, tuple(runs), tuple(setups))


def _without_repeats(request: BenchmarkRequest) -> BenchmarkRequest:
    """Each name once, in the order given; the twin is not among the methods."""
    return replace(
        request,
        methods=tuple(name for name in dict.fromkeys(request.methods) if name != TWIN),
        labeled=tuple(dict.fromkeys(request.labeled)),
        draws=tuple(dict.fromkeys(request.draws)),
        folds=tuple(dict.fromkeys(request.folds)),
        seeds=tuple(dict.fromkeys(request.seeds)),
    )


def _check_methods(request: BenchmarkRequest, problems: Problems) -> None:
    """Names of methods and settings."""
    names = (TWIN, *request.methods)
    for name in names:
        method = problems.catch(method_class, _method(name))
        if method is not None:
            problems.catch(make_settings, method, _given(request, name))
            if ":" in name and _given(request, name) == _given(request, _method(name)):
                settings = f"--set {name}.SETTING=VALUE"
                fix = f"give the variant settings with {settings}, or leave it out"
                problems.add(f"'{name}' has the settings of {_method(name)}", "settings of its own", fix)
    known = dict.fromkeys([*names, *map(_method, names)])
    for name in request.settings:
        if name not in known:
            fix = "correct the name, or add the method with -m"
            problems.add(f"--set names method '{name}'", f"one of {nearest(name, known)}", fix)


def _check_place(request: BenchmarkRequest, problems: Problems) -> None:
    """Dataset, plans, configuration, device, and options that contradict."""
    workspace = Workspace.locate(request.workspace)
    dataset = problems.catch(workspace.find_dataset, request.dataset)
    if dataset is not None:
        plans = problems.catch(find_plans, workspace.preprocessed_folder(dataset), request.preset)
        if plans is not None:
            problems.catch(plans.configuration, request.configuration)
    problems.catch(resolve_device, request.device)
    if request.full_labels and not request.labeled:
        fix = "add --labeled N, or leave --full_labels out"
        problems.add("--full_labels without --labeled", "a budget to compare all labels with", fix)
    if request.steps is not None and request.steps < 1:
        problems.add(f"--steps {request.steps}", "at least 1", "give a positive number")


def _budgets(request: BenchmarkRequest) -> list[tuple[str | None, int | None]]:
    """Budget and draw of all splits; (None, None) is the default split."""
    budgets: list[tuple[str | None, int | None]] = [(b, draw) for b in request.labeled for draw in request.draws]
    return budgets + ([(None, None)] if request.full_labels or not budgets else [])


def _rows(request: BenchmarkRequest) -> Iterator[tuple[RowKey, str | None, int | None]]:
    """Row, budget and draw, in the order of the table."""
    for budget, draw in _budgets(request):
        full = request.full_labels and budget is None
        for name in [TWIN] if full else [TWIN, *request.methods]:
            role: Role = "full labels" if full else "twin" if name == TWIN else "method"
            yield RowKey(role, name, budget), budget, draw


def _folds(request: BenchmarkRequest, setups: Iterable[RunSetup], problems: Problems) -> tuple[str, ...]:
    """The folds as numbers; all of the wrong ones are reported."""
    known = [str(number) for number in range(min(len(setup.split.folds) for setup in setups))]
    if request.folds == (ALL_FOLDS,) and known:
        return tuple(known)
    for fold in request.folds:
        if fold not in known:
            found = f"fold '{fold}'" + (" has no validation cases" if fold == "all" else " does not exist")
            fix = "choose among these; all_folds, alone, takes each of them"
            problems.add(found, f"one of {', '.join(known) or '(the dataset has none)'}", fix)
    return request.folds


def _method(name: str) -> str:
    """Of a method or a variant of it."""
    return name.partition(":")[0]


def _given(request: BenchmarkRequest, name: str) -> dict[str, str]:
    """Settings of a method or variant that are not the defaults, as text."""
    method, _, variant = name.partition(":")
    without = method_class(method).ablation if variant == ABLATION else {}
    return {**request.settings.get(method, {}), **without, **(request.settings.get(name, {}) if variant else {})}


def _resolve(
    request: BenchmarkRequest, folds: tuple[str, ...], method: str, budget: str | None, draw: int | None
) -> RunSetup:
    return resolve(
        TrainRequest(
            dataset=request.dataset,
            configuration=request.configuration,
            folds=folds,
            method=_method(method),
            workspace=request.workspace,
            preset=request.preset,
            steps=request.steps,
            labeled=budget,
            draw=draw or 0,
            device=request.device,
            settings=dict(_given(request, method)),
        )
    )


def _runs_of(setup: RunSetup, row: RowKey, draw: int | None, request: BenchmarkRequest) -> list[PlannedRun]:
    """Of one row and draw: every seed and fold."""
    steps = request.steps or setup.plans.semi_supervised.total_steps
    total = setup.method.total_steps(steps, setup.settings)
    runs = []
    for seed in request.seeds:
        spec = replace(setup, request=replace(setup.request, seed=seed)).spec(total)
        folder = run_folder(setup.workspace, spec)
        given = _given(request, row.method)
        runs += [PlannedRun(row, draw, fold, seed, spec, folder, steps, given) for fold in request.folds]
    return runs


def _refuse_other_runs(runs: Iterable[PlannedRun], problems: Problems) -> None:
    """A run with another specification under the same name cannot stand in the table."""
    for run in {run.folder: run for run in runs}.values():
        if not run.folder.is_dir() or not any(run.folder.iterdir()):
            continue
        stored = problems.catch(read_run, run.folder)
        if stored is None:
            continue
        started = [fold for fold in run.spec.folds if fold_state(run.folder / f"fold_{fold}") != "absent"]
        # how many unlabeled patches fit into memory is decided by the training itself, not asked for
        asked = run.spec.model_copy(update={"unlabeled_batch_size": stored.unlabeled_batch_size})
        for problem in spec_differences(stored, asked, started):
            fix = "ask for what it was made with, or move the run's folder away to have it made again"
            problems.add(problem.found, problem.expected, fix, run.folder)
