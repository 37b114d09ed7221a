"""A span of OpenTelemetry for each request, if its standard environment variables name a collector.

Each of VARIABLES switches it on. All others of the OpenTelemetry SDK hold too: headers, sampling, attributes of the
resource. A span has no content of a request: names, counts and times alone.

Names of attributes: OpenTelemetry semantic conventions 1.37, HTTP server spans and generative AI; ``mdiq.*`` are ours.
"""

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import web

from mdiq import __version__
from mdiq.errors import ConfigError

VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PARENT = "traceparent"  # W3C Trace Context
_PARENT = re.compile(r"[0-9a-f-]{1,128}")
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
}


class RequestTraces:
    """Makes spans and sends them, a few seconds later and in a thread of its own. service: its name there.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """

    def __init__(self, service: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            name = next(name for name in VARIABLES if os.environ.get(name))
            raise ConfigError(
                f"{name} is set, and OpenTelemetry is not installed; pip install 'mdiq[otel]', or unset it"
            ) from None
        names = {"service.name": os.environ.get("OTEL_SERVICE_NAME") or service, "service.version": __version__}
        self._provider = TracerProvider(resource=Resource.create(names), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("mdiq", __version__)

    def note(
        self,
        method: str,
        path: str,
        seconds: float,
        status: int,
        attributes: Mapping[str, Any],
        parent: Mapping[str, str],
    ) -> None:
        """Make a span of a request that has ended just now. path: of its route, or "none". parent: of ``parent_in``."""
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        now_ns = time.time_ns()
        span = self._tracer.start_span(
            method if path == "none" else f"{method} {path}",
            context=TraceContextTextMapPropagator().extract(parent),
            kind=SpanKind.SERVER,
            start_time=now_ns - round(seconds * 1e9),
            attributes={
                "http.request.method": method,
                "http.route": path,
                "http.response.status_code": status,
                **({"gen_ai.operation.name": operation} if (operation := _OPERATIONS.get(path)) else {}),
                **attributes,
            },
        )
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        span.end(now_ns)

    def close(self) -> None:
        """Send what there is; takes as long as the collector does, a few seconds at most where there is none."""
        self._provider.shutdown()


TRACES: web.AppKey[RequestTraces] = web.AppKey("traces", RequestTraces)


async def traced(app: web.Application) -> AsyncIterator[None]:
    """Have an application send spans as long as it runs, if that is wanted.

    Raises:
        ConfigError: see RequestTraces.
    """
    if not any(os.environ.get(name) for name in VARIABLES):
        yield
        return
    app[TRACES] = traces = await asyncio.to_thread(RequestTraces, "mdiq")
    yield
    await asyncio.to_thread(traces.close)


def parent_in(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the header of a request that names its client's own span, if it has one."""
    parent = headers.get(PARENT, "")
    return {PARENT: parent} if _PARENT.fullmatch(parent) else {}
