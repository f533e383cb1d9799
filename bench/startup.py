"""How soon the command answers: ``python -m bench.startup`` prints medians in milliseconds beside their limits."""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 9
IMPORT = "import time; start = time.perf_counter(); import tiledcore; print(1000 * (time.perf_counter() - start))"
PYTHON = [sys.executable, "-P"]  # -P: the working folder is not searched for modules


def importing() -> float:
    return float(subprocess.run([*PYTHON, "-c", IMPORT], capture_output=True, text=True, check=True).stdout)


def first_line(*args: str) -> float:
    """Until the command has written its first line, to stdout or stderr."""
    start = time.perf_counter()
    command = [*PYTHON, "-m", "tiledcore", *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None and process.stdout.readline()
        elapsed = 1000 * (time.perf_counter() - start)
        process.kill()
    return elapsed


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        generate = ("generate", "a coast", "--out", str(Path(folder) / "a.png"))
        cases = (("import tiledcore", 50, importing), ("tiledcore --help", 500, lambda: first_line("--help")))
        for name, limit, run in (*cases, ("generate: first message", 1000, lambda: first_line(*generate))):
            print(f"{name:<26}{statistics.median(run() for _ in range(RUNS)):>8.0f} ms, limit {limit}", flush=True)


if __name__ == "__main__":
    main()
