"""Two roads to a pruned Q4_K_M: from the checkpoint, and from the GGUF that people already have.

Both are calibrated on the same text and compared with the unpruned model in its own precision, by
llama-perplexity. Beside them: how fast a GGUF is calibrated, against llama-bench's prompt, which computes no
statistics and the product with the vocabulary for one token only; and how fast it is written, against `cp` of
the file that comes out. Competitors take turns.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measuring import Json, pairwise, programs, scratch, spread
from measuring.bytes import divergence, read_sentencepiece, write_text
from measuring.methods import MODELS, trained
from models.random_gguf import SHAPES, write_model

OUTTYPE = "q4_k_m"
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
    """Return tokens per second of a calibration and of llama-bench's prompt, on one random GGUF."""
    import torch

    from mone_export.artifacts import Corpus
    from mone_export.calibration.corpus import fingerprint_rows
    from mone_export.calibration.engines import load

    runs: list[Json] = []
    with scratch() as folder:
        shape = SHAPES[args.shape]
        file = write_model(folder / "random.gguf", shape, args.weights, "full", shape.n_expert)
        tokens = torch.randint(0, shape.n_vocab, (args.rows_timed, 512))
        corpus = Corpus(tokens, "random", fingerprint_rows(tokens))
        engine: Any = load(file, n_threads=args.threads)
        for number in range(args.rounds):
            start = time.perf_counter()
            engine.calibrate(corpus, model_sha256="")
            rate = tokens.numel() / (time.perf_counter() - start)
            runs.append({"round": number, "name": "calibration", "tokens_per_second": rate})
            command = [bin_dir / "llama-bench", "-m", file, "-p", 512, "-n", 0, "-r", args.rows_timed]
            options = ["-t", args.threads, "-o", "jsonl"]
            done = subprocess.run(
                [str(part) for part in (*command, *options)], capture_output=True, text=True
            )
            rate = float(done.stdout.split('"avg_ts": ')[1].split(",")[0])
            runs.append({"round": number, "name": "llama-bench", "tokens_per_second": rate})
            print(runs[-2:], file=sys.stderr, flush=True)
        engine.close()
    return {"runs": runs, "ratio": pairwise(runs, "tokens_per_second", "calibration", "llama-bench")}


def _writing(args: argparse.Namespace) -> Json:
    """Return the seconds of writing a pruned GGUF over those of copying it, and the process's memory."""
    from mone_export.output.writing import write
    from mone_export.pruning.planning import plan_without_scores
    from mone_export.recipe import Recipe
    from mone_export.source import open_source

    runs: list[Json] = []
    with scratch() as folder:
        shape = SHAPES[args.shape]
        file = write_model(folder / "random.gguf", shape, "Q8_0", "full", shape.n_expert)
        source = open_source(file)
        source.fingerprint()  # is known by then, from the calibration
        chosen = plan_without_scores(source.spec, Recipe.of(0.5, method="drop", score="random"))
        outfile, copy = folder / "pruned.gguf", folder / "copy.gguf"
        for number in range(args.rounds):
            for path in (outfile, copy):
                path.unlink(missing_ok=True)
            start = time.perf_counter()
            size = write(source, None, chosen, outfile)
            runs.append({"round": number, "name": "write", "seconds": time.perf_counter() - start})
            start = time.perf_counter()
            with outfile.open("rb") as source_file, copy.open("wb") as target:
                shutil.copyfileobj(source_file, target, 2**20)
            runs.append({"round": number, "name": "copy", "seconds": time.perf_counter() - start})
    return {
        "size": size,
        "runs": runs,
        "ratio": pairwise(runs, "seconds", "copy", "write"),
        "seconds": spread([run["seconds"] for run in runs if run["name"] == "write"]),
        "peak_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
