"""What the command itself decides of a service; the ring is tests/integration's."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import web

from mdiq.config.load import load_topology
from mdiq.core.sequence import SamplingParams, Sequence
from mdiq.errors import TransportError
from mdiq.plan import privacy
from mdiq.service.ring_backend import RingBackend
from mdiq.service.starter import TopologyService, _Topologies, name_of
from mdiq.service.topology_values import remote_nodes


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("models/Llama-3.2-1B-Instruct", "Llama-3.2-1B-Instruct"),
        ("/m/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "qwen2.5-coder-0.5b-instruct-q4_k_m"),
        ("big-Q4_K_M-00002-of-00003.gguf", "big-Q4_K_M"),
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
    ],
)
def test_a_model_is_called_after_its_path(path: str, name: str) -> None:
    assert name_of(path) == name


def test_a_sequence_has_the_name_and_the_share_of_its_key() -> None:
    asked: list[Sequence] = []
    keeper = SimpleNamespace(stream=asked.append)
    tokenizer = SimpleNamespace(with_special_stops=lambda params: params, eos_token_ids=frozenset([2]))
    config = SimpleNamespace(vocab_size=9, context_tokens=8)
    backend = RingBackend(*cast(Any, (keeper, tokenizer, None, config, "m", None, dict, str)))
    backend.answer((1,), SamplingParams(), owner="office", share=3)
    backend.answer((1,), SamplingParams())
    assert [(each.owner, each.share) for each in asked] == [("office", 3), ("", 1)]
    assert asked[0].index != asked[1].index


async def test_an_address_that_the_machine_has_not_yet_is_no_mistake_in_the_file() -> None:
    runner = SimpleNamespace(application=web.Application, note_cut_off=lambda _: None)
    wanted = SimpleNamespace(host="203.0.113.7", port=8080, client_timeout_s=5.0)  # RFC 5737: nobody's
    service = SimpleNamespace(
        _wanted_api=wanted, _api=runner, _api_files=SimpleNamespace(certificate=None), _file="topology.yaml"
    )
    with pytest.raises(TransportError, match=r"topology\.yaml: api: 203\.0\.113\.7 port 8080 cannot be used") as caught:
        async with TopologyService._listening(cast(Any, service)):
            pass
    # The units give up for good on exit code 2: see RestartPreventExitStatus.
    assert caught.value.exit_code == 1


async def test_the_first_noise_of_a_reload_is_computed_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "topology.yaml"
    noise = "{epsilon: 8, delta: 1.0e-6, clip: 40}"

    def write(noise: str) -> None:
        nodes = (
            f"[{{name: a, address: 127.0.0.1, role: starter}}, {{name: b, address: 127.0.0.1, data_port: 7403{noise}}}]"
        )
        file.write_text(f"version: 1\nmodel: {{path: m}}\nnodes: {nodes}\n")

    threads: list[threading.Thread] = []
    ratio = privacy._ratio.__wrapped__

    @privacy.lru_cache
    def noted(epsilon: float, delta: float) -> float:
        threads.append(threading.current_thread())
        return cast(float, ratio(epsilon, delta))

    async def reload() -> str:
        topology = load_topology(file).topology
        (_, node) = remote_nodes(topology, topology.nodes, with_noise=True)
        return f"sigma {node.noise.row.sigma:.1f}" if node.noise is not None else "none"

    monkeypatch.setattr(privacy, "_ratio", noted)
    write("")
    topologies = _Topologies(load_topology(file), tmp_path, cast(Any, None), 1, even_split=False)
    service = cast(Any, object.__new__(TopologyService))
    service._topologies, service._keeper = topologies, SimpleNamespace(reload=reload)
    service._api_files = SimpleNamespace(read_again=lambda: None, keys=[])
    service._api = SimpleNamespace(replace_keys=lambda _: None)
    assert await service._reload_all() == "none"
    write(f", noise: {noise}")
    assert (await service._reload_all()).startswith("sigma ")
    assert len(threads) == 1 and threads[0] is not threading.main_thread()
    file.write_text("nonsense")  # the keeper refuses it
    topologies.prepare()
