"""The rules of the house: who imports whom, who prints, what files are called, what is in none of them."""

import ast
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixed_text import fixed_text

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mone_export"

# a module imports only from modules before it
ORDER = (
    *("errors", "lazily", "transformers_internals", "files", "terminal", "locks", "paths"),
    *("memory", "runtime"),
    *("recipe", "llama_options", "artifacts", "architectures", "source"),
    *("calibration.chats", "calibration.documents", "calibration.corpus", "calibration.sums"),
    *("calibration.input_sums", "calibration.ranks", "calibration.work_folder", "calibration.rows"),
    *("calibration.streaming", "calibration.linear_inputs", "calibration.observer", "calibration.loading"),
    *("calibration.stability", "calibration.passes"),
    *("calibration.masking", "calibration.sensitivity", "calibration.channel_sums", "calibration.channels"),
    *("calibration.eval_callback", "calibration.cut_short"),
    "calibration.llama_model",
    "calibration.through_llamacpp",
    *("calibration.engines", "calibration.merging", "calibration.usage", "pruned_model"),
    *("pruning.novices", "pruning.damage", "pruning.guard", "pruning.uncertainty", "pruning.scoring"),
    *("pruning.protecting", "pruning.allocation", "pruning.planning", "pruning.plan_files", "pruning.dern"),
    *("pruning.thinning", "pruning.fates"),
    *("output.quantizing", "output.recombining", "output.thin_experts", "output.provenance"),
    "output.redoing",
    *("output.importance", "output.packing", "output.writing", "output.checkpoints", "output.splitting"),
    *("output.restore_check", "output.rounding"),
    *("evaluation.results", "evaluation.texts", "evaluation.slots", "evaluation.predictions"),
    *("evaluation.probe", "evaluation.speed", "evaluation.tasks", "evaluation.harness"),
    "evaluation.evaluate",
    *("inspection.anatomy", "inspection.savings", "inspection.cache_memory", "inspection.of_gguf"),
    *("inspection.of_checkpoint", "inspection.of_records", "inspection.inspecting"),
    *("fitting", "room", "request", "spending", "statistics", "deciding", "cautions", "reporting"),
    *("publishing.record", "publishing.shown", "publishing.charts", "publishing.page", "publishing.card"),
    *("publishing.publishing", "pipeline", "cli"),
)
STAGES = ("calibration", "pruning", "output", "evaluation", "inspection", "publishing")
TOP = (
    "__init__",
    "__main__",
    "cli_eval",
    "cli_inspect",
    "cli_llama",
    "cli_stats",
)  # they stand above the road


def sources() -> Iterator[tuple[str, Path]]:
    """Yield (module, file); `runtime`, `source` and `demo` count as one module each."""
    for file in sorted(PACKAGE.rglob("*.py")):
        module = _module(".".join(file.relative_to(PACKAGE).with_suffix("").parts))
        if module is not None:
            yield module, file


def _module(dotted: str) -> str | None:
    """Return a module's name in `ORDER`; None for a stage's `__init__`, which only holds a docstring."""
    first, _, rest = dotted.partition(".")
    if first in STAGES:
        return None if rest in ("", "__init__") else ".".join(dotted.split(".")[:2])
    return first


