"""Writes docs/methods.md and the README's table of methods from the registry and from what was measured.

python docs/methods_page.py           writes both
python docs/methods_page.py --check   only says whether they are up to date (exit code 1: they are not)
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from autossl.trainers.describe import MethodDescription, describe_methods
from autossl.trainers.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COSTS = {dims: RESULTS / f"method_costs_hippocampus_{name}.json" for dims, name in ((2, "2d"), (3, "3d_fullres"))}
GAINS = {
    "hippocampus_2d": "",
    "founders_hippocampus_2d": "",
    "hippocampus_3d_fullres": "3D",
    "fetal_head_2d": "fetal head",
    "lgg_2d": "LGG",
    "lgg_flair_2d": "LGG, to FLAIR alone",
    "longer_hippocampus_2d": "3000 steps",
    "ablations_hippocampus_2d": "seed 0",
}
"""Tables of autossl_benchmark, each against its own twin, and a mark for gains that are not of hippocampus in 2D.
By benchmarks/tables.sh: nano, fold 0, 8 labels, 1000 steps, where the mark says nothing else; seeds 0 to 2 in the first
two, seed 0 in the others."""
FORCED = "ersr"
"""Its needs are not met by hippocampus, whose figure is shown all the same."""
TERMS = {
    "founders_hippocampus_2d": "hippocampus in 2D",
    "hippocampus_3d_fullres": "hippocampus in 3D",
    "fetal_head_2d": "fetal heads",
    "lgg_2d": "LGG",
    "lgg_flair_2d": "LGG",
}
"""Results of benchmarks/special_terms.py, from the runs of the tables, and how they are called."""
LITTLE = 0.01
WHY_LITTLE = {
    ("c3s3", "contrast"): "a tenth of the released weight, with which networks from scratch learn nothing; it compares "
    "15 % of the voxels, from a quarter of the run on",
    ("criinet", "consistency"): "the refined output differs from the coarse one in 0.3 % of the voxels, so there is "
    "little to agree on",
    ("medl", "fisher"): "the information of a Dirichlet distribution enters with 0.001, since above 0.1 it would "
    "outweigh the labels, and the whole term ramps up to a tenth",
    ("transmedseg", "tsa"): "what the augmentation adds to the cross-entropy of the same voxels, which is `clean`: its "
    "strength grows from 0 to a quarter",
    (
        "semi_cml",
        "consistency",
    ): "a mean squared difference of probabilities, whose ramp would end at 2.47 of the run: its weight grows to 0.006",
    ("semi_cml", "relearning_contrast"): "its weight is 0.01, beside 0.9 of the soft pseudo-labels",
}
"""Why a term has under 1 % of the gradient, by method and term."""
DEVELOPMENT = RESULTS / "development_hippocampus_2d.json"
"""Single runs, most of them on fold 1, that settings were chosen by."""
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Advice:
    """What the registry does not know: how to say it in a few words, and when to take it."""

    unlabeled_teach_by: str
    predicts_with: str
    when: str


ADVICE = {
    "supervised": Advice(
        "nothing: the twin that every other method is compared with", "one network", "no unlabeled scans"
    ),
    "entropy_min": Advice("being predicted with certainty", "one network", "a baseline"),
    "mean_teacher": Advice("agreement with the moving average of the weights", "student", "the usual first comparison"),
    "uamt": Advice("the same, where the teacher is certain over noisy passes", "student", "noisy or ambiguous borders"),
    "urpc": Advice("agreement of the levels of deep supervision", "one network", "no second network"),
    "dtc": Advice("agreement of mask and signed distance", "one network", "compact structures"),
    "mcnet": Advice("agreement of decoders that up-sample differently", "one decoder", "thin or hard regions"),
    "bcp": Advice("being pasted into labeled patches, and the reverse", "student", "very few labels; cheap"),
    "self_training": Advice("whole-case pseudo-labels, filtered, over rounds", "last round's network", "many scans"),
    "fixmatch": Advice("confident labels of the weak view for a strong, mixed view", "one network", "few labels"),
    "unimatch": Advice("the same with two strong views and perturbed features", "one network", "memory to spare"),
    "cps": Advice("two networks that label for each other", "mean of two networks", "ensembling anyway"),
    "fsmifnet": Advice(
        "likeness of their deep features, and mixtures as images and as feature maps",
        "student",
        "varied unlabeled scans",
    ),
    "mcl_cs": Advice(
        "two disturbed networks that label for each other; contrast of cells and voxels",
        "mean of two networks",
        "borders",
    ),
    "spcl": Advice("looking like patches of the same place, patient or phase", "one network", "1 to 4 labels"),
    "m_and_n": Advice(
        "a 2D network pretrained on photographs and a 3D one that label for each other", "3D network", "3D"
    ),
    "ersr": Advice("labels made elliptic, and symmetry about the long axis", "student", "elliptic targets in 2D"),
    "m3hl": Advice("exchanging cells of a grid with labeled ones; features at two depths", "student", "few labels"),
    "c3s3": Advice(
        "the better of two networks teaching the other, contrast where they differ", "mean of both", "borders"
    ),
    "transmedseg": Advice(
        "lending their spread of features to labeled ones", "student", "unlabeled scans from elsewhere"
    ),
    "medl": Advice("fused evidence of two different networks", "mean of both", "uncertainty wanted; no regions"),
    "cad": Advice(
        "doubtful regions replaced by trusted ones, two networks", "first student", "memory and time to spare"
    ),
    "semi_cml": Advice(
        "two modalities that find areas of the same shape", "better modality", "two registered channels"
    ),
    "criinet": Advice("the coarse prediction following the refined one", "refined output", "low contrast"),
}


@dataclass(frozen=True)
class Gain:
    """One row of one table."""

    table: str
    labeled: str
    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        """Points of Dice above the twin with the 95 % interval."""
        estimate, low, high = (f"{100 * x:+.1f}" for x in (self.estimate, self.low, self.high))
        return re.sub(r"[+-]0\.0\b", "0.0", f"{estimate} [{low}, {high}]")

    def marked(self, name: str) -> str:
        """With the data where they are not the usual ones."""
        marks = [GAINS[self.table]] if GAINS[self.table] else []
        if self.labeled != "8":
            marks.append(f"{self.labeled} labels")
        if name.split(":")[0] == FORCED and not GAINS[self.table]:
            marks.append("forced")
        return f"{self} ({', '.join(marks)})" if marks else str(self)


Gains = dict[str, list[Gain]]
"""By method or variant ("cps", "cps:ablation"), in the order of the tables."""


def measured_gains() -> Gains:
    """Everything that was measured."""
    found: Gains = {}
    for table in GAINS:
        path = RESULTS / f"table_{table}.json"
        for row in json.loads(path.read_text())["rows"] if path.is_file() else []:
            if row["role"] == "method" and (to_twin := row["to_twin"]):
                figures = (to_twin[key] for key in ("estimate", "low", "high"))
                found.setdefault(row["method"], []).append(Gain(table, row["labeled"], *figures))
    return found


def gain(name: str, gains: Gains) -> str:
    """All that was measured of a method; its one-seed row beside the ablation only where three seeds were not run."""
    if name == "supervised":
        return "-"
    rows = gains.get(name, [])
    main = [row for row in rows if not row.table.startswith("ablations")]
    if all(GAINS[row.table] for row in main):  # hippocampus in 2D is there by one seed alone
        main = rows
    return ", ".join(row.marked(name) for row in main) or NOT_RUN


def without(name: str, gains: Gains) -> str:
    """The ablation beside the full method of the same runs' table."""
    variant = f"{name}:ablation"
    beside = {(row.table, row.labeled): row for row in gains.get(name, [])}
    return (
        "; ".join(
            f"{off.marked(variant)}, with it {beside.get((off.table, off.labeled), NOT_RUN)}"
            for off in gains.get(variant, [])
        )
        or NOT_RUN
    )


