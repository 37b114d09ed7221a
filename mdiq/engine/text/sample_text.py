"""Real text to measure with, without a download."""

import pydoc_data.topics


def sample_text() -> str:
    """Return real English text that comes with Python: the language reference, about 700 kB."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))