def imports(file: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "mone_export":
            names = [f"mone_export.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.startswith("mone_export.") and (module := _module(name.removeprefix("mone_export."))):
                yield module


def test_every_module_has_its_place_in_the_order() -> None:
    assert {module for module, _ in sources()} == {*ORDER, *TOP}


def test_modules_import_only_from_earlier_ones() -> None:
    wrong = [
        f"{file.relative_to(ROOT)} imports {other}"
        for module, file in sources()
        if module in ORDER
        for other in imports(file)
        if other in (*ORDER, *TOP) and other != module and (*ORDER, *TOP).index(other) > ORDER.index(module)
    ]
    assert not wrong


def test_only_the_commands_print() -> None:
    printing = {
        module
        for module, file in sources()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing <= {"cli", "cli_eval", "cli_inspect", "cli_llama", "cli_stats", "terminal"}


def test_llama_cpps_code_is_imported_in_one_place() -> None:
    foreign = re.compile(r"^\s*(import|from) (gguf|conversion)\b", re.MULTILINE)
    found = {module for module, file in sources() if foreign.search(file.read_text(encoding="utf-8"))}
    assert found <= {"source", "runtime"}


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_files_are_named_for_what_they_hold(tracked: list[Path]) -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "base", "misc", "manager"}
    assert not [path for path in tracked if drawers.intersection(re.split(r"[_\W]", path.stem.lower()))]


def test_no_file_holds_a_path_of_one_machine(tracked: list[Path]) -> None:
    machine = re.compile(r"(?<![\w.~}])/(?:home|Users|root|work|mnt|tmp)/\w+")
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in tracked
        if path.suffix not in {".gguf", ".safetensors", ".png", ".model", ".json"}
        for match in machine.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert not found


def test_pages_lead_to_files_that_exist(tracked: list[Path]) -> None:
    """Links, and mentions of tools and of Python files of the package with their folder."""
    missing = []
    for page in (path for path in tracked if path.suffix == ".md" and path.is_relative_to(ROOT)):
        text = page.read_text(encoding="utf-8")
        named = {page.parent / link for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)}
        named |= {ROOT / name for name in re.findall(r"\b(?:tools|mone_export)/[\w/]+\.(?:py|sh)\b", text)}
        missing += [f"{page.relative_to(ROOT)}: {path}" for path in named if not path.exists()]
    assert not missing


def test_the_readmes_tree_is_the_tree(tracked: list[Path]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.partition("## File tree")[2].split("```")[1]
    names = {path.name for path in tracked} | {"cli*.py"}
    assert set(re.findall(r"[\w*]+\.(?:py|sh)\b", tree)) <= names
    folders = {path.parent.relative_to(ROOT) for path in tracked} - {Path()}
    wanted = {folder.parts[-1] for folder in folders if len(folder.parts) <= 2 and folder.parts[0] != "tests"}
    assert not [name for name in wanted if not name.startswith(".") and f"{name}/" not in tree]


def private_names(file: Path) -> Iterator[str]:
    """Yield the private names of the package that a test file imports, reaches for or replaces."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    ours = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mone_export")
        for alias in node.names
    }
    yield from (name for name in ours if name.startswith("_") and not name.startswith("__"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
            if re.match(r"_[a-z]", node.attr):
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Constant) and re.fullmatch(
            r"mone_export\.[\w.]*\b_[a-z]\w*", str(node.value)
        ):
            yield str(node.value)


def test_tests_use_no_private_name_of_the_package() -> None:
    found = {file.name: names for file in (ROOT / "tests").glob("*.py") if (names := [*private_names(file)])}
    assert not found


def test_functions_fit_a_screen_and_take_few_parameters() -> None:
    wrong = []
    for _, file in sources():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                n_line = (node.end_lineno or 0) - node.lineno + 1
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                n_parameter = len([each for each in given if each.arg not in ("self", "cls")])
                if n_line > 60 or n_parameter > 7:
                    wrong.append(f"{file.name}: {node.name} has {n_line} lines, {n_parameter} parameters")
    assert not wrong


def test_the_text_of_the_tests_is_the_known_one() -> None:
    """It moves with the pinned transformers: then state it anew, and look at tests that fail besides."""
    found = hashlib.sha256(fixed_text().encode("utf-8")).hexdigest()
    assert found == "b408bc8a47ab04c72be552cff44339d965b958c6d1c1fb5a63763fa69b8ad46e"


@pytest.mark.slow
def test_every_tool_starts() -> None:
    """Each as people start it, all at a time: what it imports is there."""
    texts = {file: file.read_text() for file in (ROOT / "tools").rglob("*.py")}
    files = [file for file, text in texts.items() if "add_argument" in text and "__main__" in text]
    runs = {
        file: subprocess.Popen([sys.executable, file, "--help"], stdout=subprocess.PIPE, text=True)
        for file in files
    }
    said = {file: run.communicate()[0] for file, run in runs.items()}
    assert len(runs) > 10 and not [file for file, run in runs.items() if run.returncode]
    assert not [file for file, text in said.items() if not text.startswith("usage: ")]
