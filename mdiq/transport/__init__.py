"""ZeroMQ links, and in-process links with the same interface: parts of bytes, no torch."""
