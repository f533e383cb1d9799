"""Other methods for images larger than the model's own size, written from their papers: see bench/modes.py."""
