"""Sees to it that what a training reads is there and as it was written."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from autossl.data.parallel import usable_cpus
from autossl.data.problems import InvalidInput, Problem
from autossl.planners.plan_and_preprocess import Progress, find_plans, preprocess_planned
from autossl.trainers.setup import RunSetup

logger = logging.getLogger(__name__)


def provide_cases(setup: RunSetup, on_progress: Progress | None = None) -> None:
    """Makes sure that all cases are preprocessed with the run's plans.

    Only a budget split on CT has numbers of its own and is preprocessed here; else what is missing is an error.

    Raises:
        InvalidInput: cases that autossl_plan_and_preprocess has not made.
    """
    folder, configuration = setup.workspace.preprocessed_folder(setup.raw.name), setup.request.configuration
    if setup.plans.data_hash(configuration) != find_plans(folder, setup.plans.preset).data_hash(configuration):
        logger.info("%s: CT is preprocessed with the intensities of its own labeled cases", setup.split.name)
        wanted = (configuration,)
        preprocess_planned(setup.raw, setup.fingerprint, setup.plans, wanted, folder, on_progress=on_progress)
    _check_preprocessed(setup)


def _check_preprocessed(setup: RunSetup) -> None:
    wanted = {case: True for cases in setup.folds.values() for case in (*cases.labeled, *cases.validation)}
    wanted = {case: False for cases in setup.folds.values() for case in cases.unlabeled} | wanted
    missing = sorted(case for case, labeled in wanted.items() if not setup.store.has(case, labeled))
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        configuration = setup.request.configuration
        command = f"autossl_plan_and_preprocess -d {setup.raw.name} --preset {setup.plans.preset}"
        raise InvalidInput(
            Problem(
                f"{len(missing)} of {len(wanted)} cases are not preprocessed for {configuration}: {shown}",
                f"all of them in {setup.store.folder}",
                f"run {command} -c {configuration}",
            )
        )
    _check_undamaged(setup, wanted)


def _check_undamaged(setup: RunSetup, wanted: Mapping[str, bool]) -> None:
    """Reads all that the folds will use and compares it with its checksums; the reading also fills the disk cache."""

    def damages(case: str) -> dict[Path, str]:
        return setup.store.damaged(case, wanted[case])

    with ThreadPoolExecutor(usable_cpus()) as threads:
        found = [item for of_case in threads.map(damages, sorted(wanted)) for item in of_case.items()]
    command = f"autossl_plan_and_preprocess -d {setup.raw.name} --preset {setup.plans.preset}"
    fix = f"run {command} -c {setup.request.configuration}: it makes what is damaged again"
    if found:
        expected = "a preprocessed file as it was written"
        raise InvalidInput([Problem(damage, expected, fix, file=path) for path, damage in found])
