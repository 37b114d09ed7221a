"""Until when a certificate is valid: as files of every kind tell it, in the log, and as a metric."""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog
from prometheus_client import CollectorRegistry

from mdiq.api.certificate import DAY_S, Certificate, Validity, validity_of
from mdiq.api.tls import TlsFiles
from mdiq.errors import ConfigError
from tests.api.certificates import make_certificate

LEFT = "mdiq_tls_certificate_left_seconds"


@pytest.mark.parametrize(
    "extensions",
    [
        (),
        ("basicConstraints=critical,CA:FALSE",),
        ("basicConstraints=critical,CA:FALSE", "extendedKeyUsage=serverAuth", "keyUsage=digitalSignature"),
    ],
)
def test_the_dates_are_those_that_openssl_shows(tmp_path: Path, extensions: Sequence[str]) -> None:
    files = TlsFiles(*make_certificate(tmp_path, days=90, extensions=extensions))
    found = validity_of(files.context({}), files.cert)
    shown = subprocess.run(
        ["openssl", "x509", "-in", files.cert, "-noout", "-dates"], check=True, capture_output=True, text=True
    ).stdout
    dates = dict(line.split("=") for line in shown.splitlines())
    assert [dates["notBefore"], dates["notAfter"]] == [
        time.strftime("%b %e %H:%M:%S %Y GMT", time.gmtime(each)) for each in (found.begins_s, found.ends_s)
    ]
    assert found.days_left(found.begins_s) == pytest.approx(90)


def test_the_first_certificate_of_a_chain_counts(tmp_path: Path) -> None:
    files = TlsFiles(*make_certificate(tmp_path, days=20))
    other, _ = make_certificate(tmp_path / "other", days=900)
    files.cert.write_bytes(files.cert.read_bytes() + other.read_bytes())
    found = validity_of(files.context({}), files.cert)
    assert found.ends_s - found.begins_s == pytest.approx(20 * DAY_S)


def test_one_that_is_not_for_servers_is_said_so(tmp_path: Path) -> None:
    files = TlsFiles(*make_certificate(tmp_path, extensions=("extendedKeyUsage=clientAuth",)))
    with pytest.raises(
        ConfigError, match=r"api.crt: no client accepts it \(un.* certificate purpose\); make another one"
    ):
        validity_of(files.context({}), files.cert)
    with structlog.testing.capture_logs() as lines:
        certificate = Certificate(files)
    assert [line["event"] for line in lines] == ["certificate_refused"] and not [*certificate.collect()]


def test_what_is_wrong_with_a_time_is_said_with_its_day() -> None:
    validity = Validity(1_000_000_000.0, 1_000_864_000.0)
    assert validity.trouble(1_000_000_000.0) is None and validity.days_left(1_000_000_000.0) == 10
    assert validity.trouble(999_999_999.0) == (
        "it is not valid before 2001-09-09 01:46 UTC, so clients refuse it; see that the clock is right"
    )
    assert validity.trouble(1_000_864_000.0) == (
        "it has expired (2001-09-19 01:46 UTC), so clients refuse it; renew it"
    )


@pytest.mark.parametrize(
    ("days", "event"),
    [
        (0.5, None),
        (15.9, None),
        (16.1, "certificate_expires_soon"),
        (30.1, "certificate_refused"),
        (-1, "certificate_refused"),
    ],
)
def test_a_service_logs_at_its_start_what_clients_will_meet_and_the_metric_goes_on(
    tmp_path: Path, days: float, event: str | None
) -> None:
    files, begun_s = TlsFiles(*make_certificate(tmp_path)), time.time()
    now = [begun_s + days * DAY_S]
    with structlog.testing.capture_logs() as lines:
        certificate = Certificate(files, clock=lambda: now[0])
    assert [line["event"] for line in lines] == ([] if event is None else [event])
    registry = CollectorRegistry()
    registry.register(certificate)

    def left_days() -> Any:
        left_s = registry.get_sample_value(LEFT)
        return None if left_s is None else left_s / DAY_S

    assert left_days() == pytest.approx(30 - days, abs=0.01)
    now[0] += 40 * DAY_S
    assert left_days() == pytest.approx(-10 - days, abs=0.01)


def test_a_reload_looks_at_the_renewed_certificate(tmp_path: Path) -> None:
    files = TlsFiles(*make_certificate(tmp_path))
    certificate = Certificate(files)
    context = certificate.context
    make_certificate(tmp_path, days=3)
    with structlog.testing.capture_logs() as lines:
        certificate.read_again()
    assert [(line["event"], line["log_level"], line["days"]) for line in lines] == [
        ("certificate_expires_soon", "warning", 3.0)
    ]
    (family,) = certificate.collect()
    assert family.samples[0].value == pytest.approx(3 * DAY_S, abs=120)
    files.cert.write_text("diary")
    with pytest.raises(ConfigError, match="not a PEM certificate"):
        certificate.read_again()
    assert certificate.context is context and [*certificate.collect()]
