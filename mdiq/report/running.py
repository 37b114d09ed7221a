"""Measures a ring that runs, through its HTTP API: as it stands, without stages and without a drill.

Users are asked alone first and then all at once; the texts must be the same. What the Nodes did comes from the status.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from mdiq.bench.figures import LoadFigures, UserTimes, load_figures
from mdiq.bench.runner import NodeShare
from mdiq.bench.workload import Load
from mdiq.errors import ConfigError, RemoteProtocolError, RingError
from mdiq.report.gates import Limits, Shown, all_pass, gates
from mdiq.report.measure import LoadRun
from mdiq.report.trial import Energy, StageRun
from mdiq.runtime.options import HopFigures

VOCAB_SIZE = 256
"""Prompts are drawn from the first tokens: the API does not tell how many there are, and every model has these."""
MAX_ANSWER_BYTES = 4 << 20
SILENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One user's answer: when its pieces of text came, the text, and how many tokens they were."""

    times: UserTimes
    text: str
    num_tokens: int


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
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=SILENCE_S)
        try:
            async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
                models = await self._get(session, "/v1/models")
                model = str(models["data"][0]["id"])
                prompts = load.prompts(VOCAB_SIZE)
                alone = [await self._ask(session, model, prompt, load.answer_tokens) for prompt in prompts]
                await asyncio.sleep(rest_s)
                before = await self._get(session, "/status.json")
                async with asyncio.TaskGroup() as tasks:
                    asked = [
                        tasks.create_task(self._ask(session, model, prompt, load.answer_tokens)) for prompt in prompts
                    ]
                many = [task.result() for task in asked]
                await asyncio.sleep(rest_s)
                after = await self._get(session, "/status.json")
            return model, stage_of(load, alone, many, before, after, limits)
        except aiohttp.ClientError as error:
            raise ConfigError(f"--api {self.url}: {error}; give the address of a ring's API") from None
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RemoteProtocolError(f"{self.url}: not what mdiq's API answers ({error!r:.80})") from None

    async def _get(self, session: aiohttp.ClientSession, path: str) -> dict[str, Any]:
        async with session.get(self.url.rstrip("/") + path) as response:
            self._check(response)
            body = await response.content.read(MAX_ANSWER_BYTES)
            value = json.loads(body)
            if not isinstance(value, dict):
                raise TypeError(path)
            return value

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
        text, used = "", 0
        async with session.post(self.url.rstrip("/") + "/v1/completions", json=body) as response:
            self._check(response)
            async for line in response.content:
                if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                    continue
                chunk = json.loads(line[len(b"data: ") :])
                if "error" in chunk:
                    raise RingError(f"{self.url}: {str(chunk['error'])[:200]}")
                if piece := "".join(choice["text"] for choice in chunk["choices"]):
                    times_s.append(time.monotonic())
                    text += piece
                if chunk.get("usage"):
                    used = int(chunk["usage"]["completion_tokens"])
                if len(text) > MAX_ANSWER_BYTES:
                    raise ValueError("an answer without an end")
        if not times_s or used != num_tokens:
            raise RingError(f"{self.url}: {used} of {num_tokens} tokens came")
        return Answer(UserTimes(submitted_s, tuple(times_s)), text, used)

    def _check(self, response: aiohttp.ClientResponse) -> None:
        if response.status in (401, 403):
            raise ConfigError(f"--api {self.url}: the key is missing or wrong; set MDIQ_API_KEY to one of the ring's")
        if response.status != 200:
            raise RingError(f"{self.url}: {response.status} {response.reason}; see mdiq status on its Starter")


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
        KeyError, TypeError, ValueError: they are not statuses of a ring that serves.
    """
    nodes = [node for node in after["nodes"] if node.get("state") == "serves"]
    shares = _shares(before, after, nodes, load)
    equal = sum(mine.text == its.text for mine, its in zip(many, alone, strict=True))
    one_run, many_run = _run(load, alone[:1], shares), _run(load, many, shares)
    stage = StageRun(
        name="now",
        nodes=len(nodes),
        split=tuple(int(node["layers"][1]) - int(node["layers"][0]) for node in nodes),
        is_planned=False,
        one=one_run,
        many=many_run,
        part=None,
        equal=equal,
        predicted=None,
        devices=shares,
        kv_bytes=(),
        hops=tuple(
            HopFigures(str(hop["wire"]), _number(hop["delay_s"]), _number(hop["bytes_per_s"])) for hop in after["hops"]
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
    )


def _shares(
    before: Mapping[str, Any], after: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]], load: Load
) -> tuple[NodeShare, ...]:
    """Return what each Node did between two statuses: its busy share is of all the time since the ring serves."""
    earlier = {node["name"]: node for node in before["nodes"]}
    begun_s, ended_s = float(before["serving_s"]), float(after["serving_s"])
    shares = []
    for i, node in enumerate(nodes):
        start = earlier[node["name"]]
        busy_s = float(node["busy_share"]) * ended_s - float(start["busy_share"]) * begun_s
        is_last = i == len(nodes) - 1
        rows = load.users * (load.answer_tokens if is_last else load.prompt_tokens + load.answer_tokens - 1)
        first, stop = node["layers"]
        shares.append(
            NodeShare(
                name=str(node["name"]),
                layers=f"{int(first)}-{int(stop) - 1}",
                rss_bytes=int(node["rss_bytes"]),
                weight_bytes=int(node["weight_bytes"]),
                busy_share=min(max(busy_s / (ended_s - begun_s), 0.0), 1.0) if ended_s > begun_s else 0.0,
                waiting_share=0.0,
                bytes_per_token=(int(node["bytes_out"]) - int(start["bytes_out"])) / rows,
            )
        )
    return tuple(shares)


def _number(value: object) -> float | None:
    return None if value is None else float(str(value))
