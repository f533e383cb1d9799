"""Tile mode: the canvas is cut into tiles, a batch of tiles goes through the network, the predictions are blended."""
