"""Redoing a file: the command that made it, stated in the file and read back without trust.

A file states the arguments that its bytes depend on, as far as they differ from their defaults, and the
SHA-256 of the files that were given. It names no folder: the same command gives the same bytes everywhere.
What is read back is shown to a user, who may run it: only options of ours pass, files are bare names, and
nothing lets code of others run.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mone_export.errors import MoneError
from mone_export.llama_options import LlamaOptions
from mone_export.output.provenance import Keys
from mone_export.recipe import Recipe
from mone_export.source import GgufFile, Source
from mone_export.source.fingerprints import remembered
from mone_export.source.gguf_file import hash_of
from mone_export.source.gguf_format import INPUTS_KEY, MEASURED_KEY, OPTIONS_KEY
from mone_export.source.gguf_header import Header, read_header

_CODE = "--trust-remote-code"
_FLAGS = {"guarded": "--no-guard", "with_imatrix": "--no-imatrix"}
_FLAGS |= {"sequential": "--sequential", "trust_remote_code": _CODE}
_VALUES = {  # of a `Request`
    "n_row": "--chunks",
    "seq_len": "-c",
    "field": "--field",
    "seed": "--seed",
    "until_stable": "--until-stable",
    "outtype": "--outtype",
    "split_max_size": "--split-max-size",
    "device": "--device",
    "dtype": "--dtype",
    "stream": "--stream",
}
_RECIPE = {
    "ratio": "--ratio",
    "fit": "--fit",
    "method": "--method",
    "score": "--score",
    "novice": "--novice",
    "allocation": "--allocate",
    "min_kept": "--min-kept",
    "mtp": "--mtp",
}
# llama.cpp's products do not depend on the number of threads
_LLAMA = {"n_gpu_layers": "-ngl", "n_cpu_moe": "--n-cpu-moe", "n_batch": "-b", "n_ubatch": "-ub"}
_FILES = ("-f", "--protect", "--plan", "--stats", "--imatrix")
_TAKE_ONE = {*_VALUES.values(), *_RECIPE.values(), *_LLAMA.values(), *_FILES, "--dataset"}
_GGUF = re.compile(r"[^-/\\][^/\\]*\.gguf")
_MODEL = re.compile(rf"demo|\./[^/\\]+|{_GGUF.pattern}|\w[\w.-]*/[\w.-]+(@[\w./-]+)?")
_FILE = re.compile(r"(\./)?[^/\\]+")
_DATASET = re.compile(r"(\./[^/\\]+|\w[\w.-]*(/[\w.-]+)?)([:=][^/\\]*)?")
_MOST, _LONGEST = 500, 500  # arguments, characters of one


@dataclass(frozen=True, slots=True)
class Redo:
    """How a file is made again: the arguments of `mone-export`, and what is to be known beside them."""

    arguments: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command, for a shell."""
        return shlex.join(("mone-export", *self.arguments))


def stated(
    values: Mapping[str, Any], defaults: Mapping[str, Any], source: Source, recipe: Recipe, stats: Path | None
) -> Keys:
    """Return the keys that state a request's command.

    `values` and `defaults` are the request's fields, `recipe` what became of them, `stats` the statistics
    that it takes in place of a text.
    """
    arguments = [_model(values["model"], source), *_of_recipe(values, recipe)]
    for name, option in _VALUES.items():
        if values[name] != defaults[name]:
            arguments += [option, _written(values[name])]
    arguments += [option for name, option in _FLAGS.items() if values[name] != defaults[name]]
    usual = LlamaOptions()
    for name, option in _LLAMA.items():
        if (value := getattr(values["llama"], name)) != getattr(usual, name):
            arguments += [option, str(value)]
    given = list(_files(values, stats))
    arguments += [part for option, name, _ in given for part in (option, name)]
    for name in values["datasets"]:
        arguments += ["--dataset", _dataset(name)]
    if values["imatrix"] is not None:
        arguments += ["--imatrix", _bare(values["imatrix"])]
    hashed = [[path.name, _sha256(path)] for _, _, path in given if path.is_file()]
    return {
        OPTIONS_KEY: ("STRING", json.dumps(arguments)),
        INPUTS_KEY: ("STRING", json.dumps(hashed)),
    }


def redo(path: Path) -> Redo:
    """Return how a GGUF is made again; raises `MoneError` for one that does not say, or says nonsense."""
    return redo_of(read_header(path))


def redo_of(header: Header) -> Redo:
    """Return how the file with a head is made again, as `redo` does."""
    path = header.files[0]
    told = header.value(OPTIONS_KEY)
    if told is None:
        raise MoneError(
            f"{path} does not say which command made it: files of mone-export from this version on do"
        )
    arguments, hashed = _list(told), _list(header.value(INPUTS_KEY, "[]"))
    if arguments is None or hashed is None or not (passed := _passed(arguments)):
        raise MoneError(f"{path} states a command that mone-export has not written: do not run it")
    name = _bare("".join(each if each.isprintable() else "_" for each in GgufFile(path).name))
    notes = list(_notes(header, hashed))
    if _CODE in arguments:
        notes.append(f"it was made with {_CODE}: add that only if you trust the code in the model's folder")
    if "--fit" in passed and "--novice" not in passed:
        stand_in = header.value("mone.novice", "none")
        notes.append(
            "--fit makes thin experts where type and room for temporary files allow them: its novices are "
            f"{stand_in}"
        )
    return Redo((*passed, "-o", f"{name}-again.gguf"), tuple(notes))


