"""What observing costs on top of a forward pass."""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measuring import Json, pairwise, scratch, spread

BATCH_TOKENS = 4096
QWEN = {
    "vocab_size": 1000,
    "hidden_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 384,
    "norm_topk_prob": True,
}


def measure_calibrate(args: argparse.Namespace) -> Json:
    """Time a plain forward pass, the same one observed, streamed, and with statistics expert by expert.

    The last is how the reference codes of MoNE and REAP see their experts: one call per expert in Python,
    running mean and variance in float32.
    """
    with scratch() as folder:
        return measure_passes(args, folder / "model")


def measure_passes(args: argparse.Namespace, folder: Path) -> Json:
    """Time the competitors on a random model, which `folder` will hold for the streamed one."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from mone_export.calibration.loading import Model, open_streamed
    from mone_export.calibration.observer import observe
    from mone_export.calibration.passes import Pass
    from mone_export.source import open_source

    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**QWEN), dtype=dtype).eval()
    model.save_pretrained(folder)
    model = model.to(args.device)
    tokens = torch.randint(0, QWEN["vocab_size"], (args.tokens // 2048, 2048))
    batches = tokens.to(args.device).split(BATCH_TOKENS // 2048)

    def forward() -> None:
        with torch.inference_mode():
            for rows in batches:
                model.base_model(input_ids=rows, use_cache=False)

    def observed() -> None:
        with observe(model):
            forward()

    def expert_by_expert() -> None:
        with running_statistics(model):
            forward()

    def streamed() -> None:
        with torch.inference_mode(), observe(module) as layers:
            Pass(handle, tokens).run(layers)

    torch.set_num_threads(args.threads[0])
    fastest, seconds = fastest_implementation(model, forward)
    model.set_experts_implementation(fastest)
    # opening is not timed, as loading a model into memory is not; what streaming reads in its turn is
    module, files = open_streamed(folder, device=args.device, dtype=dtype)
    handle = Model(open_source(folder), module, files)
    competitors = {
        "plain": forward,
        "observed": observed,
        "observed, streamed": streamed,
        "expert by expert": expert_by_expert,
    }
    runs: list[Json] = []
    for n_thread in args.threads:
        torch.set_num_threads(n_thread)
        for number in range(args.rounds):
            for name, function in competitors.items():
                runs.append({"round": number, "name": name, "threads": n_thread} | timed(function))
    return {
        "settings": {"model": f"Qwen3-MoE, random weights, {args.dtype}", "experts_implementation": fastest}
        | {key: QWEN[key] for key in QWEN if "exp" in key or "hidden" in key or "moe" in key}
        | {
            "device": device_name(args.device),
            "tokens": args.tokens,
            "batch_tokens": BATCH_TOKENS,
            "rounds": args.rounds,
        },
        "implementations_cpu_s": seconds,
        "summary": [summarise_calibrate(runs, n_thread, args.tokens) for n_thread in args.threads],
        "runs": runs,
    }


def device_name(device: str) -> str:
    """Return what a device is called, `cpu` for all CPUs: the machine's description names those."""
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def fastest_implementation(model: Any, forward: Callable[[], None]) -> tuple[str, Json]:
    """Return the fastest of transformers' experts implementations, and the least CPU seconds of each."""
    names = ("grouped_mm", "eager")  # batched_mm would copy the weights for every token
    seconds = dict.fromkeys(names, float("inf"))
    for _ in range(4):
        for name in names:
            model.set_experts_implementation(name)
            seconds[name] = min(seconds[name], timed(forward)["cpu_s"])
    return min(names, key=lambda name: seconds[name]), seconds


def timed(function: Callable[[], None]) -> Json:
    """Return the wall and CPU seconds of a call, and of what it left to a GPU."""
    import torch

    wall, cpu = time.perf_counter(), time.process_time()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def summarise_calibrate(runs: Sequence[Json], n_thread: int, n_token: int) -> Json:
    """Return tokens per second of the competitors, and what they cost relative to the plain forward pass."""
    rows = [run for run in runs if run["threads"] == n_thread]
    return {
        "threads": n_thread,
        "competitors": {
            name: {
                "tokens_per_second": spread([n_token / run["wall_s"] for run in rows if run["name"] == name]),
                "cpu_s": spread([run["cpu_s"] for run in rows if run["name"] == name]),
                "wall_ratio": pairwise(rows, "wall_s", name, "plain"),
                "wall_ratio_observed": pairwise(rows, "wall_s", name, "observed"),
                "cpu_ratio": pairwise(rows, "cpu_s", name, "plain"),
            }
            for name in dict.fromkeys(run["name"] for run in rows)
        },
    }


@contextmanager
def running_statistics(model: Any) -> Iterator[None]:
    """Run experts one by one and keep a running mean and variance of their outputs, and their gates' sum."""
    import torch
    from torch.nn.functional import linear
    from transformers.integrations.moe import ExpertsInterface

    state: dict[tuple[int, int], tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def update(key: tuple[int, int], f: torch.Tensor, gate: torch.Tensor) -> None:
        count, mean, m2 = len(f), f.mean(0), (f - f.mean(0)).square().sum(0)
        gates = gate.sum()
        if key in state:
            n_before, mean_before, m2_before, gates_before = state[key]
            delta, total = mean - mean_before, n_before + count
            mean = mean_before + delta * (count / total)
            m2 = m2_before + m2 + delta.square() * (n_before * count / total)
            count, gates = total, gates_before + gates
        state[key] = count, mean, m2, gates

    def forward(module: Any, hidden: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        output = torch.zeros_like(hidden)
        mask = torch.nn.functional.one_hot(top_k_index, len(module.down_proj)).permute(2, 1, 0)
        for expert in mask.sum(dim=(1, 2)).nonzero().flatten().tolist():
            slot, token = torch.where(mask[expert])
            gate, up = linear(hidden[token], module.gate_up_proj[expert]).chunk(2, dim=-1)
            f = linear(module.act_fn(gate) * up, module.down_proj[expert])
            weight = top_k_weights[token, slot, None]
            update((id(module), expert), f, weight)
            output.index_add_(0, token, f * weight)
        return output

    before = model.config._experts_implementation
    ExpertsInterface.register("mone_measured", forward)
    model.set_experts_implementation("mone_measured")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
