"""The files that the API of a topology needs: keys and certificate, on the Starter's machine."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mdiq.api.certificate import SOON_S, Certificate, validity_of
from mdiq.api.keys import ApiKey, read_keys
from mdiq.api.tls import TlsFiles
from mdiq.config.findings import Problem
from mdiq.config.load import LoadedTopology
from mdiq.errors import ConfigError


def keys_of(loaded: LoadedTopology) -> list[ApiKey]:
    """Return the API's keys as the file has them now; none if it needs none.

    Raises:
        ConfigError: see read_keys.
    """
    file = loaded.topology.api.keys_file
    return [] if file is None else read_keys(loaded.path(file))


def tls_files_of(loaded: LoadedTopology) -> TlsFiles | None:
    """Return where certificate and key are; None if the API is plain HTTP."""
    api = loaded.topology.api
    if api.tls_cert is None or api.tls_key is None:
        return None
    return TlsFiles(loaded.path(api.tls_cert), loaded.path(api.tls_key))


class ApiFiles:
    """The files as a service has read them last. certificate: None for plain HTTP.

    Raises:
        ConfigError: one of them cannot be used.
    """

    def __init__(self, loaded: LoadedTopology) -> None:
        self._loaded = loaded
        files = tls_files_of(loaded)
        self.keys = keys_of(loaded)
        self.certificate = None if files is None else Certificate(files)

    def read_again(self) -> None:
        """Take over what the files hold now; connections that are open keep their certificate.

        Raises:
            ConfigError: one of them cannot be used; nothing has changed.
        """
        keys = keys_of(self._loaded)
        if self.certificate is not None:
            self.certificate.read_again()
        self.keys = keys


def api_file_problems(loaded: LoadedTopology) -> tuple[list[Problem], list[Problem]]:
    """Return what is wrong with these files, and which are not here: other machines do not have them."""
    errors: list[Problem] = []
    warnings: list[Problem] = []

    def look(key: str, files: list[Path], use: Callable[[], object]) -> None:
        for file in files:
            if not file.exists():
                text = f"{file} is not here; the Starter's machine needs it"
                warnings.append(Problem(("api", key), text))
                return
        try:
            use()
        except ConfigError as error:
            errors.append(Problem(("api", key), str(error)))

    if (keys_file := loaded.topology.api.keys_file) is not None:
        look("keys_file", [loaded.path(keys_file)], lambda: keys_of(loaded))
    if (files := tls_files_of(loaded)) is not None:

        def use(now_s: float, files: TlsFiles = files) -> None:
            validity = validity_of(files.context(), file := files.cert_file())
            if (trouble := validity.trouble(now_s)) is not None:
                raise ConfigError(f"{file}: {trouble}")
            if validity.ends_s - now_s < SOON_S:
                text = f"{file}: it expires in {validity.days_left(now_s):.1f} days; renew it"
                warnings.append(Problem(("api", "tls_cert"), text))

        look("tls_cert", [files.cert, files.key], partial(use, time.time()))
    return errors, warnings
