"""The 24 prompts of the equality tests: 1 to 1,500 tokens, raw and chat, several languages, code, emoji."""

import pydoc_data.topics

_TOPICS = pydoc_data.topics.topics

RAW = [
    "The",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "La capitale de la France est",
    "Die Hauptstadt von Deutschland ist Berlin. Die Hauptstadt von Österreich ist",
    "El perro corrió por el parque y",
    "日本の首都は東京です。フランスの首都は",
    "Столица России — Москва. Столица Италии —",
    "مرحبا بالعالم",
    "🎉🚀 Launch day! 👩‍👩‍👧‍👦 The team is",
    "1 2 3 4 5 6 7 8 9 10 11 12",
    "    \n\n\t  indented",
    '{"name": "Ada", "born": 1815, "languages": [',
    _TOPICS["assert"][:900],
    _TOPICS["import"][:2_400],
    _TOPICS["class"][:3_600],
    _TOPICS["specialnames"][:6_300],
]
CHAT = [
    [{"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "system", "content": "You answer in one sentence."}, {"role": "user", "content": "What is a ring?"}],
    [
        {"role": "user", "content": "Name a prime number."},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "And the next one?"},
    ],
    [{"role": "user", "content": "Schreibe ein kurzes Gedicht über den Herbst. 🍂"}],
    [{"role": "user", "content": "Write a Python function that reverses a list."}],
    [{"role": "user", "content": "Summarise this text:\n" + _TOPICS["operator-summary"][:2_000]}],
]
