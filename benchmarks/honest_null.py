"""How often the verdict says *helped* where nothing helped, and how much power it has.

- *null*: supervised runs that differ in nothing but the seed, on all folds of a deployment split. Every pair is judged
  as if one of them were a method. The share of *helped* is how often a user would be fooled. A pair in the other order
  is the same but for its sign, so half the share of pairs whose interval leaves out zero is the steadier figure.
- *power*: a gain is planted on samples without any effect, the gain 0 among them. (a) Independent patients: their
  differences are drawn from all patients of all pairs, around their pair's mean. There the paired t-test holds, and the
  verdict may have little less power. (b) Folds and patients: means of folds, freed of what their patients explain, and
  deviations from them are drawn. (c) The pairs as they are. In (b) and (c) the t-test over patients has power that it
  is not entitled to, as its share of false alarms at gain 0 shows; that over the means of the folds holds everywhere.

Trainings are resumed and finished ones are used again, so the script may be stopped and called again at any time. They
carry a tag of their own, and the commands that compare methods leave them alone.

    python benchmarks/honest_null.py --workspace W -d Hippocampus -c 2d --preset nano --labeled 20 --steps 300 -o F.json
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from autossl.data.files import read_json, write_json
from autossl.data.provenance import Written
from autossl.data.raw_dataset import read_raw_dataset
from autossl.data.runs import FoundRun, RunFilter, find_runs
from autossl.data.splits import split_name
from autossl.data.workspace import Workspace
from autossl.evaluation.benchmark.provenance import machine
from autossl.evaluation.resampling import Case, draw_resamples, spread_of
from autossl.evaluation.statistics import PairedSample
from autossl.evaluation.verdict import judge_pair, patient_means

Array = npt.NDArray[np.float64]

TAG = "honest-null"
GAINS = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05)
"""Planted, in Dice; the issue asks for 0.03."""
SIMULATED = 4000
RESAMPLES = 2000
LARGEST_SHARE, LARGEST_LOSS = 0.05, 0.03


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is missing, judges all pairs, and writes the figures."""
    arguments = _parser().parse_args(argv)
    workspace = Workspace.locate(arguments.workspace)
    dataset = workspace.find_dataset(arguments.dataset)
    split = split_name("deployment", arguments.labeled, arguments.draw)
    if not arguments.judge_only:
        _train(arguments, workspace, dataset, split)
    runs = finished_runs(workspace, dataset, split, arguments)
    if len(runs) < 2:
        print(f"{len(runs)} runs are finished, 2 make a pair")
        return 1
    patients = {case.id: case.patient for case in read_raw_dataset(workspace.raw_folder(dataset)).cases}
    dice, cases, classes = read_dice(runs, patients)
    content = {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        "dataset": dataset,
        "split": split,
        "configuration": arguments.configuration,
        "preset": runs[0].spec.preset,
        "steps": runs[0].spec.total_steps,
        "seeds": [run.spec.seed for run in runs],
        "machine": machine("cpu"),
        **figures(dice, cases, classes),
        "written": Written.now().model_dump(mode="json"),
    }
    write_json(arguments.output, content)
    print(summary(content))
    print(arguments.output)
    return 0


def figures(dice: Array, cases: Sequence[Case], classes: Sequence[str]) -> dict[str, Any]:
    """All that is said of runs which differ in their seed.

    Args:
        dice: [runs, cases, classes] out of fold, NaN where undefined.
        cases: Fold and patient of each case.
        classes: Their names.
    """
    pairs = list(combinations(range(len(dice)), 2))
    differences = [dice[one] - dice[other] for one, other in pairs]
    per_patient = np.array([patient_means(values[None], cases) for values in differences])
    units = list(dict.fromkeys(cases))
    return {
        "n_runs": len(dice),
        "n_pairs": len(pairs),
        "n_patients": per_patient.shape[1],
        "mean_dice": [float(np.nanmean(np.nanmean(run, 0))) for run in dice],
        "null": null_shares(differences, per_patient, cases, classes),
        "spread": measured_spread(per_patient, [fold for fold, _ in units]),
        "power": {
            "independent patients": planted(_independent(per_patient), units),
            "folds and patients": planted(_with_folds(per_patient, units), units),
            "pairs as they are": planted(np.concatenate([per_patient, -per_patient]), units),
        },
    }


