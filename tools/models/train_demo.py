"""Train the embedded demo: a mixture of 32 small experts, on text that every machine with Python has.

The package carries a model so that its first command works offline, and so that pruning can be judged on
experts that really specialise, which random weights never do. Two CPU cores and an hour are enough:

    python tools/models/train_demo.py --out mone_export/demo --minutes 55

The learning rate follows the clock, so the run ends annealed whatever the speed of the machine. Everything
that the tool measured goes into `training.json`; the model card is generated from it.
"""

import argparse
import copy
import hashlib
import io
import json
import math
import platform
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaTokenizer,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3MoeConfig,
)

from mone_export.calibration.corpus import make_corpus
from mone_export.calibration.documents import Document, builtin_documents

VOCAB_SIZE = 3072
N_LAYER, N_EXPERT, TOP_K = 5, 32, 4
CONTEXT = 2048
BOS, EOS = 1, 2
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "num_hidden_layers": N_LAYER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": CONTEXT,
    "num_experts_per_tok": TOP_K,
    "tie_word_embeddings": True,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
QWEN_SHAPE = SHAPE | {"num_experts": N_EXPERT}
FAMILIES: dict[str, Callable[[int], PreTrainedConfig]] = {
    "mixtral": lambda width: MixtralConfig(
        **SHAPE, num_local_experts=N_EXPERT, intermediate_size=width, sliding_window=None
    ),
    "qwen3_moe": lambda width: Qwen3MoeConfig(
        **QWEN_SHAPE, norm_topk_prob=True, moe_intermediate_size=width, intermediate_size=width
    ),
    # The weights of the chosen experts stay as the softmax gave them, as in OLMoE itself.
    "olmoe": lambda width: OlmoeConfig(**QWEN_SHAPE, norm_topk_prob=False, intermediate_size=width),
}
# The model has learnt to continue text, not to obey: a chat is its messages, one under the other.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] + ('' if loop.last else '\\n') }}{% endfor %}"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the weights, apart from the text, the seed and the speed of the machine."""

    learning_rate: float = 2e-3
    warmup_share: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.1
    clip: float = 1.0
    balance: float = 0.001  # weight of the balance loss: 0.01 made the use of experts almost equal
    prose_share: float = 0.4
    short_rows: tuple[int, int] = (4, 512)  # rows per step, tokens per row
    long_rows: tuple[int, int] = (2, 2048)  # towards the end, so that late positions are trained too
    long_from: float = 0.8  # share of the time after which rows are long


