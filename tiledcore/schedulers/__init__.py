"""Schedulers of diffusers as tables of coefficients, and what their predictions stand for."""