def _of_recipe(values: Mapping[str, Any], recipe: Recipe) -> Iterator[str]:
    """Yield the options of a recipe: with a ratio what became of them, else what was said."""
    said = {name: values[name] for name in _RECIPE}
    said["novice"] = None if said["novice"] == "auto" else said["novice"]
    if values["stock"]:  # what that means depends on more than the options
        said["method"] = recipe.method
    if said["ratio"] is not None and said["fit"] is None and recipe.ratio:
        novice = recipe.novice if recipe.method == "mone" else None
        usual = Recipe.of(recipe.ratio, method=recipe.method, novice=novice)
        for name in ("method", "score", "allocation", "min_kept", "mtp"):
            value = getattr(recipe, name)
            said[name] = (
                None if value in ("mone" if name == "method" else getattr(usual, name), "budget") else value
            )
        said["novice"] = novice  # whether any can be thin depends on more than the options
    for name, option in _RECIPE.items():
        if said[name] is not None:
            yield from (option, _written(said[name]))


def _files(values: Mapping[str, Any], stats: Path | None) -> Iterator[tuple[str, str, Path]]:
    """Yield each file that is given: its option, what is stated of it, its path."""
    for given in values["files"]:
        raw = _path_of(given)
        yield "-f", _bare(raw) + str(given)[len(raw) :], Path(raw)
    for given in values["protect"]:
        name, n = given.rpartition("=")[::2] if isinstance(given, str) else given
        yield "--protect", f"{_bare(name)}={n}", Path(name)
    for option, value in (("--plan", values["plan"]), ("--stats", stats)):
        if value is not None:
            yield option, _bare(value), Path(value)


def _bare(path: str | Path) -> str:
    """Return a file's name without its folder, never one that looks like an option."""
    name = Path(path).name
    return f"./{name}" if name.startswith("-") else name


def _dataset(given: str) -> str:
    """Return what names a dataset: its id, or a folder without those it lies in, and what follows them."""
    for raw in (_path_of(given), given.partition(":")[0]):
        if Path(raw).exists():
            return f"./{Path(raw).absolute().name}{given[len(raw) :]}"
    return given


def _path_of(given: object) -> str:
    """Return the path in `PATH=WEIGHT`, or all of it."""
    text = str(given)
    head, equals, _ = text.rpartition("=")
    return head if equals and not Path(text).exists() else text


def _sha256(path: Path) -> str:
    return remembered([path], lambda: hash_of([path]))


def _model(given: object, source: Source) -> str:
    """Return what names the model, without its folder."""
    if source.id:
        return f"{source.id}@{source.revision}" if source.revision else source.id
    if isinstance(source, GgufFile):
        name = source.files[0].name
        return name if _GGUF.fullmatch(name) else f"./{name}"
    return str(given) if given == "demo" else f"./{source.name}"


def _written(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _list(text: object) -> list[Any] | None:
    """Return the list that a text of JSON holds, None for anything else."""
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and len(found) <= _MOST else None


def _passed(arguments: list[Any]) -> list[str]:
    """Return the arguments, the model first, without what lets code run; none where one is not ours."""
    if not all(isinstance(each, str) and each.isprintable() and len(each) <= _LONGEST for each in arguments):
        return []
    model, *rest = arguments or [""]
    if not _MODEL.fullmatch(model) or _leaves(model):
        return []
    found, left = [model], iter(rest)
    for option in left:
        if option in _FLAGS.values():
            found += [option] if option != _CODE else []
            continue
        value = next(left, "")
        if option not in _TAKE_ONE or not re.fullmatch(r"-\d+|[^-].*", value):
            return []
        pattern = _FILE if option in _FILES else _DATASET if option == "--dataset" else None
        if pattern and (not pattern.fullmatch(value) or _leaves(value)):
            return []
        found += [option, value]
    return found


def _leaves(name: str) -> bool:
    """Return whether a part of a name leads out of its folder."""
    return ".." in re.split("[/@=:]", name)


def _notes(header: Header, hashed: list[Any]) -> Iterator[str]:
    """Yield what has to be the same beside the command."""
    for each in hashed:
        if isinstance(each, list) and len(each) == 2:
            name, sha256 = map(str, each)
            yield f"{name} has the SHA-256 {sha256}"
    made = {
        "the model's fingerprint": "mone.source.sha256",
        "the text's": "mone.calibration.sha256",
        "that of what was measured": MEASURED_KEY,
        "made by mone-export": "mone.tool_version",
    }
    for what, key in made.items():
        if (value := header.value(key)) is not None:
            yield f"{what} {value}"