def main() -> None:
    """Train the tokenizer and the model, measure them, write the folder."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    recipe = Recipe()
    documents = select(builtin_documents("calibration"), args.text)
    tokenizer = save_tokenizer(train_tokenizer(documents, threads=args.threads), args.out)
    model = make_model(args.family, args.expert_width)
    packer = Packer(documents, tokenizer, prose_share=recipe.prose_share, seed=args.seed)
    result = train(
        model, packer, recipe, minutes=args.minutes, checkpoints=args.checkpoints, tokenizer_dir=args.out
    )
    save_model(model, args.out)
    report = {
        "family": args.family,
        "text": args.text,
        "seed": args.seed,
        "threads": args.threads,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "recipe": asdict(recipe),
        "training": result | packer.describe(),
        "held_out": measure(args.out),
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (torch, transformers, sentencepiece)},
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / "README.md").write_text(model_card(report), encoding="utf-8")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the demo model of mone_export on a CPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, in Hugging Face's form")
    parser.add_argument("--minutes", type=float, default=55, help="wall-clock training time (default: 55)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the weights and the order of text (default: 0)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument(
        "--family", choices=FAMILIES, default="mixtral", help="architecture (default: mixtral)"
    )
    parser.add_argument(
        "--expert-width", type=int, default=32, help="intermediate channels of an expert (default: 32)"
    )
    parser.add_argument(
        "--text", choices=["mixed", "python", "prose"], default="mixed", help="default: mixed"
    )
    parser.add_argument("--checkpoints", type=Path, help="also write the model here every five minutes")
    return parser.parse_args()


# Text and tokenizer


def select(documents: Iterable[Document], text: str) -> list[Document]:
    """Keep the documents of one kind, or all of them for `mixed`."""
    return [document for document in documents if text in ("mixed", document.kind)]


def train_tokenizer(documents: list[Document], *, threads: int) -> bytes:
    """Train SentencePiece BPE like Llama's: byte fallback, single digits, runs of spaces as pieces.

    Unlike Llama's it puts no space in front of a text: transformers leaves that space out where the text
    begins with one, SentencePiece and llama.cpp do not. Without it all three agree.
    """
    lines = (line for document in documents for line in document.text.split("\n") if line)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=written,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=0.9995,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        max_sentence_length=1 << 20,
        num_threads=threads,
        minloglevel=2,
    )
    return written.getvalue()


def save_tokenizer(sentencepiece_model: bytes, out: Path) -> PreTrainedTokenizerBase:
    """Write the tokenizer's files, and return the tokenizer as a user will load it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(sentencepiece_model)
    tokenizer = LlamaTokenizer.from_pretrained(out, add_prefix_space=False, add_bos_token=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(out)
    (out / "tokenizer.model").write_bytes(sentencepiece_model)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(out)
    return loaded


class Packer:
    """Turns documents into shuffled rows of tokens without end, repeating prose to reach its share."""

    def __init__(
        self, documents: list[Document], tokenizer: PreTrainedTokenizerBase, *, prose_share: float, seed: int
    ) -> None:
        """Tokenise the documents, each with the BOS that the tokenizer puts in front and an EOS after it."""
        self._random = random.Random(seed)
        self._sha256 = hashlib.sha256("\0".join(document.text for document in documents).encode()).hexdigest()
        self._ids: dict[str, list[list[int]]] = {"python": [], "prose": []}
        for document in documents:
            ids = tokenizer(document.text, verbose=False)["input_ids"]
            self._ids[document.kind].append([*ids, EOS])
        self._n_token = {kind: sum(map(len, texts)) for kind, texts in self._ids.items()}
        n_python, n_prose = self._n_token["python"], self._n_token["prose"]
        wanted = n_python * prose_share / (1 - prose_share)
        self._prose_repeats = wanted / n_prose if n_python and n_prose else 1.0

    def batches(self, n_row: int, seq_len: int) -> Iterator[Tensor]:
        """Yield int64 [n_row, seq_len] for ever; every epoch has its own order of documents and of rows."""
        while True:
            tokens = torch.tensor(self._epoch(), dtype=torch.int64)
            rows = tokens[: len(tokens) // seq_len * seq_len].view(-1, seq_len)
            order = list(range(len(rows)))
            self._random.shuffle(order)
            for start in range(0, len(order) - n_row + 1, n_row):
                yield rows[order[start : start + n_row]]

    def describe(self) -> dict[str, Any]:
        """Say what the text was."""
        return {
            "documents": {kind: len(texts) for kind, texts in self._ids.items()},
            "tokens": self._n_token,
            "prose_repeats_per_epoch": round(self._prose_repeats, 3),
            "text_sha256": self._sha256,
        }

    def _epoch(self) -> list[int]:
        texts = list(self._ids["python"])
        for ids in self._ids["prose"]:
            times = int(self._prose_repeats) + (self._random.random() < self._prose_repeats % 1)
            texts += [ids] * times
        self._random.shuffle(texts)
        return [token for ids in texts for token in ids]


# Model and training


def make_model(family: str, expert_width: int) -> PreTrainedModel:
    """Build the random model: weights of 0.02, smaller where a layer writes into the residual stream."""
    config = FAMILIES[family](expert_width)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")  # on a CPU 6 times the speed of `eager`, backward included
    scale = (2 * N_LAYER) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(scale)
    return model


def train(
    model: PreTrainedModel,
    packer: Packer,
    recipe: Recipe,
    *,
    minutes: float,
    checkpoints: Path | None,
    tokenizer_dir: Path,
) -> dict[str, Any]:
    """Train for `minutes` of wall-clock time and return what happened."""
    model.train()
    optimizer = make_optimizer(model, recipe)
    batches = packer.batches(*recipe.short_rows)
    clock = Clock(minutes * 60)
    is_long = False
    while (share := clock.share()) < 1:
        if share >= recipe.long_from and not is_long:
            batches, is_long = packer.batches(*recipe.long_rows), True
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, share / recipe.warmup_share) * (1 - share)
        tokens = next(batches)
        loss = step(model, optimizer, tokens, recipe)
        clock.advance(tokens.numel(), loss)
        if checkpoints and clock.is_checkpoint_due():
            save_checkpoint(model, checkpoints, tokenizer_dir)
    return clock.describe()


def make_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW, with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )


