"""Measures autossl against the real nnU-Net v2 where both do the same work: time, memory, and that it is the same.

    python benchmarks/versus_nnunet.py --nnunet_env ENV --data FOLDER [--only ROW …] [--repeats 3] [--work FOLDER]
        [-o versus_nnunet.json]

ENV is a virtual environment with nnunetv2 2.8.1 (or the environment variable AUTOSSL_NNUNET_ENV); nothing is installed.
FOLDER holds the raw datasets Dataset004_Hippocampus and Dataset011_LGGMultiMR. --list names the rows.

Each repetition of a row runs both tools in turn, every second one in the reverse order, each run in processes of its
own: start and imports count. Ours runs with its defaults, nnU-Net with its defaults and with a few numbers of worker
processes; medians are compared, with nnU-Net's fastest. Memory is the proportional set size (PSS) of the whole tree of
processes, sampled, so Linux alone. After the first repetition the results are compared: a row counts only where both
did the same. The file is written after each repetition, and what is in it is not measured again. `others_cpu_s` of a
run tells what else the machine did meanwhile.

To see whether a row works: --repeats 1 --cases 6 --volume 60 96 96 --classes 5 --threads 1 -o tried.json
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
from pathlib import Path

from versus.bench import Bench, Row
from versus.export_row import CLASSES, SHAPE_ZYX, export_rows
from versus.help_row import help_rows
from versus.predict_row import predict_rows
from versus.prepare_row import further_prepare_rows, prepare_rows
from versus.results import Results, conditions, printed, table
from versus.train_row import train_rows

NNUNET_VARIABLE = "AUTOSSL_NNUNET_ENV"


def measure(row: Row, results: Results, repeats: int, again: bool) -> None:
    """The repetitions of a row that are missing."""
    missing = results.open_row(row, repeats, again)
    if not missing:
        print(f"{row.name}: measured before", flush=True)
        return
    print(f"{row.name}: {row.what}", flush=True)
    row.prepare()
    entry = results.rows[row.name]
    calls = row.variants()
    for index in range(repeats - missing, repeats):
        measured = {}
        for variant in list(calls)[:: 1 if index % 2 == 0 else -1]:
            found = measured[variant] = calls[variant]()
            others = f"others used {found['others_cpu_s']:.1f} s of processor time"
            shown = f"{found[row.time]:.2f} s, {found['peak_pss_mb']:.0f} MB, {others}"
            print(f"  {index + 1}. {variant}: {shown}", flush=True)
        if entry["same_work"] is None:
            entry["same_work"] = row.same_work()
        for variant in calls:
            entry["runs"][variant].append(measured[variant])
        results.write()


def all_rows(bench: Bench, arguments: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Those of the comparison, and further ones that run when they are named."""
    shape, classes = tuple(arguments.volume), arguments.classes
    rows: list[Row] = [*help_rows(bench), *export_rows(bench, shape, classes), *prepare_rows(bench)]
    rows += [*predict_rows(bench, arguments.run), *train_rows(bench)]
    return rows, [*further_prepare_rows(bench)]


def main() -> None:
    """Entry point."""
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the tool that runs ends as well
    with tempfile.TemporaryDirectory(prefix="versus_nnunet_") as scratch:
        bench = Bench(
            nnunet=arguments.nnunet_env,
            data=arguments.data,
            work=(arguments.work or Path(scratch)).absolute(),
            workers=None if arguments.workers is None else tuple(arguments.workers),
            threads=arguments.threads,
            cases=arguments.cases,
            device=arguments.device,
        )
        usual, further = all_rows(bench, arguments)
        if arguments.list:
            print("\n".join(f"{row.name:<28}{row.what}" for row in (*usual, *further)))
            return
        known = {row.name: row for row in (*usual, *further)}
        unknown = [name for name in arguments.only or () if name not in known]
        if unknown:
            raise SystemExit(f"no row {', '.join(unknown)}; there are {', '.join(known)}")
        bench.work.mkdir(parents=True, exist_ok=True)
        now = conditions(bench)
        results = Results(arguments.output, now)
        for row in [known[name] for name in arguments.only] if arguments.only else usual:
            measure(row, results, arguments.repeats, arguments.again)
    print(f"\n{now['cpu']}, {now['cores']} cores, {now['memory_gb']} GB, {now['platform']}")
    print(f"autossl {now['commit']}, {now['versions']}\nnnU-Net {now['nnunet_versions']}\n")
    print(printed(table(results.rows)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    environment = os.environ.get(NNUNET_VARIABLE)
    parser.add_argument("--nnunet_env", type=Path, metavar="ENV", default=environment, required=environment is None)
    parser.add_argument("--data", type=Path, metavar="FOLDER", required=True)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="default: all but those that only tell")
    parser.add_argument("--list", action="store_true", help="names the rows and stops")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--again", action="store_true", help="measures rows anew that are in the file")
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="scratch folder to keep, 10 GB (default: a temporary one)"
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", metavar="N", help="nnU-Net's worker processes to try beside its defaults"
    )
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="trained run for the rows of prediction")
    parser.add_argument("--device", default="cpu", help="of prediction and training; memory is the host's")
    parser.add_argument("--threads", type=int, metavar="N", help="OMP_NUM_THREADS for both (default: not set)")
    parser.add_argument("--cases", type=int, metavar="N", help="so few cases, to try things out")
    parser.add_argument(
        "--volume", type=int, nargs=3, default=SHAPE_ZYX, metavar=("Z", "Y", "X"), help="of the rows of export"
    )
    parser.add_argument("--classes", type=int, default=CLASSES, metavar="N", help="of the rows of export")
    parser.add_argument("-o", "--output", type=Path, default=Path("versus_nnunet.json"), metavar="FILE")
    return parser


if __name__ == "__main__":
    main()
