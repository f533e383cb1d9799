"""The same image by several processes, each with a device of its own."""
