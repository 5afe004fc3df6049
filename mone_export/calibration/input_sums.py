"""What goes into the layers' matrices: sums of squares, which importance matrices are made of.

They are kept by name: of a GGUF's matrices by its own; of a checkpoint's by those of transformers' modules,
which `Source.named_inputs` translates. Experts have GGUF names either way, two for each layer: what goes
into `ffn_up_exps` goes into `ffn_gate_exps` and `ffn_gate_up_exps`, too.

Source: `tools/imatrix/imatrix.cpp` of llama.cpp, for which matrices count and how often.
"""

import torch
from torch import Tensor

from mone_export.artifacts import InputSums
from mone_export.source.gguf_format import matrix_of, part_of

UP, DOWN = "blk.{layer}.ffn_up_exps.weight", "blk.{layer}.ffn_down_exps.weight"


def inputs_name(matrix: str) -> str:
    """Return the name under which the inputs of a GGUF's matrix are kept."""
    layer, part = part_of(matrix) or (-1, None)
    if part != "experts":
        return matrix
    return (DOWN if matrix_of(matrix) == "down" else UP).format(layer=layer)


def sums_of_rows(inputs: Tensor, n_matrix: int = 1) -> InputSums:
    """Return the sums of rows [n_block, n_row, n_in], blocks in turn through `n_matrix` matrices."""
    squares = inputs.float().square().sum(1).view(-1, n_matrix, inputs.shape[-1]).sum(0)
    n_row = torch.full((1,), inputs.shape[0] * inputs.shape[1] / n_matrix, device=squares.device)
    return _exact(squares, n_row)


def sums_of_routed(inputs: Tensor, ids: Tensor, n_matrix: int) -> InputSums:
    """Return the sums of rows that went through experts: [n_token, 1 or top_k, n_in], ids [n_token, top_k].

    Ids beyond the matrices are novices', which multiply nothing. Nothing here waits for a GPU.
    """
    bank = ids.clamp(max=n_matrix)  # one more than there are, for all novices
    if inputs.shape[1] == 1:  # every expert of a token gets the same
        chosen = torch.zeros(len(ids), n_matrix + 1, device=ids.device)
        chosen.scatter_add_(1, bank, torch.ones(ids.shape, device=ids.device))
        squares, n_row = chosen.T @ inputs[:, 0].float().square(), chosen.sum(0)
    else:
        squares = torch.zeros(n_matrix + 1, inputs.shape[-1], device=ids.device)
        squares.index_add_(0, bank.flatten(), inputs.flatten(0, 1).float().square())
        n_row = torch.bincount(bank.flatten(), minlength=n_matrix + 1)
    return _exact(squares[:n_matrix], n_row[:n_matrix])


def _exact(squares: Tensor, n_row: Tensor) -> InputSums:
    if squares.device.type == "mps":  # which has no float64
        squares, n_row = squares.cpu(), n_row.cpu()
    return InputSums(squares.double(), n_row.double())
