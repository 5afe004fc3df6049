"""What pruning costs in quality, by method, score, novice and ratio, over several calibration samples.

Nothing is written: novices answer inside the loaded model, and a model of fewer experts is built from its
weights. Every variant is compared with the unpruned model token by token (KL divergence, top-1 agreement) on
four texts that neither training nor calibration has seen: `choose`, of the calibration's kind, on which a
default may be chosen; `like`, of that kind too, `unlike`, of another, and `rare`, which hardly any
calibration holds (`rare_text.py`), on which it is judged. A few variants are measured after a shorter
calibration too.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from measuring import Json, with_constants
from measuring.baselines import flap, without_layers

SEQ_LEN = 512
# model -> the kind of its calibration text, and a kind unlike it
MODELS = {
    "demo": ("python", "prose"),
    "qwen3_moe-prose": ("prose", "python"),
    "olmoe-prose": ("prose", "python"),  # does not renormalise the chosen weights
}
EXPERT_WIDTH = 96  # of what is trained here: as wide against the model as in Qwen3-30B


class Variant(NamedTuple):
    """One way to prune."""

    method: str
    score: str
    novice: str = "none"
    way: str = ""


PAPER = Variant("mone", "mone", "mean")
# measured after every length of calibration: the default, and what must not be better elsewhere
ALWAYS = (
    PAPER,
    Variant("mone", "error", "least-squares", "sensitivity"),
    Variant("mone", "reap", "least-squares", "sensitivity"),
    Variant("mone", "reap", "least-squares"),
    Variant("drop", "reap"),
    Variant("mone", "error", "thin", "budget"),
)
# what a default is chosen among, and what others propose
CONTENDERS = (
    *(Variant("mone", "mone", name) for name in ("zero", "mean", "least-squares", "joint")),
    *(Variant("mone", "error", name) for name in ("mean", "least-squares", "joint")),
    *(Variant("mone", name, "least-squares") for name in ("ean", "gate", "reap")),
    *(Variant("drop", name) for name in ("reap", "mone", "error")),
    Variant("dern", "gate"),
)
OTHERS = (
    Variant("mone", "mone", "gate-weighted"),
    Variant("mone", "reap", "mean"),
    *(
        Variant("mone", name, "least-squares")
        for name in ("mone-paper", "frequency", "variance", "man", "msan", "aimer", "random")
    ),
    Variant("drop", "gate"),
)

# other ways to an allocation than the same count in every layer, and what costs more passes over the text
WAYS = (
    *(Variant("mone", "mone", name, "sensitivity") for name in ("mean", "least-squares", "joint", "zero")),
    *(Variant("mone", "error", name, "sensitivity") for name in ("mean", "least-squares", "joint", "zero")),
    *(
        Variant("mone", score, novice, way)
        for score, novice in (("mone", "mean"), ("error", "least-squares"))
        for way in ("sequential", "search")
    ),
)
# what a choice must beat by far: the same widths for the experts that need them least, or for any
CONTROLS = (Variant("mone", "error", "thin", "inverted"), Variant("mone", "error", "thin", "shuffled"))
# what unpatched llama.cpp runs, and what was tried for it (`ordinary.py`)
STOCK = (
    *(variant for variant in ALWAYS if variant.method == "drop" or variant.novice == "thin"),
    Variant("narrow", "error"),
    Variant("drop", "error"),
    *(Variant("drop", score, way=way) for score in ("reap", "error") for way in ("scale", "gains")),
    *(Variant("narrow", "error", way=way) for way in ("scale", "gains")),
    Variant("dern", "gate"),
    Variant("merge", "frequency"),
)
# one of each system that the exporter is compared with, and its own: constants, thin experts
SYSTEMS = (
    Variant("mone", "error", "thin", "budget"),
    Variant("mone", "error", "least-squares", "sensitivity"),
    PAPER,
    Variant("drop", "reap"),
    Variant("dern", "gate"),
    Variant("merge", "frequency"),
    Variant("flap", "fluctuation"),
    Variant("layers", "angle"),
)
VARIANTS = {
    "always": ALWAYS,
    "contenders": CONTENDERS,
    "others": OTHERS,
    "ways": WAYS,
    "controls": CONTROLS,
    "stock": STOCK,
    "systems": SYSTEMS,
}


def measure_methods(args: argparse.Namespace) -> Json:
    """Measure every variant at every ratio, once for each calibration sample."""
    import torch

    torch.set_num_threads(args.threads)
    settings = {
        "calibration_tokens": [n_row * SEQ_LEN for n_row in args.rows],
        "evaluation_tokens": args.eval_rows * SEQ_LEN,
        "samples": args.samples,
    }
    kept = _kept(args, settings)
    runs = kept + [run for name in args.models for run in _runs_of(name, args)]
    names = sorted({run["model"] for run in runs})
    models = {name: dict(zip(("like", "unlike"), MODELS[name], strict=True)) for name in names}
    return {"settings": {"models": models} | settings, "runs": runs}


def _kept(args: argparse.Namespace, settings: Json) -> list[Json]:
    """Return the runs of the file to add to, except those that are measured again."""
    if not args.add:
        return []
    names = _variants(args, max(args.rows))
    before = json.loads(args.add.read_text())
    if any(before["settings"][key] != value for key, value in settings.items()):
        raise SystemExit(f"{args.add} was measured with other settings: {before['settings']}")
    return [
        run
        for run in before["runs"]
        if run["model"] not in args.models
        or (run["ratio"] and (run["ratio"] not in args.ratios or variant_of(run) not in names))
    ]


def _variants(args: argparse.Namespace, n_row: int) -> Sequence[Variant]:
    """Return what to measure after a calibration of `n_row` rows: all that is asked for after the longest."""
    kinds = args.kinds if n_row == max(args.rows) else [kind for kind in args.kinds if kind == "always"]
    return tuple(dict.fromkeys(variant for kind in kinds for variant in VARIANTS[kind]))


def variant_of(run: Json) -> Variant:
    """Return the variant of a run."""
    return Variant(**{field: run[field] for field in Variant._fields if field in run})


def trained(name: str, *, minutes: float) -> Path:
    """Return the folder of a model; one that is not built in is trained once and kept in the cache."""
    from mone_export import runtime
    from mone_export.source import open_source

    if name == "demo":
        return open_source("demo").folder
    family, _, text = name.rpartition("-")
    folder = runtime.cache_dir() / "models" / name
    if not (folder / "training.json").exists():
        tool = Path(__file__).parents[1] / "models" / "train_demo.py"
        command = [sys.executable, str(tool), "--out", str(folder), "--family", family, "--text", text]
        command += ["--expert-width", str(EXPERT_WIDTH)]
        subprocess.run([*command, "--minutes", str(minutes)], check=True)
    return folder


def _runs_of(name: str, args: argparse.Namespace) -> Iterator[Json]:
    from mone_export.calibration.loading import load

    model = load(trained(name, minutes=args.minutes), device="cpu", dtype="float32")
    like, unlike = MODELS[name]
    texts = {
        "choose": rows_of(model, "held-out", like, args.eval_rows, first=0, step=2),
        "like": rows_of(model, "held-out", like, args.eval_rows, first=1, step=2),
        "unlike": rows_of(model, "held-out", unlike, args.eval_rows),
    }
    texts["rare"] = rare_rows(model, args.eval_rows)
    wanted = {text: log_probabilities(model.module, corpus.tokens) for text, corpus in texts.items()}
    yield {"model": name, "ratio": 0.0} | compare(model.module, texts, wanted)
    for sample, corpus, held_out, calibration in _calibrations(model, like, args):
        n_row = len(corpus.tokens)
        for ratio in args.ratios:
            for variant in _variants(args, n_row):
                with pruned(model, calibration, corpus, held_out, variant, ratio, seed=sample) as module:
                    result = compare(module, texts, wanted)
                run = {"model": name, "ratio": ratio, "sample": sample, "calibration_tokens": n_row * SEQ_LEN}
                run |= variant._asdict() | result
                print(run, file=sys.stderr, flush=True)
                yield run


def _calibrations(model: Any, kind: str, args: argparse.Namespace) -> Iterator[tuple[int, Any, Any, Any]]:
    """Yield (sample, corpus, rows to search on, calibration); a short corpus begins a long one."""
    from mone_export.calibration.corpus import head
    from mone_export.calibration.passes import calibrate
    from mone_export.request import HELD_OUT_ROWS
    from mone_export.statistics import with_sensitivity

    longest = max(args.rows)
    for sample in range(args.samples):
        whole = rows_of(model, "calibration", kind, longest + HELD_OUT_ROWS, first=sample, step=args.samples)
        for n_row in args.rows:
            corpus = head(whole, n_row)
            calibration = with_sensitivity(model, corpus, calibrate(model, corpus, model_sha256=""))
            yield sample, corpus, whole.tokens[longest:], calibration


def rows_of(model: Any, split: Any, kind: str, n_row: int, *, first: int = 0, step: int = 1) -> Any:
    """Return rows of every `step`-th built-in document of a kind, from the `first` on."""
    from mone_export.calibration.documents import builtin_documents

    documents = (document for document in builtin_documents(split) if document.kind == kind)
    return _rows(model, islice(documents, first, None, step), kind, n_row)


def rare_rows(model: Any, n_row: int, *, seed: int = 0) -> Any:
    """Return rows of the third kind of text."""
    from measuring.rare_text import rare_documents

    return _rows(model, rare_documents(seed), "rare", n_row)


def _rows(model: Any, documents: Any, name: str, n_row: int) -> Any:
    from mone_export.calibration.corpus import make_corpus

    return make_corpus(documents, model.source.tokenizer(), name=name, n_row=n_row, seq_len=SEQ_LEN)


@contextmanager
def pruned(
    model: Any, calibration: Any, corpus: Any, held_out: Any, variant: Variant, ratio: float, *, seed: int
) -> Iterator[Any]:
    """Yield the model as a variant leaves it; super experts are not guarded."""
    from mone_export.calibration.loading import loaded_experts
    from mone_export.calibration.masking import Divergence, masked, measure_residuals, recalibrate
    from mone_export.deciding import Trial
    from mone_export.pruning.allocation import allocate
    from mone_export.pruning.novices import joint_novices, novices
    from mone_export.pruning.planning import plan
    from mone_export.pruning.scoring import score, score_weights

    if variant.method == "flap":
        with flap(model, corpus, ratio) as module:
            yield module
        return
    if variant.method in ("merge", "narrow", "layers") or variant.way in ("scale", "gains"):
        yield _ordinary(model, calibration, corpus, variant, ratio)
        return
    recipe = recipe_of(variant, ratio, seed=seed)
    if variant.novice == "thin":
        with with_thin_experts(model, calibration, corpus, recipe, control=variant.way) as module:
            yield module
        return
    if variant.score == "aimer":
        scores = replace(score_weights(model.spec, loaded_experts(model)), calibration=calibration)
    else:
        scores = score(calibration, variant.score, guarded=False, seed=seed)
    trial = Trial(Divergence(model, held_out), scores, recipe) if recipe.allocation == "search" else None
    counts = allocate(scores, recipe, trial=trial)
    if variant.way == "sequential":
        calibration = recalibrate(
            model,
            corpus,
            calibration,
            lambda so_far: plan(score(so_far, variant.score, guarded=False), counts, recipe=recipe),
            lambda stats: novices(stats, variant.novice),
        )
        scores = score(calibration, variant.score, guarded=False)
    chosen = plan(scores, counts, recipe=recipe)
    if variant.method != "mone":
        yield with_fewer_experts(model.module, calibration, chosen)
        return
    if variant.novice == "joint":
        residuals = measure_residuals(model, corpus, chosen)
        vectors = {
            layer: joint_novices(calibration.layers[layer], found) for layer, found in residuals.items()
        }
    else:
        vectors = {layer: novices(stats, variant.novice) for layer, stats in calibration.layers.items()}
    with masked(model.module, {layer.layer: layer.pruned for layer in chosen.layers}, vectors):
        yield model.module


def _ordinary(model: Any, calibration: Any, corpus: Any, variant: Variant, ratio: float) -> Any:
    """Return the model of an ordinary file: narrower, merged, or mended experts, or fewer layers."""
    from measuring.ordinary import mended, merged
    from mone_export.pruning.planning import plan
    from mone_export.pruning.scoring import score

    if variant.method == "layers":
        return without_layers(model.module, corpus, ratio)
    if variant.method == "merge":
        return merged(model, corpus, calibration, round((1 - ratio) * model.spec.n_expert))
    if variant.method == "narrow":
        smaller = with_narrow_experts(model, calibration, corpus, ratio)
    else:
        recipe = recipe_of(variant._replace(way=""), ratio, seed=0)
        chosen = plan(score(calibration, variant.score, guarded=False), recipe=recipe)
        smaller = with_fewer_experts(model.module, calibration, chosen)
    return mended(smaller, model, corpus, variant.way) if variant.way else smaller


def with_narrow_experts(model: Any, calibration: Any, corpus: Any, ratio: float) -> Any:
    """Return a model of fewer and narrower experts: zeros where channels went."""
    from mone_export.calibration.engines import engine_of
    from mone_export.deciding import fitted
    from mone_export.pruning.fates import plan_narrow
    from mone_export.pruning.scoring import score
    from mone_export.pruning.thinning import narrow_widths
    from mone_export.recipe import Recipe
    from mone_export.source.shape import expert_modules

    scores, widths = score(calibration, "error", guarded=False), narrow_widths(model.spec, 1)
    thinner = fitted(engine_of(model), corpus, widths, centred=False)
    recipe = Recipe.of(ratio, method="narrow", guarded=False)
    chosen = plan_narrow(scores, thinner.errors, widths, recipe)
    smaller = with_fewer_experts(model.module, calibration, chosen)
    before, after = (dict(expert_modules(each)) for each in (model.module, smaller))
    for layer in chosen.layers if chosen.width else ():
        for slot, expert in enumerate(layer.kept):
            down = thinner.down(
                layer.layer, expert, chosen.width, before[layer.layer].down_proj[expert].detach()
            )
            own = after[layer.layer].down_proj.data[slot].zero_()
            own[:, thinner.channels(layer.layer, expert, chosen.width)] = down.float()
    return smaller


@contextmanager
def with_thin_experts(
    model: Any, calibration: Any, corpus: Any, recipe: Any, *, control: str = ""
) -> Iterator[Any]:
    """Yield the model with thin experts: zeros where channels went, constants added."""
    from mone_export.calibration.engines import engine_of
    from mone_export.deciding import fitted
    from mone_export.pruning.fates import plan_fates
    from mone_export.pruning.scoring import score
    from mone_export.pruning.thinning import widths_of

    scores = score(calibration, "error", guarded=False)
    widths = widths_of(model.spec, 1)
    thinner = fitted(engine_of(model), corpus, widths)
    chosen = plan_fates(scores, thinner.errors, widths, recipe)
    if control in ("inverted", "shuffled"):
        layers = (reordered(layer, thinner.errors[layer.layer][:, 0], control) for layer in chosen.layers)
        chosen = replace(chosen, layers=tuple(layers))
    with thinned(model, calibration, thinner, chosen) as module:
        yield module


@contextmanager
def thinned(model: Any, calibration: Any, thinner: Any, chosen: Any) -> Iterator[Any]:
    """Yield the model as a plan with thin experts has it."""
    import torch

    from mone_export.calibration.masking import standing_in
    from mone_export.output.thin_experts import constants as with_tiers
    from mone_export.pruning.novices import novices
    from mone_export.source.shape import expert_modules

    modules, before, forwards = dict(expert_modules(model.module)), {}, {}

    for layer in chosen.layers:
        module, number = modules[layer.layer], layer.layer
        before[number] = module.down_proj.data.clone()
        own = novices(calibration.layers[number]).float().numpy()
        constants = torch.from_numpy(with_tiers(layer, model.spec.expert_size, own, thinner))
        constants[list(layer.kept)] = 0
        module.down_proj.data[list(layer.pruned)] = 0
        for tier in layer.tiers:
            for expert in tier.experts:
                whole = before[number][expert]
                module.down_proj.data[expert] = 0
                channels = thinner.channels(number, expert, tier.width)
                module.down_proj.data[expert][:, channels] = thinner.down(
                    number, expert, tier.width, whole
                ).float()
        forwards[module] = partial(with_constants, module, constants)
    try:
        with standing_in(forwards):
            yield model.module
    finally:
        for number, weights in before.items():
            modules[number].down_proj.data = weights


def reordered(layer: Any, errors: Any, control: str) -> Any:
    """Return a layer's plan with its widths given to other experts: the least needed, or any."""
    import torch

    from mone_export.artifacts import LayerPlan, Tier

    order = errors.argsort() if control == "inverted" else torch.randperm(len(errors))
    experts = order.tolist()  # the first get the most
    counts = [len(layer.kept), *(len(tier.experts) for tier in layer.tiers)]
    parts = [sorted(experts[sum(counts[:n]) : sum(counts[: n + 1])]) for n in range(len(counts))]
    tiers = tuple(Tier(tier.width, tuple(own)) for tier, own in zip(layer.tiers, parts[1:], strict=True))
    return LayerPlan(layer.layer, tuple(parts[0]), tuple(sorted(experts[sum(counts) :])), tiers)


