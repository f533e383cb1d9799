"""Exact decoding and encoding of large images in bands of rows."""
