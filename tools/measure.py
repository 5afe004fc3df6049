#!/usr/bin/env python3
"""Measure what the README claims, and keep the numbers as JSON in docs/measurements.

    python tools/measure.py speed        llama-bench: unpruned, novices, hard-pruned; distance to the ideal
    python tools/measure.py calibrate    what observing costs on top of a forward pass
    python tools/measure.py quality      perplexity on held-out text by ratio, score and novice
    python tools/measure.py memory       peak memory of the writing stage

Competitors take turns inside every round, and ratios are taken round by round: neighbours on the machine slow
both sides alike. CPU time stands beside wall time for the same reason. `tools/readme_tables.py` puts the
results into the README.
"""

import argparse
import ctypes
import datetime
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import readme_tables  # noqa: E402  (the neighbour)

from mone_export import runtime  # noqa: E402  (the checkout's own package, installed or not)

Json = dict[str, Any]
OUT = ROOT / "docs" / "measurements"

# OLMoE-1B-7B's shape with a quarter of its layers, and of its vocabulary, so that the proportions stay
N_EMBD, N_HEAD, N_FF, N_EXPERT, TOP_K, N_LAYER, N_VOCAB = 2048, 16, 1024, 64, 8, 4, 12576
N_KEPT = 32
Q4_0_BLOCK, Q4_0_BYTES = 32, 18


def main() -> int:
    """Run one measurement, write its JSON and print its table."""
    args = _parser().parse_args()
    # threads that wait for each other by spinning starve one another on a machine that is not idle
    os.environ["OMP_WAIT_POLICY"] = "passive"  # before torch is imported, and for llama.cpp's programs
    started = environment()
    data = {"kind": args.command} | started | args.measure(args)
    data["machine"]["load_average_after"] = [round(load, 1) for load in os.getloadavg()]
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{args.name or args.command}.json").write_text(json.dumps(data, indent=1) + "\n")
    print(readme_tables.render(data))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", help="name of the JSON file (default: the command's)")
    common.add_argument(
        "--bin", type=Path, help="folder of llama.cpp's programs (default: what mone-llama built)"
    )

    speed = commands.add_parser("speed", parents=[common], help="tokens per second in llama.cpp")
    speed.add_argument("--rounds", type=int, default=7)
    speed.add_argument("-t", "--threads", type=int, default=2)
    speed.add_argument("-p", "--n-prompt", type=int, default=256, help="tokens of a prompt")
    speed.add_argument("-n", "--n-gen", type=int, default=64, help="tokens to generate")
    speed.set_defaults(measure=measure_speed)

    calibrate = commands.add_parser("calibrate", parents=[common], help="tokens per second of a calibration")
    calibrate.add_argument("--rounds", type=int, default=5)
    calibrate.add_argument("--tokens", type=int, default=4096, help="tokens a round (batches of 4096)")
    calibrate.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    calibrate.set_defaults(measure=measure_calibrate)

    quality = commands.add_parser("quality", parents=[common], help="perplexity on held-out text")
    quality.add_argument("model", nargs="?", default="demo", help="as for mone-export (default demo)")
    quality.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5])
    quality.add_argument("--chunks", type=int, default=40, help="rows of 512 held-out tokens")
    quality.add_argument("-t", "--threads", type=int, default=2)
    quality.set_defaults(measure=measure_quality)

    memory = commands.add_parser("memory", parents=[common], help="peak memory of the writing stage")
    memory.set_defaults(measure=measure_memory)
    return parser


# What every file records


def environment() -> Json:
    """Describe when, on what and with what: no names of hosts, users or folders."""
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    upstream = runtime.Upstream.load(runtime.patches_dir() / "UPSTREAM")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "machine": {
            "cpu": model[1] if model else platform.processor(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
            "load_average_before": [round(load, 1) for load in os.getloadavg()],
        },
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
            "llama_cpp": f"{upstream.package} {upstream.version} ({upstream.llama_cpp_commit})",
        },
    }


