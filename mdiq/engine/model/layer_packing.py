"""A Starter's model as files of Layers for the other Nodes, packed when they are asked for."""

import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from mdiq.engine.formats.checkpoint import open_checkpoint
from mdiq.engine.formats.packed_model import PackedModel
from mdiq.engine.memory import reset_peak, return_free_memory
from mdiq.engine.model.hot_columns import hot_columns
from mdiq.errors import RingError


class LayerPacking:
    """The Layers of the model at ``path`` in the format ``weights``, kept in ``folder``; to be closed.

    digest, num_layers: the model's.

    Raises:
        ModelError: it cannot be read.
    """

    def __init__(self, path: Path, weights: str, folder: Path) -> None:
        self._is_stopped = False
        self._at_work = threading.Lock()
        with ExitStack() as opened:
            checkpoint = opened.enter_context(open_checkpoint(path))
            self.digest, self.num_layers = checkpoint.digest, checkpoint.config.num_layers
            find_hot = partial(hot_columns, checkpoint, lambda *_: self._step())
            self._packed = opened.enter_context(PackedModel(checkpoint, weights, folder, find_hot, self._step))
            self._opened = opened.pop_all()

    def find(self, layer: int) -> Path:
        """Return the file of a Layer, packed now if it never was.

        Raises:
            ModelError, CapacityError: it cannot be packed, or not be written.
            RingError: it was stopped.
        """
        with self._at_work, torch.inference_mode():
            self._step()
            path = self._packed.layer(layer).path
            if self._packed.has_packed:
                self._packed.has_packed = False
                return_free_memory()
                reset_peak()  # it is done once on a device
            return path

    def stop(self) -> None:
        """Have what packs a Layer in another thread end after its step; nothing is packed any more."""
        self._is_stopped = True

    def close(self) -> None:
        """Stop, and close the model after the step that a thread is at."""
        self.stop()
        with self._at_work:
            self._opened.close()

    def _step(self) -> None:
        if self._is_stopped:
            raise RingError("the ring ends, and its layers are packed no further")
