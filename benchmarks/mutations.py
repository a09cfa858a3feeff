"""Do the tests notice a wrong method? Plants mistakes in a copy of the tree and runs the method's tests on it.

For each method at least three: a wrong target, a gradient where none may flow (or none where one must, for methods
whose both sides move), and a flipped sign. Each must make a test of the method's own files or of the family fail.
Prints what noticed each mistake, and which ones survived; ends with exit code 1 where one did.

    python benchmarks/mutations.py mean_teacher uamt -o benchmarks/results/mutations.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("planners", "preprocessing", "trainers", "evaluation")
"""Folders that are packages of autossl (setup.cfg)."""
TIMEOUT_S = 1800
SHARED_TESTS = {"fixmatch": ("test_weak_to_strong",), "unimatch": ("test_weak_to_strong",)}
"""Where tests of several methods stand together; those with the method's name in them are run."""


@dataclass(frozen=True)
class Edit:
    """A replacement in one file; the old text must be there exactly once."""

    file: str
    """Below trainers/."""
    old: str
    new: str


@dataclass(frozen=True)
class Mutation:
    """A planted mistake."""

    method: str
    kind: str
    edits: tuple[Edit, ...]


def one(method: str, kind: str, old: str, new: str, file: str | None = None) -> Mutation:
    """A mistake in one place, by default of the method's file."""
    return Mutation(method, kind, (Edit(file or f"methods/{method}.py", old, new),))


TEACHER_WITH_GRADIENT = (
    Edit(
        "components/ema.py", "            parameter.requires_grad_(False)", "            parameter.requires_grad_(True)"
    ),
    Edit("components/ema.py", "    @torch.no_grad()\n    def logits(", "    def logits("),
)
"""The teacher is part of the student's graph."""
CONFIDENCE_WITH_GRADIENT = (
    Edit("components/pseudo.py", "@torch.no_grad()\ndef pseudo_label(", "def pseudo_label("),
    Edit("components/weak_to_strong.py", "self.job.probabilities(z.detach())", "self.job.probabilities(z)"),
    Edit(
        "components/weak_to_strong.py",
        "w, regions = self._weights(view).float(),",
        "w, regions = self._weights(view).float() * view.confidence / view.confidence.detach(),",
    ),
)
"""The same values, but the weight of a voxel pulls at the prediction that it comes from."""

