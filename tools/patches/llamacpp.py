#!/usr/bin/env python3
"""Maintain the patches to llama.cpp: work on them as commits, keep them as files.

    python tools/patches/llamacpp.py apply   make build/llama.cpp: the pinned release, the series as commits
    python tools/patches/llamacpp.py export  write those commits to patches/
    python tools/patches/llamacpp.py check   patches/ applies to the pinned release and exports to itself
    python tools/patches/llamacpp.py each    the libraries of a CPU build compile after each patch
    python tools/patches/llamacpp.py bump RELEASE   move the pin to another release of llama-cpp-python

The pinned release carries the tag `upstream`; each commit after it is a patch. Users need none of this: they
have `mone-llama`.
"""

import argparse
import filecmp
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mone_export import runtime  # noqa: E402  (the checkout's own package, installed or not)
from mone_export.errors import MoneError  # noqa: E402
from mone_export.runtime.builds import touched_tests  # noqa: E402
from mone_export.runtime.upstream import Upstream, download, read_series, sha256_of, unpack  # noqa: E402

PATCHES = ROOT / "patches"
WORK_TREE = ROOT / "build" / "llama.cpp"
IDENTITY = {"NAME": "mone_export", "EMAIL": "noreply@localhost", "DATE": "2026-01-01T00:00:00+0000"}
TEST_OPTIONS = {"test-backend-ops": ("test", "-o", "MUL_MAT_ID", "-p", "skipped=", "-b", "CPU")}
# Backends that answer to ggml_backend_mul_mat_id_skip: they answer for all of their functions at once.
DECLARED = ("ggml-cpu", "ggml-cuda", "ggml-metal", "ggml-rpc", "ggml-vulkan")
FORMAT = ("--no-signature", "--no-numbered", "--zero-commit", "--no-stat", "-N", "--full-index")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; 0 done, 1 something to mend."""
    args = _parser().parse_args(argv)
    try:
        return int(args.verb(args))
    except MoneError as error:
        print(f"llamacpp.py: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True, metavar="{apply,export,check,each,bump}")
    for verb in (apply, export, check, each, bump):
        sub = verbs.add_parser(verb.__name__, help=verb.__doc__)
        sub.set_defaults(verb=verb)
        if verb is bump:
            sub.add_argument("release", help="release of llama-cpp-python, such as 0.3.36")
            sub.add_argument("--read", action="store_true", help="upstream's changed functions are read")
        if verb not in (check, each):
            sub.add_argument(
                "folder", nargs="?", type=Path, default=WORK_TREE, help="default: build/llama.cpp"
            )
    return parser


def apply(args: argparse.Namespace) -> int:
    """Make the work tree."""
    _refuse_existing(args.folder)
    _commit_release(args.folder, Upstream.load(PATCHES / "UPSTREAM"))
    _am(args.folder, read_series(PATCHES))
    print(f"{args.folder}: edit, commit, then `python tools/patches/llamacpp.py export`")
    return 0


def export(args: argparse.Namespace) -> int:
    """Write the commits of the work tree to patches/."""
    with tempfile.TemporaryDirectory() as name:
        written = _format(args.folder, Path(name))
        for old in PATCHES.glob("*.patch"):
            old.unlink()
        for patch in written:
            shutil.copyfile(patch, PATCHES / patch.name)
    series = PATCHES / "series"
    comments = [line for line in series.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    series.write_text("\n".join([*comments, *(patch.name for patch in written)]) + "\n", encoding="utf-8")
    print(f"{len(written)} patches in {PATCHES}")
    return 0


def check(_args: argparse.Namespace) -> int:
    """Apply the series to the pinned release and export it: nothing may change."""
    series = read_series(PATCHES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "llama.cpp"
        _commit_release(folder, Upstream.load(PATCHES / "UPSTREAM"))
        _am(folder, series)
        written = _format(folder, Path(name))
        wrong = _differences(series, written)
    if wrong:
        raise MoneError(f"patches/ is not what an export writes ({', '.join(wrong)}): run apply, then export")
    print(f"{len(series)} patches apply and export to the same bytes")
    return 0


def each(_args: argparse.Namespace) -> int:
    """Compile the libraries of a CPU build, without optimising, after each patch of the series."""
    with tempfile.TemporaryDirectory() as name:
        folder, build = Path(name) / "llama.cpp", Path(name) / "build"
        _commit_release(folder, Upstream.load(PATCHES / "UPSTREAM"))
        _am(folder, read_series(PATCHES))
        options = [f"-DCMAKE_{language}_FLAGS=-O0" for language in ("C", "CXX")]
        options += ["-DCMAKE_BUILD_TYPE=None", "-DGGML_RPC=ON", "-DLLAMA_OPENSSL=OFF"]
        for number, commit in enumerate(_git(folder, "rev-list", "--reverse", "upstream..HEAD").split(), 1):
            _git(folder, "checkout", "--quiet", commit)
            subject = _git(folder, "log", "-1", "--format=%s").strip()
            for command in (
                ["-G", "Ninja", "-S", str(folder), "-B", str(build), *options],
                ["--build", str(build), "--target", "llama", "ggml-rpc"],
            ):
                done = subprocess.run(["cmake", *command], capture_output=True, text=True)
                if done.returncode:
                    raise MoneError(f"after patch {number} ({subject}): {done.stdout[-2000:]}")
            print(f"{number:3d} compiles: {subject}", flush=True)
    return 0


def bump(args: argparse.Namespace) -> int:
    """Move the pin: download, compare functions with ids, apply with three-way merges, export, test."""
    _refuse_existing(args.folder)
    old = Upstream.load(PATCHES / "UPSTREAM")
    new = _pin_of(args.release, old)
    _commit_release(args.folder, old)
    before = functions_with_ids(args.folder)
    _commit_release(args.folder, new)
    after = functions_with_ids(args.folder)
    changed = sorted(name for name in before | after if before.get(name) != after.get(name))
    if changed and not args.read:
        print(*changed, sep="\n", file=sys.stderr)
        raise MoneError(
            f"{len(changed)} functions that take ids changed, came or went: each must know ids that select "
            f"no matrix. Read them (git -C {args.folder} diff HEAD~), then rm -rf {args.folder} and "
            f"`bump {args.release} --read`"
        )
    _write_pin(new)
    try:
        _am(args.folder, read_series(PATCHES), "-3")
    except MoneError as error:
        print(f"{error}\nmend the conflict in {args.folder}, then:", file=sys.stderr)
        print(f"  git -C {args.folder} add --all && git -C {args.folder} am --continue", file=sys.stderr)
        print(f"  python tools/patches/llamacpp.py export {args.folder}", file=sys.stderr)
        print("  python tools/patches/llamacpp.py check && make test", file=sys.stderr)
        return 1
    return export(args) or _build_and_test()


def functions_with_ids(tree: Path) -> dict[str, list[str]]:
    """The functions of declared backends that know ids of MUL_MAT_ID: by file and name, their texts."""
    found: dict[str, list[str]] = {}
    for file in (file for name in DECLARED for file in sorted((tree / "ggml" / "src" / name).rglob("*.*"))):
        for text in _definitions(file.read_text(encoding="utf-8", errors="replace")):
            if re.search(r"\b(?:h|row_|data_)?ids\b|mul_m\w+_id\b|expert_id", text):
                head = text.split("{")[0]
                name = re.search(r"\bvoid (\w+)\s*\(", head) or re.search(r"(\w+)\s*\(", head)
                key = f"{file.relative_to(tree)}: {name[1] if name else head[:60].strip()}"
                found.setdefault(key, []).append(text)
    return found


def _definitions(text: str) -> Iterator[str]:
    """What begins in the first column and has braces, up to where they close, in one line each."""
    block: list[str] = []
    for line in text.splitlines():
        if block or re.match(r"\w", line):
            block.append(line.strip())
            joined = " ".join(block)
            closed = line.rstrip().endswith((";", "}")) and joined.count("{") == joined.count("}")
            if closed or line.startswith("}"):
                if "{" in joined:
                    yield joined
                block = []


def slug(title: str) -> str:
    """A file name for a commit title: "ggml : skip ids" -> "ggml-skip-ids"."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", title).strip("-.").lower()


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise MoneError(f"{folder} is there already: export what it holds, then remove it (rm -rf {folder})")


