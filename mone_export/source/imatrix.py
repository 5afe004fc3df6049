"""Importance matrices in llama.cpp's form, which `llama-quantize --imatrix` reads."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mone_export.errors import MoneError
from mone_export.paths import replacing
from mone_export.source.gguf_types import gguf_library


def save_imatrix(
    path: Path,
    sums: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    dataset: str,
    n_token: int,
    chunk_size: int,
) -> None:
    """Write sums of squared inputs [n_matrix, n_in] and numbers of rows [n_matrix or 1], by matrix.

    `n_token` tokens of the text `dataset` were seen, `chunk_size` at a time. The file appears when it is
    complete; raises `MoneError` when it cannot be written.

    Source: `IMatrixCollector::save_imatrix` in llama.cpp's `tools/imatrix/imatrix.cpp`.
    """
    library = gguf_library()
    try:
        with replacing(path) as part:
            writer = library.GGUFWriter(part, "")  # of no architecture
            writer.add_type("imatrix")
            writer.add_array("imatrix.datasets", [dataset])
            writer.add_uint32("imatrix.chunk_count", n_token // chunk_size)
            writer.add_uint32("imatrix.chunk_size", chunk_size)
            for name, (squares, n_row) in sorted(sums.items()):
                count = n_row.astype(np.float32)
                shape = (len(count), -1) if len(count) > 1 else (-1,)
                writer.add_tensor(f"{name}.in_sum2", squares.astype(np.float32).reshape(shape))
                writer.add_tensor(f"{name}.counts", count.reshape(shape))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    except OSError as error:
        raise MoneError(f"cannot write {path}: {error.strerror}; choose another place") from None
