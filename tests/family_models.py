"""Builds the tiny models of `families.py` without a tokenizer, and calibrates them on random tokens."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import COMMON, N_LAYER, Row
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from mone_export.artifacts import Calibration, Corpus, MoeSpec
from mone_export.calibration.loading import Model, load_module
from mone_export.calibration.passes import calibrate
from mone_export.source import open_source

# one converter counts the entries here to cut the embedding to size
_NO_TOKENS = {
    "model": {"vocab": {str(token): token for token in range(COMMON["vocab_size"])}},
    "added_tokens": [],
}


def save_family(row: Row, folder: Path) -> Path:
    """Write a tiny random model of a family, every parameter and selection bias random, as a folder."""
    nested = {"text_config": COMMON | row.config, "tie_word_embeddings": False, **row.outer}
    config = AutoConfig.for_model(row.model_type, **nested if row.outer else COMMON | row.config)
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if row.outer else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            factor = re.search("norm|scal", name) and not name.endswith("bias")
            tensor.normal_(1.0 if factor else 0.0, 0.1 if tensor.dim() > 1 else 0.05)
        for name, tensor in model.named_buffers():
            if name in model.state_dict() and "bias" in name:
                tensor.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    if row.mtp:
        tensors = load_file(file)
        save_file(tensors | _block_behind(tensors, row.mtp), file, metadata={"format": "pt"})
    if row.transposed:
        tensors = load_file(file)
        turned = {
            name: tensor.transpose(1, 2).contiguous()
            for name, tensor in tensors.items()
            if ".experts." in name
        }
        save_file(tensors | turned, file, metadata={"format": "pt"})
    if row.packed:
        _pack(folder, row.packed)
    _amend(folder, row.hub)
    (folder / "tokenizer.json").write_text(json.dumps(_NO_TOKENS))
    return folder


def _block_behind(tensors: dict[str, Tensor], style: str) -> dict[str, Tensor]:
    """Return a block that predicts the token after the next: the last layer again, and what joins it on."""
    last = f"layers.{N_LAYER - 1}."
    prefix = next(name for name in tensors if last in name).partition(last)[0]
    layer = {name.removeprefix(prefix + last): value for name, value in tensors.items() if last in name}
    width = len(layer["input_layernorm.weight"])
    if style == "mtp":
        block = {f"layers.0.{name}": tensor.clone() for name, tensor in layer.items()}
        join, norms = "fc", ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        start = "mtp."
    else:
        block = {name: tensor.clone() for name, tensor in layer.items()}
        join, norms = "eh_proj", ("enorm", "hnorm", "shared_head.norm")
        start = f"{prefix}layers.{N_LAYER}."
    block |= {f"{name}.weight": torch.ones(width) for name in norms}
    block[f"{join}.weight"] = torch.randn(width, 2 * width)
    return {start + name: tensor for name, tensor in block.items()}


def _pack(folder: Path, method: str) -> None:
    """Quantise a checkpoint as published ones are: `mxfp4` experts, or all the layers' matrices in `fp8`."""
    file = folder / "model.safetensors"
    config: dict[str, Any] = {"quant_method": method}
    if method == "fp8":
        config |= {"weight_block_size": [16, 16], "activation_scheme": "dynamic", "fmt": "e4m3"}
    packed: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        if method == "mxfp4" and re.search(r"experts\.\w+_proj$", name):
            packed |= _mxfp4(name, tensor)
        elif method == "fp8" and re.search(r"layers\..*_proj(_with_mqa)?\.weight$", name):
            packed |= _fp8(name, tensor)
        else:
            packed[name] = tensor
    save_file(packed, file, metadata={"format": "pt"})
    _amend(folder, {"quantization_config": config})


def _mxfp4(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return random blocks in the shape of [n, in, out]: 16 bytes of 4-bit values and an exponent for 32."""
    shape = (tensor.shape[0], tensor.shape[2], tensor.shape[1] // 32)
    return {
        f"{name}_blocks": torch.randint(0, 256, (*shape, 16), dtype=torch.uint8),
        f"{name}_scales": torch.randint(119, 122, shape, dtype=torch.uint8),
    }


def _fp8(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return a matrix as 8-bit floats with one scale for each block of 16 x 16."""
    rows, columns = (size // 16 for size in tensor.shape)
    scale = tensor.abs().max() / 448 * (1 + torch.rand(rows, columns))
    values = tensor / scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return {name: values.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def save_config(row: Row, folder: Path) -> Path:
    """Write a folder with the config of a family and nothing else."""
    AutoConfig.for_model(row.model_type, **row.config).save_pretrained(folder)
    _amend(folder, row.hub | {"architectures": [row.hf_class]})
    return folder


def random_tokens(n_row: int, n_token: int) -> Tensor:
    """Return the same random token ids [n_row, n_token] at every call."""
    return torch.randint(
        3, COMMON["vocab_size"], (n_row, n_token), generator=torch.Generator().manual_seed(0)
    )


def _amend(folder: Path, keys: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def without_vocabulary(converter_class: Callable[[Any, Path], Any]) -> Callable[[Any, Path], Any]:
    """Wrap the function that finds a converter: the models here have token ids only."""

    def set_vocab(self: Any) -> None:
        self._set_vocab_none()
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    def find(conversion: Any, path: Path) -> Any:
        base = converter_class(conversion, path)
        return type(base.__name__, (base,), {"model_arch": base.model_arch, "set_vocab": set_vocab})

    return find


def calibrated(folder: Path, spec: MoeSpec) -> tuple[PreTrainedModel, Calibration]:
    """Load a model and calibrate it on random tokens."""
    module = load_module(folder, device="cpu", dtype=torch.float32)
    corpus = Corpus(tokens=random_tokens(16, 64), name="random", sha256="")
    model = Model(source=open_source(folder), module=module)
    return module, calibrate(model, corpus, model_sha256="")
