"""The command of the suite.

    python -m bench list
    python -m bench run [CASE ...] [--quick] [--json out.json]
    python -m bench compare A.json B.json
    python -m bench tables [--check]      writes the tables of docs/benchmarks.md
    python -m bench tune                  measures attention on this GPU and writes its table of what is fastest

``run`` exits with 1 if a result was wrong, ``compare`` if something became slower, ``tables --check`` if a table
is out of date.
"""

import argparse
import sys
from pathlib import Path

import torch

from bench import bench_neighbor_attention as attention
from bench import compare, suite


def parsed(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names of the cases")
    run = commands.add_parser("run", help="check and time cases")
    run.add_argument("cases", nargs="*", help="parts of names; default: all")
    run.add_argument("--quick", action="store_true", help="the small cases, few rounds")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--dtype", help="default: float16 on CUDA, float32 on a CPU")
    run.add_argument("--seconds", type=float, help="of timing for each case; default 10, with --quick 1")
    run.add_argument("--rounds", type=int, help="turns of each provider; default 10, with --quick 5")
    run.add_argument("--json", type=Path)
    two = commands.add_parser("compare", help="two files of `run --json`")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    commands.add_parser("tune", help="neighbour attention on this GPU: write which implementation is the fastest")
    write = commands.add_parser("tables", help="write the tables from bench/results")
    write.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table differs")
    return parser, parser.parse_args(argv)


def run_cases(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("float16" if device.type == "cuda" else "float32"))
    seconds, rounds = args.seconds or (1.0 if args.quick else 10.0), args.rounds or (5 if args.quick else 10)
    results = suite.run(suite.chosen(args.cases, args.quick), device, dtype, seconds, rounds)
    print(f"\n{len({row['case'] for row in results['results']})} cases in {results['took_seconds']} s")
    if args.json:
        args.json.write_text(suite.dumps(results))
    return int(any("wrong" in row for row in results["results"]))


def compare_runs(args: argparse.Namespace) -> int:
    changes, only = compare.compare(compare.load(args.before), compare.load(args.after))
    print(compare.HEADER, *changes, *only, sep="\n")
    return int(any(change.verdict == "slower" for change in changes))


def tune() -> int:
    """Time neighbour attention at the shapes of SDXL and FLUX, and write the table; a wrong result is not timed."""
    if not torch.cuda.is_available():
        raise ValueError("tune: needs a CUDA device")
    rows: dict[attention.Shape, list[suite.Row]] = {}
    for shape in attention.CUDA_SHAPES:
        case = next(case for case in attention.cases() if case.shapes.startswith(f"{shape.name}: "))
        rows[shape] = suite.run_case(case, torch.device("cuda"), torch.float16, 3.0, 3)
        print(case.name, *map(suite.text, rows[shape]), sep="\n")
    major, minor = torch.cuda.get_device_capability()
    attention.TABLE.write_text(attention.tuned(attention.TABLE.read_text(), 10 * major + minor, rows))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser, args = parsed(argv)
    try:
        if args.command == "run":
            return run_cases(args)
        if args.command == "compare":
            return compare_runs(args)
        if args.command == "tune":
            return tune()
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.command == "tables":
        from bench import tables  # imports the studies and their pipelines

        return tables.main(args.check)
    for case in suite.all_cases():
        print(f"{'quick' if case.quick else '':6}{case.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
