from mdiq.report.evaluate import kv_tokens, longest_text
from mdiq.report.measure import BYTES_TOKENS


def test_the_kv_cache_holds_all_users_with_their_longest_texts() -> None:
    assert kv_tokens(3, 32) == 96
    assert kv_tokens(3, 33) == 3 * 64


def test_the_longest_text_is_of_a_load_or_of_one_whose_bytes_are_counted() -> None:
    assert longest_text(10, 50, (16, 32)) == 60
    assert longest_text(10, 2, (8,)) == max(14, 8 + 1 + BYTES_TOKENS), "a warm-up has four tokens"
    assert longest_text(10, 20, (16, 64)) == 64 + 1 + BYTES_TOKENS
