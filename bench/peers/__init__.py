"""Other ways to denoise a canvas larger than the model's own size, as baselines: written from their papers alone.

:mod:`bench.peers.model` is what they have in common, :mod:`bench.peers.methods` has one function each, and
``python -m bench.peers_table`` compares them with tiledcore.
"""