def spread(values: Sequence[float]) -> Json:
    """Return median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def pairwise(runs: Sequence[Json], key: str, name: str, base: str) -> Json:
    """Return the spread of value(name) / value(base), taken round by round."""
    values = {(run["round"], run["name"]): run[key] for run in runs}
    rounds = sorted({number for number, _ in values})
    return spread([values[number, name] / values[number, base] for number in rounds])


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a folder in the cache for large files, removed at the end."""
    runtime.cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runtime.cache_dir(), prefix="measure-") as folder:
        yield Path(folder)


def programs(args: argparse.Namespace) -> Path:
    """Return the folder of llama.cpp's programs, and make llama-cpp-python load the libraries there."""
    folder: Path = args.bin or runtime.path()
    os.environ["LLAMA_CPP_LIB_PATH"] = str(folder)
    return folder


# speed

# the files; the last two are probes that say what the ideal is
SPEED_FILES = ("full", "novices", "hard", "skipped", "half-used")
# how many times faster the first is than the second
SPEED_RATIOS = (
    ("novices", "full"),
    ("novices", "hard"),
    ("novices", "ideal"),
    ("novices", "ideal by use"),
    ("hard", "full"),
)
REPETITIONS = 3


def measure_speed(args: argparse.Namespace) -> Json:
    """Time llama-bench on random files: all experts, half of them novices, half of them gone, and two probes.

    The probe `skipped` is the novices' file with a router that never chooses a kept expert: the time without
    expert matrices. `half-used` is the unpruned file with half as many experts used per token: two points of
    a line, hence the time of the expert matrices with none of our changes in it. Either gives an ideal, the
    time of a model whose experts cost exactly in proportion to the slots that land on kept experts.
    """
    bin_dir = programs(args)
    tests = {"prompt": ("-p", args.n_prompt), "generation": ("-n", args.n_gen)}
    with scratch() as folder:
        files = {name: write_speed_file(folder / f"{name}.gguf", name) for name in SPEED_FILES}
        share = {
            name: measure_share(files[name], args.n_prompt, args.n_gen) for name in ("novices", "skipped")
        }
        runs: list[Json] = []
        for number in range(args.rounds):
            for name, file in files.items():
                runs += [{"round": number, "name": name} | run for run in bench(bin_dir, file, tests, args)]
            print(f"round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
        sizes = {name: file.stat().st_size for name, file in files.items()}
    shape = {"n_layer": N_LAYER, "n_embd": N_EMBD, "n_expert": N_EXPERT, "n_kept": N_KEPT, "top_k": TOP_K}
    chosen = {key: vars(args)[key] for key in ("rounds", "threads", "n_prompt", "n_gen")}
    return {
        "settings": {"weights": "random, Q4_0"} | shape | chosen,
        "sizes": sizes,
        "share": share,
        "summary": {test: summarise_speed(runs, share, test) for test in tests},
        "runs": runs,
    }


def summarise_speed(runs: Sequence[Json], share: Json, test: str) -> Json:
    """Return the spread of one test's times, and of the ratios round by round, ideals included."""
    rows = [run for run in runs if run["test"] == test]
    rows += [row for number in {run["round"] for run in rows} for row in ideals(rows, share, test, number)]
    names = {run["name"]: None for run in rows}
    return {
        "times": {
            name: {
                key: spread([run[key] for run in rows if run["name"] == name])
                for key in ("wall_ms", "cpu_ms")
            }
            for name in names
        },
        "speed_ratios": {
            f"{name} / {base}": {key: pairwise(rows, key, base, name) for key in ("wall_ms", "cpu_ms")}
            for name, base in SPEED_RATIOS
        },
    }


def ideals(rows: Sequence[Json], share: Json, test: str, number: int) -> Iterator[Json]:
    """Yield the two ideals of a round: the unpruned time less that of the slots that novices take."""
    time_of = {run["name"]: run for run in rows if run["round"] == number}
    spared = 1 - share["novices"][test]
    for name, probe, slots in (
        ("ideal", "skipped", 1 - share["skipped"][test]),
        ("ideal by use", "half-used", 0.5),
    ):
        row: Json = {"round": number, "name": name}
        for key in ("wall_ms", "cpu_ms"):
            full = time_of["full"][key]
            row[key] = full - spared * (full - time_of[probe][key]) / slots
        yield row


def bench(bin_dir: Path, file: Path, tests: Json, args: argparse.Namespace) -> Iterator[Json]:
    """Yield wall and CPU time per token of llama-bench's tests on a file.

    Two runs first do nearly nothing but load (and repack) the weights: one brings the file into memory, the
    other's CPU time is subtracted.
    """
    common = [str(bin_dir / "llama-bench"), "-m", str(file), "-t", str(args.threads), "-o", "json"]
    load = min(run_bench([*common, "-p", "1", "-n", "0", "-r", "1", "--no-warmup"])[1] for _ in range(2))
    for test, (option, n_token) in tests.items():
        lengths = {"-p": 0, "-n": 0} | {option: n_token}
        flags = [str(word) for pair in lengths.items() for word in pair]
        result, cpu = run_bench([*common, *flags, "-r", str(REPETITIONS)])
        n_warmup = n_token if test == "prompt" else 1
        yield {
            "test": test,
            "tokens_per_second": result["avg_ts"],
            "wall_ms": 1000 / result["avg_ts"],
            "cpu_ms": 1000 * (cpu - load) / (REPETITIONS * n_token + n_warmup),
            "load_cpu_s": load,
        }


def run_bench(command: Sequence[str]) -> tuple[Json, float]:
    """Run llama-bench with one test; return its result and the seconds of CPU time it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise SystemExit(f"llama-bench failed: {done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(done.stdout)[0], cpu


def write_speed_file(file: Path, name: str) -> Path:
    """Write one of `SPEED_FILES`: the same random weights in all of them, cut as the name says."""
    import gguf

    novices = name in ("novices", "skipped")
    n_kept = N_EXPERT if name in ("full", "half-used") else N_KEPT
    writer = gguf.GGUFWriter(file, "olmoe")
    writer.add_block_count(N_LAYER)
    writer.add_context_length(4096)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("no_vocab")
    writer.add_expert_count(N_KEPT if name == "hard" else N_EXPERT)
    writer.add_expert_used_count(TOP_K // 2 if name == "half-used" else TOP_K)
    rng = np.random.default_rng(0)
    orders = [speed_order(n_kept) for _ in range(N_LAYER)]
    if novices:
        add_novice_keys(writer, orders)
    add_q4_0(writer, "token_embd.weight", q4_0(rng, N_VOCAB, N_EMBD))
    add_q4_0(writer, "output.weight", q4_0(rng, N_VOCAB, N_EMBD))
    writer.add_tensor("output_norm.weight", np.ones(N_EMBD, np.float32))
    for layer, order in enumerate(orders):
        add_attention(writer, rng, f"blk.{layer}")
        add_experts(writer, rng, f"blk.{layer}", name, order, n_kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def speed_order(n_kept: int) -> np.ndarray:
    """Return experts in the file's order: a random choice of kept ones first, both groups ascending."""
    shuffled = np.random.default_rng(1).permutation(N_EXPERT)
    return np.concatenate([np.sort(shuffled[:n_kept]), np.sort(shuffled[n_kept:])])


def add_novice_keys(writer: Any, orders: Sequence[np.ndarray]) -> None:
    """Add the keys of the MoNE format, version 1."""
    from gguf import GGUFValueType

    writer.add_key_value(
        "olmoe.expert_kept_count", [N_KEPT] * N_LAYER, GGUFValueType.ARRAY, sub_type=GGUFValueType.UINT32
    )
    writer.add_uint32("mone.format_version", 1)
    order = np.concatenate(orders).tolist()
    writer.add_key_value("mone.expert_order", order, GGUFValueType.ARRAY, sub_type=GGUFValueType.INT32)


def add_attention(writer: Any, rng: np.random.Generator, block: str) -> None:
    """Add one layer's attention and norms."""
    for part in ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm"):
        writer.add_tensor(f"{block}.{part}.weight", np.ones(N_EMBD, np.float32))
    for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
        add_q4_0(writer, f"{block}.{part}.weight", q4_0(rng, N_EMBD, N_EMBD))


def add_experts(
    writer: Any, rng: np.random.Generator, block: str, name: str, order: np.ndarray, n_kept: int
) -> None:
    """Add one layer's router, experts and novices."""
    router = rng.standard_normal((N_EXPERT, N_EMBD), np.float32)[order]
    if name == "hard":
        router = router[:n_kept]
    elif name == "skipped":
        router[:n_kept] = 0  # eight of the others always have a positive logit
    writer.add_tensor(f"{block}.ffn_gate_inp.weight", router)
    for part, n_out, n_in in (("gate", N_FF, N_EMBD), ("up", N_FF, N_EMBD), ("down", N_EMBD, N_FF)):
        experts = q4_0(rng, N_EXPERT, n_out, n_in)[order[:n_kept]]
        add_q4_0(writer, f"{block}.ffn_{part}_exps.weight", experts)
    vectors = rng.standard_normal((N_EXPERT, N_EMBD), np.float32)
    if name in ("novices", "skipped"):
        vectors[:n_kept] = 0
        writer.add_tensor(f"{block}.ffn_down_exps.bias", vectors)


def add_q4_0(writer: Any, name: str, data: np.ndarray) -> None:
    """Add a tensor of Q4_0 blocks, given as bytes."""
    from gguf import GGMLQuantizationType

    writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType.Q4_0)


