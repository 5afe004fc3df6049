"""Models: `inspect()` reads the shape from the config alone, `load()` brings the weights.

The shape comes from the model built without weights (on torch's meta device), so that no family has code of
its own: transformers names an expert stack the same way in every family that uses its experts interface.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mone_export.architectures import REFUSED, family_of
from mone_export.artifacts import MoeSpec
from mone_export.errors import MoneError, first_line
from mone_export.runtime import Progress

log = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
    "moe_k",
)
_BLOCK_FORMATS = ("mxfp4", "nvfp4")


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A loaded model: the one value of the road that is never saved."""

    spec: MoeSpec
    path: Path
    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def resolve(name: str) -> Path:
    """Return the folder of a model: the built-in `demo`, a folder, or a Hugging Face id to download."""
    if name == "demo":
        return Path(__file__).parent / "demo"
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise MoneError(
            f"{name} is neither a folder nor a Hugging Face id like org/model: check the spelling"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).splitlines()[0]
        raise MoneError(f"cannot download {name} from Hugging Face ({reason}); pass a local folder") from None


def inspect(path: Path) -> MoeSpec:
    """Read the mixture-of-experts shape of a model folder without its weights.

    Raises `MoneError` for a missing or unknown config, a model without routed experts, and the families that
    cannot be exported (grouped routing, experts stored in 4-bit blocks, experts outside transformers' experts
    interface).
    """
    config = _read_config(path)
    arch = (config.architectures or [type(config).__name__])[0]
    if arch in REFUSED:
        raise MoneError(f"{arch} cannot be pruned: {REFUSED[arch]}")
    _refuse_block_formats(config, path)
    try:
        with torch.device("meta"):
            skeleton = auto_class(config).from_config(config)
    except (ValueError, KeyError, ImportError) as error:
        raise MoneError(
            f"transformers cannot build {arch} as a language model: {first_line(error)}"
        ) from None
    modules = list(expert_modules(skeleton))
    experts = dict(modules)
    if len(modules) > len(experts):
        raise MoneError(f"{arch} has layers with several expert stacks: such models are not supported")
    text_config = config.get_text_config()
    if not experts:
        hint = (
            "its experts are not behind transformers' experts interface"
            if any("expert" in key for key in text_config.to_dict())
            else "only models with routed experts can be pruned"
        )
        raise MoneError(f"{arch} in {path} has no mixture-of-experts layers that can be read: {hint}")
    shapes = {(int(module.down_proj.shape[0]), *_widths(module)) for module in experts.values()}
    if len(shapes) > 1:
        raise MoneError(f"{arch}: layers with different expert shapes {sorted(shapes)} are not supported")
    n_expert, hidden_size, expert_size = shapes.pop()
    n_group = int(getattr(text_config, "n_group", None) or 1)
    if n_group > 1:
        raise MoneError(
            f"{arch} selects experts by group (n_group = {n_group}): grouped routing is not supported yet"
        )
    _check_runtime_assumptions(arch, text_config)
    return MoeSpec(
        arch=arch,
        n_layer=int(text_config.num_hidden_layers),
        moe_layers=tuple(sorted(experts)),
        n_expert=n_expert,
        top_k=_top_k(text_config, arch),
        n_group=n_group,
        hidden_size=hidden_size,
        expert_size=expert_size,
    )


def auto_class(config: Any) -> Any:
    """Return the class that builds a model: with its vision part where transformers has no other."""
    known = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if known else AutoModelForImageTextToText


def expert_modules(module: nn.Module) -> Iterator[tuple[int, Any]]:
    """Yield (layer number, experts module) for every expert stack behind transformers' experts interface."""
    for name, child in module.named_modules():
        if hasattr(child, "has_post_expert_norm") and hasattr(
            child, "down_proj"
        ):  # set by transformers' decorator
            yield int(next(part for part in name.split(".") if part.isdecimal())), child


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the model's own tokenizer."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise MoneError(
            f"cannot load the tokenizer in {path}: {first_line(error)}; is the folder complete?"
        ) from None
    return tokenizer


