"""Measuring: loads, a ring and its peer under them, and the figures that come out."""
