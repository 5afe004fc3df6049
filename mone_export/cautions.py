"""What can make a pruned model worse than it looks: one line each, for the report and a dry run.

Each caution is a pure function of what it looks at, and yields nothing where it sees no reason or cannot
know. None of them changes what is done.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil

from mone_export.artifacts import Plan, TextSample
from mone_export.calibration.corpus import BUILT_IN
from mone_export.request import Job
from mone_export.terminal import as_size

SHORT_ROW = 512  # tokens, below which little of a document is in a row
_ALIKE, _LEAST_SAMPLE = 0.95, 4000  # share of one kind, characters of a text that tell
_CODE_SIGNS = frozenset("{}[]()<>=;_+*/\\|&#$@^~\"'`:%")
_CODE_SHARE = 0.09
_NON_LATIN = 0.5  # share of letters
_SENSES = ("vision_config", "audio_config", "vision_model", "audio_model")
_STOP_WORDS = {
    "English": "the of and to in is that for it was with as on are be this by",
    "German": "der die und das nicht ist den von zu mit sich auf ein eine dem auch",
    "French": "le la les des et est une dans que qui du pas pour sur au ne",
    "Spanish": "el los las y que en una por con del no se para es como su",
    "Italian": "il di che la e non per un una sono del della con gli anche le",
    "Portuguese": "o os que e do da em um uma para com não por as no dos",
    "Dutch": "de het een van en dat niet is op te zijn voor met die aan er",
}
_LANGUAGE_OF = [(name, frozenset(words.split())) for name, words in _STOP_WORDS.items()]


def cautions(job: Job, plan: Plan) -> tuple[str, ...]:
    """Return what a user should know of a job's text and choices; no model has to run for it."""
    source, corpus, found = job.source, job.corpus, list[str]()
    if job.limit is not None:
        whole = max((item.size_unpruned for item in job.candidates), default=job.size_unpruned)
        found += main_memory(job.limit, whole, int(psutil.virtual_memory().total))
    if not (plan.share_pruned or plan.mixes_types):
        return tuple(found)
    found += senses(source.computing_config)
    if corpus is not None:
        if corpus.sample:
            given = corpus.name != BUILT_IN  # of which another line says what it is
            found += one_kind(corpus.sample.pieces) if given else ()
            found += without_template(corpus.sample)
        found += short_rows(corpus.ids.shape[1], source.limits[1], sliding_window(source.computing_config))
    return tuple(found)


def senses(config: Mapping[str, Any]) -> Iterator[str]:
    """Say so where a model sees or hears: no image or sound is ever calibrated on.

    Told by a part of config.json, or in a GGUF by positions of several dimensions, which only pictures need.
    """
    if any(config.get(key) for key in _SENSES) or any(
        key.endswith(".rope.dimension_sections") for key in config
    ):
        yield (
            "the model sees or hears, the calibration is text alone: experts for images or sounds look idle "
            "and may be pruned; try some before you rely on it"
        )


def one_kind(pieces: Sequence[str]) -> Iterator[str]:
    """Say so where a text is all code or all in one language or script.

    Rule: each piece is of the kind `kind_of` tells, and 95% of the characters, at least 4000 in all, are of
    pieces of one kind. Pieces whose kind is not clear count against it.
    """
    sizes: Counter[str] = Counter()
    for piece in pieces:
        sizes[kind_of(piece)] += len(piece)
    if (total := sizes.total()) < _LEAST_SAMPLE:
        return
    kind, size = sizes.most_common(1)[0]
    if kind and size >= _ALIKE * total:
        other = "prose and other languages" if kind == "code" else "code and other languages"
        yield (
            f"the calibration text is all {kind}, as far as can be told: experts that {other} need look "
            "idle; add such text with -f, or hold some of theirs with --protect"
        )


def kind_of(piece: str) -> str:
    """Return what a piece of text is: `code`, a language, a script (`Cyrillic`); empty: not clear.

    Code has `{}[]()<>=;_` and the like in at least 9% of what is no white space; prose in about 3%. Where
    half of the letters are not Latin, the commonest script of theirs is the kind. Else the language is the
    one whose commonest words are found most often, three times at least and twice as often as the next one's.
    """
    visible = [sign for sign in piece if not sign.isspace()]
    if not visible:
        return ""
    if sum(sign in _CODE_SIGNS for sign in visible) >= _CODE_SHARE * len(visible):
        return "code"
    scripts = Counter(unicodedata.name(sign, "unknown").split()[0] for sign in visible if sign.isalpha())
    script, n_letter = max(scripts.items(), key=lambda item: (item[0] != "LATIN", item[1]), default=("", 0))
    if script != "LATIN" and n_letter >= _NON_LATIN * scripts.total():
        return script.capitalize()
    words = Counter(re.findall(r"\w+", piece.lower()))
    hits = sorted(((sum(words[word] for word in own), name) for name, own in _LANGUAGE_OF), reverse=True)
    (most, name), (next_most, _) = hits[:2]
    return name if most >= 3 and most >= 2 * next_most else ""


def without_template(sample: TextSample) -> Iterator[str]:
    """Say so where the tokenizer has a chat template, and no document went through it."""
    if sample.n_chat == 0:
        yield (
            "the model has a chat template, the calibration text holds no chat: if it is used for chat, "
            "calibrate on chats with -f, which go through the template"
        )


def short_rows(n_token: int, window: int | None, sliding: int | None) -> Iterator[str]:
    """Say so where rows of text show little of what the model's attention reaches.

    That is, rows shorter than `SHORT_ROW` tokens or than the sliding window, and than the whole window.
    """
    if window is None or n_token >= window:
        return
    if sliding is not None and sliding < window and n_token < sliding:
        yield (
            f"rows of {n_token} tokens are shorter than the model's sliding window of {sliding}: what "
            f"experts do far into a text is not seen; pass -c {min(2 * sliding, window)} or so"
        )
    elif n_token < SHORT_ROW:
        yield (
            f"rows of {n_token} tokens are short against the model's window of {window}: what experts do far "
            "into a text is not seen; pass a larger -c"
        )


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """Return the sliding window that a config states, None where it has or uses none."""
    text = config.get("text_config")
    part = text if isinstance(text, Mapping) else config
    stated = next((value for key, value in part.items() if key.endswith("sliding_window")), None)
    if part.get("use_sliding_window") is False or not isinstance(stated, int) or isinstance(stated, bool):
        return None
    return stated or None


def main_memory(fit: int, whole: int, memory: int) -> Iterator[str]:
    """Say so where a size is asked for that is smaller than the whole file, which main memory would hold.

    A tenth of the memory is left for the rest.
    """
    if fit < whole <= 0.9 * memory:
        yield (
            f"the file with all experts would have {as_size(whole)}, this machine has "
            f"{as_size(memory)} of memory: if the size is a GPU's, llama.cpp's --n-cpu-moe keeps experts "
            "in main memory, and nothing is lost but speed"
        )


def prediction(*, kept: bool) -> str:
    """Return what became of a model's blocks that predict further tokens (MTP)."""
    if kept:
        return (
            "the block for multi-token prediction stays, with all its experts, which no calibration saw: "
            "--mtp drop leaves it out"
        )
    return "the model's block for multi-token prediction is not in the file, which can not draft with it"
