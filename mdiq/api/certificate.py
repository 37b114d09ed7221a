"""The certificate that a service shows: from when and until when it is valid, in words, in the log and as a metric."""

import contextlib
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mdiq.api.tls import TlsFiles
from mdiq.errors import ConfigError

log = structlog.get_logger()

DAY_S = 86_400.0
SOON_S = 14 * DAY_S
"""Before its end a certificate is warned about; those of Let's Encrypt are renewed a month before."""
_NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL's x509_vfy.h, which Python's ssl does not name."""


@dataclass(frozen=True, slots=True)
class Validity:
    """From when and until when a certificate is valid; Unix times."""

    begins_s: float
    ends_s: float

    def trouble(self, now_s: float) -> str | None:
        """Return why clients refuse the certificate now, and what to do; None if they do not."""
        if now_s >= self.ends_s:
            return f"it has expired ({_day(self.ends_s)}), so clients refuse it; renew it"
        if now_s < self.begins_s:
            return f"it is not valid before {_day(self.begins_s)}, so clients refuse it; see that the clock is right"
        return None

    def days_left(self, now_s: float) -> float:
        return (self.ends_s - now_s) / DAY_S


def validity_of(context: ssl.SSLContext, cert: Path) -> Validity:
    """Return the validity of the certificate that a context has from a file.

    Python tells the dates of a certificate that it has verified alone. So a client that trusts this very certificate,
    whatever the time is, shakes hands with the context in memory.

    Raises:
        ConfigError: no client would accept it, whatever it trusts and whatever the time is.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags(_NO_CHECK_TIME)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = context.wrap_bio(to_server, to_client, server_side=True), client.wrap_bio(to_client, to_server)
    try:
        client.load_verify_locations(cert)
        for _ in range(4):  # messages go to and fro
            for end in reversed(ends):
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
        found = ends[1].getpeercert()
        assert found is not None  # the handshake is over
        begins, until = str(found["notBefore"]), str(found["notAfter"])
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "verify_message", None) or getattr(error, "reason", None) or str(error)
        raise ConfigError(f"{cert}: no client accepts it ({reason}); make another one") from None
    return Validity(ssl.cert_time_to_seconds(begins), ssl.cert_time_to_seconds(until))


class Certificate(Collector):
    """The certificate of a service. ``context`` is for its sockets; ``read_again`` takes over renewed files.

    clock: Unix time.

    Raises:
        ConfigError: the files cannot be used. One that has expired can: a service that is not there helps nobody.
    """

    def __init__(self, files: TlsFiles, clock: Callable[[], float] = time.time) -> None:
        self._files, self._clock = files, clock
        self.context = files.context()
        self._validity: Validity | None = None
        self._look()

    def read_again(self) -> None:
        """Use the files as they are now for connections that come from now on.

        Raises:
            ConfigError: they cannot be used; nothing has changed.
        """
        self._files.context()  # a context that half of a pair was loaded into would be of no use
        self._files.load(self.context)
        self._look()

    def collect(self) -> Iterator[Metric]:
        if self._validity is not None:
            left_s = self._validity.ends_s - self._clock()
            text = "Seconds until the certificate of the API expires; below 0, since it has."
            yield GaugeMetricFamily("mdiq_tls_certificate_left_seconds", text, left_s)

    def _look(self) -> None:
        now_s, file = self._clock(), self._files.cert_file()
        try:
            self._validity = found = validity_of(self.context, file)
        except ConfigError as error:
            self._validity = None
            log.error("certificate_refused", reason=str(error))
            return
        if (trouble := found.trouble(now_s)) is not None:
            log.error("certificate_refused", reason=f"{file}: {trouble}")
        elif found.ends_s - now_s < SOON_S:
            log.warning("certificate_expires_soon", file=str(file), days=round(found.days_left(now_s), 1))


def _day(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_s))
