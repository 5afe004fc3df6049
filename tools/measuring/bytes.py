"""At equal bytes: what `--fit` makes of a size, and what else there is to do with it.

Every file is at most as large as the size; all are compared with the unpruned model in its own precision, on
two held-out texts, by llama-perplexity. Arms: only quantised, in each type (with an importance matrix); REAP,
and novices alone, in the type that their estimate chooses; `--fit`; the next best of its candidates, to see
whether it chose well; and its plan with the experts of each layer in reverse order, which must be far worse.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from measuring import Json, ask_perplexity, programs, scratch
from measuring.methods import MODELS, trained

TEXTS = ("like", "unlike")
FRACTIONS = (0.45, 0.4, 0.35, 0.3, 0.26)  # of the unpruned file: from Q6_K to little more than Q2_K
TYPES = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k")
N_OTHER = 2  # of the candidates that were not chosen


def measure_bytes(args: argparse.Namespace) -> Json:
    """Return KL divergence and size of each arm, per model, size and calibration sample."""
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


def _runs_of(name: str, bin_dir: Path, args: argparse.Namespace) -> Iterator[Json]:
    from mone_export.pipeline import export

    path = trained(name, minutes=args.minutes)
    read_sentencepiece(path)
    with scratch() as folder:
        base, outfile = folder / "base.gguf", folder / "model.gguf"
        samples = [_sample(folder, MODELS[name][0], number, args) for number in range(args.samples)]
        size = _size(export(path, ratio=0, outfile=base))
        texts = {
            text: write_text(folder / text, kind) for text, kind in zip(TEXTS, MODELS[name], strict=True)
        }
        for text in texts.values():
            ask_perplexity(bin_dir, base, text, "Final estimate", *_options(text, args))

        def run(arm: str, sample: int, fraction: float, **options: Any) -> Json | None:
            from mone_export.errors import MoneError

            try:
                report = export(path, outfile=outfile, overwrite=True, **samples[sample], **options)
            except MoneError as error:  # such as that nothing is small enough
                print(f"{name} {fraction} {arm}: {error}", file=sys.stderr)
                return None
            found = {"model": name, "fraction": fraction, "sample": sample, "arm": arm}
            found |= {"limit": int(fraction * size), "size": _size(report)}
            best = report.candidates[0] if report and report.candidates else None
            found |= {"outtype": best.outtype if best else options["outtype"]}
            found |= {"others": [item.outtype for item in report.candidates[1:]] if report else []}
            found |= {key: divergence(bin_dir, outfile, text, args) for key, text in texts.items()}
            print(found, file=sys.stderr, flush=True)
            return found

        for outtype in TYPES:
            quantised = run("only quantised", 0, 1.0, ratio=0, outtype=outtype, imatrix=folder / "imatrix")
            yield from (each for each in [quantised] if each)
        for fraction in args.fractions:
            for sample in range(args.samples):
                yield from _of_size(
                    partial(run, sample=sample, fraction=fraction), int(fraction * size), folder
                )


def _of_size(run: Any, limit: int, folder: Path) -> Iterator[Json]:
    """Yield the arms of a size and a sample; the controls of the first sample only."""
    plan = folder / "plan.json"
    chosen = run("fit", fit=limit, plan_out=plan)
    arms = [chosen, run("constants", fit=limit, novice="least-squares", allocation="sensitivity")]
    if chosen and chosen["sample"] == 0:
        others = chosen["others"][:N_OTHER]
        arms += [run("other candidate", fit=limit, outtype=outtype) for outtype in others]
        arms.append(run("REAP", fit=limit, method="drop"))
        value = json.loads(plan.read_text())
        for layer in value["layers"].values():
            _invert(layer)
        plan.write_text(json.dumps(value))
        arms.append(run("inverted", plan=plan, outtype=chosen["outtype"]))
    yield from (arm for arm in arms if arm)


def _invert(layer: Json) -> None:
    """Give the largest fates of a layer to the experts of the lowest scores."""
    scores = [float("inf") if score == "guarded" else score or 0.0 for score in layer["scores"]]
    ranked = iter(sorted(range(len(scores)), key=lambda expert: scores[expert]))
    layer["kept"] = sorted(islice(ranked, len(layer["kept"])))
    for tier in layer.get("tiers", ()):
        tier["experts"] = sorted(islice(ranked, len(tier["experts"])))
    layer["pruned"] = sorted(ranked)


def _sample(folder: Path, kind: str, number: int, args: argparse.Namespace) -> Json:
    """Return the options that calibrate on a sample of text, which no other sample shares."""
    documents = _documents(kind, "calibration")
    file = folder / f"{number}.txt"
    file.write_text("\n\n".join(islice(documents, number, 4000, args.samples)))
    return {"files": [file], "n_row": args.rows, "seq_len": 512, "stats": folder / f"{number}.stats"}


def _size(report: Any) -> int:
    assert report is not None
    return int(report.size)


def read_sentencepiece(path: Path) -> None:
    """Let the converter read our models' kind of vocabulary, which it looks for in some families only."""
    from mone_export.source import llamacpp

    _, conversion = llamacpp.load_converter()
    hparams = conversion.ModelBase.load_hparams(path, False)
    own = conversion.get_model_class(conversion.get_model_architecture(hparams, conversion.ModelType.TEXT))
    own.set_vocab = own._set_vocab_sentencepiece


def write_text(file: Path, kind: str, n_document: int = 400, *, split: Any = "held-out") -> Path:
    """Write documents of a kind, held-out ones unless another split is named."""
    file.write_text("\n\n".join(islice(_documents(kind, split), n_document)))
    return file


def _documents(kind: str, split: Any) -> Iterator[str]:
    from mone_export.calibration.documents import builtin_documents

    return (document.text for document in builtin_documents(split) if document.kind == kind)


def divergence(bin_dir: Path, file: Path, text: Path, args: argparse.Namespace) -> Json:
    """Return KL(unpruned || file) per token in nats, and top-1 agreement."""
    pattern = r"(?s)Mean\s+KLD:\s+(-?[\d.]+).*Same top p:\s+([\d.]+)"
    found = ask_perplexity(bin_dir, file, text, pattern, *_options(text, args), "--kl-divergence")
    return {"kl": float(found[1]), "top1": float(found[2]) / 100}


def _options(text: Path, args: argparse.Namespace) -> Sequence[object]:
    """Return llama-perplexity's options: the unpruned model's logits are written, or read to compare."""
    return "-t", args.threads, "--chunks", args.chunks, "--kl-divergence-base", text.with_suffix(".kld")
