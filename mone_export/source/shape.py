"""A model's shape, read from its config alone.

It comes from the model built without weights (on torch's meta device), so that no family has code of
its own: transformers names an expert stack the same way in every family that uses its experts interface.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mone_export.architectures import REFUSED, family_of
from mone_export.artifacts import MoeSpec
from mone_export.errors import MoneError, first_line
from mone_export.lazily import torch

if TYPE_CHECKING:  # what builds models takes seconds to import: where it is not needed it is not imported
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Stream = Literal["auto", "on", "off"]

TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
    "moe_k",
)
# of values in config.json that transformers does not check itself: what they have to be
_FORMS: Mapping[str, tuple[type, str]] = {
    "model_type": (str, "a name"),
    "architectures": (list, "a list"),
    "dtype": (str, "a name"),
    "torch_dtype": (str, "a name"),
    "auto_map": (dict, "an object"),
    "text_config": (dict, "an object"),
    "rope_parameters": (dict, "an object"),
    "quantization_config": (dict, "an object"),
}
# and the least they may be
_LEAST: Mapping[str, float] = {
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 1,
    "decoder_sparse_step": 1,
    "vocab_size": 1,
    "max_position_embeddings": 1,
    "sliding_window": 1,
    "num_experts": 1,
    "num_local_experts": 1,
    "n_routed_experts": 1,
    "intermediate_size": 0,
    "moe_intermediate_size": 0,
    "rms_norm_eps": 0,
    "rope_theta": 1,
}
_OF_LAYERS, _MOST_LAYERS = re.compile(r"layers?$|depth$"), 2000  # several times as many as any model's
# quantised checkpoints that transformers unpacks on any device, and llama.cpp's converter as well
_UNPACKED = ("mxfp4", "fp8")


def shape_of(config: Any) -> MoeSpec:
    """Return the mixture-of-experts shape of the model that a config (transformers') describes.

    Raises `MoneError` for a model without routed experts, and for experts that do not use transformers'
    experts interface.
    """
    arch, text_config = arch_of(config), config.get_text_config()
    modules = list(expert_modules(skeleton(config)))
    experts = dict(modules)
    if len(modules) > len(experts):
        raise MoneError(f"{arch} has layers with several expert stacks: such models are not supported")
    if not experts:
        hint = (
            "config.json makes all layers dense, or the experts do not use transformers' interface"
            if any("expert" in key for key in text_config.to_dict())
            else "only models with routed experts can be pruned"
        )
        raise MoneError(f"{arch} has no mixture-of-experts layers that can be read: {hint}")
    shapes = {(int(module.down_proj.shape[0]), *_widths(module)) for module in experts.values()}
    if len(shapes) > 1:
        raise MoneError(f"{arch}: layers with different expert shapes {sorted(shapes)} are not supported")
    n_expert, hidden_size, expert_size = shapes.pop()
    return MoeSpec(
        arch=arch,
        n_layer=int(text_config.num_hidden_layers),
        moe_layers=tuple(sorted(experts)),
        n_expert=n_expert,
        top_k=_top_k(text_config, arch, n_expert),
        n_group=int(getattr(text_config, "n_group", None) or 1),
        hidden_size=hidden_size,
        expert_size=expert_size,
        topk_group=int(getattr(text_config, "topk_group", None) or 1),
    )


def arch_of(config: Any) -> str:
    """Return the name of the model's class."""
    return str((config.architectures or [type(config).__name__])[0])


def check_config(config: Any, name: str, stated: Mapping[str, Any]) -> None:
    """Refuse what cannot be exported, whatever the weights; warn of what is not tested.

    `name` is what messages call the model, `stated` what config.json itself says: transformers fills in the
    rest.
    """
    arch = arch_of(config)
    if arch in REFUSED:
        raise MoneError(f"{arch} cannot be pruned: {REFUSED[arch]}")
    _refuse_packed(config, name)
    _check_runtime_assumptions(arch, config.get_text_config(), stated)


def auto_class(config: Any) -> Any:
    """Return the class that builds a model: with its vision part where transformers has no other."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    known = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if known else AutoModelForImageTextToText


def skeleton(config: Any) -> "PreTrainedModel":
    """Build a model without weights, on torch's meta device."""
    _refuse_endless(config)
    try:
        with torch.device("meta"):
            skeleton: PreTrainedModel = auto_class(config).from_config(config)
    except Exception as error:  # what a model's constructor makes of an odd config is no closed list
        raise misfit("build", config, error) from None
    return skeleton


def _refuse_endless(config: Any) -> None:
    """Refuse counts of layers that nobody could wait for."""
    parts = [config.to_dict()]
    for part in parts:  # which grows: a config may hold others
        parts += [value for value in part.values() if isinstance(value, dict)]
        for key, value in part.items():
            if _OF_LAYERS.search(str(key)) and isinstance(value, int) and value > _MOST_LAYERS:
                raise MoneError(
                    f"{arch_of(config)} has {value} layers by its config.json ({key}): compare it with the "
                    "published model's"
                )


def misfit(what: str, config: Any, error: BaseException) -> MoneError:
    """Return the error for a model that transformers cannot `build` or `run` as its config says."""
    text_config = (
        config if isinstance(getattr(config, "text_config", None), dict) else config.get_text_config()
    )
    empty = ", ".join(key for key, value in text_config.to_diff_dict().items() if value is None)
    return MoneError(
        f"transformers cannot {what} {arch_of(config)} as a language model by its config.json: "
        f"{first_line(error)}; compare it "
        f"with the published model's{f' (null here: {empty})' if empty else ''}"
    )


def expert_modules(module: "torch.nn.Module") -> Iterator[tuple[int, Any]]:
    """Yield (layer number, experts module) for every expert stack laid out as in transformers' interface."""
    for name, child in module.named_modules():
        if not hasattr(child, "has_post_expert_norm"):
            _mark(child)
        if hasattr(child, "has_post_expert_norm") and hasattr(child, "down_proj"):
            yield int(next(part for part in name.split(".") if part.isdecimal())), child


def _mark(module: Any) -> None:
    """Mark experts that do not use the interface, but are laid out like those, as its decorator would."""
    stacks = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    first, down = (
        stack if isinstance(stack, torch.nn.Parameter) and stack.dim() == 3 else None for stack in stacks
    )
    if first is not None and down is not None:
        module.has_gate, module.has_bias, module.has_post_expert_norm = True, False, False
        module.is_transposed = first.shape[1:] == (down.shape[2], 2 * down.shape[1])


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


def read_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """Return transformers' config of a model folder; raises `MoneError` for one of unexpected form."""
    if not (path / "config.json").is_file():
        raise MoneError(f"{path} has no config.json: pass the folder of a Hugging Face model")
    _check_form(path / "config.json")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers checks configs with classes of its own and of others
        raise MoneError(
            f"transformers cannot read {path / 'config.json'}: {first_line(error)}; pass the folder of "
            "a model that this version of transformers knows"
        ) from None


def _check_form(file: Path) -> None:
    """Refuse values that transformers takes, and fails with later, naming another cause or none."""
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MoneError(
            f"cannot read {file}: {first_line(error)}; pass the folder of a model of Hugging Face's form"
        ) from None
    if not isinstance(stated, dict):
        raise MoneError(f"{file} holds no JSON object: pass the folder of a model of Hugging Face's form")
    parts = (stated, stated.get("text_config"))
    for part in (part for part in parts if isinstance(part, dict)):
        for key, value in part.items():
            if wrong := _wrong(key, value, part):
                raise MoneError(
                    f"{file} says {key} = {json.dumps(value)[:80]}, where {wrong} belongs: compare it with "
                    "the published model's"
                )


def _wrong(key: str, value: Any, part: Mapping[str, Any]) -> str:
    """Return what belongs in the place of a value of a config, "" where the value will do."""
    if value is not None and key in _FORMS and not isinstance(value, _FORMS[key][0]):
        return _FORMS[key][1]
    if key == "architectures" and not all(isinstance(name, str) for name in value or ()):
        return "a list of names"
    if key == "quantization_config" and value == {}:
        return "a quant_method, or null,"
    if key == "rope_parameters" and value is not None:
        theta = value.get("rope_theta", 1.0)
        return "" if isinstance(theta, int | float) and theta > 0 else "a rope_theta above 0"
    if key not in _LEAST or not isinstance(value, int | float) or value >= _LEAST[key]:
        return ""
    unused = key == "sliding_window" and part.get("use_sliding_window") is False
    unused |= key == "head_dim" and "qk_rope_head_dim" in part  # which then says it
    return "" if unused else f"at least {_LEAST[key]:g}"


def packing(config: Any) -> dict[str, Any]:
    """Return what a config says about quantised weights, empty when they are not."""
    for holder in (config, config.get_text_config()):
        if found := getattr(holder, "quantization_config", None):
            return dict(found if isinstance(found, dict) else found.to_dict())
    return {}


def _refuse_packed(config: Any, name: str) -> None:
    found = packing(config)
    method = str(found.get("quant_method") or found.get("quant_algo") or "an unknown method")
    if found and method not in _UNPACKED:
        raise MoneError(
            f"{name} is quantised by {method}, whose weights transformers cannot unpack for calibration: "
            f"pass the model's BF16 or F16 checkpoint, or one in {' or '.join(_UNPACKED)}"
        )


def _check_runtime_assumptions(arch: str, config: Any, stated: Mapping[str, Any]) -> None:
    family = family_of(arch)
    if family is None:
        log.warning(
            "%s is not among the families the tests cover; check the result against the original", arch
        )
        return
    for key, value in family.requires.items():
        found = getattr(config, key, None)
        if found is not None and found != value:
            says = f"has {key} = {found}" if _states(stated, key) else f"has no {key}, which means {found}"
            raise MoneError(
                f"{arch}: config.json {says}, but llama.cpp always computes {family.gguf_arch} with "
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


def _states(stated: Mapping[str, Any], key: str) -> bool:
    """Say whether a config states a key, at its top or in a part of it."""
    return key in stated or any(_states(part, key) for part in stated.values() if isinstance(part, dict))


def _top_k(config: Any, arch: str, n_expert: int) -> int:
    for key in TOP_K_KEYS:
        value = getattr(config, key, None)
        values = set(value) if isinstance(value, list | tuple) else {value}  # some name it for each layer
        if len(values) > 1:
            raise MoneError(
                f"{arch}: {key} in config.json differs from layer to layer ({sorted(map(str, values))}), and "
                "llama.cpp has one number for all: such models cannot be exported"
            )
        value = next(iter(values), None)
        if isinstance(value, int) and not isinstance(value, bool):
            if not 1 <= value <= n_expert:
                raise MoneError(
                    f"{arch}: {key} = {value} in config.json is not between 1 and the {n_expert} experts: "
                    "compare it with the published model's"
                )
            return value
    raise MoneError(
        f"{arch}: the config names no number of experts per token (looked for {', '.join(TOP_K_KEYS)})"
    )


def _widths(module: Any) -> tuple[int, int]:
    first, second = (int(size) for size in module.down_proj.shape[1:])
    return (second, first) if module.is_transposed else (first, second)
