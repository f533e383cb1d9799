"""The suite of benchmarks.

    python -m bench list
    python -m bench run [CASE ...] [--quick] [--json out.json]
    python -m bench compare A.json B.json          or two checkouts, which are then run A, B, B, A
    python -m bench report RUN.json [--scaling FILE] [--peers FILE] --out FOLDER
    python -m bench tables [--check]               writes the tables of docs/benchmarks.md

``compare`` exits with 1 if something became slower, ``run`` if a result was wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench import comparison, suite


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the cases")
    run = commands.add_parser("run", help="check and time cases")
    run.add_argument("cases", nargs="*", help="parts of names; all where none is given")
    _options(run)
    run.add_argument("--json", type=Path)
    run.add_argument("--markdown", type=Path)
    compare = commands.add_parser("compare", help="two files of `run --json`, or two checkouts")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    _options(compare)
    report = commands.add_parser("report", help="a page and plots")
    report.add_argument("run", type=Path)
    report.add_argument("--scaling", type=Path, help="of `python -m bench.scaling --json`")
    report.add_argument("--peers", type=Path, help="of `python -m bench.peers_table --json`")
    report.add_argument("--out", type=Path, required=True, help="folder")
    tables = commands.add_parser("tables", help="write the tables of docs/benchmarks.md from bench/results")
    tables.add_argument("--check", action="store_true", help="write nothing; exit with 1 if they differ")
    args = parser.parse_args(argv)
    if args.command == "run":
        return _run(args, parser)
    if args.command == "compare":
        return _compare(args, parser)
    if args.command == "report":
        from bench import report as page

        print(page.write(args.run, args.scaling, args.peers, args.out))
    elif args.command == "tables":
        from bench import tables as documents

        return documents.main(args.check)
    else:
        for case in suite.all_cases():
            print(f"{'quick' if case.quick else '':6}{case.name}")
    return 0


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the small cases, few rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="default: float16 on CUDA, float32 elsewhere")
    parser.add_argument("--budget", type=float, help="seconds of samples a case; default 4 with --quick, else 30")
    parser.add_argument("--rounds", type=int, help="samples of each provider; default 10 with --quick, else 50")


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("float16" if device.type == "cuda" else "float32"))
    try:
        cases = suite.chosen(args.cases, args.quick)
    except ValueError as error:
        parser.error(str(error))
    rounds = args.rounds or (10 if args.quick else 50)
    results = suite.run(cases, device, dtype, rounds, args.budget or (4.0 if args.quick else 30.0))
    print(f"\n{len(cases)} cases in {results['took_seconds']} s")
    if args.json:
        args.json.write_text(suite.dumps(results))
    if args.markdown:
        args.markdown.write_text(suite.markdown(results) + "\n")
    return int(any("wrong" in row for row in results["results"]))


def _compare(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        if args.before.is_dir() and args.after.is_dir():
            options = ["--quick"] * args.quick + ["--device", args.device]
            options += ["--dtype", args.dtype] if args.dtype else []
            options += ["--rounds", str(args.rounds)] if args.rounds else []
            options += ["--budget", str(args.budget)] if args.budget else []
            before, after = comparison.checkouts(args.before, args.after, options)
        else:
            before, after = [comparison.load(args.before)], [comparison.load(args.after)]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    changes, only = comparison.compare(before, after)
    print(comparison.text(changes, only))
    return int(any(change.verdict == "slower" for change in changes))


if __name__ == "__main__":
    sys.exit(main())
