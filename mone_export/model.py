"""Model folders: `inspect()` reads the shape from the config alone, `fingerprint()` reads all weights.

The shape comes from the model built without weights (on torch's meta device), so that no family has code of
its own: transformers names an expert stack the same way in every family that uses its experts interface.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from mone_export.architectures import REFUSED, family_of
from mone_export.artifacts import Calibration, MoeSpec
from mone_export.errors import MoneError, first_line
from mone_export.runtime import Progress

if TYPE_CHECKING:  # what builds models takes seconds to import: where it is not needed it is not imported
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Stream = Literal["auto", "on", "off"]

_TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
    "moe_k",
)
# quantised checkpoints that transformers unpacks on any device, and llama.cpp's converter as well
_UNPACKED = ("mxfp4", "fp8")


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


def inspect(path: Path, *, saved: Calibration | None = None) -> MoeSpec:
    """Read the mixture-of-experts shape of a model folder without its weights.

    Statistics `saved` of a model with the very same config.json know it already.

    Raises `MoneError` for a missing or unknown config, a model without routed experts, and the families that
    cannot be exported (weights in a form transformers cannot unpack, experts outside its experts interface).
    """
    config = read_config(path)
    arch = (config.architectures or [type(config).__name__])[0]
    if arch in REFUSED:
        raise MoneError(f"{arch} cannot be pruned: {REFUSED[arch]}")
    _refuse_packed(config, path)
    text_config = config.get_text_config()
    if saved and saved.config_sha256 == config_fingerprint(path):
        _check_runtime_assumptions(arch, text_config)
        return saved.spec
    modules = list(expert_modules(skeleton(config)))
    experts = dict(modules)
    if len(modules) > len(experts):
        raise MoneError(f"{arch} has layers with several expert stacks: such models are not supported")
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
    _check_runtime_assumptions(arch, text_config)
    return MoeSpec(
        arch=arch,
        n_layer=int(text_config.num_hidden_layers),
        moe_layers=tuple(sorted(experts)),
        n_expert=n_expert,
        top_k=_top_k(text_config, arch),
        n_group=int(getattr(text_config, "n_group", None) or 1),
        hidden_size=hidden_size,
        expert_size=expert_size,
        topk_group=int(getattr(text_config, "topk_group", None) or 1),
    )


def auto_class(config: Any) -> Any:
    """Return the class that builds a model: with its vision part where transformers has no other."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    known = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if known else AutoModelForImageTextToText


