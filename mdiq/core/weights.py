"""Messages of a weight transfer. Files are control/weight_store.py's, sockets transport/'s.

The Starter has each Layer as one file, in the form in which the Ring holds it. A Node names its Layers once. The
Starter offers the file of each as soon as it is there, and the Node asks for parts of the offered files, a few at a
time, in order. Each part comes as Pieces, small enough that a slow link always has news. A file is believed when all
of its bytes have the SHA-256 that was offered.

    Node                                  Starter
    AskLayers(model, layers)        ->
                                    <-    Waiting                 while a Layer is being packed
                                    <-    LayerFile, LayerFile .. or Refused
    AskPart(layer, offset)          ->                            at most CREDIT_PARTS unanswered
                                    <-    Piece, Piece, ...
                                    <-    Waiting                 while the rate limit holds a part back
    Done                            ->

The tag of these messages is a checksum under a public key: who may speak at all is a matter of the sockets.
"""

import re
from dataclasses import dataclass
from typing import get_args

from mdiq.core.codec import MAX_TEXT, Codec
from mdiq.core.types import LayerRange
from mdiq.errors import RemoteProtocolError

VERSION = 2
PIECE_BYTES = 2**16  # on 0.1 Mbit/s five seconds: ZeroMQ gives up a link on which nothing arrives for 6 s
PART_BYTES = 2**20
"""Bytes that one AskPart is about; the last part of a file may be shorter."""
CREDIT_PARTS = 4
SHA256_BYTES = 32
MAX_FILE_BYTES = 2**44
MAX_BYTES = 2**17
_CHECKSUM_KEY = b"mdiq weights, v2"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FORMAT = re.compile(r"[a-z0-9]{1,8}")


def folder_name(digest: str, weights: str) -> str:
    """Return what a Node calls its folder of a model in one format.

    Raises:
        RemoteProtocolError: the Starter named something else, which might lead elsewhere.
    """
    if not _DIGEST.fullmatch(digest) or not _FORMAT.fullmatch(weights):
        raise RemoteProtocolError(f"model {digest[:80]!r} as {weights[:80]!r}: neither can be a name")
    return f"{digest}-{weights}"


@dataclass(frozen=True, slots=True)
class AskLayers:
    """A Node asks for the files of some Layers. digest: of the model that it is to compute with."""

    digest: str
    layer_start: int
    layer_stop: int

    def __post_init__(self) -> None:
        if not self.layer_start < self.layer_stop or not _DIGEST.fullmatch(self.digest):
            raise ValueError("it needs a SHA-256 in hexadecimal, and a layer")

    @property
    def layers(self) -> LayerRange:
        """The Layers that it is about."""
        return LayerRange(self.layer_start, self.layer_stop)


@dataclass(frozen=True, slots=True)
class LayerFile:
    """The file of a Layer, which the Node may now ask for."""

    layer: int
    num_bytes: int
    sha256: bytes

    def __post_init__(self) -> None:
        if len(self.sha256) != SHA256_BYTES or not 0 < self.num_bytes <= MAX_FILE_BYTES:
            raise ValueError(f"it needs a SHA-256 and 1 to {MAX_FILE_BYTES} bytes")


@dataclass(frozen=True, slots=True)
class AskPart:
    """A Node asks for PART_BYTES of a Layer's file, from ``offset`` on.

    taken: parts that it has taken in since AskLayers: so many less are under way.
    """

    layer: int
    offset: int
    taken: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Some bytes of a Layer's file, which begin at ``offset`` in it."""

    layer: int
    offset: int
    data: bytes

    def __post_init__(self) -> None:
        if not 0 < len(self.data) <= PIECE_BYTES:
            raise ValueError(f"it needs 1 to {PIECE_BYTES} bytes")


@dataclass(frozen=True, slots=True)
class Waiting:
    """The Starter has the question, and the answer takes its time."""


@dataclass(frozen=True, slots=True)
class Done:
    """A Node has all that it wants."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The Starter does not do what it was asked. ``is_final``: asking again gives the same answer."""

    text: str
    is_final: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", self.text[:MAX_TEXT].encode("utf-8", "replace").decode())


Message = AskLayers | LayerFile | AskPart | Piece | Waiting | Done | Refused

_CODEC = Codec[Message]("weights message", VERSION, get_args(Message), max_bytes=MAX_BYTES, max_blob_bytes=PIECE_BYTES)


def encode(message: Message) -> bytes:
    """Return the bytes of a message.

    Raises:
        LocalProtocolError: a field is out of bounds, or the whole is too long.
    """
    return _CODEC.encode(message, _CHECKSUM_KEY)


def decode(data: bytes) -> Message:
    """Return the message that ``data`` carries.

    Raises:
        RemoteProtocolError: it is none, or a field is missing or not what it must be.
    """
    return _CODEC.decode(data, _CHECKSUM_KEY)
