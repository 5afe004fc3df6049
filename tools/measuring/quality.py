"""Perplexity on held-out text by ratio, score and novice."""

import argparse
import sys
from pathlib import Path

from measuring import Json, ask_perplexity, programs, scratch

N_RANDOM = 3


def measure_quality(args: argparse.Namespace) -> Json:
    """Perplexity of the unpruned model and of exports, all F32, from one calibration; and their sizes."""
    from mone_export.source import open_source

    bin_dir = programs(args)
    variants = [(0.0, "error", "least-squares", 0)]
    for ratio in args.ratios:
        variants += [(ratio, "error", "least-squares", 0), (ratio, "error", "zero", 0)]
        variants += [(ratio, "random", "least-squares", seed) for seed in range(N_RANDOM)]
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
            "model": open_source(args.model).name,
            "calibration": "built-in text, 64 rows of 512 tokens",
            "held_out": f"built-in held-out documents, {args.chunks} rows of 512 tokens",
            "held_out_characters": n_character,
            "outtype": "f32",
        },
        "runs": runs,
    }


def write_held_out(file: Path, n_chunk: int) -> int:
    """Write held-out documents, Python and prose as they come, enough for the rows; return characters."""
    from mone_export.calibration.documents import builtin_documents

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
    from mone_export.output.writing import measure
    from mone_export.pipeline import export
    from mone_export.pruning.planning import plan_without_scores
    from mone_export.recipe import Recipe
    from mone_export.source import open_source

    source = open_source(model)
    recipe = Recipe.of(run["ratio"], score=run["score"], novice=run["novice"])
    announced = measure(source, plan_without_scores(source.spec, recipe), outtype="f32")
    options = {key: run[key] for key in ("ratio", "score", "novice", "seed")}
    report = export(
        model, outfile=outfile, outtype="f32", n_row=64, seq_len=512, stats=stats, dtype="float32", **options
    )
    return {"size": report.size, "size_announced": announced, "size_unpruned": report.size_unpruned}


def perplexity(bin_dir: Path, file: Path, text: Path, args: argparse.Namespace) -> Json:
    """Return llama-perplexity's estimate and its standard error."""
    pattern = r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)"
    found = ask_perplexity(bin_dir, file, text, pattern, "--chunks", args.chunks, "-t", args.threads)
    return {"perplexity": float(found[1]), "standard_error": float(found[2])}
