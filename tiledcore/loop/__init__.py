"""The denoising loop of one call: engine, CUDA graphs, checkpoints."""
