"""Matmuls and what else is compiled on the device itself: which there are, and which one is fastest here."""
