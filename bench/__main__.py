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
from bench import measure, suite


def list_cases(_: argparse.Namespace) -> None:
    for case in suite.all_cases():
        print(f"{'quick' if case.quick else '':6}{case.name}")


def run_cases(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("float16" if device.type == "cuda" else "float32"))
    seconds, rounds = args.seconds or (1.0 if args.quick else 10.0), args.rounds or (5 if args.quick else 10)
    results = suite.run(suite.chosen(args.cases, args.quick), device, dtype, seconds, rounds)
    print(f"\n{len({row['case'] for row in results['results']})} cases in {results['took_seconds']} s")
    if args.json:
        args.json.write_text(suite.dumps(results))
    return int(any("wrong" in row for row in results["results"]))


def tune(_: argparse.Namespace) -> None:
    """Time neighbour attention at the shapes of SDXL and FLUX, and write the table; a wrong result is not timed."""
    if not torch.cuda.is_available():
        raise ValueError("tune: needs a CUDA device")
    device, dtype, rows = torch.device("cuda"), torch.float16, {}
    ceiling = measure.ceilings(device, dtype)
    for shape in attention.CUDA_SHAPES:
        case = next(case for case in attention.cases() if case.shapes.startswith(f"{shape.name}: "))
        rows[shape] = suite.run_case(case, device, dtype, 3.0, 3, ceiling)
        print(case.name, *map(suite.text, rows[shape]), sep="\n")
    major, minor = torch.cuda.get_device_capability()
    attention.TABLE.write_text(attention.tuned(attention.TABLE.read_text(), 10 * major + minor, rows))


def write_tables(args: argparse.Namespace) -> int:
    from bench import tables  # imports the studies and their pipelines

    return tables.main(args.check)


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="check and time cases")
    run.add_argument("cases", nargs="*", help="parts of names; default: all")
    run.add_argument("--quick", action="store_true", help="the small cases, few rounds")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--dtype", help="default: float16 on CUDA, float32 on a CPU")
    run.add_argument("--seconds", type=float, help="of timing for each case; default 10, with --quick 1")
    run.add_argument("--rounds", type=int, help="turns of each provider; default 10, with --quick 5")
    run.add_argument("--json", type=Path)
    run.set_defaults(act=run_cases)
    two = commands.add_parser("compare", help="two files of `run --json`")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    two.set_defaults(act=lambda args: suite.compare(args.before, args.after))
    write = commands.add_parser("tables", help="write the tables from bench/results")
    write.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table differs")
    write.set_defaults(act=write_tables)
    commands.add_parser("tune", help="write which attention is the fastest here").set_defaults(act=tune)
    commands.add_parser("list", help="names of the cases").set_defaults(act=list_cases)
    args = parser.parse_args(argv)
    try:
        return int(args.act(args) or 0)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
