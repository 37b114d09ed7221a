"""The files that the API of a topology needs: keys and certificate, on the Starter's machine."""

from collections.abc import Callable
from pathlib import Path

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
        look("tls_cert", [files.cert, files.key], files.context)
    return errors, warnings
