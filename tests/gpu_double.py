"""A GPU's double: tensors that say they are on ``cuda``, compute on the CPU, and tell what makes the host wait.

For a process of its own (``capture_safety.py``): it makes torch believe that there is a CUDA device.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
ROOTS = {"tiledcore": "tiledcore", "diffusers": "diffusers"}  # Folder in a frame's path -> who is to blame
# Their results, or the sizes of them, are read by the host.
WAITS = {
    *(aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default),
    *(aten.masked_select.default, aten._unique2.default, aten.unique_dim.default, aten.repeat_interleave.Tensor),
}


class OnGpu(Tensor):
    """A tensor on the GPU; ``raw`` holds its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> "OnGpu":
        made: OnGpu = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, raw.shape, raw.stride(), raw.storage_offset(), dtype=raw.dtype, device=GPU
        )
        made.raw = raw
        return made

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Any:
        torch.ops.aten.copy_.default(self, source, non_blocking)
        return self

    def __deepcopy__(self, _: Any) -> Any:
        return OnGpu(self.raw.clone())

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
        kept = self.is_contiguous(memory_format=memory_format)
        return self if kept else self.clone(memory_format=memory_format)

    def nonzero(self, *, as_tuple: bool = False) -> Any:
        Gpu.active.waited("nonzero")
        return tree_map_only(Tensor, OnGpu, self.raw.nonzero(as_tuple=as_tuple))

    # Torch's own methods of these names ask CUDA for its current device.
    def __getitem__(self, index: Any) -> Any:
        return OnGpu(self.raw[indices(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.raw[indices(index)] = value.raw if isinstance(value, OnGpu) else value

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: the double is not active")


def _reads(name: str) -> Callable[[OnGpu], Any]:
    def method(self: OnGpu) -> Any:
        Gpu.active.waited(name)
        return getattr(self.raw, name)()

    return method


for _name in ("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__"):
    setattr(OnGpu, _name, _reads(_name))


class Gpu(TorchDispatchMode):
    """While active, there is a GPU. ``waits``: (who, where, what) -> how often, while ``watching``."""

    active: "Gpu"

    def __init__(self) -> None:
        super().__init__()
        Gpu.active = self
        self.waits: Counter[tuple[str, str, str]] = Counter()
        self.watching = self.capturing = False
        self.pinned = WeakTensorKeyDictionary()

    def waited(self, what: str) -> None:
        """The host waits for the device here."""
        if self.capturing:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what} in {blamed()[1]}")
        if self.watching:
            self.waits[(*blamed(), what)] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = any(isinstance(leaf, OnGpu) for leaf in leaves)
        asked = kwargs.get("device")
        there = here if asked is None else torch.device(asked).type == "cuda"
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        self._look(func, args, kwargs, leaves, here, there)
        name = str(func)
        if name.startswith("tiledcore.") and name.endswith("_triton.default"):
            func = getattr(
                torch.ops.tiledcore, name[len("tiledcore.") : -len("_triton.default")] + "_reference"
            ).default
        args, kwargs = tree_map_only(OnGpu, lambda tensor: tensor.raw, (args, kwargs))
        result = func(*args, **kwargs)
        if not there:
            return result
        given = {id(leaf.raw): leaf for leaf in leaves if isinstance(leaf, OnGpu)}
        return tree_map_only(Tensor, lambda out: given[id(out)] if id(out) in given else OnGpu(out), result)

    def _look(self, func: Any, args: Any, kwargs: Any, leaves: list[Tensor], here: bool, there: bool) -> None:
        """Tell what this call makes the host wait for."""
        if here and func in WAITS:
            self.waited(func.overloadpacket.__name__.strip("_"))
        elif func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) and here:
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                self.waited("a mask as index")
        elif func is aten._to_copy.default and here and not there:
            self.waited("a copy to the host")
        elif func is aten._to_copy.default and there and not here:
            if not (leaves[0] in self.pinned and kwargs.get("non_blocking")):
                self.waited("a pageable copy")
        elif func is aten.copy_.default:
            to, source = (isinstance(arg, OnGpu) for arg in args[:2])
            if to != source:
                self.waited("a pageable copy" if to else "a copy to the host")
        elif here and any(not isinstance(leaf, OnGpu) and leaf.ndim for leaf in leaves):
            raise RuntimeError(f"{func}: tensors on two devices")

    def pin(self, tensor: Tensor) -> Tensor:
        copied = tensor.clone()
        self.pinned[copied] = True
        return copied


def indices(index: Any) -> Any:
    """An index of an :class:`OnGpu`, for its values."""
    mode = Gpu.active
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, OnGpu) and part.dtype == torch.bool:
            mode.waited("a mask as index")
        elif isinstance(part, list) or (isinstance(part, Tensor) and not isinstance(part, OnGpu) and part.ndim):
            mode.waited("a pageable copy")
    return tree_map_only(OnGpu, lambda tensor: tensor.raw, index)


def blamed() -> tuple[str, str]:
    """Whose code, and which line of it, runs; the innermost one that is the package's or diffusers'."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        for folder, name in ROOTS.items():
            if folder in parts:
                return name, f"{'/'.join(parts[parts.index(folder) + 1 :])}:{frame.f_lineno}"
        frame = frame.f_back
    return "others", ""


def moved(pipe: Any) -> Any:
    """The pipeline with all its weights on the GPU."""
    for module in pipe.components.values():
        for part in module.modules() if isinstance(module, torch.nn.Module) else ():
            for name, value in part._parameters.items():
                if value is not None:
                    part._parameters[name] = torch.nn.Parameter(OnGpu(value.detach()), requires_grad=False)
            for name, value in part._buffers.items():
                if value is not None:
                    part._buffers[name] = OnGpu(value)
    return pipe


@contextmanager
def gpu() -> Iterator[Gpu]:
    """A GPU for this process, from now on; CUDA's functions that the package calls do nothing."""
    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    mode = Gpu()
    torch.cuda._lazy_init = nothing
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = nothing
    made, as_tensor = torch.tensor, torch.as_tensor
    torch.as_tensor = lambda value, **kwargs: (  # type: ignore[assignment]
        (value.to(**kwargs) if kwargs else value)
        if isinstance(value, Tensor)
        else (torch.tensor if kwargs.get("device") else as_tensor)(value, **kwargs)
    )
    torch.tensor = lambda *args, device=None, **kwargs: made(*args, **kwargs).to(device)
    Tensor.new_tensor = lambda self, *args, device=None, **kwargs: made(  # type: ignore[method-assign]
        *args, **{"dtype": self.dtype, **kwargs}
    ).to(device or self.device)
    Tensor.pin_memory = lambda self, *_: mode.pin(self)  # type: ignore[method-assign,assignment]
    with mode:
        yield mode
