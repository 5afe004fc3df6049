"""At equal bytes: prune much and round little, the other way round, or only quantise?

For each size the candidates of `--fit` are written, one per type with as many experts as fit, and compared
with the unpruned model in its own precision, on two held-out texts, by llama-perplexity. Beside the KL
divergence stands the estimate that `--fit` chooses by: it has seen neither text.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from measuring import Json, ask_perplexity, programs, scratch
from measuring.methods import MODELS, rows_of, trained

TEXTS = ("like", "unlike")
FRACTIONS = (
    0.5,
    0.45,
    0.4,
    0.35,
    0.3,
    0.26,
)  # of the unpruned file: from less than Q8_0 to little more than Q2_K


def measure_bytes(args: argparse.Namespace) -> Json:
    """Return KL divergence and estimate of each candidate, per model, size and calibration sample."""
    bin_dir = programs(args)
    return {
        "settings": {
            "models": {name: dict(zip(TEXTS, MODELS[name], strict=True)) for name in args.models},
            "calibration_tokens": args.rows * 512,
            "evaluation_tokens": args.chunks * 512,
            "samples": args.samples,
        },
        "runs": [run for name in args.models for run in _runs_of(name, bin_dir, args)],
    }


def _runs_of(name: str, bin_dir: Path, args: argparse.Namespace) -> list[Json]:
    from mone_export.calibration.loading import load
    from mone_export.pipeline import export
    from mone_export.statistics import calibrate

    path = trained(name, minutes=args.minutes)
    read_sentencepiece(path)
    model = load(path, device="cpu", dtype="float32")
    runs: list[Json] = []
    with scratch() as folder:
        base, outfile = folder / "base.gguf", folder / "model.gguf"
        stats = [folder / f"{sample}.stats" for sample in range(args.samples)]
        for sample, file in enumerate(stats):
            corpus = rows_of(
                model, "calibration", MODELS[name][0], args.rows, first=sample, step=args.samples
            )
            calibrate(model, corpus).save(file)
        size = export(str(path), ratio=0, outfile=base, stats=stats[0]).size
        texts = {
            text: write_text(folder / text, kind) for text, kind in zip(TEXTS, MODELS[name], strict=True)
        }
        for text in texts.values():
            ask_perplexity(bin_dir, base, text, "Final estimate", *_options(text, args))
        known: dict[str, Json] = {}  # files without novices are the same for all samples
        for fraction in args.fractions:
            budget = int(fraction * size)
            for sample, file in enumerate(stats):
                judged = export(str(path), fit=budget, outfile=outfile, stats=file).candidates
                for place, item in enumerate(judged):
                    result = known.get(item.outtype) if not item.ratio else None
                    if result is None:
                        way = {"ratio": item.ratio} if item.outtype == "auto" else {"fit": budget}
                        export(str(path), **way, outtype=item.outtype, outfile=outfile, stats=file)
                        result = {
                            key: divergence(bin_dir, outfile, text, args) for key, text in texts.items()
                        }
                    if not item.ratio:
                        known[item.outtype] = result
                    run = {"model": name, "fraction": fraction, "sample": sample, "outtype": item.outtype}
                    run |= {
                        "ratio": item.ratio,
                        "size": item.size,
                        "estimate": item.error,
                        "chosen": place == 0,
                    }
                    runs.append(run | result)
                    print(runs[-1], file=sys.stderr, flush=True)
    return runs


def read_sentencepiece(path: Path) -> None:
    """Let the converter read our models' kind of vocabulary, which it looks for in some families only."""
    from mone_export.source import llamacpp

    _, conversion = llamacpp.load_converter()
    hparams = conversion.ModelBase.load_hparams(path, False)
    own = conversion.get_model_class(conversion.get_model_architecture(hparams, conversion.ModelType.TEXT))
    own.set_vocab = own._set_vocab_sentencepiece


def write_text(file: Path, kind: str, n_document: int = 400, *, split: Any = "held-out") -> Path:
    """Write documents of a kind, held-out ones unless another split is named."""
    from mone_export.calibration.documents import builtin_documents

    own = (document.text for document in builtin_documents(split) if document.kind == kind)
    file.write_text("\n\n".join(islice(own, n_document)))
    return file


def divergence(bin_dir: Path, file: Path, text: Path, args: argparse.Namespace) -> Json:
    """Return KL(unpruned || file) per token in nats, and top-1 agreement."""
    pattern = r"(?s)Mean\s+KLD:\s+(-?[\d.]+).*Same top p:\s+([\d.]+)"
    found = ask_perplexity(bin_dir, file, text, pattern, *_options(text, args), "--kl-divergence")
    return {"kl": float(found[1]), "top1": float(found[2]) / 100}


def _options(text: Path, args: argparse.Namespace) -> Sequence[object]:
    """Return llama-perplexity's options: the unpruned model's logits are written, or read to compare."""
    return "-t", args.threads, "--chunks", args.chunks, "--kl-divergence-base", text.with_suffix(".kld")
