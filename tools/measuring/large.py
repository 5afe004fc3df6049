"""A model larger than the memory: peak memory, disk and time, streamed and not; what larger ones would take.

The estimates take shapes from transformers' own configs and the overhead from the measured run; what they
assume of the machine stands in `MACHINE`, and in the table's note.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from measuring import Json, scratch
from models.random_model import SIX_GB, save_random_model

ROOT = Path(__file__).resolve().parents[2]
N_TOKEN = 32 * 512
QWEN = {
    "head_dim": 128,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
}
# shapes from the published configs; gpt-oss-120b's are transformers' defaults
LARGE: dict[str, tuple[str, Json]] = {
    "30B: Qwen3-30B-A3B": (
        "qwen3_moe",
        QWEN
        | {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32}
        | {"moe_intermediate_size": 768},
    ),
    "120B: gpt-oss-120b": ("gpt_oss", {}),
    "235B: Qwen3-235B-A22B": (
        "qwen3_moe",
        QWEN
        | {"hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64}
        | {"moe_intermediate_size": 1536},
    ),
}
# assumptions: bytes/s read from disk, FLOP/s of a data sheet, and the share of them that is reached
MACHINE = {"name": "RTX 4090 with 24 GB, 32 GB of RAM, NVMe", "read": 3e9, "flops": 165e12, "share": 0.2}
N_TOKEN_LARGE = 100 * 2048  # what mone-export calibrates on unless told otherwise


def measure_large(args: argparse.Namespace) -> Json:
    """Export a random 6 GB model at ratio 0.5, streamed and in memory, and extrapolate from the former."""
    with scratch() as folder:
        path = args.model or folder / "model"
        if args.model is None:
            save_random_model(path, SIX_GB)
        runs = [exported(path, folder / "out.gguf", stream) for stream in ("on", "off")]
        config = json.loads((path / "config.json").read_text())
        return summary(shape(config.pop("model_type"), config), runs)


def exported(path: Path, outfile: Path, stream: str) -> Json:
    """Export in a process of its own; return its peak memory, its stages' seconds, the file's size."""
    command = [
        sys.executable,
        "-m",
        "mone_export",
        path,
        "-o",
        outfile,
        "--ratio",
        0.5,
        "--chunks",
        32,
        "-c",
        512,
    ]
    command += ["--dtype", "bfloat16", "--stream", stream, "--json"]
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    events = [json.loads(line) for line in process.stdout]
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the export with --stream {stream} failed: {events[-1:]}")
    outfile.unlink()
    report = events[-1]
    return {
        "stream": stream,
        "peak": usage.ru_maxrss * 1024,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "seconds": report["seconds"],
        "size": report["size"],
    }


def summary(measured: Json, runs: list[Json]) -> Json:
    """Return the measurement with the estimates that follow from it."""
    overhead = runs[0]["peak"] - known_bytes(measured, N_TOKEN)
    return {
        "settings": {
            "n_token": N_TOKEN,
            "n_token_large": N_TOKEN_LARGE,
            "machine": MACHINE,
            "overhead": overhead,
        },
        "model": measured,
        "runs": runs,
        "estimates": [
            {"name": name} | estimate(shape(model_type, config), overhead)
            for name, (model_type, config) in LARGE.items()
        ],
    }


def shape(model_type: str, config: Json) -> Json:
    """Return the sizes of a model, counted on one that is built without weights: bytes in BF16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from mone_export.calibration.rows import stats_bytes
    from mone_export.calibration.streaming import decoder_layers
    from mone_export.source.shape import expert_modules, shape_of

    built = AutoConfig.for_model(model_type, **config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(built)
    experts = [module for _, module in expert_modules(model)]
    total, layers = n_weight(model), decoder_layers(model)[1]
    routed = sum(n_weight(module) for module in experts)
    n_expert = len(experts[0].down_proj)
    return {
        "bytes": 2 * total,
        "layer_bytes": 2 * max(n_weight(layer) for layer in layers),
        "embedding_bytes": 2 * n_weight(model.get_input_embeddings()),
        "active": total - routed + routed * built.num_experts_per_tok // n_expert,
        "hidden_size": built.hidden_size,
        "n_layer": len(layers),
        "stats_bytes": stats_bytes(shape_of(built)),
        "pruned_bytes": 2 * total - routed,
    }


def n_weight(module: Any) -> int:
    """Return the number of a module's weights."""
    return sum(parameter.numel() for parameter in module.parameters())


def known_bytes(sizes: Json, n_token: int) -> int:
    """Return what streaming is known to hold: embeddings, three layers, the statistics, the hidden states."""
    states = 2 * n_token * sizes["hidden_size"]
    total: int = sizes["embedding_bytes"] + 3 * sizes["layer_bytes"] + sizes["stats_bytes"] + states
    return total


def estimate(sizes: Json, overhead: int) -> Json:
    """Return memory, disk and seconds that a large model would take on `MACHINE`."""
    from mone_export.calibration.sensitivity import N_ROW
    from mone_export.calibration.sensitivity import N_TOKEN as N_TOKEN_PROBE

    states = 2 * N_TOKEN_LARGE * sizes["hidden_size"]
    read = sizes["bytes"] / MACHINE["read"]
    per_token = 2 * sizes["active"] / (MACHINE["flops"] * MACHINE["share"])
    n_probe = min(N_ROW * N_TOKEN_PROBE * sizes["n_layer"], N_TOKEN_LARGE) / 2  # tokens through all layers
    calibrate = max(read, N_TOKEN_LARGE * per_token) + max(read, n_probe * per_token)
    return {
        "bytes": sizes["bytes"],
        "memory": overhead + known_bytes(sizes, N_TOKEN_LARGE),
        "disk": sizes["pruned_bytes"] + 2 * states + sizes["stats_bytes"],
        "calibrate_s": calibrate,
        # the fingerprint reads the model as well, the writer half of the experts, and writes as much
        "total_s": calibrate + read + 2 * sizes["pruned_bytes"] / MACHINE["read"],
    }
