"""Measures a ring that runs, through its HTTP API: as it stands, without stages and without a drill.

Users are asked all at once and then alone; the texts must be the same. In this order the ring does not have the
prompts in its cache when the time to the first token is measured. What the Nodes did comes from the status.
"""

import asyncio
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from mdiq.bench.figures import LoadFigures, UserTimes, load_figures, num_ended_early
from mdiq.bench.runner import WARM_UP_TOKENS, NodeShare
from mdiq.bench.workload import Load
from mdiq.errors import ConfigError, RemoteProtocolError, RingError, first_of
from mdiq.report.gates import Limits, Shown, all_pass, gates
from mdiq.report.measure import LoadRun
from mdiq.report.trial import Energy, StageRun
from mdiq.runtime.options import HopFigures

VOCAB_SIZE = 256
"""Prompts are drawn from the first tokens: the API does not tell how many there are, and every model has these."""
MAX_ANSWER_BYTES = 4 << 20
MAX_TOKEN_BYTES = 4 << 10
"""What a token's event may take on the way, beside MAX_ANSWER_BYTES for all of the answer."""
SILENCE_S = 120.0
_MAX_NAME, _MAX_COUNT = 200, 1 << 62
_MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class Answer:
    """One user's answer: when its pieces of text came, the text, and how many tokens they were.

    num_cached: tokens of the prompt that the ring had in its cache.
    """

    times: UserTimes
    text: str
    num_tokens: int
    num_cached: int = 0


