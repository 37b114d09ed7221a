"""mdiq runs a large language model on several cheap devices at once."""

__version__ = "0.1.0"
