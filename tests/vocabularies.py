"""Small tokenizers of every kind, and the GGUFs that hold the same."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from fixed_text import fixed_text
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mone_export.source.tokenizing import control_tokens

CONTROL = ["<s>", "</s>", "<unk>", "<|im_end|>"]
SOURCES = fixed_text()
MIXED = (
    "  two leading spaces, 東京タワーは高い。\n\n\n\tTabs\t\tand  runs     of spaces;   \n   \n"
    "Ünïcode \U0001f600 e\u0301 don't 12345 x=f(y);\r\n" + " " * 999 + "\n" * 99 + "end "
)
for name in CONTROL:  # so that they are no pieces of a vocabulary, and no token that is not special
    SOURCES = SOURCES.replace(name, "")


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_level(regex: str | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    own = [] if regex is None else [pre_tokenizers.Split(Regex(regex), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*own, split])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=CONTROL[:3],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SOURCES.splitlines(keepends=True), trainer)
    # as in several published models: a control token that is not marked as special
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=False, normalized=False)])
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=CONTROL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator((SOURCES + MIXED).splitlines(), trainer)
    return tokenizer


def prefixed(folder: Path) -> Tokenizer:
    """SentencePiece BPE as older files write it: a normaliser puts a space in front of all."""
    tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    rules = json.loads(tokenizer.to_str())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    rules |= {"normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}, "pre_tokenizer": None}
    return Tokenizer.from_str(json.dumps(rules))


# the pre-tokenizer of Qwen2 and, except for the digits, of Llama 3
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS: dict[str, Callable[[Path], PreTrainedTokenizerBase]] = {
    "sentencepiece": lambda folder: AutoTokenizer.from_pretrained(folder),
    "sentencepiece-prefixed": lambda folder: fast(prefixed(folder)),
    "unigram": lambda folder: fast(unigram()),
    "byte-level": lambda folder: fast(byte_level()),
    "byte-level-nfc": lambda folder: fast(with_nfc(byte_level(QWEN))),
}


def with_nfc(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def write_gguf(tokenizer: PreTrainedTokenizerBase, path: Path, *, pre: str, arch: str = "llama") -> Path:
    """Write a GGUF with nothing but a tokenizer: `pre` is llama.cpp's name of its pre-tokenizer."""
    import gguf

    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    writer = gguf.GGUFWriter(path, arch)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_token_list(pieces)
    control = set(control_tokens(tokenizer))
    kinds = [gguf.TokenType.CONTROL if piece in control else gguf.TokenType.NORMAL for piece in pieces]
    if rules["model"]["type"] == "Unigram":
        kinds[tokenizer.unk_token_id] = gguf.TokenType.UNKNOWN
        writer.add_tokenizer_model("t5")
        writer.add_token_scores([score for _, score in rules["model"]["vocab"]])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_merges([" ".join(merge) for merge in rules["model"]["merges"]])
    writer.add_tokenizer_pre(pre)
    writer.add_token_types(kinds)
    for name in ("bos", "eos", "unk"):
        getattr(writer, f"add_{name}_token_id")(getattr(tokenizer, f"{name}_token_id"))
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.add_chat_template(_template_list(tokenizer.chat_template))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def _template_list(template: str | dict[str, str] | None) -> str | Sequence[dict[str, str]] | None:
    if not isinstance(template, dict):
        return template
    return [{"name": name, "template": text} for name, text in template.items()]
