"""Save a run in one file, and go on from it: a run may be stopped at any moment.

Saved is what the loop carries from one evaluation to the next, and the generators. The rest comes from calling the
pipeline again with the same arguments, which is checked.
"""

import hashlib
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tiledcore import __version__

try:
    import fcntl
except ImportError:  # not a POSIX system: no locks
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

FILE = "checkpoint.pt"
CALLBACKS = ("callback_on_step_end", "callback")
# Arguments of a call that do not change what is denoised.
FORM = ("self", "kwargs", "output_type", "return_dict", "callback_on_step_end_tensor_inputs")
SAMPLES = 64  # values of each weight that are compared


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is saved, and how often.

    Args:
        folder: made if it is not there; holds the file of one run.
        every: evaluations between two saves. The last one is always saved.

    Raises:
        ValueError: ``every`` is below 1, or ``folder`` cannot be made.
    """

    folder: Path
    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"checkpoint: every={self.every}: must be at least 1")
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"checkpoint: {self.folder} is not a folder")
        if not self.folder.parent.is_dir():
            raise ValueError(f"checkpoint: there is no folder {self.folder.parent}")

    @property
    def file(self) -> Path:
        return self.folder / FILE

    def remove(self) -> None:
        """Remove the file, and the folder if nothing else is in it."""
        self.file.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            self.folder.rmdir()


@dataclass(frozen=True)
class Saved:
    """What a file holds, by ``torch.save`` after its SHA-256."""

    index: int  # Evaluations that are done
    steps: int  # Evaluations of the whole run
    settings: dict[str, str]  # Of the call, by name, as :func:`settings_of` gives them
    seeds: list[int]  # Of the generators, as they were made
    tensors: dict[str, Tensor]


def load(checkpoint: Checkpoint) -> Saved | None:
    """Read and check a file; None where there is none.

    Raises:
        ValueError: it is damaged.
        OSError: it cannot be read.
    """
    path = checkpoint.file
    if not path.exists():
        return None
    content = path.read_bytes()
    digest, data = content[:32], content[32:]
    if hashlib.sha256(data).digest() != digest:
        raise ValueError(f"checkpoint: {path} is damaged (its checksum does not match); remove it to start over")
    return Saved(**torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


_held: set[Path] = set()  # folders that this process has locked


@contextmanager
def locked(checkpoint: Checkpoint) -> Iterator[None]:
    """No other process uses the folder meanwhile; it is made for that, and removed again where nothing was saved.

    Raises:
        ValueError: another process uses it.
    """
    folder = checkpoint.folder.resolve()
    if folder in _held or fcntl is None:
        yield
        return
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"checkpoint: {checkpoint.folder}: another process uses it; wait for it, or give another folder"
            ) from error
        except OSError as error:  # a file system without locks
            logger.warning("checkpoint: %s cannot be locked: %s", checkpoint.folder, error)
        _held.add(folder)
        yield
    finally:
        _held.discard(folder)
        os.close(handle)
        if made:
            with suppress(OSError):  # not empty: a run was saved
                folder.rmdir()


class Run:
    """One call that is saved, and goes on from what was saved.

    ``call``: all arguments of the pipeline's call, ``settings``: what else the canvas depends on, both by name.

    Raises:
        ValueError: the call cannot be resumed, the file is damaged, or it is of another run.
    """

    def __init__(self, checkpoint: Checkpoint, pipe: Any, call: dict[str, Any], settings: dict[str, Any]) -> None:
        for name in CALLBACKS:
            if call.get(name) is not None:
                raise ValueError(f"checkpoint: {name} may change the latents, which a resumed run could not repeat")
        self.checkpoint, self.generators = checkpoint, _generators(call)
        self.settings = settings_of(pipe, call, settings)
        self.saved = load(checkpoint) or Saved(0, 0, self.settings, [], {})
        there, now = self.saved.settings, self.settings
        names = [name for name in there | now if there.get(name) != now.get(name)]
        if names:
            values = [(name, there.get(name, "nothing"), now.get(name, "nothing")) for name in names[:3]]
            differences = [f"{name}: {old:.60} there, {new:.60} now" for name, old, new in values]
            raise ValueError(
                f"checkpoint: {checkpoint.file} is of another run ({'; '.join(differences)}); "
                "remove it, or choose another folder"
            )

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put the saved run into these tensors, and its generators into their state."""
        if self.saved.index == 0:
            return
        for name, tensor in tensors.items():
            tensor.copy_(self.saved.tensors[name])
        for i, generator in enumerate(self.generators):
            generator.set_state(self.saved.tensors[f"generator.{i}"])

    def after(self, index: int, steps: int, tensors: dict[str, Tensor]) -> None:
        """Save these tensors after ``index`` of ``steps`` evaluations, if it is time.

        Raises:
            OSError: it could not be written; the file that was there before stays.
        """
        if index % self.checkpoint.every and index != steps:
            return
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        tensors |= {f"generator.{i}": generator.get_state() for i, generator in enumerate(self.generators)}
        seeds = [generator.initial_seed() for generator in self.generators]
        data = io.BytesIO()
        torch.save(vars(Saved(index, steps, self.settings, seeds, tensors)), data)
        path = self.checkpoint.file
        temporary = path.with_suffix(".tmp")  # one name, so that a killed run's is written over by the next
        try:
            self.checkpoint.folder.mkdir(exist_ok=True)
            with temporary.open("wb") as file:
                file.write(hashlib.sha256(data.getbuffer()).digest())
                file.write(data.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise OSError(f"checkpoint: {path} was not written: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)


def _generators(call: dict[str, Any]) -> list[torch.Generator]:
    given = call.get("generator")
    generators: list[Any] = given if isinstance(given, list) else [given]
    if not all(isinstance(generator, torch.Generator) for generator in generators):
        raise ValueError("checkpoint: needs generator=torch.Generator(...), whose state is part of the run")
    return generators


def settings_of(pipe: Any, call: dict[str, Any], more: dict[str, Any]) -> dict[str, str]:
    """All that the denoised canvas depends on, as comparable text; large values as their hash."""
    scheduler = pipe.scheduler
    # Without diffusers' own notes, such as ``_use_default_values``: a set, in another order in each process.
    numbers = sorted((name, value) for name, value in scheduler.config.items() if not name.startswith("_"))
    settings = {
        "tiledcore": __version__,
        "pipeline": type(pipe).__name__,
        "scheduler": f"{type(scheduler).__name__} {_hash(repr(numbers).encode())}",
    }
    changes = {name: value for name, value in call.items() if name not in FORM + CALLBACKS}
    settings |= {name: _describe(value) for name, value in (changes | more).items()}
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            settings[f"weights of {name}"] = _hash(b"".join(_samples(component)))
    return settings


def _describe(value: Any) -> str:
    if isinstance(value, torch.Generator):
        return f"seed {value.initial_seed()}, state {_hash(_bytes(value.get_state()))}"
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)} {value.dtype} {_hash(_bytes(value))}"
    if isinstance(value, Image.Image):
        return f"image {value.size} {value.mode} {_hash(value.tobytes())}"
    if hasattr(value, "__array_interface__"):
        return f"array {list(value.shape)} {value.dtype} {_hash(value.tobytes())}"
    if isinstance(value, dict):
        return str({str(k): _describe(v) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_describe, value))}]"
    return repr(value) if isinstance(value, bool | int | float | str | None) else type(value).__name__


def _samples(module: torch.nn.Module) -> Iterator[bytes]:
    """Some values of every weight, and the adapters' scales: enough to tell two checkpoints apart."""
    for parameter in module.parameters():
        yield f"{list(parameter.shape)} {parameter.dtype}".encode()
        if parameter.device.type != "meta":  # offloaded layer by layer: its values are elsewhere
            flat = parameter.detach().reshape(-1)
            yield _bytes(flat[:: max(1, len(flat) // SAMPLES)])
    for part in module.modules():
        if isinstance(getattr(part, "scaling", None), dict):
            yield str(part.scaling).encode()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
