"""What the commands share: option values, messages on stderr, quiet libraries, output whose reader may be gone.

It imports nothing large, so that ``--help`` is quick.
"""

import os
import sys
import warnings
from typing import Any, TextIO

STRENGTH = 0.6
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "dpm++2s": "DPMSolverSinglestepScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2-a": "KDPM2AncestralDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "tcd": "TCDScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def launched() -> bool:
    """Whether torchrun started this process and others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def leads() -> bool:
    """Whether this process writes files and messages: of those that torchrun started, the first."""
    return not launched() or os.environ["RANK"] == "0"


def say(text: str, always: bool = False) -> None:
    if always or leads():
        print(text, file=sys.stderr, flush=True)


def quiet() -> None:
    """Switch off log messages, progress bars and warnings of diffusers and transformers in this process.

    A RuntimeWarning concerns the image and stays. The environment is set first, for what they say while imported.
    """
    os.environ.update(DIFFUSERS_VERBOSITY="error", TRANSFORMERS_VERBOSITY="error")
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.simplefilter("ignore", category)
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    enable_progress_bars()  # of downloads, which transformers has just switched off as well


class Lasting:
    """A text stream that is silent once its reader is gone: there may be an image to write (``... | head -1``)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, method: Any, *args: str) -> None:
        try:
            method(*args)
        except BrokenPipeError:  # all that is still written, buffered text too, goes nowhere
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
