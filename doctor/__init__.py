"""The engine of gpu-doctor: it samples, judges and reports, and knows no failure mode by name."""

__version__ = "0.1.0"
