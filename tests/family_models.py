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
from mone_export.calibration import calibrate
from mone_export.model import Model, auto_class

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
            tensor.normal_(1.0 if re.search("norm|scal", name) else 0.0, 0.1 if tensor.dim() > 1 else 0.05)
        for name, tensor in model.named_buffers():
            if name in model.state_dict() and "bias" in name:
                tensor.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    if row.mtp:
        tensors = load_file(file)
        last, behind = f"model.layers.{N_LAYER - 1}.", f"model.layers.{N_LAYER}."
        width = COMMON["hidden_size"]
        block = {
            name.replace(last, behind): tensor.clone() for name, tensor in tensors.items() if last in name
        }
        block |= {
            f"{behind}{name}.weight": torch.ones(width) for name in ("enorm", "hnorm", "shared_head.norm")
        }
        block[f"{behind}eh_proj.weight"] = torch.randn(width, 2 * width)
        save_file(tensors | block, file, metadata={"format": "pt"})
    if row.transposed:
        tensors = load_file(file)
        turned = {
            name: tensor.transpose(1, 2).contiguous()
            for name, tensor in tensors.items()
            if ".experts." in name
        }
        save_file(tensors | turned, file, metadata={"format": "pt"})
    _amend(folder, row.hub)
    (folder / "tokenizer.json").write_text(json.dumps(_NO_TOKENS))
    return folder


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
    """Wrap the function that finds a converter: the models here have token ids only, and no extra blocks."""

    def set_vocab(self: Any) -> None:
        self._set_vocab_none()
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    def find(conversion: Any, path: Path) -> Any:
        base = converter_class(conversion, path)
        config = json.loads((path / "config.json").read_text())
        changes = {"set_vocab": set_vocab, "no_mtp": not config.get("num_nextn_predict_layers")}
        return type(base.__name__, (base,), {"model_arch": base.model_arch, **changes})

    return find


def calibrated(folder: Path, spec: MoeSpec) -> tuple[PreTrainedModel, Calibration]:
    """Load a model and calibrate it on random tokens."""
    config = AutoConfig.from_pretrained(folder)
    module = auto_class(config).from_pretrained(folder, dtype=torch.float32).eval()
    corpus = Corpus(tokens=random_tokens(16, 64), name="random", sha256="")
    model: Any = Model(spec=spec, path=folder, module=module, tokenizer=None)  # type: ignore[arg-type]
    return module, calibrate(model, corpus, model_sha256="")