def recipe_of(variant: Variant, ratio: float, *, seed: int) -> Any:
    """Return the recipe of a variant; `sequential` starts from counts by sensitivity."""
    from mone_export.recipe import Recipe

    named = {"": "even", "sequential": "sensitivity", "inverted": "budget", "shuffled": "budget"}
    allocation = named.get(variant.way, variant.way)
    novice = None if variant.novice == "none" else variant.novice
    return Recipe.of(
        ratio,
        method=variant.method,
        score=variant.score,
        novice=novice,
        allocation=allocation,
        guarded=False,
        seed=seed,
    )


def with_fewer_experts(module: Any, calibration: Any, chosen: Any) -> Any:
    """Return a model without the pruned experts and their rows of the router; DERN's if the plan says so."""
    import torch
    from transformers import AutoModelForCausalLM

    from mone_export.pruning.dern import recombine
    from mone_export.source.shape import expert_modules

    kept = {layer.layer: list(layer.kept) for layer in chosen.layers}
    config = type(module.config).from_dict(module.config.to_dict())
    (key,) = {"num_local_experts", "num_experts"} & config.to_dict().keys()
    setattr(config, key, len(chosen.layers[0].kept))
    smaller = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = module.state_dict()
    for name, value in smaller.state_dict().items():
        if state[name].shape != value.shape:
            state[name] = state[name][kept[int(name.split(".")[2])]]
    smaller.load_state_dict(state)
    if chosen.recipe.method == "dern":
        before, after = (dict(expert_modules(each)) for each in (module, smaller))
        for layer in chosen.layers:
            old, new = before[layer.layer], after[layer.layer]

            def read(e: int, old: Any = old) -> Any:
                gate, up = old.gate_up_proj[e].detach().chunk(2)
                return torch.stack([gate, up, old.down_proj[e].detach().T], dim=1)

            importance = calibration.layers[layer.layer].gate_sum
            for e, segments in enumerate(recombine(read, layer.kept, layer.pruned, importance)):
                new.gate_up_proj.data[e] = torch.cat([segments[:, 0], segments[:, 1]])
                new.down_proj.data[e] = segments[:, 2].T
    return smaller


def log_probabilities(module: Any, rows: Any) -> Any:
    """Return log p of every next token, float32 [n_row, seq_len, n_vocab]."""
    import torch

    with torch.inference_mode():
        return torch.cat([module(part).logits.float().log_softmax(-1) for part in rows.split(8)])


def compare(module: Any, texts: Json, wanted: Json) -> Json:
    """Return perplexity, KL(unpruned || pruned) per token in nats and top-1 agreement, by text."""
    results = {}
    for text, corpus in texts.items():
        found, unpruned = log_probabilities(module, corpus.tokens), wanted[text]
        next_token = found[:, :-1].gather(2, corpus.tokens[:, 1:, None]).double()
        divergence = (unpruned.exp() * (unpruned - found)).sum(-1).double()
        agreement = (found.argmax(-1) == unpruned.argmax(-1)).double()
        results[text] = {
            "perplexity": round(math.exp(-next_token.mean()), 4),
            "kl": round(float(divergence.mean()), 6),
            "top1": round(float(agreement.mean()), 5),
        }
    return results
