"""Triton kernels, one file per op. Imported as `tiledcore.kernels`, and only when one is needed."""

import triton

# Triton decides when a kernel is decorated, that is, on the import of its file, whether its
# interpreter runs it. Noted here at the same moment; only then may a kernel be given CPU tensors.
INTERPRETED: bool = triton.knobs.runtime.interpret