def load(path: Path, *, device: str = "auto", dtype: Dtype = "auto") -> Model:
    """Load weights and tokenizer for calibration.

    `device` auto means CUDA when there is one; `dtype` auto means the checkpoint's own, except on a CPU with
    room for float32, where float32 is both faster and more exact.
    """
    spec = inspect(path)
    device = resolve_device(device)
    torch_dtype: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    if dtype == "auto" and device == "cpu" and _float32_fits(path):
        torch_dtype = torch.float32
    try:
        loaded: Any = auto_class(_read_config(path)).from_pretrained(
            path, dtype=torch_dtype, device_map=None, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise MoneError(
            f"cannot load the weights in {path}: {first_line(error)}; is the folder complete?"
        ) from None
    module, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise MoneError(
            f"{path} lacks {len(missing)} of the model's tensors, {missing[0]} among them: get it again"
        )
    try:
        module = module.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise MoneError(
            f"cannot move the model to --device {device}: {first_line(error)}; try --device cpu"
        ) from None
    log.info("loaded %s as %s on %s", path.name, module.dtype, device)
    return Model(spec=spec, path=path, module=module, tokenizer=load_tokenizer(path))


def resolve_device(device: str) -> str:
    """Return the device to calibrate on, `auto` is CUDA where there is one; refuse what torch lacks."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MoneError(f"cannot use --device {device}: {first_line(error)}; try --device cpu") from None
    return device


def fingerprint(path: Path, *, progress: Progress | None = None) -> str:
    """Return the SHA-256 of a checkpoint's tensors, and refuse one with NaN or Inf in it.

    Hashed, for each tensor in ascending order of name: `<name> <dtype> <shape>\\n` as UTF-8 (safetensors'
    dtype, the shape as a JSON list), then its bytes in the file's little-endian row-major layout. How tensors
    are spread over files does not matter.
    """
    owner = open_weights(path)
    digest = hashlib.sha256()
    try:
        for done, name in enumerate(sorted(owner), start=1):
            tensor = owner[name].get_tensor(name)
            header = f"{name} {owner[name].get_slice(name).get_dtype()} {json.dumps(list(tensor.shape))}\n"
            digest.update(header.encode())
            if tensor.numel():
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
            _refuse_non_finite(name, tensor, path)
            if progress:
                progress(done, len(owner), "reading the checkpoint")
    except (OSError, SafetensorError) as error:
        raise MoneError(
            f"cannot read the weights in {path}: {first_line(error)}; download them again"
        ) from None
    return digest.hexdigest()


def open_weights(path: Path) -> dict[str, Any]:
    """Return the open safetensors file of every tensor by name; reads the headers only.

    Raises `MoneError` when there are no such files, or when one is missing, cut off or something else.
    """
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise MoneError(f"{path} holds no .safetensors weights; convert the checkpoint to safetensors first")
    try:
        index = path / "model.safetensors.index.json"
        listed = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else set()
        if missing := sorted(listed - {file.name for file in files}):
            raise MoneError(
                f"{path} lacks {len(missing)} of {len(listed)} files of weights: get {missing[0]}"
            )
        handles = {file.name: safe_open(file, framework="pt") for file in files}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise MoneError(
            f"cannot read the weights in {path}: {first_line(error)}; download them again"
        ) from None
    return {name: handle for handle in handles.values() for name in handle.keys()}  # noqa: SIM118


def _read_config(path: Path) -> Any:
    if not (path / "config.json").is_file():
        raise MoneError(f"{path} has no config.json: pass the folder of a Hugging Face model")
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise MoneError(
            f"transformers does not know the model in {path}: {first_line(error)} "
            "Pass a complete folder of a model that this version of transformers has"
        ) from None


def _refuse_block_formats(config: Any, path: Path) -> None:
    quantization = json.dumps(getattr(config, "quantization_config", None) or {}, default=str).lower()
    for name in _BLOCK_FORMATS:
        if name in quantization:
            raise MoneError(
                f"{path} stores its experts as {name.upper()} blocks, which cannot be pruned yet: "
                "pass a BF16 or F16 checkpoint of the model"
            )


def _check_runtime_assumptions(arch: str, config: Any) -> None:
    family = family_of(arch)
    if family is None:
        log.warning(
            "%s is not among the families the tests cover; check the result against the original", arch
        )
        return
    for key, value in family.requires.items():
        found = getattr(config, key, value)
        if found != value:
            raise MoneError(
                f"{arch}: config has {key} = {found}, but llama.cpp always computes {family.gguf_arch} with "
                f"{key} = {value}: the file would route differently from the model"
            )
    for key, value in family.states.items():
        if getattr(config, key, None) != value:
            raise MoneError(
                f"{arch}: llama.cpp's converter looks for {key} = {value} in config.json, without success: "
                f'add "{key}": {json.dumps(value)}, as in the published model'
            )


def _top_k(config: Any, arch: str) -> int:
    for key in _TOP_K_KEYS:
        value = getattr(config, key, None)
        if isinstance(value, list) and len(set(value)) == 1:  # some configs name it for each layer
            value = value[0]
        if isinstance(value, int):
            return value
    raise MoneError(
        f"{arch}: the config names no number of experts per token (looked for {', '.join(_TOP_K_KEYS)})"
    )


def _widths(module: Any) -> tuple[int, int]:
    first, second = (int(size) for size in module.down_proj.shape[1:])
    return (second, first) if module.is_transposed else (first, second)


def _float32_fits(path: Path) -> bool:
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2 * size < free / 2  # checkpoints hold two bytes per weight, float32 four


def _refuse_non_finite(name: str, tensor: Tensor, path: Path) -> None:
    if tensor.is_floating_point() and tensor.element_size() > 1 and not torch.isfinite(tensor).all():
        raise MoneError(
            f"{path}: tensor {name} holds NaN or infinite values; the checkpoint is broken, get it again"
        )
