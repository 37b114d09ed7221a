"""ZeroMQ links and their in-process twins: parts of bytes, no torch."""
