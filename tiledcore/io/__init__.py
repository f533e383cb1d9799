"""Image files: reading, writing whole and as a stream, previews, deep zoom."""
