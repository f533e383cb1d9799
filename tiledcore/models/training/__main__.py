"""Train an embedded model from the rasters to the exported folder: ``python -P -m tiledcore.models.training``.

Without arguments all stages run one after the other with their defaults, each going on where it stopped. With the
names of stages only these run. For options start a stage by itself: ``python -P -m tiledcore.models.training.denoiser
--help``.
"""

from __future__ import annotations

import importlib
import sys

STAGES = ("autoencoder", "latents", "denoiser", "export")


def main() -> None:
    for stage in sys.argv[1:] or STAGES:
        if stage not in STAGES:
            raise SystemExit(f"{stage!r} is no stage; there are {', '.join(STAGES)}\n\n{__doc__}")
        sys.argv = [stage]
        importlib.import_module(f"{__package__}.{stage}").main()


if __name__ == "__main__":
    main()