def q4_0(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return the bytes of random Q4_0 weights with a variance of 1 / (input width)."""
    *rows, n_in = shape
    n_block = int(np.prod(shape)) // Q4_0_BLOCK
    blocks = np.frombuffer(bytearray(rng.bytes(n_block * Q4_0_BYTES)), np.uint8).reshape(n_block, Q4_0_BYTES)
    nibble_deviation = 4.6  # of 0..15 about 8
    scale = rng.choice([-1.0, 1.0], n_block) / (nibble_deviation * n_in**0.5)
    blocks[:, :2] = scale.astype("<f2").view(np.uint8).reshape(n_block, 2)
    return blocks.reshape(*rows, n_in // Q4_0_BLOCK * Q4_0_BYTES)


class GgmlTensor(ctypes.Structure):
    """The beginning of llama.cpp's `struct ggml_tensor` (ggml.h), as far as its name."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]


def measure_share(file: Path, n_prompt: int, n_gen: int) -> Json:
    """Return the share of routed slots that land on kept experts, on the tokens that `bench` has it run."""
    import llama_cpp

    slots: list[np.ndarray] = []

    @llama_cpp.ggml_backend_sched_eval_callback
    def see(address: int, ask: bool, _: Any) -> bool:
        tensor = GgmlTensor.from_address(address)
        wanted = tensor.name.startswith(b"ffn_moe_topk")
        if wanted and not ask:
            slots.append(selected_ids(tensor))
        return wanted if ask else True

    @llama_cpp.llama_log_callback
    def silent(*_: Any) -> None:
        pass

    llama_cpp.llama_log_set(silent, None)
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.cb_eval = n_prompt + n_gen, n_prompt, see
    params.n_threads = params.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, params)

    def share_of(sequences: Sequence[np.ndarray], n_batch: int) -> float:
        slots.clear()
        for tokens in sequences:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            for part in np.split(tokens, len(tokens) // n_batch):
                ids = (llama_cpp.llama_token * n_batch)(*part.tolist())
                if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, n_batch)) != 0:
                    raise SystemExit(f"{file.name}: llama_decode failed")
        return float((np.concatenate([ids.ravel() for ids in slots]) < N_KEPT).mean())

    share = {
        "prompt": share_of(bench_tokens([n_prompt] * (REPETITIONS + 1)), n_prompt),
        "generation": share_of(bench_tokens([1] + [n_gen] * REPETITIONS), 1),
    }
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return share


