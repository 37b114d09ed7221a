"""A mark of everything that decides a ring's tokens. Rings with equal marks answer a request with the same tokens."""

import hashlib
from collections.abc import Collection

import torch

import mdiq
from mdiq.engine.device import choose_device, kind_of
from mdiq.engine.formats.checkpoint import Checkpoint
from mdiq.engine.formats.quantize import chosen_format
from mdiq.engine.program import engine_digest
from mdiq.engine.text.tokenizer import Tokenizer
from mdiq.runtime.options import RingOptions


class SameTokens:
    """Makes the marks of the rings of one model. options: of the newest Ring; None before the first."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
        self._model = checkpoint.digest
        self._tokenizer = tokenizer.digest
        self._packed = chosen_format("auto", checkpoint, torch.device("cpu"))
        self.options: RingOptions | None = None

    def mark(self, cpus: Collection[str] = (), wanted: RingOptions | None = None) -> str | None:
        """Return the mark of the Ring, or None where equal rings may differ in a token; see docs/design/exact.md.

        cpus: kinds of the processors of its nodes, those that are known. wanted: what the Ring has become since it was
        formed, or is to become. How the layers are split is no part of the mark.
        """
        options = self.options
        if options is None:
            return None
        weights = options.weights
        device = choose_device(weights.device)
        packed = self._packed if weights.format == "auto" else weights.format
        kinds = {kind_of(device), *(cpu for cpu in cpus if cpu)}
        is_exact = weights.exact and weights.dtype == "f32" and packed != "plain" and device.type == "cpu"
        may_have_noise = options.may_have_noise or (wanted is not None and wanted.may_have_noise)
        if not is_exact or len(kinds) > 1 or options.rounds(options.wanted_wires) or may_have_noise:
            return None
        program = f"mdiq {mdiq.__version__} {engine_digest()} torch {torch.__version__}"
        text = "|".join((self._model, self._tokenizer, packed, weights.dtype, *kinds, program))
        return hashlib.sha256(text.encode()).hexdigest()
