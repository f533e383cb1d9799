"""Benchmarks and quality metrics: run as `python -m bench.NAME` from the repository root.

`python -m` puts the root on sys.path, where the folder `kernels/` would pass for Hugging Face's
package of that name, which diffusers and transformers probe for. Once this package is imported
nothing needs the root any more (tiledcore is installed), so it is taken off.
"""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _ROOT]
