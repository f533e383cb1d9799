"""Scripts that train the embedded models and measure them. They are not part of the wheel."""
