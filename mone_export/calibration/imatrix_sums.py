"""What an importance matrix is made of: the mean square of each input channel of each matrix.

Source: `tools/imatrix/imatrix.cpp` of llama.cpp, for which matrices count and how often.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True, eq=False)
class ImatrixSums:
    """Sums by the name of a matrix: squares float64 [n_matrix, n_in], and how many rows they are of.

    A stack of experts has a number of rows for each, float64 [n_matrix]; any other matrix, one [1].
    """

    squares: dict[str, Tensor] = field(default_factory=dict)
    n_row: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, inputs: Tensor, n_matrix: int) -> None:
        """Add rows that went through a matrix: [n_block, n_row, n_in], blocks in turn through `n_matrix`."""
        squares = inputs.square().sum(1).view(-1, n_matrix, inputs.shape[-1]).sum(0)
        self._add(name, squares, torch.tensor([inputs.shape[0] * inputs.shape[1] / n_matrix]))

    def add_routed(self, name: str, inputs: Tensor, ids: Tensor, n_matrix: int) -> None:
        """Add rows that went through experts: [n_token, 1 or top_k, n_in], ids int64 [n_token, top_k].

        Ids beyond the matrices are novices', which multiply nothing.
        """
        n_row, bank = len(ids), ids.clamp(max=n_matrix)  # one more than there are, for all novices
        if inputs.shape[1] == 1:  # every expert of a token gets the same
            chosen = torch.zeros(n_row, n_matrix + 1).scatter_add_(1, bank, torch.ones(ids.shape))
            squares = chosen.T @ inputs[:, 0].square()
        else:
            squares = torch.zeros(n_matrix + 1, inputs.shape[-1])
            squares.index_add_(0, bank.flatten(), inputs.flatten(0, 1).square())
        counts = torch.bincount(bank.flatten(), minlength=n_matrix + 1)
        self._add(name, squares[:n_matrix], counts[:n_matrix])

    def _add(self, name: str, squares: Tensor, n_row: Tensor) -> None:
        self.squares[name] = self.squares.get(name, 0) + squares.double()
        self.n_row[name] = self.n_row.get(name, 0) + n_row.double()
