"""The denoising loop of one call: engine, fallback, CUDA graphs, checkpoints."""