def costs(kind: str) -> dict[str, str]:
    """Factor in 2D / 3D by method; "-" where it was not measured or the method has no such form."""
    read = {dims: json.loads(path.read_text())["methods"] for dims, path in COSTS.items()}

    def one(dims: int, name: str) -> str:
        found = read[dims].get(name)
        return f"{found[kind]:.1f}" if found else "-"

    return {name: f"{one(2, name)} / {one(3, name)}" for name in METHODS}


def readme_table() -> str:
    """One line per method."""
    time, memory, gains = costs("time_factor"), costs("memory_factor"), measured_gains()
    lines = [
        "| method | the unlabeled patches teach by | predicts with | time 2D / 3D | memory 2D / 3D | gain, points | "
        "when to take it |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in METHODS:
        said = ADVICE[name]
        lines.append(
            f"| `{name}` | {said.unlabeled_teach_by} | {said.predicts_with} | {time[name]} | {memory[name]} | "
            f"{gain(name, gains)} | {said.when} |"
        )
    return "\n".join(lines)


def care() -> str:
    """What the gains must be read beside: how much the twin itself gains from longer training."""
    runs = [run for run in json.loads(DEVELOPMENT.read_text())["runs"]["runs"] if "fold 0" not in run.get("note", "")]

    def dice(method: str, steps: int = 1000, **changed: float) -> float:
        return next(
            float(run["mean_dice"])
            for run in runs
            if (run["method"], run["steps"], run["changed_settings"]) == (method, steps, changed)
        )

    rows = json.loads((RESULTS / "table_founders_hippocampus_2d.json").read_text())["rows"]
    mixed = sorted(run["mean_dice"] for row in rows if row["method"] == "m3hl" for run in row["runs"])
    short, long = dice("supervised"), dice("supervised", 3000)
    return f"""\
1000 steps do not exhaust 8 labels: on fold 1 the twin reaches {short:.4f} with them and {long:.4f} with 3000,
{100 * (long - short):+.1f} points. So a method that gives the labels more weight gains by that alone, one that gives
them less loses: there `mcnet` with the labels alone reaches {dice("mcnet", lambda_max=0.0):.4f}, and `bcp` with 3000
steps {dice("bcp", 3000):.4f}. Methods that see mixed images alone are slowest. `m3hl` takes pseudo-labels
from 2 % of the run on, when its teacher knows nothing: of its three runs one never found the class Posterior
({mixed[0]:.4f}, the others {mixed[1]:.4f} and {mixed[2]:.4f})."""


def page() -> str:
    """docs/methods.md."""
    gains = measured_gains()
    ours = [method for method in describe_methods() if method.name in METHODS]
    parts = [INTRODUCTION, care(), overview(ours, gains)]
    parts += [section(method, gains) for method in ours]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """\
# Methods

Made by `docs/methods_page.py` from the registry and from [benchmarks/results](../benchmarks/results). All settings, and
where their defaults come from: `autossl_methods NAME`. To add a method: [add_a_method.md](add_a_method.md).

Time and memory of a training step are relative to `supervised` on the same labeled patches (nano networks on
hippocampus, one CPU thread). Gain: Dice points above the supervised twin with a 95 % interval over cases and seeds, on
hippocampus in 2D (nano, fold 0, 8 labeled of 208 cases, 1000 steps, seeds 0 to 2; [benchmark.md](benchmark.md) says how
to read it). Where another dataset or length is named, seed 0 alone, so its interval is over cases only; the same holds
for gains without what makes a method itself: where it is as large as with it, that part did not help there. "Of the
gradient": a term's gradient beside that of the supervised terms on the weights that both reach, mean over a run. They
are small sets and small networks; networks of full size, which need a GPU, were not run: measure on yours with
`autossl_benchmark`. LGG validates on five patients, for whom an interval is too narrow: go by p in `table_lgg*.txt`."""


def overview(methods: list[MethodDescription], gains: Gains) -> str:
    """The table that people choose by."""
    time, memory = costs("time_factor"), costs("memory_factor")
    lines = [
        "| method | idea | dimensions | networks | time 2D / 3D | memory 2D / 3D | gain, points |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in methods:
        needs = METHODS[method.name].needs
        dims = " and ".join(f"{d}D" for d in needs.dims)
        networks = f"{needs.networks}{' + teacher' if needs.teacher else ''}"
        lines.append(
            f"| [{method.name}](#{method.name}) | {method.title} | {dims} | {networks} | {time[method.name]} | "
            f"{memory[method.name]} | {gain(method.name, gains)} |"
        )
    return "\n".join(lines)


def section(method: MethodDescription, gains: Gains) -> str:
    """One method."""
    lines = [f"## {method.name}", "", f"{method.title}. {method.idea}", "", f"*Source.* {method.citation}", ""]
    lines += [f"*Needs.* {'; '.join(method.needs) or 'nothing beyond labeled cases'}.", ""]
    lines += [f"*When.* {ADVICE[method.name].when[0].upper()}{ADVICE[method.name].when[1:]}."]
    if method.ablation:
        settings = ", ".join(f"`{key}={value}`" for key, value in method.ablation.items())
        lines += ["", f"*Without what makes it itself* ({settings}): gain {without(method.name, gains)}."]
    return "\n".join(lines + terms(method.name))


def terms(name: str) -> list[str]:
    """For each dataset what share of the gradient each unsupervised term had; nothing where no run was kept."""
    lines = []
    for results, where in TERMS.items():
        path = RESULTS / f"special_terms_{results}.json"
        runs = json.loads(path.read_text()) if path.is_file() else {}
        said = [
            f"{term} {100 * share['mean']:.1f} %, at most {100 * share['most']:.1f} %"
            + (f" ({WHY_LITTLE[name, term]})" if share["mean"] < LITTLE else "")
            for phase in runs.get(name, {"phases": {}})["phases"].values()
            for term, share in phase["gradient"].items()
            if term != "total"
        ]
        lines += ["", f"*Of the gradient* on {where}: {'; '.join(said)}."] if said else []
    return lines


def with_table(readme: str) -> str:
    """The README with the table between its marks."""
    before, rest = readme.split(BEGIN, 1)
    return f"{before}{BEGIN}\n\n{readme_table()}\n\n{END}{rest.split(END, 1)[1]}"


def made() -> dict[Path, str]:
    """Files and what they should hold."""
    readme = ROOT / "README.md"
    return {ROOT / "docs" / "methods.md": page(), readme: with_table(readme.read_text(encoding="utf-8"))}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Writes docs/methods.md and the README's table of methods.")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where a file is out of date")
    check = parser.parse_args().check
    old = [path for path, text in made().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in old:
        print(f"{path.relative_to(ROOT)} {'is out of date' if check else 'written'}")
        if not check:
            path.write_text(made()[path], encoding="utf-8")
    return int(check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