def bench_tokens(lengths: Sequence[int]) -> list[np.ndarray]:
    """Return llama-bench's token sequences: C's `rand`, which it never seeds."""
    libc = ctypes.CDLL(None)
    libc.srand(1)
    return [np.array([libc.rand() % N_VOCAB for _ in range(length)]) for length in lengths]


def selected_ids(tensor: GgmlTensor) -> np.ndarray:
    """Copy the expert ids [n_token, top_k] out of a tensor that is a view of a wider one."""
    top_k, n_token = tensor.ne[:2]
    raw = ctypes.string_at(tensor.data, (n_token - 1) * tensor.nb[1] + top_k * 4)
    return np.stack([np.frombuffer(raw, "<i4", top_k, row * tensor.nb[1]) for row in range(n_token)])


# calibrate

BATCH_TOKENS = 4096
QWEN = {
    "vocab_size": 1000,
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}


def measure_calibrate(args: argparse.Namespace) -> Json:
    """Time a plain forward pass, the same one observed, and one with statistics expert by expert.

    The last is how the reference codes of MoNE and REAP see their experts: one call per expert in Python,
    running mean and variance in float32.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from mone_export.observer import observe

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**QWEN)).eval()
    tokens = torch.randint(0, QWEN["vocab_size"], (args.tokens // 2048, 2048))
    batches = tokens.split(BATCH_TOKENS // 2048)

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

    torch.set_num_threads(args.threads[0])
    fastest, seconds = fastest_implementation(model, forward)
    model.set_experts_implementation(fastest)
    competitors = {"plain": forward, "observed": observed, "expert by expert": expert_by_expert}
    runs: list[Json] = []
    for n_thread in args.threads:
        torch.set_num_threads(n_thread)
        for number in range(args.rounds):
            for name, function in competitors.items():
                runs.append({"round": number, "name": name, "threads": n_thread} | timed(function))
    return {
        "settings": {"model": "Qwen3-MoE, random weights, float32", "experts_implementation": fastest}
        | {key: QWEN[key] for key in QWEN if "exp" in key or "hidden" in key or "moe" in key}
        | {"tokens": args.tokens, "batch_tokens": BATCH_TOKENS, "rounds": args.rounds},
        "implementations_cpu_s": seconds,
        "summary": [summarise_calibrate(runs, n_thread, args.tokens) for n_thread in args.threads],
        "runs": runs,
    }


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
    """Return the wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
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


