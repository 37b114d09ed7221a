"""Certificates of this machine's own, made by openssl."""

import subprocess
from collections.abc import Sequence
from pathlib import Path


def make_certificate(
    folder: Path, name: str = "api", *, password: str | None = None, days: int = 30, extensions: Sequence[str] = ()
) -> tuple[Path, Path]:
    """Return the files of a new certificate for 127.0.0.1 and of its private key."""
    folder.mkdir(parents=True, exist_ok=True)
    cert, key = folder / f"{name}.crt", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days"]
    command += [
        str(days),
        *(word for each in extensions for word in ("-addext", each)),
        "-subj",
        "/CN=127.0.0.1",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        key,
        "-out",
        cert,
    ]
    command += ["-nodes"] if password is None else ["-passout", f"pass:{password}"]
    subprocess.run(command, check=True, capture_output=True, timeout=20)
    key.chmod(0o600)
    return cert, key
