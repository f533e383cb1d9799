"""What every test needs before triton and diffusers are imported."""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

# One thread a process, in the processes that tests start as well. Tensors here are tiny, and threads that wait for one
# another on a busy machine made the same tests take eighteen times as much CPU time. `make test` runs two processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Examples are slow and uneven here (2 cores, interpreted kernels): a deadline would only be noise. A gate runs the
# same examples every time; HYPOTHESIS_PROFILE=search looks for new ones.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# The root must not be on sys.path: its `kernels/` would pass for Hugging Face's package. `pytest`
# leaves it off, `python -m pytest` does not. So `bench` is registered by hand.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
_spec = spec_from_file_location("bench", ROOT / "bench" / "__init__.py")
assert _spec is not None and _spec.loader is not None
sys.modules["bench"] = module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["bench"])
