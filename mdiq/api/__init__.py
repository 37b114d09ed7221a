"""The HTTP API in front of a ring, in the shape of OpenAI's."""