def step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, tokens: Tensor, recipe: Recipe) -> float:
    """Do one step on int64 [n_row, seq_len] and return the cross-entropy in nats per token."""
    losses, router_logits = forward(model, tokens)
    loss = losses.mean()
    (loss + recipe.balance * balance_loss(router_logits)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def forward(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Run int64 [n_row, seq_len] through the model.

    Returns the cross-entropy in nats [n_row * (seq_len - 1)], and per layer the router's logits
    [n_row * seq_len, n_expert].
    """
    output = model.get_decoder()(tokens, use_cache=False, output_router_logits=True)
    logits = model.get_output_embeddings()(output.last_hidden_state[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses, list(output.router_logits)


def balance_loss(router_logits: list[Tensor]) -> Tensor:
    """The Switch Transformer's balance loss, averaged over layers: 1 when all experts are used equally.

    Source: Fedus et al., 2021, arXiv 2101.03961, equation 4, with top-k choices instead of one.
    """
    losses = []
    for logits in router_logits:
        share = logits.softmax(-1).mean(0)
        used = count_choices(logits) / (len(logits) * TOP_K)
        losses.append(N_EXPERT * (share * used).sum())
    return torch.stack(losses).mean()


def count_choices(router_logits: Tensor) -> Tensor:
    """Count the tokens that each expert gets: [n_token, n_expert] -> int64 [n_expert]."""
    return torch.bincount(router_logits.topk(TOP_K, dim=-1).indices.flatten(), minlength=N_EXPERT)


class Clock:
    """Counts tokens against wall-clock time and draws the one line of progress."""

    def __init__(self, seconds: float) -> None:
        """Start now, for a budget in seconds."""
        self._seconds = seconds
        self._start = time.monotonic()
        self._drawn = self._saved = 0.0
        self._n_step = self._n_token = 0
        self._loss = math.nan

    def share(self) -> float:
        """Return the share of the time that has passed."""
        return self._elapsed() / self._seconds

    def advance(self, n_token: int, loss: float) -> None:
        """Count one step, and redraw the line (on a terminal each second, in a log each half minute)."""
        self._n_step += 1
        self._n_token += n_token
        self._loss = loss if math.isnan(self._loss) else 0.98 * self._loss + 0.02 * loss
        is_terminal = sys.stdout.isatty()
        if self._elapsed() - self._drawn >= (1 if is_terminal else 30):
            self._drawn = self._elapsed()
            print(self._line(), end="\r" if is_terminal else "\n", flush=True)

    def is_checkpoint_due(self, every: float = 300) -> bool:
        """Return whether `every` seconds have passed since the last time the answer was yes."""
        if self._elapsed() - self._saved < every:
            return False
        self._saved = self._elapsed()
        return True

    def describe(self) -> dict[str, Any]:
        """Return the totals."""
        print(self._line())
        return {
            "steps": self._n_step,
            "tokens_seen": self._n_token,
            "seconds": round(self._elapsed()),
            "final_training_loss": round(self._loss, 4),
        }

    def _elapsed(self) -> float:
        return time.monotonic() - self._start

    def _line(self) -> str:
        speed = self._n_token / self._elapsed()
        left = max(0.0, self._seconds - self._elapsed()) / 60
        done = f"step {self._n_step}  {self._n_token / 1e6:.2f}M tokens"
        return f"{done}  {speed:.0f} tok/s  loss {self._loss:.3f}  {left:.1f} min left  "


def save_checkpoint(model: PreTrainedModel, out: Path, tokenizer_dir: Path) -> None:
    """Write the model as it is now, with its tokenizer, in the form of the finished folder."""
    out.mkdir(parents=True, exist_ok=True)
    for path in tokenizer_dir.iterdir():
        if path.name.startswith("tokenizer") or path.suffix == ".jinja":
            shutil.copy(path, out)
    save_model(model, out)


def save_model(model: PreTrainedModel, out: Path) -> None:
    """Write configuration and BF16 weights; the model itself stays F32."""
    rounded: PreTrainedModel = copy.deepcopy(model).bfloat16()
    rounded.save_pretrained(out)


# Measuring


def measure(folder: Path, *, seq_len: int = 512) -> dict[str, Any]:
    """Measure the written folder on the held-out text, by the rule of `calibration.corpus`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_experts_implementation("grouped_mm")
    perplexity, n_token, counts = {}, {}, {}
    for kind in ("python", "prose"):
        documents = select(builtin_documents("held-out"), kind)
        available = sum(len(tokenizer(document.text, verbose=False)["input_ids"]) for document in documents)
        tokens = make_corpus(
            documents, tokenizer, name=kind, n_row=available // seq_len, seq_len=seq_len
        ).tokens
        loss, counts[kind] = measure_rows(model, tokens)
        perplexity[kind], n_token[kind] = round(math.exp(loss), 3), tokens.numel()
    return {
        "row_length": seq_len,
        "tokens": n_token,
        "perplexity": perplexity,
        "experts": describe_experts(counts["python"], counts["prose"]),
    }


@torch.no_grad()
def measure_rows(model: PreTrainedModel, tokens: Tensor) -> tuple[float, Tensor]:
    """Return the mean cross-entropy in nats, and the tokens per expert: int64 [n_layer, n_expert]."""
    total, n_loss, counts = 0.0, 0, torch.tensor(0)
    for rows in tokens.split(8):
        losses, router_logits = forward(model, rows)
        total, n_loss = total + losses.double().sum().item(), n_loss + losses.numel()
        counts = counts + torch.stack([count_choices(logits) for logits in router_logits])
    return total / n_loss, counts


def describe_experts(python: Tensor, prose: Tensor) -> list[dict[str, Any]]:
    """Per layer: entropy of use in bits, smallest and largest share, and each expert's share of Python.

    Both kinds weigh the same, so `python_share` is 0.5 for an expert that does not care.
    """
    layers = []
    for python_count, prose_count in zip(python.double(), prose.double(), strict=True):
        on_python, on_prose = python_count / python_count.sum(), prose_count / prose_count.sum()
        use = (on_python + on_prose) / 2
        python_share = (on_python / (2 * use)).nan_to_num(0.5)
        layers.append(
            {
                "entropy_bits": round(float(torch.special.entr(use).sum() / math.log(2)), 3),
                "max_entropy_bits": math.log2(len(use)),
                "least_used": round(float(use.min()), 5),
                "most_used": round(float(use.max()), 5),
                "use": [round(value, 5) for value in use.tolist()],
                "python_share": [round(value, 3) for value in python_share.tolist()],
            }
        )
    return layers


def model_card(report: dict[str, Any]) -> str:
    """Write the model card from the report; no number in it is typed by hand."""
    held_out, training, recipe = report["held_out"], report["training"], report["recipe"]
    table = "\n".join(table_row(number, layer) for number, layer in enumerate(held_out["experts"]))
    perplexity = held_out["perplexity"]
    return f"""---
license: mit
language: en
tags: [mixture-of-experts, demo]
---
# A demo mixture of experts

A `{report["family"]}` model of {report["parameters"] / 1e6:.2f} million parameters:
{N_LAYER} layers, each with {N_EXPERT} experts, {TOP_K} of them for every token.
It exists so that pruning can be tried without a download, on experts that specialise. It continues Python and
English text badly; it knows nothing and follows no instructions.

- Text: the Python standard library, its documentation and that of the packages installed beside it
  ({training["documents"]["python"]} sources, {training["documents"]["prose"]} texts of prose), nothing else.
  A tenth was held out.
- Training: {training["tokens_seen"] / 1e6:.1f} million tokens in {training["seconds"] / 60:.0f} minutes on \
{report["threads"]} CPU threads,
  AdamW with a peak of {recipe["learning_rate"]:g}, balance loss weighed {recipe["balance"]:g},
  seed {report["seed"]}.
- Held-out perplexity per token, in rows of {held_out["row_length"]}:
  **{perplexity["python"]:.2f}** on Python, **{perplexity["prose"]:.2f}** on prose.

| layer | entropy of use, bits | least used | most used | lowest Python share | highest Python share |
|---|---|---|---|---|---|
{table}

Use is measured on the held-out text, both kinds weighing the same: {1 / N_EXPERT:.2%} would be equal use, and
an expert with a Python share of 50% does not care (experts with less than a tenth of equal use are left out
there). `training.json` has every expert.

Written by `tools/models/train_demo.py`; do not edit.
"""


def table_row(number: int, layer: dict[str, Any]) -> str:
    """Write one layer's row of the model card's table; experts hardly used say nothing about Python."""
    pairs = zip(layer["use"], layer["python_share"], strict=True)
    shares = [share for use, share in pairs if use > 0.1 / N_EXPERT]
    cells = [
        str(number),
        f"{layer['entropy_bits']:.2f} of {layer['max_entropy_bits']:.0f}",
        *(f"{layer[name]:.2%}" for name in ("least_used", "most_used")),
        *(f"{pick(shares):.0%}" for pick in (min, max)),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
