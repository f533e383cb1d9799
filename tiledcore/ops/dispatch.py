"""Which implementation of an op runs: schemas, the C++ extension, what is available here, and the choice.

Each implementation of an op is one torch op, ``tiledcore::NAME_IMPL``. Schemas are declared in Python, so fake tensors
and ``torch.compile`` work without a compiler and without Triton.
"""

import logging
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

Impl = Literal["reference", "native", "triton", "sdpa", "flash", "cudnn", "xformers"]
"""``reference``: plain torch, any device. ``native``: C++ from csrc/. ``triton``: kernels/. The others, for attention
only, gather tokens and call a dense attention: ``sdpa`` what torch chooses, the rest the library of that name."""

_log = logging.getLogger(__name__)
_implementations: dict[str, tuple[str, ...]] = {}


def _load_native() -> str | None:
    """Load the C++ extension; return why it is not there, or None."""
    library = Path(__file__).parent.with_name("_C.abi3.so")
    if not library.exists():
        return "the extension was not built (see csrc/ and setup.py)"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        _log.warning("tiledcore runs without its C++ extension, which failed to load: %s", error)
        return f"the extension failed to load: {error}"
    return None


def define(
    name: str, schema: str, fake: Callable[..., Any], reference: Callable[..., Any], **others: Callable[..., Any]
) -> None:
    """Declare an op: one schema and one fake implementation for all of its implementations.

    ``others``: by name, those beside reference, C++ and Triton; they and ``reference`` have the schema's arguments.
    """
    implementations = {"reference": reference, "native": None, "triton": partial(_launch, name), **others}
    _implementations[name] = tuple(implementations)
    for impl, run in implementations.items():
        op = f"tiledcore::{name}_{impl}"
        torch.library.define(op, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(op, fake)
        if run is not None:  # the extension registers its own
            torch.library.impl(op, ("cpu", "cuda"))(torch.no_grad()(run))


def _launch(name: str, *arguments: Any) -> Any:
    """Run a Triton kernel by the launcher of its name. Triton is imported only here, when a kernel is needed."""
    return getattr(import_module(f"tiledcore.kernels.{name}"), name)(*arguments)


_native_missing = _load_native()


def unavailable(name: str, impl: Impl, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why an implementation of an op, such as ``"blend_tiles"``, cannot run on a device; None if it can.

    ``dtype`` is that of the op's tensors; None skips the checks that depend on it. Without a GPU (planning) a recent
    one is assumed.
    """
    attention = name == "neighbor_attention"
    if attention and impl in ("native", "triton") and dtype == torch.float64:
        return "it needs float16, bfloat16 or float32"
    if impl == "native":
        if _native_missing is not None:
            return _native_missing
        key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type, "")
        if not key or not torch._C._dispatch_has_kernel_for_dispatch_key(f"tiledcore::{name}_native", key):
            return f"the extension was built without {name} for {device.type}"
    if impl == "triton":
        if find_spec("triton") is None:
            return "triton is not installed"
        if device.type == "cpu":
            from tiledcore.kernels import INTERPRETED

            return None if INTERPRETED else "on the CPU it needs TRITON_INTERPRET=1 in the environment from the start"
        if device.type != "cuda":
            return f"no kernel runs on {device.type}"
        if torch.version.hip and attention:
            return "the table of configurations is for NVIDIA GPUs"
        if _old(device) and (attention or dtype == torch.bfloat16):
            what = f"{name} in {dtype}" if dtype == torch.bfloat16 else name
            major, minor = torch.cuda.get_device_capability(device)
            return f"{what} needs compute capability 8.0, and this GPU has {major}.{minor}"
    if impl in ("flash", "cudnn", "xformers"):
        if device.type != "cuda":
            return f"{impl} has no attention on {device.type}"
        if impl == "xformers" and find_spec("xformers") is None:
            return "xformers is not installed"
        if impl != "xformers" and dtype not in (None, torch.float16, torch.bfloat16):
            return f"{impl} needs float16 or bfloat16, got {dtype}"
        if _old(device):
            return f"{impl} needs compute capability 8.0"
    return None


def _old(device: torch.device) -> bool:
    """Whether a GPU is an NVIDIA GPU before Ampere. ROCm's capabilities, such as 9.4, are no NVIDIA architectures."""
    there = torch.cuda.is_available() and not torch.version.hip
    return there and torch.cuda.get_device_capability(device)[0] < 8


def choose(name: str, impl: Impl | None, device: torch.device, dtype: torch.dtype | None = None) -> Callable[..., Any]:
    """The op to call: the named implementation, or the fastest one available.

    Raises:
        ValueError: the op has no implementation of that name.
        RuntimeError: the named implementation is unavailable; no other takes its place.
    """
    known = _implementations[name]
    if impl is None:
        # Interpreted Triton is for tests: on the CPU it must be named.
        ranking: tuple[Impl, ...] = ("triton", "native", "sdpa") if device.type == "cuda" else ("native", "sdpa")
        there = (i for i in ranking if i in known and unavailable(name, i, device, dtype) is None)
        impl = next(there, "reference")
    elif impl not in known:
        raise ValueError(f"impl={impl!r} is not one of {', '.join(known)}, or None")
    elif (reason := unavailable(name, impl, device, dtype)) is not None:
        raise RuntimeError(f"{name}: impl={impl!r} is unavailable on {device}: {reason}")
    return getattr(torch.ops.tiledcore, f"{name}_{impl}")