def null_shares(
    differences: Sequence[Array], per_patient: Array, cases: Sequence[Case], classes: Sequence[str]
) -> dict[str, Any]:
    """Share of pairs by word, overall and per class, and what the paired t-test says of them."""
    verdicts = [judge_pair(_sample(values, cases), classes) for values in differences]
    words = [verdict.word for verdict in verdicts]
    helped, hurt = words.count("helped") / len(words), words.count("hurt") / len(words)
    below = stats.ttest_1samp(per_patient, 0, axis=1).pvalue < 0.05
    return {
        "helped": helped,
        "hurt": hurt,
        "helped_over_both_orders": (helped + hurt) / 2,
        "helped_per_class": {
            name: sum(verdict.per_class[name].word == "helped" for verdict in verdicts) / len(words) for name in classes
        },
        "t_test_helped": float((below & (per_patient.mean(1) > 0)).mean()),
        "t_test_over_both_orders": float(below.mean() / 2),
        "largest_allowed": LARGEST_SHARE,
        "estimates": [verdict.estimate for verdict in verdicts],
        "words": words,
    }


def measured_spread(per_patient: Array, folds: Sequence[Any]) -> dict[str, float]:
    """Standard deviations of paired differences: over patients, and what of it belongs to patients and to folds.

    Args:
        per_patient: [pairs, patients].
        folds: Of each patient.
    """
    names = list(dict.fromkeys(folds))
    member = np.array([[fold == name for fold in folds] for name in names], dtype=float)
    sizes, n = member.sum(1), len(folds)
    means = per_patient @ member.T / sizes
    # runs that differ in the seed have no effect in expectation: zero is the mean, and every fold counts
    between = float((sizes * means**2).sum(1).mean() / len(names))
    within = float(((per_patient - means @ member) ** 2).sum(1).mean() / (n - len(names)))
    fold_variance = max(0.0, (between - within) / float((sizes**2).sum() / n))
    return {
        "standard_deviation": float(per_patient.std(1, ddof=1).mean()),
        "of_patients": math.sqrt(within),
        "of_folds": math.sqrt(fold_variance),
        "share_of_trainings": fold_variance / (fold_variance + within) if within > 0 else 0.0,
        "between_over_within": between / within if within > 0 else math.inf,
    }


def planted(per_patient: Array, units: Sequence[Case], gains: Sequence[float] = GAINS) -> dict[str, Any]:
    """Share of samples in which a gain is found, by the verdict and by the paired t-test.

    Args:
        per_patient: [samples, patients] without any effect.
        units: Fold and patient of each column.
        gains: In Dice.
    """
    resamples = draw_resamples(units, 1, RESAMPLES)
    spreads = [spread_of(row[None, :, None], units) for row in per_patient]
    lows = np.array([spread.estimate + np.percentile(spread.errors(resamples), 2.5) for spread in spreads])
    member = np.array([[fold == name for fold, _ in units] for name in dict.fromkeys(fold for fold, _ in units)])
    lows_of = {
        "verdict": lows,
        "t_test": _t_lows(per_patient),
        "t_test_of_folds": _t_lows(per_patient @ member.T / member.sum(1)),
    }
    found = []
    for gain in (0.0, *gains):
        shares = {name: float((values + gain > 0).mean()) for name, values in lows_of.items()}
        found.append({"gain": gain, **shares, "loss": shares["t_test"] - shares["verdict"]})
    return {"n_samples": len(per_patient), "gains": found, "largest_allowed_loss": LARGEST_LOSS}


def finished_runs(workspace: Workspace, dataset: str, split: str, arguments: argparse.Namespace) -> list[FoundRun]:
    """The runs of this script that are trained and scored on all their folds, by seed."""
    wanted = RunFilter(arguments.configuration, arguments.preset, "supervised", tag=TAG, split=split)
    runs = [run for run in find_runs(workspace, dataset, wanted) if run.spec.total_steps == arguments.steps]
    n_folds = max((len(run.spec.folds) for run in runs), default=0)
    whole = [run for run in runs if len(run.spec.folds) == n_folds and all(p.is_file() for p in _summaries(run))]
    return sorted(whole, key=lambda run: run.spec.seed)[: arguments.runs]


def read_dice(runs: Sequence[FoundRun], patients: dict[str, str]) -> tuple[Array, list[Case], list[str]]:
    """[runs, cases, classes], fold and patient of the cases, and the classes."""
    scores = [
        {case: entry for path in _summaries(run) for case, entry in read_json(path)["cases"].items()} for run in runs
    ]
    fold_of = {case: fold for fold, entry in runs[0].spec.folds.items() for case in entry.validation}
    cases = sorted(fold_of)
    classes = list(next(iter(scores[0].values())))
    dice = [[[_number(run[case][name]["dice"]) for name in classes] for case in cases] for run in scores]
    return np.array(dice), [(fold_of[case], patients.get(case, case)) for case in cases], classes


