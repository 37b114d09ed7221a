"""Who asks: the keys, what the clients of each have in flight and have had, and their limits. Time is an argument.

A request that has begun is answered to its end. The tokens that it takes beyond its key's limit are owed: the next
request of the key is taken when they are paid, at the rate of the limit.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil

from mdiq.api.keys import NO_KEY, ApiKey, find_key
from mdiq.api.requests import ApiError, too_many
from mdiq.core.token_bucket import TokenBucket

RETRY_S = 1
"""Of a key whose requests are in flight: when one of them ends is not known."""


@dataclass(slots=True, eq=False)
class Client:
    """The clients of one key.

    num_running: requests in flight, each prompt counted. num_requests, num_prompt, num_answer: requests that were
    begun, and their tokens. num_refused: requests that a limit of the key refused.
    """

    key: ApiKey
    num_running: int = 0
    num_requests: int = 0
    num_prompt: int = 0
    num_answer: int = 0
    num_refused: int = 0
    _bucket: TokenBucket | None = field(init=False)

    def __post_init__(self) -> None:
        self._bucket = _bucket_of(self.key)

    def change(self, key: ApiKey) -> None:
        """Take over a key of the same name from a file that was read again."""
        if key.tokens_per_minute != self.key.tokens_per_minute:
            self._bucket = _bucket_of(key)
        self.key = key

    def check(self, num_prompts: int, now: float, *, num_choices: int = 1) -> None:
        """Refuse a request that a limit of the key does not allow now. num_choices: see too_many.

        Raises:
            BadRequest: it never does.
            ApiError: it does later.
        """
        limit = self.key.max_requests
        if limit is not None and num_prompts > limit:
            raise too_many(num_prompts, num_choices, limit, f"this key may have {limit} in flight")
        if limit is not None and self.num_running + num_prompts > limit:
            raise self._refused(f"this key has {self.num_running} requests in flight, and may have {limit}", RETRY_S)
        self._check_tokens(1, now)

    @contextmanager
    def in_flight(
        self, num_prompts: int, now: float, *, num_choices: int = 1, is_checked: bool = True
    ) -> Iterator[None]:
        """Have a request in flight, or refuse it as ``check`` does. is_checked: False for one that was taken before."""
        if is_checked:
            self.check(num_prompts, now, num_choices=num_choices)
        self.num_running += num_prompts
        try:
            yield
        finally:
            self.num_running -= num_prompts

    def begin(self, num_prompt: int, now: float) -> None:
        """Count a request with the tokens of its prompts, before it runs.

        Raises:
            ApiError: the key has to wait for so many tokens.
        """
        self._check_tokens(num_prompt, now)
        self.num_requests += 1
        self.num_prompt += num_prompt
        self._take(num_prompt, now)

    def got(self, num_tokens: int, now: float) -> None:
        """Count tokens of an answer as they come."""
        self.num_answer += num_tokens
        self._take(num_tokens, now)

    def told(self, num_prompt: int, num_answer: int, now: float, *, is_new: bool = True) -> None:
        """Count tokens of a request that another server answers. is_new: False: the request was counted before."""
        self.num_requests += is_new
        self.num_prompt += num_prompt
        self._take(num_prompt, now)
        self.got(num_answer, now)

    def _take(self, num_tokens: int, now: float) -> None:
        if self._bucket is not None:
            self._bucket.take(num_tokens, now)

    def _check_tokens(self, num_tokens: int, now: float) -> None:
        if self._bucket is not None and (wait_s := self._bucket.wait_s(num_tokens, now)) > 0:
            raise self._refused(f"this key may have {self.key.tokens_per_minute} tokens a minute", ceil(wait_s))

    def _refused(self, what: str, retry_s: int) -> ApiError:
        self.num_refused += 1
        return ApiError(429, f"{what}; ask again in {retry_s} s", reason="key_limit", retry_after_s=retry_s)


class Clients:
    """All keys, and the clients of each. Without a key, everybody is one client."""

    def __init__(self, keys: Sequence[ApiKey] = ()) -> None:
        self._clients: dict[str, Client] = {}
        self._keys: Sequence[ApiKey] = ()
        self.replace(keys)

    def replace(self, keys: Sequence[ApiKey]) -> None:
        """Take over the keys of a file that was read again; what runs goes on."""
        keys_now = keys or (NO_KEY,)
        before = {client.key.digest: client for client in self._clients.values()}
        # A named key may be another one now; the name of a bare one may be that of another.
        renewed = {
            client.key.name: client
            for client in self._clients.values()
            if not client.key.is_bare and client.key.digest not in {key.digest for key in keys_now}
        }
        self._keys = keys
        self._clients = {}
        for key in keys_now:
            known = before.get(key.digest) or (None if key.is_bare else renewed.get(key.name))
            client = self._clients[key.name] = known or Client(key)
            client.change(key)

    @property
    def has_keys(self) -> bool:
        """Whether clients need one."""
        return bool(self._keys)

    def find(self, headers: Mapping[str, str]) -> Client | None:
        """Return who asks with these headers: Authorization: Bearer KEY, or x-api-key: KEY."""
        if not self._keys:
            return self._clients[NO_KEY.name]
        scheme, _, given = headers.get("Authorization", "").partition(" ")
        for sent in (given if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")):
            key = find_key(self._keys, sent.strip().encode(errors="surrogateescape"))
            if key is not None:
                return self._clients[key.name]
        return None

    def of_digest(self, digest: bytes, name: str) -> Client:
        """Return the client that asked for something in an earlier process. Its key may be gone: it had that name."""
        for client in self._clients.values():
            if client.key.digest == digest:
                return client
        return Client(ApiKey(name, digest))

    def place_share(self, key: ApiKey) -> float:
        """Return the part of all places that is a key's own."""
        return key.share / sum(client.key.share for client in self._clients.values())

    def counts(self) -> list[dict[str, object]]:
        """Return what the status shows of each key; nothing of an API without keys."""
        return [
            {
                "name": client.key.name,
                "running": client.num_running,
                "requests": client.num_requests,
                "refused": client.num_refused,
                "prompt_tokens": client.num_prompt,
                "answer_tokens": client.num_answer,
            }
            for client in self._clients.values()
            if client.key is not NO_KEY
        ]


def _bucket_of(key: ApiKey) -> TokenBucket | None:
    per_minute = key.tokens_per_minute
    return None if per_minute is None else TokenBucket(per_minute / 60, per_minute)