WEIGHTED = '"consistency": weight * consistency'
MIXING, SIMILARITY = "components/mixing.py", "components/similarity.py"
WRONG_TARGET, MISSING_DETACH, FLIPPED_SIGN = "wrong target", "missing detach", "flipped sign"
EXTRA_DETACH = "a detach too many"
MUTATIONS = (
    one(
        "mean_teacher",
        WRONG_TARGET,
        "self.job.probabilities(self.teacher.logits(seen_by_teacher))",
        "self.job.probabilities(student(seen_by_teacher)[0].detach())",
    ),
    Mutation("mean_teacher", MISSING_DETACH, TEACHER_WITH_GRADIENT),
    one("mean_teacher", FLIPPED_SIGN, WEIGHTED, '"consistency": -weight * consistency'),
    one(
        "uamt",
        WRONG_TARGET,
        "self.job.probabilities(self.teacher.logits(seen + noise))",
        "self.job.probabilities(student(seen + noise)[0].detach())",
    ),
    one("uamt", "the wrong voxels", "(uncertainty < threshold)", "(uncertainty > threshold)"),
    Mutation("uamt", MISSING_DETACH, TEACHER_WITH_GRADIENT),
    one("uamt", FLIPPED_SIGN, WEIGHTED, '"consistency": -weight * consistency'),
    one("urpc", WRONG_TARGET, "(mean * (log_mean - log_p))", "(log_p.exp() * (log_p - log_mean))"),
    one("urpc", EXTRA_DETACH, "weight = torch.exp(-divergence)", "weight = torch.exp(-divergence).detach()"),
    one("urpc", "certainty upside down", "torch.exp(-divergence)", "torch.exp(divergence)"),
    one("urpc", FLIPPED_SIGN, WEIGHTED, '"consistency": -weight * consistency'),
    one("dtc", WRONG_TARGET, "distance_loss(s[: len(labeled)],", "distance_loss(s[-len(labeled) :],"),
    one(
        "dtc",
        EXTRA_DETACH,
        "probability_mse(mask_of_distance(s, self.steepness), p,",
        "probability_mse(mask_of_distance(s, self.steepness).detach(), p,",
    ),
    one("dtc", FLIPPED_SIGN, "torch.sigmoid(-steepness * s.float())", "torch.sigmoid(steepness * s.float())"),
    one("mcnet", WRONG_TARGET, "if i != j]", "if i == j]"),
    one(
        "mcnet",
        EXTRA_DETACH,
        "[target.detach() for target in q] if settings.detach_targets else q",
        "[target.detach() for target in q] if not settings.detach_targets else q",
    ),
    one("mcnet", FLIPPED_SIGN, 'losses["consistency"] = weight * consistency', 'losses["consistency"] = -consistency'),
    one(
        "entropy_min",
        "the wrong rows",
        "judged = slice(0 if self._labeled_is_judged else n_labeled, None)",
        "judged = slice(0, n_labeled)",
    ),
    one("entropy_min", EXTRA_DETACH, "self._entropy(z[0][judged],", "self._entropy(z[0][judged].detach(),"),
    one("entropy_min", FLIPPED_SIGN, '"entropy": weight * entropy', '"entropy": -weight * entropy'),
    one(
        "bcp",
        WRONG_TARGET,
        "region_mix_loss(z_1, mask, y_ua, y_la,",
        "region_mix_loss(z_1, mask, y_ub, y_la,",
        MIXING,
    ),
    Mutation("bcp", MISSING_DETACH, TEACHER_WITH_GRADIENT),
    one("bcp", FLIPPED_SIGN, '"pseudo": alpha * pseudo', '"pseudo": -alpha * pseudo'),
    one(
        "self_training", WRONG_TARGET, "kept_label_loss(z_pseudo, target,", "kept_label_loss(z_pseudo, target.flip(0),"
    ),
    one(
        "self_training",
        "the wrong teacher",
        'self._refresh(j, at, "teacher")',
        'self._refresh(j, at, "network")',
    ),
    one(
        "self_training",
        MISSING_DETACH,
        "copy.deepcopy(network).float().eval().requires_grad_(False)",
        "copy.deepcopy(network).float().eval()",
    ),
    one("self_training", FLIPPED_SIGN, '"pseudo": weight * pseudo', '"pseudo": -weight * pseudo'),
    one(
        "fixmatch",
        WRONG_TARGET,
        "self.weak_to_strong.loss(network(view.image), view)",
        "self.weak_to_strong.loss(\n"
        "            network(view.image), type(view)(view.image, weak.labels, view.confidence, view.valid)\n"
        "        )",
    ),
    Mutation("fixmatch", MISSING_DETACH, CONFIDENCE_WITH_GRADIENT),
    one("fixmatch", FLIPPED_SIGN, '"strong": weight * strong', '"strong": -weight * strong'),
    one(
        "unimatch",
        WRONG_TARGET,
        "self.weak_to_strong.loss(z_features, weak)",
        "self.weak_to_strong.loss(z_features, views[0])",
    ),
    Mutation("unimatch", MISSING_DETACH, CONFIDENCE_WITH_GRADIENT),
    one("unimatch", FLIPPED_SIGN, "{name: weight * shares[name] * term", "{name: -weight * shares[name] * term"),
    one("cps", WRONG_TARGET, "labels[other], valid[first:]", "labels[key], valid[first:]"),
    one(
        "cps",
        MISSING_DETACH,
        "self._cross(judged[key], labels[other], valid[first:])",
        "self._cross(judged[key], labels[other], valid[first:])"
        " * (judged[other][0].exp().mean() / judged[other][0].exp().mean().detach())",
    ),
    one("cps", FLIPPED_SIGN, "{name: weight * term", "{name: -weight * term"),
    one("mcl_cs", WRONG_TARGET, "clean.given[other], valid", "clean.given[key], valid"),
    one(
        "mcl_cs",
        MISSING_DETACH,
        "hard_label_loss(z[key], clean.given[other], valid, regions=regions)",
        "hard_label_loss(z[key], clean.given[other], valid, regions=regions)"
        " * (z[other][0].exp().mean() / z[other][0].exp().mean().detach())",
    ),
    one("mcl_cs", "the wrong voxels", "torch.minimum(sure, also_sure)", "torch.maximum(sure, also_sure)"),
    one("mcl_cs", FLIPPED_SIGN, "{name: weights[name] * term", "{name: -weights[name] * term"),
    one(
        "criinet",
        WRONG_TARGET,
        "(z[0][n:], refined[n:], unlabeled.valid)\n            losses",
        "(refined[n:], z[0][n:], unlabeled.valid)\n            losses",
    ),
    one("criinet", MISSING_DETACH, "q if self.settings.sym else q.detach()", "q"),
    one("criinet", "the wrong pairs", "~_diagonal(n, e))", "_diagonal(n, e))"),
    one("criinet", FLIPPED_SIGN, "losses[name] = weights[name] * term", "losses[name] = -weights[name] * term"),
    one(
        "c3s3",
        WRONG_TARGET,
        "self._competition(rest[winner], rest[loser],",
        "self._competition(rest[loser], rest[winner],",
    ),
    one(
        "c3s3",
        MISSING_DETACH,
        "@torch.no_grad()\ndef sharpened(",
        "def sharpened(",
        "components/competition.py",
    ),
    one("c3s3", "the wrong voxels", "~union[:, claimed]", "union[:, claimed]", "components/outcome_contrast.py"),
    one("c3s3", FLIPPED_SIGN, "losses[name] = weights[name] * term", "losses[name] = -weights[name] * term"),
    one(
        "medl",
        WRONG_TARGET,
        "labels, w = opinion.belief.argmax(1, keepdim=True)",
        'labels, w = evidence["a"].alpha.detach().argmax(1, keepdim=True)',
    ),
    one("medl", MISSING_DETACH, "    @torch.no_grad()\n    def _fused(", "    def _fused("),
    one(
        "medl",
        "hard before easy",
        "torch.tanh(psi * (2 * r - 1))",
        "torch.tanh(psi * (1 - 2 * r))",
        "components/evidence.py",
    ),
    one(
        "medl", "information lost", "error - information_weight", "error + information_weight", "components/evidence.py"
    ),
    one("medl", FLIPPED_SIGN, "{name: weights[name] * (term", "{name: -weights[name] * (term"),
    one(
        "transmedseg",
        WRONG_TARGET,
        'self._rows(features["dec:last"][n_mixed:], labeled.target,',
        'self._rows(features["dec:last"][: len(labeled)], labeled.target,',
    ),
    Mutation(
        "transmedseg",
        MISSING_DETACH,
        (
            TEACHER_WITH_GRADIENT[0],
            Edit(
                "methods/transmedseg.py",
                "        with torch.no_grad():\n            z_teacher",
                "        with torch.enable_grad():\n            z_teacher",
            ),
        ),
    ),
    one("transmedseg", EXTRA_DETACH, "functional.linear(f.float(),", "functional.linear(f.detach().float(),"),
    one(
        "transmedseg",
        "moved the wrong way",
        "(self.unlabeled_moments.mean - self.labeled_moments.mean)",
        "(self.labeled_moments.mean - self.unlabeled_moments.mean)",
    ),
    one("transmedseg", "narrowed instead of spread", "+ 0.5 * spread", "- 0.5 * spread", "components/transfer.py"),
    one("transmedseg", FLIPPED_SIGN, '["tsa"] = weight * tsa', '["tsa"] = -weight * tsa'),
    one(
        "cad", WRONG_TARGET, "hard_label_dice(z, decided[OTHER[key]].labels,", "hard_label_dice(z, decided[key].labels,"
    ),
    one(
        "cad",
        MISSING_DETACH,
        "+ decided[OTHER[key]].doubt",
        "+ decided[OTHER[key]].doubt + z_of[OTHER[key]][0].mean() - z_of[OTHER[key]][0].mean().detach()",
    ),
    one(
        "cad",
        "replaced from the same view",
        "displaced(image[key], image[other], moves[key])",
        "displaced(image[key], image[key], moves[key])",
    ),
    one(
        "cad",
        "sure regions are replaced",
        "low = (mine.confidence < limits.threshold) & valid\n",
        "low = (mine.confidence > limits.threshold) & valid\n",
        "components/displacement.py",
    ),
    one("cad", FLIPPED_SIGN, "{name: weight * term for", "{name: -weight * term for"),
    one(
        "m_and_n",
        WRONG_TARGET,
        "self._logits(PARTNER[learner], unlabeled.image, at)[0])",
        "self._logits(learner, unlabeled.image, at)[0])",
    ),
    one("m_and_n", MISSING_DETACH, "        with torch.no_grad():\n            yield", "        yield"),
    one("m_and_n", FLIPPED_SIGN, 'f"pseudo_{short}": pseudo + doubt}', 'f"pseudo_{short}": doubt - pseudo}'),
    one("m_and_n", "both learn", "            (learner,),\n        )", "            None,\n        )"),
    one("m_and_n", "no labeled patch is left", "max(1, batch_size - 1)", "batch_size"),
    one("ersr", WRONG_TARGET, "probability_mse(mine, theirs, w) * reliance", "probability_mse(mine, 1 - theirs, w)"),
    one(
        "ersr",
        "the irregular patches",
        "key=lambda index: everything[index])",
        "key=lambda index: -everything[index])",
        "components/ellipse_labels.py",
    ),
    one(
        "ersr",
        "mirrored at the short axis",
        "fit.ellipse.directions[-1] if q.ndim == 2",
        "fit.ellipse.directions[0] if q.ndim == 2",
        "components/ellipse_labels.py",
    ),
    Mutation("ersr", MISSING_DETACH, TEACHER_WITH_GRADIENT),
    one("ersr", EXTRA_DETACH, "if self.settings.detach_sym:", "if not self.settings.detach_sym:"),
    one("ersr", FLIPPED_SIGN, "weights[name] * (term + doubt)", "-weights[name] * (term + doubt)"),
    one("spcl", WRONG_TARGET, "label.values.repeat(2)", "label.values.repeat_interleave(2)"),
    Mutation(
        "spcl",
        MISSING_DETACH,
        (
            Edit(
                "components/contrast.py", "    values = values.detach()\n    return (values <=", "    return (values <="
            ),
            Edit("components/contrast.py", "given.detach().float()[anchors]", "given.float()[anchors]"),
        ),
    ),
    one("spcl", FLIPPED_SIGN, "= weight * loss", "= -weight * loss"),
    one(
        "spcl",
        "hard pairs count more",
        "(1 - values / gamma).clamp(min=0)",
        "(values / gamma).clamp(max=1)",
        "components/contrast.py",
    ),
    one("spcl", "mirrored positions", "unmirrored_axes=axes", "unmirrored_axes=()"),
    one(
        "m3hl",
        WRONG_TARGET,
        "forward_features(self.teacher.network, unlabeled.image, taps)",
        'forward_features(self.parts.trained["network"], unlabeled.image, taps)',
    ),
    Mutation(
        "m3hl",
        MISSING_DETACH,
        (
            TEACHER_WITH_GRADIENT[0],
            Edit("methods/m3hl.py", "        with torch.no_grad():\n", "        with torch.enable_grad():\n"),
        ),
    ),
    one("m3hl", FLIPPED_SIGN, "{name: weights[name] * term", "{name: -weights[name] * term"),
    one("m3hl", "the wrong voxels", "inside[rows] & valids[j]", "inside[rows]"),
    one(
        "fsmifnet",
        WRONG_TARGET,
        "propagation_loss(guessed, propagated, wanted,",
        "propagation_loss(guessed, wanted, wanted,",
    ),
    one("fsmifnet", "the wrong neighbors", "masked_fill(itself,", "masked_fill(itself & False,", SIMILARITY),
    Mutation(
        "fsmifnet",
        MISSING_DETACH,
        (
            Edit(SIMILARITY, "@torch.no_grad()\ndef affinity(", "def affinity("),
            Edit(SIMILARITY, "@torch.no_grad()\ndef propagate(", "def propagate("),
            Edit("methods/fsmifnet.py", "propagate(e.detach(),", "propagate(e,"),
        ),
    ),
    one(
        "fsmifnet",
        EXTRA_DETACH,
        "self.job.probabilities(z), self.job.probabilities(z_fused)",
        "self.job.probabilities(z), self.job.probabilities(z_fused.detach())",
    ),
    one(
        "fsmifnet",
        FLIPPED_SIGN,
        "(self._ramped(settings.lambda_rel, at), loss)",
        "(-self._ramped(settings.lambda_rel, at), loss)",
    ),
    one("semi_cml", WRONG_TARGET, "list(self.channels[better])", "list(self.channels[OTHER[better]])"),
    one("semi_cml", "the wrong partner", ".roll(n)", ".roll(1)", "components/area_similarity.py"),
    one("semi_cml", "a gate upside down", "score <= lowest", "score >= lowest", "components/gated_average.py"),
    Mutation(
        "semi_cml",
        MISSING_DETACH,
        (
            *TEACHER_WITH_GRADIENT,
            Edit("methods/semi_cml.py", "    @torch.no_grad()\n    def _soft_labels(", "    def _soft_labels("),
            Edit("components/soft_labels.py", "q.detach().float()", "q.float()"),
        ),
    ),
    one("semi_cml", EXTRA_DETACH, "_area_contrast(p[1], p[2],", "_area_contrast(p[1], p[2].detach(),"),
    one(
        "semi_cml",
        FLIPPED_SIGN,
        'losses["area_contrast"] = settings.lambda_asc * contrast',
        'losses["area_contrast"] = -settings.lambda_asc * contrast',
    ),
)


