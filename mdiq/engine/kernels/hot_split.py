"""What hot columns ask of activations: int8 kernels give a matrix's copies of a column equal shares of it."""

import torch

from mdiq.engine.formats.packed_file import PackedFile


class HotSplit:
    """Spreads activations over the places of hot columns: each place takes an equal share; see quantize_columns.

    hot: the column of each copy, i64 [copies]. share: of each column and copy, f32 [in + copies].
    """

    def __init__(self, num_in: int, hot: torch.Tensor) -> None:
        self.hot = hot
        places = 1 + torch.bincount(hot, minlength=num_in)
        self.share = (1 / places)[torch.cat((torch.arange(num_in), hot))]

    @classmethod
    def find(cls, file: PackedFile, role: str) -> "HotSplit | None":
        """Return what a matrix needs, or None where it has no copies."""
        hot = file.find(f"{role}.hot")
        return None if hot is None else cls(file.shape(f"{role}.q")[1] - len(hot), hot.clone())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, in + copies] for x: [n, in], in x's dtype."""
        # Most columns stay where they are: index_select of all of them takes twice as long.
        return torch.cat((x, x.index_select(1, self.hot)), 1).mul_(self.share)
