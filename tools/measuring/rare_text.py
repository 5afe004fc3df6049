"""Text of a third kind, unlike code and unlike prose: markup, rare spellings, other scripts, names of tokens.

What pruning costs on text that hardly any calibration holds is measured on it. It is made, not collected: a
seed and what every installation of Python has give the same documents (`xml`, `html.entities`, `unicodedata`,
and the words of the built-in held-out prose).
"""

import random
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from html.entities import html5
from xml.etree import ElementTree

from mone_export.calibration.documents import Document, builtin_documents

# first letters of alphabets: Greek, Cyrillic, Armenian, Hebrew, Arabic, Devanagari, Thai, Georgian, Hangul,
# Hiragana, Chinese
ALPHABETS = (0x3B1, 0x430, 0x561, 0x5D0, 0x627, 0x905, 0xE01, 0x10D0, 0xAC00, 0x3042, 0x4E00)
TAGS = ("svg", "path", "tr", "td", "math", "mfrac", "msup", "xsl:template", "w:pPr", "dc:title", "ruby", "rt")
TOKEN_NAMES = ("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|endoftext|>", "[INST]", "<<SYS>>")
LOOKALIKES = str.maketrans("aeiostbg", "43105789")


def rare_documents(seed: int) -> Iterator[Document]:
    """Yield documents without end, of the kinds in turn and of about the same number of tokens each."""
    chance = random.Random(seed)
    words = _words()
    while True:
        for name, make in (("markup", _markup), ("spelling", _spelling), ("script", _script)):
            yield Document(name, "file", make(words, chance))


def _words() -> list[str]:
    prose = (document.text for document in builtin_documents("held-out") if document.kind == "prose")
    return re.findall(r"[A-Za-z]{2,12}", " ".join(prose))


def _markup(words: Sequence[str], chance: random.Random) -> str:
    """Nested elements with attributes, entities by name, and names of control tokens as text."""
    root = ElementTree.Element(chance.choice(TAGS))
    for _ in range(8):
        parent = chance.choice(list(root.iter()))
        element = ElementTree.SubElement(
            parent, chance.choice(TAGS), {chance.choice(words): f"#{chance.getrandbits(24):06x}"}
        )
        element.text = f"&{chance.choice(list(html5))} {chance.choice(words)}"
        element.tail = chance.choice(TOKEN_NAMES)
    text = ElementTree.tostring(root, encoding="unicode")
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") + "\n"


def _spelling(words: Sequence[str], chance: random.Random) -> str:
    """A run of words, each spelt in one of the ways that people play with."""
    ways: tuple[Callable[[str], str], ...] = (
        str.upper,
        lambda word: word.translate(LOOKALIKES),
        lambda word: re.sub("[aeiou]", "", word),
        lambda word: re.sub("([aeiou])", r"\1\1\1", word),
        lambda word: "".join(letter.upper() if i % 2 else letter for i, letter in enumerate(word)),
        lambda word: "-".join(word),
        lambda word: word[::-1],
    )
    start = chance.randrange(len(words) - 60)
    return " ".join(chance.choice(ways)(word) for word in words[start : start + 60]) + "\n"


def _script(words: Sequence[str], chance: random.Random) -> str:
    """Words letter by letter in another alphabet, then some of its letters with their names."""
    first = chance.choice(ALPHABETS)
    start = chance.randrange(len(words) - 12)
    lines = [" ".join(_transcribed(word, first) for word in words[start : start + 12])]
    for letter in chance.sample(range(first, first + 20), 3):
        lines.append(f"U+{letter:04X} {chr(letter)} {unicodedata.name(chr(letter), 'unassigned')}")
    return "\n".join(lines) + "\n"


def _transcribed(word: str, first: int) -> str:
    return "".join(chr(first + (ord(letter) - ord("a")) % 20) for letter in word.lower())
