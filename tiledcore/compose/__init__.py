"""What makes one picture of many parts: stages, regions, wrapped canvases, connected sets."""
