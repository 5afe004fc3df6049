"""GGUFs with something wrong in them, aimed at what a pruned file has and an ordinary one has not.

Each is made from its number alone: the same number and the same sound file give the same bytes.
"""

import random
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from fuzz import mutated
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf_parts import Parts, Stored, key, put_together

LARGEST = 2**24  # bytes of a tensor that is made to fit its shape
OURS = re.compile(r"(mone\.format_version|.*\.expert_(kept_count|tier_count|tier_sizes))$")
NEAR = re.compile(r".*\.(expert_\w+|block_count|feed_forward_length|leading_dense_block_count)$")
TENSORS = re.compile(r"blk\.\d+\.(ffn_\w*exps|ffn_exps_slot|ffn_gate_tid2eid|ffn_gate_inp|exp_probs_b)\b.*")
OUR_TENSORS = re.compile(r"blk\.\d+\.(ffn_\w+_exps\.t\d+\..*|ffn_exps_slot)")
EXPERTS = re.compile(r"blk\.\d+\.ffn_\w*exps.*\.weight")
NUMBERS = (0, 1, 2, 3, 5, 7, 8, 9, 64, 255, 1024, 1025, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
PLAIN = {0: "b", 1: "b", 2: "H", 3: "H", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
ARRAY, U32 = 9, 4

Change = Callable[[Parts, random.Random], Parts]


@dataclass(frozen=True)
class Broken:
    """A broken file: what it was, what is wrong with it, its bytes.

    `only_ours`: all that is wrong is in what ordinary files do not have, so that no other check can find it.
    """

    number: int
    of: str
    wrong: str
    content: bytes
    only_ours: bool = False


def broken(number: int, sound: Mapping[str, Parts], seed: int = 0, only: str | None = None) -> Broken:
    """Return a broken file: those of even numbers are aimed, of the others any byte of the head is.

    With `only`, a name of `CHANGES`, every file is aimed, and that is what is changed.
    """
    dice = random.Random(f"{seed} {number}")
    name = [*sound][number // 2 % len(sound)]
    if number % 2 and not only:
        return Broken(number, name, "bytes", mutated(put_together(sound[name]), dice))
    parts, wrong = sound[name], []
    for _ in range(1 if only else dice.choice((1, 1, 1, 2, 3))):
        what = only or dice.choice([*CHANGES])
        parts = CHANGES[what](parts, dice)
        wrong.append(what)
    ours = _only_ours(sound[name], parts)
    return Broken(number, name, ", ".join(wrong), put_together(parts), ours)


def _only_ours(before: Parts, after: Parts) -> bool:
    keys = {*before.keys.items()} ^ {*after.keys.items()}
    names = {*before.tensors, *after.tensors}
    changed = [name for name in names if before.tensors.get(name) != after.tensors.get(name)]
    return all(OURS.fullmatch(name) for name, _ in keys) and all(
        OUR_TENSORS.fullmatch(name) and not _as_in_any_file(before, after, name) for name in changed
    )


def _as_in_any_file(before: Parts, after: Parts, name: str) -> bool:
    """Whether only the numbers or the type of weights differ, which can be as odd in any file."""
    one, other = before.tensors.get(name), after.tensors.get(name)
    if one is None or other is None or one.kind == GGMLQuantizationType.I32:
        return False
    return one.shape == other.shape


def numbers_of(stored: bytes) -> list[Any]:
    """Return the numbers that a key holds, one or an array of them; none of a text's."""
    start = 8 + struct.unpack_from("<Q", stored)[0]
    kind = struct.unpack_from("<I", stored, start)[0]
    at, n = start + 4, 1
    if kind == ARRAY:
        kind, n = struct.unpack_from("<IQ", stored, at)
        at += 12
    return list(struct.unpack_from(f"<{n}{PLAIN[kind]}", stored, at)) if kind in PLAIN else []


def _chosen(names: Mapping[str, object], pattern: re.Pattern[str], dice: random.Random) -> str | None:
    found = [name for name in names if pattern.fullmatch(name)]
    return dice.choice(found) if found else None


def _with_key(parts: Parts, name: str, stored: bytes | None) -> Parts:
    keys = {each: value for each, value in parts.keys.items() if each != name}
    return replace(parts, keys=keys if stored is None else parts.keys | {name: stored})


def _with_tensor(parts: Parts, name: str, tensor: Stored | None) -> Parts:
    if tensor is None:
        return replace(parts, tensors={each: value for each, value in parts.tensors.items() if each != name})
    return replace(parts, tensors=parts.tensors | {name: tensor})


def _stated(name: str, numbers: list[int], *, single: bool) -> bytes:
    numbers = [int(number) % 2**32 for number in numbers]
    return key(name, numbers[0] if single and numbers else numbers)


def _other_number(pattern: re.Pattern[str]) -> Change:
    def change(parts: Parts, dice: random.Random) -> Parts:
        name = _chosen(parts.keys, pattern, dice)
        numbers = numbers_of(parts.keys[name]) if name else []
        if not name or not numbers:
            return parts
        at = dice.randrange(len(numbers))
        near = (int(numbers[at]) + dice.choice((-2, -1, 1, 2)),)
        numbers[at] = dice.choice((*near * 6, *NUMBERS))
        return _with_key(parts, name, _stated(name, numbers, single=len(numbers) == 1))

    return change


def _other_length(parts: Parts, dice: random.Random) -> Parts:
    name = _chosen(parts.keys, OURS, dice)
    if not name:
        return parts
    numbers = numbers_of(parts.keys[name])
    longer = [numbers[:-1], numbers * 2, numbers + [1], [], numbers * 1000]
    return _with_key(parts, name, _stated(name, dice.choice(longer), single=False))


def _other_kind(parts: Parts, dice: random.Random) -> Parts:
    name = _chosen(parts.keys, OURS, dice)
    if not name:
        return parts
    numbers = [int(number) for number in numbers_of(parts.keys[name])] or [0]
    kinds = ("text", True, 1.5, ["a", "b"], numbers[0], [numbers[0]])
    stored = [key(name, each) for each in kinds]
    stored += [key(name, numbers, integer=integer) for integer in (5, 6, 7, 10)]
    return _with_key(parts, name, dice.choice(stored))


def _key_gone(parts: Parts, dice: random.Random) -> Parts:
    name = _chosen(parts.keys, dice.choice((OURS, OURS, NEAR)), dice)
    return _with_key(parts, name, None) if name else parts


def _counts_added(parts: Parts, dice: random.Random) -> Parts:
    """State counts where the file has none, or other ones throughout."""
    arch = next(iter(name.split(".")[0] for name in parts.keys if name.endswith(".block_count")), "x")
    n = dice.choice((1, 2, 4, 8, 12, 14))
    name = f"{arch}.{dice.choice(('expert_kept_count', 'expert_tier_sizes', 'expert_tier_count'))}"
    return _with_key(parts, name, key(name, [dice.choice((0, 1, 2, 3, 4, 8)) for _ in range(n)]))


def _ids(parts: Parts, dice: random.Random) -> Parts:
    """Change the entries of a table of slots, or of experts by token."""
    tables = {name: each for name, each in parts.tensors.items() if each.kind == GGMLQuantizationType.I32}
    if not tables:
        return parts
    name = dice.choice([*tables])
    ids = np.frombuffer(tables[name].data, np.int32).copy()
    for _ in range(dice.choice((1, 2, ids.size))):
        ids[dice.randrange(ids.size)] = dice.choice((-1, 0, 1, 7, 8, 9, 1000, 2**31 - 1, -(2**31)))
    return _with_tensor(parts, name, tables[name]._replace(data=ids.tobytes()))


def _fitted(tensor: Stored) -> Stored:
    """Return a tensor with as many bytes as its type and its shape say, where they are not too many."""
    block, size = GGML_QUANT_SIZES[tensor.kind]
    n = int(np.prod([float(each) for each in tensor.shape])) // block * size
    return tensor._replace(data=tensor.data[:n] + bytes(max(0, min(n, LARGEST) - len(tensor.data))))


def _other_shape(parts: Parts, dice: random.Random, *, fits: bool = True) -> Parts:
    name = _chosen(parts.tensors, TENSORS, dice)
    if not name:
        return parts
    shape = list(parts.tensors[name].shape)
    at, kind = dice.randrange(len(shape)), dice.randrange(5)
    if kind == 0:
        shape[at] = dice.choice((0, 1, shape[at] // 2, shape[at] * 2, shape[at] + 32, 2**31, 2**40, 2**62))
    elif kind == 1:
        shape[at] = max(0, shape[at] + dice.choice((-32, -1, 1, 32)))
    elif kind == 2:
        dice.shuffle(shape)
    elif kind == 3:
        shape = shape[:-1] or [1]
    else:
        shape = [*shape, dice.choice((1, 2))][:4]
    changed = parts.tensors[name]._replace(shape=tuple(shape))
    return _with_tensor(parts, name, _fitted(changed) if fits else changed)


def _claimed_shape(parts: Parts, dice: random.Random) -> Parts:
    return _other_shape(parts, dice, fits=False)


def _other_type(parts: Parts, dice: random.Random) -> Parts:
    name = _chosen(parts.tensors, TENSORS, dice)
    if not name:
        return parts
    kind = dice.choice([*GGML_QUANT_SIZES])
    return _with_tensor(parts, name, _fitted(parts.tensors[name]._replace(kind=kind)))


def _other_name(parts: Parts, dice: random.Random) -> Parts:
    name = _chosen(parts.tensors, TENSORS, dice)
    if not name:
        return parts
    new = _renamed(name, dice)
    if new in parts.tensors and dice.random() < 0.7:  # the two change places
        one, other = parts.tensors[name], parts.tensors[new]
        return replace(parts, tensors=parts.tensors | {name: other, new: one})
    tensors = {new if each == name else each: value for each, value in parts.tensors.items()}
    return replace(parts, tensors=tensors)


def _renamed(name: str, dice: random.Random) -> str:
    parts = ("gate", "up", "down", "gate_up", "tilt_in", "tilt_out")
    ways = (
        lambda: re.sub(r"\.t(\d+)\.", lambda _: f".t{dice.choice((0, 1, 2, 3, 4, 5, 8, 99))}.", name),
        lambda: re.sub(r"blk\.\d+", f"blk.{dice.choice((0, 1, 2, 99))}", name),
        lambda: re.sub(r"ffn_[a-z_]+_exps", f"ffn_{dice.choice(parts)}_exps", name),
        lambda: name.replace("_exps.", f"_exps.t{dice.choice((1, 2, 3))}."),
        lambda: name.replace(".weight", ".bias") if ".weight" in name else name.replace(".bias", ".weight"),
        lambda: re.sub(r"\.t\d+", "", name),
    )
    return dice.choice(ways)()[:63]


def _tensor_gone(parts: Parts, dice: random.Random) -> Parts:
    """Leave out a tensor, or all of its kind."""
    name = _chosen(parts.tensors, TENSORS, dice)
    if not name:
        return parts
    like = re.compile(re.sub(r"blk\\\.\d+", r"blk\\.\\d+", re.escape(name)))
    gone = [each for each in parts.tensors if each == name or (dice.random() < 0.5 and like.fullmatch(each))]
    return replace(parts, tensors={each: value for each, value in parts.tensors.items() if each not in gone})


def _tensor_added(parts: Parts, dice: random.Random) -> Parts:
    name = _chosen(parts.tensors, TENSORS, dice)
    if not name:
        return parts
    slot = re.sub(r"(blk\.\d+)\..*", r"\1.ffn_exps_slot", name)
    new = dice.choice((_renamed(name, dice), slot))
    return _with_tensor(parts, new, parts.tensors[name]) if new not in parts.tensors else parts


def _odd_values(parts: Parts, dice: random.Random) -> Parts:
    """Fill a tensor with numbers that are none, or too large."""
    name = _chosen(parts.tensors, dice.choice((TENSORS, EXPERTS)), dice)
    if not name:
        return parts
    tensor = parts.tensors[name]
    piece = dice.choice((b"\xff" * 4, b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\0" * 4, b"\x99\x76\x96\x7e"))
    return _with_tensor(
        parts, name, tensor._replace(data=(piece * (len(tensor.data) // 4 + 1))[: len(tensor.data)])
    )


CHANGES: Mapping[str, Change] = {
    "a number": _other_number(OURS),
    "a number near ours": _other_number(NEAR),
    "a length": _other_length,
    "a type of a key": _other_kind,
    "a key gone": _key_gone,
    "counts added": _counts_added,
    "ids": _ids,
    "a shape": _other_shape,
    "a shape without its bytes": _claimed_shape,
    "a type of a tensor": _other_type,
    "a name": _other_name,
    "a tensor gone": _tensor_gone,
    "a tensor added": _tensor_added,
    "values": _odd_values,
}
