"""HTTPS by certificate files: what a listening socket needs, or what is wrong with them."""

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mdiq.errors import ConfigError

CERT_CREDENTIAL, KEY_CREDENTIAL = "api.tls_cert", "api.tls_key"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """A certificate with those that it needs (a chain), and its private key, both PEM."""

    cert: Path
    key: Path

    def context(self, environ: Mapping[str, str] = os.environ) -> ssl.SSLContext:
        """Return a context with the files as they are now, or with systemd's credentials of these names.

        Raises:
            ConfigError: one cannot be read, they do not belong together, or others can read the key.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.load(context, environ)
        return context

    def cert_file(self, environ: Mapping[str, str] = os.environ) -> Path:
        """Return the file of the certificate that ``load`` reads."""
        return _file(self.cert, CERT_CREDENTIAL, environ)[0]

    def load(self, context: ssl.SSLContext, environ: Mapping[str, str] = os.environ) -> None:
        """Have connections that come from now on use the files as they are now; see ``context``."""
        cert = self.cert_file(environ)
        key, is_credential = _file(self.key, KEY_CREDENTIAL, environ)
        for what, file in (("tls_cert", cert), ("tls_key", key)):
            try:
                with file.open("rb"):
                    pass
            except OSError as error:
                raise ConfigError(f"{file}: {error.strerror}; api.{what} names it") from None
        if key.stat().st_mode & 0o077 and not is_credential:
            raise ConfigError(f"{key}: others can read it; run chmod 600 {key}")
        try:
            # Without the password of its own OpenSSL would ask for one at the terminal.
            context.load_cert_chain(cert, key, password=_no_password)
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(_why(error, cert, key)) from None


class _Encrypted(ValueError):
    """The private key needs a password."""


def _no_password() -> NoReturn:
    raise _Encrypted


def _file(file: Path, credential: str, environ: Mapping[str, str]) -> tuple[Path, bool]:
    if directory := environ.get("CREDENTIALS_DIRECTORY"):
        found = Path(directory, credential)
        if found.exists():
            return found, True
    return file, False


def _why(error: Exception, cert: Path, key: Path) -> str:
    if isinstance(error, _Encrypted):
        return f"{key}: it is encrypted with a password; write it without one (openssl pkey -in ... -out ...)"
    reason = getattr(error, "reason", None) or str(error)
    if "KEY_VALUES_MISMATCH" in reason or "KEY_TYPE_MISMATCH" in reason:
        return f"{key}: it is not the key of the certificate {cert}; api.tls_cert and api.tls_key are one pair"
    return f"{cert}, {key}: not a PEM certificate and its private key ({reason}); see api.tls_cert and api.tls_key"
