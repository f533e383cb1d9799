"""Prove the tests of CUDA graphs and kernels: put each fault back into the code, and see its test fail.

    python tests/mutations.py [FAULT ...]      names such as a or d2; default: all

Works on the files of this checkout and puts them back; commit before. Exits with 1 if a fault was not found.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GRAPH, REPLAY, SAFETY = (f"tests/loop/test_{name}.py::test_" for name in ("graph", "graph_replay", "capture_safety"))
CHOICE = "tests/ops/test_dispatch.py::test_choice_by_capability"
FAR = "tests/ops/test_neighbor_attention_triton.py::test_batch_entries_may_lie_far_apart"
WAITS = "the_host_waits_for_nothing"
FAILED = "a_failed_capture_puts_the_stream_back"
STEP = "buffers.advance(predicted, guidance_scale=guidance, **options)"
ON_NOISE = "buffers.noise if self._solver.uses_noise[index] else None"
KEPT = '                raise RuntimeError(f"cuda_graph=True: {reason}") from error\n'
RETRY = "            self._drop(entry, reason)\n            self.counters.eager += 1\n            return body()\n"

FAULTS = {
    "a": ("loop/graph.py", "hash(tuple(settings))", "0", GRAPH + "what_a_graph_bakes_in_belongs_to_its_key"),
    "a2": ("loop/graph.py", "hash(tuple(settings))", "0", REPLAY + "changes_of_adapters_are_never_replayed_stale"),
    "b": ("loop/engine.py", STEP,
          f"(b := __import__('copy').copy(buffers), setattr(b, 'noise', {ON_NOISE}), b{STEP[7:]})",
          REPLAY + "noise_is_part_of_a_step_that_adds_none"),
    "c": ("tiles/denoiser.py", "self.attention.grid = (size, self.unit)", "pass", SAFETY + WAITS),
    "c2": ("canvas/windows.py", "torch.arange(n, device=device)", "torch.tensor(range(n), device=device)",
           SAFETY + WAITS),
    "c3": ("tiles/conditioning.py", "self.hook.time(arguments[self.family.timestep])",
           "arguments[self.family.timestep]", SAFETY + WAITS),
    "c4": ("function.py", "noise.shape[3]), time, noise.device", "noise.shape[3]), t, noise.device", SAFETY + WAITS),
    "d": ("loop/graph.py", "torch.cuda.set_stream(stream)", "pass", GRAPH + FAILED),
    "d2": ("loop/graph.py", "            graph.reset()\n", "", GRAPH + FAILED),
    "d3": ("loop/graph.py", "CudaBackend.broken = not_captured(error)", "pass", GRAPH + FAILED),
    "d4": ("loop/engine.py", "= acts_within(self.network)", "= None", REPLAY + "a_network_with_hooks"),
    "e": ("loop/graph.py", KEPT, KEPT + RETRY, GRAPH + "the_eager_retry_does_not_keep_the_failed_attempt_alive"),
    "f": ("call.py", "            current_device(device_of(self.pipe)),\n", "",
          "tests/pipeline/test_call.py::test_a_call_makes_the_pipelines_device_the_current_one"),
    "g": ("kernels/neighbor_attention.py", "tl.cast(q_b, tl.int64) * VECTOR", "q_b * VECTOR", FAR),
    "h": ("ops/dispatch.py", "torch.version.hip and attention", "False", CHOICE),
    "i": ("ops/dispatch.py", "if _old(device) and (", "if False and (", CHOICE),
    "lists": ("loop/graph.py", "(body, keeps, used)", "(body, keeps)", GRAPH + "lists_that_a_graph_reads_live"),
    "tiles": ("tiles/denoiser.py", "return alike and", "return len(tiling.groups) == 1 and",
              REPLAY + "tiles_of_one_size_in_some"),
    "budget": ("call.py", "            graphs.release()", "            pass", REPLAY + "with_a_budget_no_graph"),
}  # fmt: skip
"""Name -> file, what is there, the fault, the start of the test's name."""


def found(file: str, code: str, fault: str, test: str) -> str:
    """``"failed as it should"``, or what happened instead."""
    path = ROOT / file if file.startswith("kernels") else ROOT / "tiledcore" / file
    before = path.read_text()
    if code not in before:
        return f"{path}: {code!r} is not there"
    path.write_text(before.replace(code, fault))
    try:
        name, _, key = test.partition("::")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        done = subprocess.run([*command, name, "-k", key], cwd=ROOT, capture_output=True, text=True)
    finally:
        path.write_text(before)
    outcome = {1: "failed as it should", 0: "PASSED: the fault is not found", 5: "NO TEST of this name"}
    return outcome.get(done.returncode, done.stdout[-300:])


def main() -> int:
    chosen = sys.argv[1:] or list(FAULTS)
    missed = 0
    for name in chosen:
        outcome = found(*FAULTS[name])
        missed += outcome != "failed as it should"
        print(f"| {name} | {FAULTS[name][0]} | {FAULTS[name][3].partition('::')[2]} | {outcome} |", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
