"""Two roads to a pruned Q4_K_M: from the checkpoint, and from the GGUF that people already have.

Both are calibrated on the same text and compared with the unpruned model in its own precision, by
llama-perplexity. Beside them: how fast a GGUF is calibrated, against llama-perplexity; and how fast it is
written, against `cp` of the file that comes out, both until the data is on the disk. Competitors take turns.
"""

import argparse
import multiprocessing
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import Json, pairwise, programs, scratch
from measuring.bytes import divergence, read_sentencepiece, write_text
from measuring.methods import MODELS, trained
from models.random_gguf import SHAPES, write_model

OUTTYPE = "q4_k_m"
_QUIET: Mapping[str, Any] = {"capture_output": True, "stdin": subprocess.DEVNULL}
TEXTS = ("like", "unlike")


def measure_roads(args: argparse.Namespace) -> Json:
    """Return divergences by model, ratio and road; rates and their ratios."""
    bin_dir = programs(args)
    return {
        "settings": {
            "models": {name: dict(zip(TEXTS, MODELS[name], strict=True)) for name in args.models},
            "outtype": OUTTYPE,
            "calibration_tokens": args.rows * 512,
            "evaluation_tokens": args.chunks * 512,
            "shape": args.shape,
            "weights": args.weights,
            "threads": args.threads,
            "rounds": args.rounds,
        },
        "runs": [run for name in args.models for run in _quality(name, bin_dir, args)],
        "calibrating": _calibrating(bin_dir, args),
        "writing": _writing(args),
    }


def _quality(name: str, bin_dir: Path, args: argparse.Namespace) -> list[Json]:
    from mone_export.pipeline import export

    path = trained(name, minutes=args.minutes)
    read_sentencepiece(path)
    runs: list[Json] = []
    with scratch() as folder:
        whole, packed, outfile = (folder / f"{stem}.gguf" for stem in ("whole", "packed", "pruned"))
        calibration = write_text(folder / "calibration", MODELS[name][0], split="calibration")
        texts = {key: write_text(folder / key, kind) for key, kind in zip(TEXTS, MODELS[name], strict=True)}
        export(str(path), ratio=0, outfile=whole)
        export(str(path), ratio=0, outfile=packed, outtype=OUTTYPE)
        for text in texts.values():
            _ask(bin_dir, whole, text, args)

        def add(road: str, ratio: float, file: Path) -> None:
            found = {key: divergence(bin_dir, file, text, args) for key, text in texts.items()}
            runs.append({"model": name, "road": road, "ratio": ratio, "size": file.stat().st_size} | found)
            print(runs[-1], file=sys.stderr, flush=True)

        add("quantised only", 0.0, packed)
        roads: dict[str, tuple[str, str]] = {
            "checkpoint, then Q4_K_M": (str(path), OUTTYPE),
            "unquantised GGUF, then Q4_K_M": (str(whole), OUTTYPE),
            "Q4_K_M GGUF": (str(packed), "auto"),
        }
        for ratio in args.ratios:
            for road, (model, outtype) in roads.items():
                rows: dict[str, Any] = {"files": [calibration], "n_row": args.rows, "seq_len": 512}
                export(model, ratio=ratio, outfile=outfile, outtype=outtype, **rows)
                add(road, ratio, outfile)
    return runs


def _ask(bin_dir: Path, whole: Path, text: Path, args: argparse.Namespace) -> None:
    """Write the unpruned model's logits beside a text."""
    base = ("--kl-divergence-base", text.with_suffix(".kld"))
    command = [bin_dir / "llama-perplexity", "-m", whole, "-f", text, "-c", 512, "-t", args.threads, *base]
    done = subprocess.run(
        [str(part) for part in (*command, "--chunks", args.chunks)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])


def _calibrating(bin_dir: Path, args: argparse.Namespace) -> Json:
    """Return tokens per second of a calibration and of llama-perplexity, on one random GGUF."""
    import torch

    from mone_export.artifacts import Corpus
    from mone_export.calibration.corpus import fingerprint_rows
    from mone_export.calibration.engines import load

    runs: list[Json] = []
    with scratch() as folder:
        file = _with_vocabulary(args, folder)
        text = write_text(folder / "text", "python")
        tokens = torch.randint(0, 3000, (args.rows_timed, 512))
        corpus = Corpus(tokens, "random", fingerprint_rows(tokens), {"random": tokens.numel()})
        engine: Any = load(file, n_threads=args.threads)

        def perplexity(chunks: int) -> float:
            command = [bin_dir / "llama-perplexity", "-m", file, "-f", text, "-c", 512, "-b", 512]
            options = ["-t", args.threads, "--chunks", chunks]
            return _seconds(lambda: subprocess.run([str(part) for part in (*command, *options)], **_QUIET))

        for number in range(args.rounds):
            seconds = _seconds(lambda: engine.calibrate(corpus, model_sha256=""))
            runs.append(_rate(number, "calibration", tokens.numel() / seconds))
            seconds = perplexity(args.rows_timed) - perplexity(1)  # without the start
            runs.append(_rate(number, "llama-perplexity", 512 * (args.rows_timed - 1) / seconds))
            print(runs[-2:], file=sys.stderr, flush=True)
        engine.close()
    return {"runs": runs, "ratio": pairwise(runs, "tokens_per_second", "calibration", "llama-perplexity")}