class Copy:
    """The tree in another folder, laid out as it is installed, so that it comes before the installed one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / "site" / "autossl"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "autossl", self.package, ignore=ignored)
        for name in MAPPED:
            shutil.copytree(ROOT / name, self.package / name, ignore=ignored)
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", folder)

    @contextmanager
    def mutated(self, mutation: Mutation) -> Iterator[None]:
        """With the mistake; the files are as before afterwards.

        Raises:
            ValueError: a text is not there exactly once.
        """
        before: dict[Path, str] = {}
        try:
            for edit in mutation.edits:
                path = self.package / "trainers" / edit.file
                text = path.read_text(encoding="utf-8")
                before.setdefault(path, text)
                if text.count(edit.old) != 1:
                    raise ValueError(f"{edit.file} has {text.count(edit.old)} times, expected once: {edit.old!r}")
                path.write_text(text.replace(edit.old, edit.new), encoding="utf-8")
            yield
        finally:
            for path, text in before.items():
                path.write_text(text, encoding="utf-8")

    def first_failure(self, method: str) -> str | None:
        """The first test of the method that fails, its own files first; None where all pass."""
        own = sorted(str(path.relative_to(self.folder)) for path in self.folder.glob(f"tests/trainers/test_{method}*"))
        if not own:
            raise ValueError(f"{method} has no test of its own")
        own += [f"tests/trainers/{name}.py" for name in SHARED_TESTS.get(method, ())]
        family = [f"tests/trainers/{name}.py" for name in ("test_family_identities", "test_family")]
        words = [sys.executable, "-m", "pytest", "-x", "-q", "-k", method, "-p", "no:cacheprovider", *own, *family]
        environment = {**os.environ, "PYTHONPATH": str(self.package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            words, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        if done.returncode == 0:
            return None
        found = re.search(r"^(?:FAILED|ERROR) (?:tests/trainers/)?(\S+)", done.stdout, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return found[1]

    def check(self) -> None:
        """Raises where the copy is not what would be tested."""
        words = [sys.executable, "-c", "import autossl.trainers as t; print(t.__file__)"]
        environment = {**os.environ, "PYTHONPATH": str(self.package.parent)}
        done = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True, check=True)
        if not done.stdout.startswith(str(self.package)):
            raise RuntimeError(f"another autossl would be tested: {done.stdout.strip()}")


def tried(copy: Copy, method: str, known_to_pass: bool) -> list[dict[str, Any]]:
    """Every mistake of the method, with the test that noticed it."""
    start = time.time()
    broken = None if known_to_pass else copy.first_failure(method)
    if broken is not None:
        raise RuntimeError(f"{method}: {broken} fails without any mistake")
    if not known_to_pass:
        print(f"{method:<14} tests pass as they are ({time.time() - start:.0f} s)", flush=True)
    results = []
    for mutation in (entry for entry in MUTATIONS if entry.method == method):
        with copy.mutated(mutation):
            noticed = copy.first_failure(method)
        print(f"{method:<14} {mutation.kind:<22} {noticed or 'SURVIVED'}", flush=True)
        results.append({"kind": mutation.kind, "noticed_by": noticed, "edits": [asdict(e) for e in mutation.edits]})
    return results


def main() -> None:
    """Entry point."""
    methods = list(dict.fromkeys(mutation.method for mutation in MUTATIONS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"default: all of {', '.join(methods)}")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="results of other methods in it are kept")
    parser.add_argument("--known_to_pass", action="store_true", help="do not run the tests without a mistake first")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.methods) - set(methods))
    if unknown:
        parser.error(f"no mistakes are known for {', '.join(unknown)}; there are {', '.join(methods)}")
    commit = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    results: dict[str, Any] = {}
    if arguments.output and arguments.output.is_file():
        results = json.loads(arguments.output.read_text(encoding="utf-8"))
    with TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        copy.check()
        for method in arguments.methods or methods:
            head = subprocess.run(commit, capture_output=True, text=True, check=False).stdout.strip()
            results[method] = {"commit": head, "mutations": tried(copy, method, arguments.known_to_pass)}
            if arguments.output:
                arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    survived = [
        f"{method}: {entry['kind']}"
        for method in arguments.methods or methods
        for entry in results[method]["mutations"]
        if entry["noticed_by"] is None
    ]
    print(f"survived: {', '.join(survived) or 'none'}")
    sys.exit(bool(survived))


if __name__ == "__main__":
    main()