def summary(content: dict[str, Any]) -> str:
    """In a few lines."""
    null, spread = content["null"], content["spread"]
    lines = [
        f"{content['n_runs']} runs of {content['steps']} steps, {content['n_pairs']} pairs, {content['n_patients']} "
        f"patients, mean Dice {np.mean(content['mean_dice']):.3f}",
        f"helped: {null['helped']:.1%} of the pairs, {null['helped_over_both_orders']:.1%} over both orders (at most "
        f"{null['largest_allowed']:.0%}); paired t-test: {null['t_test_helped']:.1%}, "
        f"{null['t_test_over_both_orders']:.1%}",
        f"spread of paired differences: {100 * spread['standard_deviation']:.2f} points, of patients "
        f"{100 * spread['of_patients']:.2f}, of trainings {100 * spread['of_folds']:.2f} "
        f"({spread['share_of_trainings']:.0%} of the variance)",
    ]
    for name, entry in content["power"].items():
        lines += [
            f"{name}, gain {100 * row['gain']:.1f} points: found in {row['verdict']:.1%}, paired t-test "
            f"{row['t_test']:.1%} ({100 * row['loss']:+.1f} points less), over folds {row['t_test_of_folds']:.1%}"
            for row in entry["gains"]
        ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path)
    parser.add_argument("-d", "--dataset", required=True)
    parser.add_argument("-c", "--configuration", default="2d")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--labeled", default="20", help="of the deployment split")
    parser.add_argument("--draw", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side, one thread each")
    parser.add_argument("--judge_only", action="store_true", help="train nothing, judge what is finished")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="F.json")
    return parser


def _train(arguments: argparse.Namespace, workspace: Workspace, dataset: str, split: str) -> None:
    """All runs that are not finished; the first one alone, because it makes the split."""
    done = {run.spec.seed for run in finished_runs(workspace, dataset, split, arguments)}
    missing = [seed for seed in range(arguments.runs) if seed not in done]
    print(f"{len(done)} of {arguments.runs} runs are finished")

    def train(seed: int) -> None:
        words = [
            str(Path(sys.executable).parent / "autossl_train"),
            dataset,
            arguments.configuration,
            "all_folds",
            "-q",
        ]
        words += ["-m", "supervised", "--preset", arguments.preset, "--steps", str(arguments.steps), "--tag", TAG]
        words += ["--labeled", arguments.labeled, "--draw", str(arguments.draw), "--deployment", "--seed", str(seed)]
        words += ["--resume", "--num_workers", "0", "--device", "cpu", "--workspace", str(workspace.root)]
        subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        print(f"seed {seed} is finished", flush=True)

    for seed in missing[:1]:
        train(seed)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(train, missing[1:]))


def _sample(differences: Array, cases: Sequence[Case]) -> PairedSample:
    """[cases, classes] as a sample with one training per fold."""
    folds = list(dict.fromkeys(fold for fold, _ in cases))
    values = np.full((len(folds), *differences.shape), math.nan)
    for number, (fold, _) in enumerate(cases):
        values[folds.index(fold), number] = differences[number]
    return PairedSample(values, tuple((0, fold) for fold in folds), tuple(cases))


def _independent(per_patient: Array) -> Array:
    """[SIMULATED, patients]: differences around their pair's mean, of random pairs and patients, with random sign."""
    generator = np.random.default_rng(0)
    n = per_patient.shape[1]
    centered = (per_patient - per_patient.mean(1, keepdims=True)) * math.sqrt(n / (n - 1))
    return generator.choice(centered.ravel(), (SIMULATED, n)) * generator.choice([-1.0, 1.0], (SIMULATED, n))


def _with_folds(per_patient: Array, units: Sequence[Case]) -> Array:
    """[SIMULATED, patients]: drawn fold effects with the measured variance, and drawn deviations from fold means."""
    generator = np.random.default_rng(1)
    folds = [fold for fold, _ in units]
    spread = measured_spread(per_patient, folds)
    member = np.array([[fold == name for fold in folds] for name in dict.fromkeys(folds)], dtype=float)
    means = per_patient @ member.T / member.sum(1)
    deviations = per_patient - means @ member
    effects = means / math.sqrt(float((means**2).mean()) or 1.0) * spread["of_folds"]
    deviations = deviations / math.sqrt(float((deviations**2).mean()) or 1.0) * spread["of_patients"]
    drawn = generator.choice(effects.ravel(), (SIMULATED, len(member))) @ member
    drawn = drawn + generator.choice(deviations.ravel(), (SIMULATED, len(folds)))
    return np.asarray(drawn * generator.choice([-1.0, 1.0], (SIMULATED, 1)))


def _t_lows(values: Array) -> Array:
    """Lower ends of the 95 % t-intervals of the rows' means."""
    n = values.shape[1]
    half = stats.t.ppf(0.975, n - 1) * values.std(1, ddof=1) / math.sqrt(n)
    return np.asarray(values.mean(1) - half)


def _summaries(run: FoundRun) -> Iterator[Path]:
    return (run.folder / f"fold_{fold}" / "validation" / "summary.json" for fold in run.spec.folds)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


if __name__ == "__main__":
    sys.exit(main())