@dataclass(frozen=True, slots=True)
class RunningRing:
    """A ring at the address of its API. key: of the API; None: it asks for none."""

    url: str
    key: str | None = None

    async def measure(self, load: Load, limits: Limits, rest_s: float) -> tuple[str, StageRun]:
        """Return the model's name, and what the ring showed. rest_s: how long after a Load its Nodes have reported.

        Raises:
            ConfigError: nothing answers there, or the key is wrong. RemoteProtocolError: it is no API of mdiq.
            RingError: the ring failed a user.
        """
        try:
            return await self._measured(load, limits, rest_s)
        except (aiohttp.ClientError, ExceptionGroup, *_MALFORMED) as error:
            raise self._named(first_of(error)) from None

    async def _measured(self, load: Load, limits: Limits, rest_s: float) -> tuple[str, StageRun]:
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=SILENCE_S)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            models = await self._get(session, "/v1/models")
            model = str(models["data"][0]["id"])
            # Other prompts than any that a user's seed gives.
            await self._ask_all(session, model, replace(load, answer_tokens=WARM_UP_TOKENS, seed=~load.seed))
            await asyncio.sleep(rest_s)
            before = await self._status(session)
            many = await self._ask_all(session, model, load)
            await asyncio.sleep(rest_s)
            after = await self._status(session)
            prompts = load.prompts(VOCAB_SIZE)
            alone = [await self._ask(session, model, prompt, load.answer_tokens) for prompt in prompts]
        if any(not answer.text for answer in (*many, *alone)):
            raise RingError(f"{self.url}: tokens came, but no text; give another --seed or more --answer-tokens")
        if any(answer.num_cached for answer in many):
            raise ConfigError(f"--seed {load.seed}: the ring still has these prompts in its cache; give another --seed")
        stage = stage_of(load, alone, many, before, after, limits)
        if not stage.many.figures.decode_tokens_per_s:
            raise RingError(
                f"{self.url}: each answer came in one piece, so there is no rate; give more --answer-tokens, "
                "or the address of the ring itself if a proxy that holds streams back is before it"
            )
        return _name(model), stage

    def _named(self, error: BaseException) -> BaseException:
        """Return the error that a user sees in place of this one."""
        if isinstance(error, aiohttp.ClientError):
            return ConfigError(f"--api {self.url}: {error}; give the address of a ring's API")
        if isinstance(error, _MALFORMED):
            return RemoteProtocolError(f"{self.url}: not what mdiq's API answers ({error!r:.80})")
        return error

    async def _status(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        status = await self._get(session, "/status.json")
        if "serving_s" not in status and isinstance(status.get("state"), str):
            raise RingError(f"{self.url}: the ring does not serve now ({status['state']!r:.80}); measure again later")
        return status

    async def _get(self, session: aiohttp.ClientSession, path: str) -> dict[str, Any]:
        async with session.get(self.url.rstrip("/") + path) as response:
            await self._check(response)
            body = bytearray()  # a single read() ends with the first packet
            async for piece in response.content.iter_any():
                body += piece
                if len(body) > MAX_ANSWER_BYTES:
                    raise ValueError(f"{path} without an end")
            value = json.loads(body)
            if not isinstance(value, dict):
                raise TypeError(path)
            return value

    async def _ask_all(self, session: aiohttp.ClientSession, model: str, load: Load) -> list[Answer]:
        async with asyncio.TaskGroup() as tasks:
            asked = [
                tasks.create_task(self._ask(session, model, prompt, load.answer_tokens))
                for prompt in load.prompts(VOCAB_SIZE)
            ]
        return [task.result() for task in asked]

    async def _ask(
        self, session: aiohttp.ClientSession, model: str, prompt: tuple[int, ...], num_tokens: int
    ) -> Answer:
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        submitted_s = time.monotonic()
        times_s: list[float] = []
        text, used, cached, received = "", 0, 0, 0
        async with session.post(self.url.rstrip("/") + "/v1/completions", json=body) as response:
            await self._check(response)
            async for line in response.content:
                received += len(line)
                if received > MAX_ANSWER_BYTES + num_tokens * MAX_TOKEN_BYTES:
                    raise ValueError("an answer without an end")
                if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                    continue
                chunk = json.loads(line[len(b"data: ") :])
                if "error" in chunk:
                    raise RingError(f"{self.url}: {str(chunk['error'])[:200]}")
                if piece := "".join(choice["text"] for choice in chunk["choices"]):
                    times_s.append(time.monotonic())
                    text += piece
                if usage := chunk.get("usage"):
                    used = _count(usage["completion_tokens"])
                    cached = _count((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))
        if used != num_tokens:
            raise RingError(f"{self.url}: {used} of {num_tokens} tokens came")
        return Answer(UserTimes(submitted_s, tuple(times_s)), text, used, cached)

    async def _check(self, response: aiohttp.ClientResponse) -> None:
        if response.status in (401, 403):
            raise ConfigError(f"--api {self.url}: the key is missing or wrong; set MDIQ_API_KEY to one of the ring's")
        if response.status == 429:
            raise RingError(f"{self.url}: 429, the ring or the key allows fewer requests; give fewer --users")
        if response.status != 200:
            said = await response.content.read(_MAX_NAME)
            why = f" ({said!r})" if said else ""
            raise RingError(f"{self.url}: {response.status} {response.reason}{why}; see mdiq status on its Starter")


def stage_of(
    load: Load,
    alone: Sequence[Answer],
    many: Sequence[Answer],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    limits: Limits,
) -> StageRun:
    """Return the stage that answers and two statuses of the ring, before and after the Load, show.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, OverflowError: they are not statuses of a ring that serves.
        RingError: the ring changed between them.
    """
    nodes = [node for node in after["nodes"] if node.get("state") == "serves"]
    if not nodes:
        raise ValueError("no node serves")
    times = [answer.times for answer in many]
    seconds = max(user.tokens_s[-1] for user in times) - min(user.submitted_s for user in times)
    shares = _shares(before, after, nodes, load, seconds)
    equal = sum(mine.text == its.text for mine, its in zip(many, alone, strict=True))
    one_run, many_run = _run(load, alone[:1], shares), _run(load, many, shares)
    stage = StageRun(
        name="now",
        nodes=len(nodes),
        split=tuple(_count(node["layers"][1]) - _count(node["layers"][0]) for node in nodes),
        is_planned=False,
        one=one_run,
        many=many_run,
        part=None,
        equal=equal,
        predicted=None,
        devices=shares,
        kv_bytes=(),
        hops=tuple(
            HopFigures(_name(hop["wire"]), _known(hop["delay_s"]), _known(hop["bytes_per_s"])) for hop in after["hops"]
        ),
        energy=Energy("", None, None, None),
    )
    shown = Shown(load.users, equal, many_run.figures.decode_tokens_per_s, None, many_run.figures.itl_p95_s)
    found = gates(shown, limits)
    return replace(stage, gates=found, passes=all_pass(found))


def _run(load: Load, answers: Sequence[Answer], shares: tuple[NodeShare, ...]) -> LoadRun:
    users = [answer.times for answer in answers]
    figures = load_figures(users)
    # A piece of text may be several tokens: rates count tokens.
    tokens_per_piece = sum(answer.num_tokens for answer in answers) / sum(len(user.tokens_s) for user in users)
    return LoadRun(
        users=len(answers),
        prompt_tokens=load.prompt_tokens,
        answer_tokens=load.answer_tokens,
        seconds=max(user.tokens_s[-1] for user in users) - min(user.submitted_s for user in users),
        figures=LoadFigures(
            figures.total_tokens_per_s * tokens_per_piece,
            figures.decode_tokens_per_s * tokens_per_piece,
            figures.ttft_median_s,
            figures.ttft_p95_s,
            figures.itl_median_s,
            figures.itl_p95_s,
        ),
        nodes=shares,
        answers=(),
        ended_early=num_ended_early(users),
    )


def _shares(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    nodes: Sequence[Mapping[str, Any]],
    load: Load,
    seconds: float,
) -> tuple[NodeShare, ...]:
    """Return what each Node did between two statuses. seconds: that the Load took; the rest of the time is rest."""
    earlier = {node["name"]: node for node in before["nodes"] if node.get("state") == "serves"}
    is_same = before.get("rings_formed") == after.get("rings_formed")
    is_later = _number(after["serving_s"]) >= _number(before["serving_s"])
    if not (is_same and is_later) or {node["name"] for node in nodes} != set(earlier):
        raise RingError("the ring lost a node or formed anew while it was measured; measure again")
    shares = []
    for i, node in enumerate(nodes):
        start = earlier[node["name"]]
        busy_s = _number(node["busy_s"]) - _number(start["busy_s"])
        is_last = i == len(nodes) - 1
        rows = load.users * (load.answer_tokens if is_last else load.prompt_tokens + load.answer_tokens - 1)
        first, stop = node["layers"]
        shares.append(
            NodeShare(
                name=_name(node["name"]),
                layers=f"{_count(first)}-{_count(stop) - 1}",
                rss_bytes=_count(node["rss_bytes"]),
                weight_bytes=_count(node["weight_bytes"]),
                busy_share=min(max(busy_s / seconds, 0.0), 1.0) if seconds > 0 else 0.0,
                waiting_share=0.0,
                bytes_per_token=max(_count(node["bytes_out"]) - _count(start["bytes_out"]), 0) / rows,
            )
        )
    return tuple(shares)


def _name(text: object) -> str:
    """Return a name from the network, as it may stand in a page: a line of text, of a bounded length."""
    return "".join(sign if sign.isprintable() else "?" for sign in str(text)[:_MAX_NAME])


def _count(value: object) -> int:
    count = int(str(value))
    if not 0 <= count <= _MAX_COUNT:
        raise ValueError(f"{value!r:.40} is out of range")
    return count


def _number(value: object) -> float:
    number = float(str(value))
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{value!r:.40} is out of range")
    return number


def _known(value: object) -> float | None:
    return None if value is None else _number(value)
