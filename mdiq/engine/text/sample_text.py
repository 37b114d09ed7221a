"""Real text to measure with, without a download."""

import pydoc_data.topics


def sample_text() -> str:
    """Return real English that every Python carries: the language reference, about 700 kB."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))