def skeleton(config: Any) -> "PreTrainedModel":
    """Build a model without weights, on torch's meta device."""
    try:
        with torch.device("meta"):
            skeleton: PreTrainedModel = auto_class(config).from_config(config)
    except (ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        arch = (config.architectures or [type(config).__name__])[0]
        raise MoneError(
            f"transformers cannot build {arch} as a language model: {first_line(error)}"
        ) from None
    return skeleton


def expert_modules(module: nn.Module) -> Iterator[tuple[int, Any]]:
    """Yield (layer number, experts module) for every expert stack laid out as in transformers' interface."""
    for name, child in module.named_modules():
        if not hasattr(child, "has_post_expert_norm"):
            _mark(child)
        if hasattr(child, "has_post_expert_norm") and hasattr(child, "down_proj"):
            yield int(next(part for part in name.split(".") if part.isdecimal())), child


def _mark(module: Any) -> None:
    """Mark experts that are not behind the interface, but laid out like those, as its decorator would."""
    stacks = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    first, down = (
        stack if isinstance(stack, nn.Parameter) and stack.dim() == 3 else None for stack in stacks
    )
    if first is not None and down is not None:
        module.has_gate, module.has_bias, module.has_post_expert_norm = True, False, False
        module.is_transposed = first.shape[1:] == (down.shape[2], 2 * down.shape[1])


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """Load the model's own tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise MoneError(
            f"cannot load the tokenizer in {path}: {first_line(error)}; is the folder complete?"
        ) from None
    return tokenizer


def resolve_device(device: str) -> str:
    """Return the device to calibrate on, `auto` is a GPU where there is one; refuse what torch lacks."""
    if device == "auto":
        # not Apple's: it lacks float64, and what the statistics lose by that is not measured
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


def config_fingerprint(path: Path) -> str:
    """Return the SHA-256 of a model folder's config.json."""
    return hashlib.sha256((path / "config.json").read_bytes()).hexdigest()


def open_weights(path: Path) -> dict[str, Any]:
    """Return the open safetensors file of every tensor by name; reads the headers only.

    What is taken from them is read, not mapped: the pages of a large file would fill the memory.

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
        handles = {file.name: safe_open(file, framework="pt", backend="pread") for file in files}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise MoneError(
            f"cannot read the weights in {path}: {first_line(error)}; download them again"
        ) from None
    return {name: handle for handle in handles.values() for name in handle.keys()}  # noqa: SIM118


def prediction_tensors(path: Path, n_layer: int) -> list[str]:
    """Return the tensors behind the last layer, of blocks that predict further tokens: never run here."""
    numbered = re.compile(r"^(model\.)?(language_model\.)?(model\.)?layers\.(\d+)\.")
    return [
        name
        for name in (open_weights(path) if any(path.glob("*.safetensors")) else ())
        if re.search(r"(^|\.)mtp\.", name) or ((match := numbered.match(name)) and int(match[4]) >= n_layer)
    ]


def check_weights(path: Path) -> None:
    """Raise `MoneError` unless all weights are there and transformers unpacks them right; reads headers only.

    It takes the size of FP8 blocks from the number of scales, which is wrong where the last block is cut off.
    """
    owner = open_weights(path)
    block = packing(read_config(path)).get("weight_block_size") or (1, 1)
    for name in owner:
        shape = owner[name].get_slice(name).get_shape()
        if f"{name}_scale_inv" in owner and any(size % b for size, b in zip(shape, block, strict=True)):
            raise MoneError(
                f"{path}: {name} {shape} does not consist of whole blocks of {list(block)} FP8 values: "
                "transformers would unpack it wrongly; pass the model's BF16 checkpoint"
            )


def read_config(path: Path) -> Any:
    """Return transformers' config of a model folder."""
    if not (path / "config.json").is_file():
        raise MoneError(f"{path} has no config.json: pass the folder of a Hugging Face model")
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise MoneError(
            f"transformers does not know the model in {path}: {first_line(error)} "
            "Pass a complete folder of a model that this version of transformers has"
        ) from None


def packing(config: Any) -> dict[str, Any]:
    """Return what a config says about quantised weights, empty when they are not."""
    for holder in (config, config.get_text_config()):
        if found := getattr(holder, "quantization_config", None):
            return dict(found if isinstance(found, dict) else found.to_dict())
    return {}


def _refuse_packed(config: Any, path: Path) -> None:
    found = packing(config)
    method = str(found.get("quant_method") or found.get("quant_algo") or "an unknown method")
    if found and method not in _UNPACKED:
        raise MoneError(
            f"{path} is quantised by {method}, whose weights transformers cannot unpack for calibration: "
            f"pass the model's BF16 or F16 checkpoint, or one in {' or '.join(_UNPACKED)}"
        )


def _check_runtime_assumptions(arch: str, config: Any) -> None:
    family = family_of(arch)
    if family is None:
        log.warning(
            "%s is not among the families the tests cover; check the result against the original", arch
        )
        return
    for key, value in family.requires.items():
        found = getattr(config, key, None)
        if found is not None and found != value:
            raise MoneError(
                f"{arch}: config has {key} = {found}, but llama.cpp always computes {family.gguf_arch} with "
                f"{key} = {value}: the file would route differently from the model"
            )
    if family.differs and (what := family.differs(config)):
        raise MoneError(f"{arch}: llama.cpp computes otherwise than the model: {what}")
    if family.unlike:
        log.warning("%s: llama.cpp computes otherwise than the model, pruned or not: %s", arch, family.unlike)
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


def _refuse_non_finite(name: str, tensor: Tensor, path: Path) -> None:
    if tensor.is_floating_point() and tensor.element_size() > 1 and not torch.isfinite(tensor).all():
        raise MoneError(
            f"{path}: tensor {name} holds NaN or infinite values; the checkpoint is broken, get it again"
        )