def _commit_release(folder: Path, upstream: Upstream) -> None:
    """Make the pinned tree the content of `folder`'s next commit, tagged `upstream`."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ".git").exists():
        _git(folder, "init", "--quiet")
        for key, value in (
            ("user.name", IDENTITY["NAME"]),
            ("user.email", IDENTITY["EMAIL"]),
            ("gc.auto", "0"),
        ):
            _git(folder, "config", key, value)
    for entry in folder.iterdir():
        if entry.name != ".git":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        unpack(runtime.fetch(upstream), Path(name))
        for entry in (Path(name) / upstream.tree).iterdir():
            entry.rename(folder / entry.name)
    _git(folder, "add", "--all", "--force")
    title = f"llama.cpp {upstream.llama_cpp_commit} ({upstream.package} {upstream.version})"
    _git(folder, "commit", "--quiet", "--allow-empty", "--message", title)
    _git(folder, "tag", "--force", "upstream")


def _am(folder: Path, patches: Sequence[Path], *options: str) -> None:
    if patches:
        _git(folder, "am", "--quiet", *options, *map(str, patches))


def _format(folder: Path, out: Path) -> tuple[Path, ...]:
    """Write each commit after `upstream` to a file of `out` named by its title, in order."""
    if _git(folder, "status", "--porcelain", "--untracked-files=no"):
        raise MoneError(f"{folder} has changes that are not committed: commit or stash them")
    lines = _git(folder, "log", "--reverse", "--format=%H %s", "upstream..HEAD").splitlines()
    written = []
    for commit, title in (line.split(" ", 1) for line in lines):
        patch = out / f"{slug(title)}.patch"
        if patch in written:
            raise MoneError(f'two commits of {folder} are titled "{title}": reword one')
        numbered = _git(folder, "format-patch", *FORMAT, "-o", str(out / "numbered"), "-1", commit).strip()
        Path(numbered).rename(patch)
        written.append(patch)
    return tuple(written)


def _differences(series: Sequence[Path], written: Sequence[Path]) -> list[str]:
    names, new_names = [patch.name for patch in series], [patch.name for patch in written]
    stray = {patch.name for patch in PATCHES.glob("*.patch")} ^ set(new_names)
    if names != new_names or stray:
        return sorted(stray) or ["the order of series"]
    pairs = zip(series, written, strict=True)
    return [patch.name for patch, new in pairs if not filecmp.cmp(patch, new, shallow=False)]


def _pin_of(release: str, old: Upstream) -> Upstream:
    """Download a release and describe it; its SHA-256 is taken as found."""
    with tempfile.TemporaryDirectory(dir=_made(runtime.cache_dir())) as name:
        sdist = download(old.package, release, Path(name))
        new = replace(old, version=release, sdist=sdist.name, sha256=sha256_of(sdist))
        new = replace(new, llama_cpp_commit=_commit_in(sdist, old.tree))
        sdist.rename(runtime.cache_dir() / sdist.name)
    return new


def _commit_in(sdist: Path, tree: str) -> str:
    """The llama.cpp commit of a release: its sdist holds the git index that names it."""
    with tempfile.TemporaryDirectory() as name:
        subprocess.run(["tar", "-xzf", str(sdist), "-C", name, "--wildcards", "*/.git/*"], check=True)
        (git_dir,) = Path(name).glob("*/.git")
        entry = _git(git_dir, "ls-files", "--stage", tree, git_dir=git_dir)  # 160000 <commit> 0 <path>
        return entry.split()[1][:7]


def _write_pin(upstream: Upstream) -> None:
    file = PATCHES / "UPSTREAM"
    comments = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    values = [f"{field.name}={getattr(upstream, field.name)}" for field in fields(upstream)]
    file.write_text("\n".join([*comments, *values]) + "\n", encoding="utf-8")


def _build_and_test() -> int:
    built = runtime.build(
        progress=lambda done, total, what: print(f"[{done}/{total}] {what}", file=sys.stderr)
    )
    runtime.install_python_binding(built)
    for test in touched_tests(runtime.source()):
        if subprocess.run([built.bin / test, *TEST_OPTIONS.get(test, ())]).returncode:
            raise MoneError(
                f"{test} fails with the new release: mend the commits in {WORK_TREE}, then export"
            )
    return subprocess.run([sys.executable, "-m", "pytest"], cwd=ROOT).returncode


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _git(folder: Path, *args: str, git_dir: Path | None = None) -> str:
    # Nobody's own git settings: the same commits must give the same bytes everywhere.
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    env |= {f"GIT_{who}_{key}": value for who in ("AUTHOR", "COMMITTER") for key, value in IDENTITY.items()}
    where = [f"--git-dir={git_dir}"] if git_dir else []
    result = subprocess.run(["git", *where, *args], cwd=folder, env=env, capture_output=True, text=True)
    if result.returncode:
        raise MoneError(f"git {args[0]} failed in {folder}: {(result.stderr or result.stdout).strip()}")
    return result.stdout


if __name__ == "__main__":
    sys.exit(main())