def _rate(number: int, name: str, rate: float) -> Json:
    return {"round": number, "name": name, "tokens_per_second": rate}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _with_vocabulary(args: argparse.Namespace, folder: Path) -> Path:
    """Write a random GGUF of four layers with the demo's vocabulary, which llama-perplexity needs."""
    from mone_export.pipeline import export
    from mone_export.source.gguf_conversion import GgufConversion
    from mone_export.source.gguf_header import ARRAY, read_header
    from mone_export.source.gguf_types import gguf_library

    export("demo", ratio=0, outfile=folder / "demo.gguf")
    demo, kinds = read_header(folder / "demo.gguf"), gguf_library().GGUFValueType
    own = {key: entry for key, entry in demo.keys.items() if key.startswith("tokenizer.")}
    n_vocab = len(demo.value("tokenizer.ggml.tokens"))
    shape = replace(SHAPES[args.shape], n_layer=4, n_vocab=n_vocab)
    bare = write_model(folder / "bare.gguf", shape, args.weights, "full", shape.n_expert)
    conversion = GgufConversion(read_header(bare), NoEdits())
    number = {key: entry.raw[0] if entry.kind == ARRAY else entry.kind for key, entry in own.items()}
    file = folder / "random.gguf"
    conversion.write_head(file, {key: (kinds(number[key]).name, demo.value(key)) for key in own})
    conversion.write_tensors()
    bare.unlink()
    return file


class NoEdits:
    """Leaves every tensor as it is."""

    rewrites = False
    spec: Any = None

    def select(self, name: str) -> None:
        """Choose no experts."""

    def derived(self, name: str, shape: Sequence[int]) -> Sequence[Any]:
        """Add no experts."""
        return ()

    def rows(self, name: str, shape: Sequence[int]) -> None:
        """Change no rows."""

    def edit(self, name: str, tensor: Any) -> Any:
        """Return a tensor as it is."""
        return tensor

    def rewrite(self, name: str, read: Any) -> Any:
        """Make no experts."""


def _writing(args: argparse.Namespace) -> Json:
    """Return the seconds of writing a pruned GGUF and of copying it, both until it is on the disk."""
    with scratch() as folder:
        shape = replace(SHAPES[args.shape], n_layer=4)
        write_model(folder / "random.gguf", shape, "Q8_0", "full", shape.n_expert)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a fresh process: no old memory
            found: Json = pool.apply(write_and_copy, (folder, args.rounds))
    return found | {"ratio": pairwise(found["runs"], "seconds", "copy", "write")}


def write_and_copy(folder: Path, rounds: int) -> Json:
    """Write half of the experts of a GGUF, and copy the result; return seconds and the process's memory."""
    from mone_export.output.writing import write
    from mone_export.pruning.planning import plan_without_scores
    from mone_export.recipe import Recipe
    from mone_export.source import open_source

    source = open_source(folder / "random.gguf")
    source.fingerprint()  # is known by then, from the calibration
    chosen = plan_without_scores(source.spec, Recipe.of(0.5, method="drop", score="random"))
    outfile, copy = folder / "pruned.gguf", folder / "copy.gguf"
    before, runs = peak_resident(), []
    for number in range(rounds):
        for path in (outfile, copy):
            path.unlink(missing_ok=True)
        seconds = _seconds(lambda: write(source, None, chosen, outfile))
        runs.append({"round": number, "name": "write", "seconds": seconds})
        seconds = _seconds(lambda: subprocess.run(["cp", outfile, copy], check=True))
        seconds += _seconds(lambda: subprocess.run(["sync", copy], check=True))
        runs.append({"round": number, "name": "copy", "seconds": seconds})
    return {
        "size": outfile.stat().st_size,
        "runs": runs,
        "resident_before": before,
        "resident_peak": peak_resident(),
    }


def peak_resident() -> int:
    """Return the most memory this process has had, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0
