"""The file of the API's keys."""

import hashlib
from pathlib import Path

import pytest

from mdiq.api.keys import MAX_KEYS, ApiKey, bare_keys, find_key, line_of, make_key, parse_keys, read_keys
from mdiq.errors import ConfigError

KEY = "0123456789abcdef"


def _file(tmp_path: Path, text: str, mode: int = 0o600) -> Path:
    file = tmp_path / "api.keys"
    file.write_text(text)
    file.chmod(mode)
    return file


def test_lines_are_keys_and_comments_are_not(tmp_path: Path) -> None:
    text = f"# of the office\n  #another-comment-of-one-word\n\n {KEY} \n{KEY}2\n"
    keys = read_keys(_file(tmp_path, text), {})
    assert keys == bare_keys([KEY, KEY + "2"])
    assert [key.name for key in keys] == ["key1", "key2"]


def test_systemds_credential_comes_first(tmp_path: Path) -> None:
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "api.keys").write_text(KEY + "x")
    (folder / "api.keys").chmod(0o440)  # as systemd makes it
    assert read_keys(_file(tmp_path, KEY), {"CREDENTIALS_DIRECTORY": str(folder)}) == bare_keys([KEY + "x"])


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        ("# nothing\n", 0o600, "holds no key"),
        ("short\n", 0o600, "5 characters"),
        (f"{KEY} {KEY}\n", 0o600, "without spaces"),
        (KEY, 0o644, "chmod 600"),
        (KEY + "ä", 0o600, "ASCII"),
    ],
)
def test_a_file_that_is_not_safe_or_holds_no_key_is_refused(tmp_path: Path, text: str, mode: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_keys(_file(tmp_path, text, mode), {})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: No such file.*api\.keys_file"):
        read_keys(tmp_path / "nowhere", {})


HASH = hashlib.sha256(KEY.encode()).hexdigest()


def test_a_named_key_is_kept_as_its_hash_with_its_limits() -> None:
    text = f"office-2 sha256:{HASH}   max_requests=4 tokens_per_minute=6000 share=2\nplain sha256:{'0' * 64}\n{KEY}9\n"
    named, plain, bare = parse_keys(text, "keys")
    assert named == ApiKey("office-2", bytes.fromhex(HASH), 4, 6_000, 2)
    assert plain == ApiKey("plain", bytes(32), None, None, 1)
    assert bare.name == "key1"
    keys = [named, plain, bare]
    assert find_key(keys, KEY.encode()) is named and find_key(keys, f"{KEY}9".encode()) is bare
    for sent in (b"", HASH.encode(), f"sha256:{HASH}".encode(), KEY.upper().encode(), KEY[:-1].encode()):
        assert find_key(keys, sent) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"-office sha256:{HASH}", "k:1: a name has up to 32"),
        (f"{'n' * 33} sha256:{HASH}", "k:1: a name has up to 32"),
        (f"{KEY}\noffice sha256:{HASH[1:]}", "k:2: sha256: and 64 hex digits"),
        (f"office md5:{HASH}", "k:1: sha256: and 64 hex digits"),
        (f"office {KEY}", "k:1: sha256: and 64 hex digits"),
        (
            f"office sha256:{HASH} max_request=4",
            "k:1: after the hash come max_requests=N, tokens",
        ),
        (f"office sha256:{HASH} share=2 share=3", "k:1: after the hash come .*, each once"),
        (f"office sha256:{HASH} max_requests=0", "k:1: max_requests: write a whole number from 1 to 65536"),
        (f"office sha256:{HASH} share=101", "k:1: share: write a whole number from 1 to 100"),
        (f"office sha256:{HASH} share=1.5", "k:1: share: write"),
        (f"office sha256:{HASH} tokens_per_minute={'9' * 9_999}", "k:1: tokens_per_minute: write"),
        (f"office sha256:{HASH} share", "k:1: share: write"),
        (f"a sha256:{HASH}\n\n{KEY}", "k:3: the same key as in line 1"),
        (f"{KEY}\n{KEY}", "k:2: the same key as in line 1"),
        (f"a sha256:{HASH}\na sha256:{'0' * 64}", "k:2: the same name as in line 1"),
        (f"{KEY}a\nkey1 sha256:{HASH}", "k:2: the same name as in line 1"),
        ("".join(f"n{i} sha256:{i:064x}\n" for i in range(MAX_KEYS + 1)), "1001 keys; at most 1000"),
    ],
)
def test_a_line_that_cannot_be_is_named_by_its_number_and_not_quoted(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        parse_keys(text, "k")
    assert KEY not in str(refused.value) and HASH[1:] not in str(refused.value)


def test_the_file_that_the_page_shows_is_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    [block] = [block for block in page.split("\n```")[1::2] if "sha256:" in block]
    keys = parse_keys(block, "docs/api.md")
    assert [(key.name, key.max_requests, key.tokens_per_minute, key.share) for key in keys] == [
        ("office", 4, 6_000, 1),
        ("lab", None, None, 2),
        ("key1", None, None, 1),
    ]


def test_a_new_key_is_random_and_its_line_is_read_again() -> None:
    key, other = make_key(), make_key()
    assert key != other and len(key) >= 32 and key.isascii() and " " not in key
    line = line_of("pi", key, {"max_requests": 2, "share": 3})
    assert key not in line
    [read] = parse_keys(line, "k")
    assert (read.name, read.max_requests, read.tokens_per_minute, read.share) == ("pi", 2, None, 3)
    assert find_key([read], key.encode()) is read
    with pytest.raises(ConfigError, match="a name has up to 32"):
        line_of("p i", key, {})
