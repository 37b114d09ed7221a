"""Blocks of conversations, and who has computed them."""

from hypothesis import given
from hypothesis import strategies as st

from mdiq.route.prefixes import BLOCK_BYTES, MAX_BLOCKS, Prefixes, chain_of


def _message(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_longer_conversation_begins_with_the_blocks_of_a_shorter_one() -> None:
    short = [_message("a" * 3_000)]
    chain = chain_of({"messages": short})
    assert len(chain) == 2
    longer = chain_of({"messages": [*short, _message("b" * 3_000)]})
    assert longer[:2] == chain and len(longer) == 5
    assert chain_of({"messages": short, "tools": [{"type": "function"}]})[:1] != chain[:1]
    assert chain_of({"prompt": "x"}) == []
    assert chain_of({"prompt": [1] * 5_000}) and chain_of({"input": "y" * 2_000})
    assert len(chain_of({"prompt": "x" * 1_000_000})) == MAX_BLOCKS


@given(st.text(), st.text())
def test_blocks_are_equal_as_far_as_texts_are(first: str, second: str) -> None:
    both = "x" * (2 * BLOCK_BYTES)
    one, two = (chain_of({"prompt": both + text * 300}) for text in (first, second))
    assert one[:2] == two[:2]
    assert (one == two) == (first == second) or len(one) <= 3 or len(two) <= 3


def test_the_server_that_computed_a_conversation_last_has_all_of_it() -> None:
    known = Prefixes()
    chain = [bytes([i]) for i in range(4)]
    known.note(chain[:2], "a")
    assert known.depths(chain) == {"a": 2}
    known.note(chain[:4], "b")
    known.note([*chain[:1], b"other"], "a")
    assert known.depths(chain) == {"a": 1, "b": 4}
    known.forget("b")
    assert known.depths(chain) == {"a": 1}
    assert known.depths([b"other"]) == {"a": 1} and known.depths([]) == {}


def test_the_least_recently_used_blocks_are_forgotten_the_last_of_a_conversation_first() -> None:
    known = Prefixes(max_known=3)
    known.note([b"1", b"2"], "a")
    known.note([b"3", b"4"], "b")
    assert len(known) == 3
    assert known.depths([b"1", b"2"]) == {"a": 1} and known.depths([b"3", b"4"]) == {"b": 2}
