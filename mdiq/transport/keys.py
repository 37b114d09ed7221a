"""Private keys of CURVE in files: made, read, and refused when others could read or change them. No sockets.

A key file ``<name>.key`` holds the private key in Z85 (40 characters) and a newline, with mode 0600. The public key is
not stored: it follows from the private one. On a device systemd may provide the key instead, as the credential
``node.key``; see systemd.exec(5), LoadCredential.
"""

import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

import zmq

from mdiq.cache import write_whole
from mdiq.errors import ConfigError

KEY_CHARACTERS = 40
CREDENTIAL = "node.key"
_Z85 = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_MAX_BYTES = 256


def make_keys(folder: Path, names: Iterable[str], *, replace: bool = False) -> dict[str, str]:
    """Make a private key for each name in ``folder`` and return the public keys by name.

    An existing key stays, unless ``replace``. The folder is made, for its owner alone.

    Raises:
        ConfigError: a name, the folder or an existing key cannot be used.
    """
    public = {}
    for name in names:
        path = key_file(folder, name)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not replace and path.exists():
                public[name] = public_of(read_private(path))
                continue
            text, private = zmq.curve_keypair()
            write_whole(path, private + b"\n", replaces=replace)  # without: no key is ever lost
        except OSError as error:
            raise ConfigError(f"{path}: cannot write the key: {error.strerror}; choose another folder") from None
        public[name] = text.decode()
    return public


def key_file(folder: Path, name: str) -> Path:
    """Return the path of a Node's private key.

    Raises:
        ConfigError: the name is not a legal Node name; it could lead out of the folder.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"node name {name!r}: use a-z, 0-9 and -, at most 63 characters, and do not begin with -")
    return folder / f"{name}.key"


def private_of(folder: Path, name: str, environ: Mapping[str, str] = os.environ) -> bytes:
    """Return a Node's private key in Z85: systemd's credential if there is one, else the file in ``folder``.

    Raises:
        ConfigError: there is no key, or it is not safe to use.
    """
    if directory := environ.get("CREDENTIALS_DIRECTORY"):
        credential = Path(directory, CREDENTIAL)
        if credential.exists():
            return read_private(credential, is_credential=True)
    return read_private(key_file(folder, name))


def read_private(path: Path, *, is_credential: bool = False) -> bytes:
    """Return the private key in Z85 that a file holds.

    is_credential: systemd made the file, for this service alone: root may own it, and its group may read it.

    Raises:
        ConfigError: the file is missing, is not a key, or is open to others.
    """
    try:
        # Not blocking: a pipe of that name must not block us before it is refused.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such key; make it with mdiq keys, or copy it from where it was made") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the key: {error.strerror}; run as its owner") from None
    with open(descriptor, "rb", buffering=0) as file:
        # Of the open file, not of its name: the name may lead to another file a moment later.
        _check_owner_and_mode(path, os.fstat(file.fileno()), is_credential=is_credential)
        text = (file.read(_MAX_BYTES) or b"").strip()
    if not _Z85.fullmatch(text):
        raise ConfigError(f"{path}: not a private key of {KEY_CHARACTERS} characters; make a new one with mdiq keys")
    try:
        zmq.curve_public(text)
    except zmq.ZMQError:
        raise ConfigError(f"{path}: not a private key; make a new one with mdiq keys") from None
    return text


def public_of(private: bytes) -> str:
    """Return the public key, in Z85, that belongs to a private one."""
    return zmq.curve_public(private).decode()


def is_public_key(text: str) -> bool:
    """Return whether a text can be a public key: 40 characters of Z85 that decode to 32 bytes."""
    try:
        encoded = text.encode("ascii")
    except UnicodeEncodeError:
        return False
    if not _Z85.fullmatch(encoded):
        return False
    # Five characters of Z85 can encode more than four bytes hold (RFC 32); curve_public refuses that.
    try:
        zmq.curve_public(encoded)
    except zmq.ZMQError:
        return False
    return True


def _check_owner_and_mode(path: Path, status: os.stat_result, *, is_credential: bool) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path}: not a regular file; give the private key as a file")
    owners = {os.geteuid(), 0} if is_credential else {os.geteuid()}
    if status.st_uid not in owners:
        raise ConfigError(f"{path}: owned by another user (uid {status.st_uid}); chown it to uid {os.geteuid()}")
    forbidden = 0o027 if is_credential else 0o077
    if status.st_mode & forbidden:
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(f"{path}: mode {mode:04o} lets others read or change the private key; chmod 600 it")