# quality

N_RANDOM = 3


def measure_quality(args: argparse.Namespace) -> Json:
    """Perplexity of the unpruned model and of exports, all F32, from one calibration; and their sizes."""
    from mone_export.model import resolve

    bin_dir = programs(args)
    variants = [(0.0, "mone", "mean", 0)]
    for ratio in args.ratios:
        variants += [(ratio, "mone", "mean", 0), (ratio, "mone", "zero", 0)]
        variants += [(ratio, "random", "mean", seed) for seed in range(N_RANDOM)]
    with scratch() as folder:
        text = folder / "held-out.txt"
        n_character = write_held_out(text, args.chunks)
        runs = []
        for ratio, score, novice, seed in variants:
            outfile = folder / "model.gguf"
            run = {"ratio": ratio, "score": score, "novice": novice, "seed": seed}
            run |= export_once(args.model, outfile, run, folder / "stats")
            runs.append(run | perplexity(bin_dir, outfile, text, args))
            print(runs[-1], file=sys.stderr, flush=True)
    return {
        "settings": {
            "model": "demo" if args.model == "demo" else resolve(args.model).name,
            "calibration": "built-in text, 64 rows of 512 tokens",
            "held_out": f"built-in held-out documents, {args.chunks} rows of 512 tokens",
            "held_out_characters": n_character,
            "outtype": "f32",
        },
        "runs": runs,
    }


