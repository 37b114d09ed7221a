"""Every exception that mdiq raises on purpose, and the exit code of the command line that each one means.

    MdiqError                       exit code 1: something failed
    ├── UsageError                  exit code 2: what the user asked for cannot be
    │   ├── ConfigError             a flag, a field of a prompts file, a sampling value
    │   │   ├── TopologyError       a topology file: all that is wrong with it
    │   │   └── CostlyFormError     the form of an answer: it takes too much to compile
    │   ├── PlanError               a layer split that does not fit the model, a model that does not fit the nodes
    │   └── ModelError              a model that is missing, truncated or of an unsupported kind
    ├── CapacityError               no memory, or a prompt longer than the context
    │   ├── CrampedError            a ring that others would go on as has too little KV cache for what runs
    │   └── ContextLengthError
    ├── ProtocolError
    │   ├── LocalProtocolError      our own code called a protocol in the wrong order
    │   └── RemoteProtocolError     a peer sent what it must not send
    ├── TransportError              a socket that cannot be bound or reached
    ├── EngineError                 a forward pass failed
    │   └── SequenceError           some Sequences of a Batch cannot be computed, and nothing was yet
    └── RingError                   the ring stopped answering
        ├── RingStalledError        one Sequence made no progress in spite of its replays
        └── NodeDiedError           a process of the ring ended

A message says where, what, and what to do, in one line; a TopologyError in one line for each mistake.
"""

from collections.abc import Sequence


class MdiqError(Exception):
    """Root of all errors that mdiq raises on purpose. node: of another process than this one, where it is its error."""

    exit_code = 1
    node: str | None = None


class UsageError(MdiqError):
    """The request itself cannot be served; asking again the same way gives the same answer."""

    exit_code = 2


class ConfigError(UsageError):
    """A flag, a file's field or a sampling value is out of range."""


class TopologyError(ConfigError):
    """A topology file cannot be used. lines: one for each mistake."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)


class CostlyFormError(ConfigError):
    """The form of an answer takes too much time, memory or stack to compile."""


class GaveWayError(ConfigError):
    """A change of the ring was given up before it began, for another one; nothing has changed."""


class PlanError(UsageError):
    """A layer split does not fit the model, or the model does not fit the nodes."""


class ModelError(UsageError):
    """The model is missing, truncated, malformed or of an unsupported kind."""


class CapacityError(MdiqError):
    """There is not enough memory for what was asked."""


class CrampedError(CapacityError):
    """Another ring could go on, with less KV cache than a request that runs may need."""


class ContextLengthError(CapacityError):
    """A prompt and its answer do not fit the model's context."""

    exit_code = 2


class ProtocolError(MdiqError):
    """A rule of the ring protocol was broken."""


class LocalProtocolError(ProtocolError):
    """Our own code broke the rule: a bug in mdiq."""


class RemoteProtocolError(ProtocolError):
    """A peer broke the rule; its frame is dropped and counted."""


class TransportError(MdiqError):
    """A socket cannot be bound, reached or used."""


class EngineError(MdiqError):
    """A forward pass failed on a node."""


class SequenceError(EngineError):
    """Some Sequences of a Batch cannot be computed; the Batch can be run without them. seq_ids: theirs.

    Of one that another Node reports only the text is known: its report names the Sequences.
    """

    def __init__(self, text: str, seq_ids: Sequence[int] = ()) -> None:
        super().__init__(text)
        self.seq_ids = tuple(seq_ids)


class RingError(MdiqError):
    """The ring stopped answering."""


class RingStalledError(RingError):
    """A Sequence made no progress in spite of its replays."""


class NodeDiedError(RingError):
    """A process of the ring ended while it was needed.

    is_silent: it says nothing any more, and may live: its link may be down. unheard_s: how long it had said nothing
    when that was noticed, if that is known.
    """

    def __init__(self, *args: object, is_silent: bool = False, unheard_s: float | None = None) -> None:
        super().__init__(*args)
        self.is_silent = is_silent
        self.unheard_s = unheard_s


class KeyRevokedError(NodeDiedError):
    """A node of the ring has another key from now on, and lives: it comes back when it has that one."""


def first_of(error: BaseException) -> BaseException:
    """Return the first error that a group holds, however deep, or the error itself: users are told one at a time."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
