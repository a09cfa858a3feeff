"""The commands that are killed, and where each starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DATASET = "Dataset999_Phantom"
STEPS = 24
"""A line of log in each, a checkpoint in every second."""
PLANNED, PREPARED, TRAINED = "plan", "preprocess", "train supervised"


@dataclass(frozen=True)
class Scenario:
    """A command that is killed and called again until it is done."""

    name: str
    base: str | None
    """The scenario whose final state it starts from; None: the raw dataset."""
    words: tuple[str, ...]
    """Command and arguments; {workspace} is filled in."""
    weight: float
    """Its share of the kills."""
    worker_option: str | None = None
    """Given, each call takes 0, 1 or 2 workers."""
    in_sample: bool = True

    def call(self, workspace: Path, workers: int) -> list[str]:
        """The words of one call."""
        more = [self.worker_option, str(workers)] if self.worker_option else []
        return [word.format(workspace=workspace) for word in self.words] + more


def _train(method: str, weight: float, configuration: str = "2d", in_sample: bool = True) -> Scenario:
    run = f"{DATASET} {configuration} 0 -m {method}"
    words = f"autossl_train {run} --preset nano --steps {STEPS} --device cpu --resume -q"
    at = ("--workspace", "{workspace}")
    return Scenario(f"train {method}", PREPARED, (*words.split(), *at), weight, "--num_workers", in_sample)


def _prepare(name: str, base: str | None, weight: float, *more: str) -> Scenario:
    words = f"autossl_plan_and_preprocess -d {DATASET} -c 2d 3d_fullres --preset nano -q".split()
    return Scenario(name, base, (*words, "--workspace", "{workspace}", *more), weight, "-np")


def _predict(weight: float) -> Scenario:
    images, output = f"{{workspace}}/raw/{DATASET}/imagesTs", "{workspace}/predictions"
    words = f"autossl_predict -d {DATASET} -m supervised --save_probabilities --resume --device cpu -q".split()
    return Scenario("predict", TRAINED, (*words, "-i", images, "-o", output, "--workspace", "{workspace}"), weight)


def _run(weight: float) -> Scenario:
    words = f"autossl_run {DATASET} -c 2d -m mean_teacher --preset nano --labeled 5 --steps 4 --num_workers 0"
    more = "-np 0 -n 2 --device cpu -q --workspace {workspace}"
    return Scenario("run", None, (*words.split(), *more.split()), weight, in_sample=False)


SCENARIOS = (
    _prepare(PLANNED, None, 10, "--no_preprocessing"),
    _prepare(PREPARED, PLANNED, 15),
    _train("supervised", 10),
    _train("mean_teacher", 14),
    _train("self_training", 18),
    _train("m_and_n", 5, "3d_fullres", in_sample=False),
    _train("bcp", 8, in_sample=False),
    _train("cps", 8, in_sample=False),
    _train("spcl", 10, in_sample=False),
    _predict(15),
    _run(6),
)
"""Nothing, an EMA teacher, rounds with a store on disk, the same with crops by it, phases, two networks, banks."""
