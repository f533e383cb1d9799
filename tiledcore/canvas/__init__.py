"""Canvas mode: the network runs once over the whole canvas, and its self-attention is neighbour attention."""