def write_held_out(file: Path, n_chunk: int) -> int:
    """Write held-out documents, Python and prose as they come, enough for the rows; return characters."""
    from mone_export.corpus import builtin_documents

    texts, n_character = [], 0
    for document in builtin_documents("held-out"):
        texts.append(document.text)
        n_character += len(document.text)
        if n_character > n_chunk * 512 * 8:  # more characters than a token has in any of our tokenizers
            break
    file.write_text("\n\n".join(texts))
    return n_character


def export_once(model: str, outfile: Path, run: Json, stats: Path) -> Json:
    """Export one variant, and compare the size with the one announced beforehand."""
    from mone_export.model import inspect, resolve
    from mone_export.pipeline import export
    from mone_export.planning import plan_without_scores
    from mone_export.writing import measure

    announced, _ = measure(
        resolve(model), plan_without_scores(inspect(resolve(model)), ratio=run["ratio"]), outtype="f32"
    )
    options = {key: run[key] for key in ("ratio", "score", "novice", "seed")}
    report = export(
        model, outfile=outfile, outtype="f32", n_row=64, seq_len=512, stats=stats, dtype="float32", **options
    )
    return {"size": report.size, "size_announced": announced, "size_unpruned": report.size_unpruned}


def perplexity(bin_dir: Path, file: Path, text: Path, args: argparse.Namespace) -> Json:
    """Return llama-perplexity's estimate and its standard error."""
    command = [str(bin_dir / "llama-perplexity"), "-m", str(file), "-f", str(text), "-c", "512"]
    command += ["--chunks", str(args.chunks), "-t", str(args.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", done.stdout + done.stderr)
    if done.returncode != 0 or not found:
        raise SystemExit(
            f"llama-perplexity ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"
        )
    return {"perplexity": float(found[1]), "standard_error": float(found[2])}


# memory

MEMORY_SHAPE = {"n_layer": 2, "n_expert": 128, "hidden": 1024, "expert": 1024}
BAR_FACTOR, BAR_EXTRA = 1.5, 500_000_000


def measure_memory(args: argparse.Namespace) -> Json:
    """Sample the anonymous memory of `write` on a checkpoint with large layers, experts apart and fused."""
    if args.bin:
        raise SystemExit("memory needs no programs: leave out --bin")
    sizes = MEMORY_SHAPE
    layer_bytes = sizes["n_expert"] * 3 * sizes["hidden"] * sizes["expert"] * 2
    runs = []
    for form in ("apart", "fused"):
        with scratch() as folder:
            save_large_checkpoint(folder / "model", fused=form == "fused")
            for outtype in ("auto", "q8_0", "f32"):
                with multiprocessing.get_context("spawn").Pool(1) as pool:  # a fresh process: no old memory
                    run = pool.apply(write_and_sample, (folder, outtype))
                runs.append({"form": form, "outtype": outtype} | run)
                print(runs[-1], file=sys.stderr, flush=True)
    bar = BAR_FACTOR * layer_bytes + BAR_EXTRA
    return {
        "settings": sizes | {"dtype": "bfloat16", "ratio": 0.25},
        "largest_layer_experts": layer_bytes,
        "bar": bar,
        "runs": [run | {"within": run["peak"] <= bar} for run in runs],
    }


def save_large_checkpoint(folder: Path, *, fused: bool) -> None:
    """Write a random BF16 Qwen3-MoE checkpoint, a file per layer, with GPT-2's tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, Qwen3MoeConfig

    sizes = MEMORY_SHAPE
    folder.mkdir()
    # a vocabulary that the converter recognises
    tokenizer = AutoTokenizer.from_pretrained(runtime.tree() / "models", gguf_file="ggml-vocab-gpt-2.gguf")
    tokenizer.save_pretrained(folder)
    config = Qwen3MoeConfig(
        **QWEN | {"vocab_size": len(tokenizer), "num_experts": sizes["n_expert"], "tie_word_embeddings": True}
    )
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.moe_intermediate_size, config.dtype = sizes["expert"], torch.bfloat16
    config.save_pretrained(folder)

    def random(*shape: int) -> torch.Tensor:
        return torch.randint(-100, 100, shape, dtype=torch.int8).to(torch.bfloat16) / 1000

    hidden, heads = sizes["hidden"], QWEN["head_dim"]
    save_file(
        {
            "model.embed_tokens.weight": random(len(tokenizer), hidden),
            "model.norm.weight": random(hidden),
        },
        folder / "model-rest.safetensors",
    )
    for layer in range(sizes["n_layer"]):
        prefix = f"model.layers.{layer}."
        tensors = {
            "input_layernorm.weight": random(hidden),
            "post_attention_layernorm.weight": random(hidden),
            "self_attn.q_proj.weight": random(QWEN["num_attention_heads"] * heads, hidden),
            "self_attn.k_proj.weight": random(QWEN["num_key_value_heads"] * heads, hidden),
            "self_attn.v_proj.weight": random(QWEN["num_key_value_heads"] * heads, hidden),
            "self_attn.o_proj.weight": random(hidden, QWEN["num_attention_heads"] * heads),
            "self_attn.q_norm.weight": random(heads),
            "self_attn.k_norm.weight": random(heads),
            "mlp.gate.weight": random(sizes["n_expert"], hidden),
        } | dict(expert_tensors(random, fused=fused))
        save_file(
            {prefix + name: tensor for name, tensor in tensors.items()},
            folder / f"model-{layer}.safetensors",
        )


def expert_tensors(random: Callable[..., Any], *, fused: bool) -> Iterator[tuple[str, Any]]:
    """Yield one layer's experts, as one tensor per matrix or one for all experts."""
    n_expert, hidden, expert = (MEMORY_SHAPE[key] for key in ("n_expert", "hidden", "expert"))
    if fused:
        yield "mlp.experts.gate_up_proj", random(n_expert, 2 * expert, hidden)
        yield "mlp.experts.down_proj", random(n_expert, hidden, expert)
        return
    for number in range(n_expert):
        for name, shape in (("gate", (expert, hidden)), ("up", (expert, hidden)), ("down", (hidden, expert))):
            yield f"mlp.experts.{number}.{name}_proj.weight", random(*shape)


def write_and_sample(folder: Path, outtype: str) -> Json:
    """Write the checkpoint, a quarter of its experts pruned; return anonymous bytes before and at peak."""
    import torch

    from mone_export.artifacts import Calibration, ExpertStats
    from mone_export.model import inspect
    from mone_export.planning import plan_without_scores
    from mone_export.writing import write

    path = folder / "model"
    spec = inspect(path)
    stats = ExpertStats.empty(spec.n_expert, spec.hidden_size)
    calibration = Calibration(
        spec=spec,
        model_sha256="0" * 64,
        corpus_sha256="0" * 64,
        corpus_name="none",
        n_token=0,
        layers=dict.fromkeys(spec.moe_layers, stats),
    )
    torch.set_num_threads(1)
    before = anonymous_bytes()
    outfile = folder / "out.gguf"
    start = time.perf_counter()
    with peak_memory() as peak:
        size = write(path, calibration, plan_without_scores(spec, ratio=0.25), outfile, outtype=outtype)
    seconds = time.perf_counter() - start
    outfile.unlink()
    return {"before": before, "peak": peak[0], "size": size, "seconds": round(seconds, 2)}


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Sample this process's anonymous memory every few milliseconds; the list holds the largest sample."""
    peak, done = [anonymous_bytes()], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def anonymous_bytes() -> int:
    """Return the memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    sys.exit(main())
