"""Promises about the llama.cpp runtime, kept with a tiny "release" and stand-ins for cmake and compilers."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import pytest

from mone_export import cli_llama, runtime
from mone_export.errors import MoneError
from mone_export.locks import tried
from mone_export.runtime import binding, builds, toolchain, upstream

PATCH = """\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: someone <someone@localhost>
Subject: [PATCH] greet

---
diff --git a/greeting.txt b/greeting.txt
--- a/greeting.txt
+++ b/greeting.txt
@@ -1,2 +1,2 @@
-hello
+hello, expert
 world
diff --git a/tests/test-greeting.cpp b/tests/test-greeting.cpp
new file mode 100644
--- /dev/null
+++ b/tests/test-greeting.cpp
@@ -0,0 +1 @@
+int main() {}
"""

# Counts its calls; compiling makes every target in bin/, unless a file called "fail" is beside it.
FAKE_CMAKE = """\
#!/bin/sh
here=$(dirname "$0")
echo "$@" >> "$here/calls"
[ "$1" = --build ] || exit 0
mkdir -p bin
echo "[1/2] Building greeting"
[ -e "$here/fail" ] && { echo "greeting.cpp:1: error: no such expert"; exit 1; }
echo "[2/2] Linking greeting"
while [ "$1" != --target ]; do shift; done
shift
for target; do echo "$target" > "bin/$target"; done
touch bin/libllama.so bin/libllama.so.0
"""


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds a tiny sdist, and a patches/ folder (returned) that pins it and changes one line."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("MONE_CACHE", str(cache))
    files = {"vendor/llama.cpp/greeting.txt": "hello\nworld\n", "vendor/llama.cpp/.git": "gitdir: nowhere\n"}
    files |= {"vendor/llama.cpp/gguf-py/gguf/__init__.py": "", "llama_cpp/__init__.py": ""}
    sdist = cache / "tiny-1.tar.gz"
    write_sdist(sdist, files)
    patches = tmp_path / "patches"
    patches.mkdir()
    write_pin(patches, hashlib.sha256(sdist.read_bytes()).hexdigest())
    (patches / "series").write_text("# in order\ngreet.patch\n")
    (patches / "greet.patch").write_text(PATCH)
    monkeypatch.setattr(upstream, "patches_dir", lambda: patches)
    monkeypatch.setattr(builds, "patches_dir", lambda: patches)
    return patches


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stand-ins, all that the build can find."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("cc", "c++", "ninja"):
        write_script(folder / name, "#!/bin/sh\necho stand-in 1.0\n")
    write_script(folder / "cmake", FAKE_CMAKE)
    monkeypatch.setattr(toolchain, "search_path", lambda: str(folder))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return folder


def write_sdist(file: Path, files: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"tiny-1/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))


def write_pin(patches: Path, sha256: str) -> None:
    pin = {"package": "tiny", "version": "1", "sdist": "tiny-1.tar.gz", "sha256": sha256}
    pin |= {"tree": "vendor/llama.cpp", "llama_cpp_commit": "abc1234"}
    (patches / "UPSTREAM").write_text("".join(f"{key}={value}\n" for key, value in pin.items()))


def write_script(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that Python imports from, as one that a wheel was unpacked in."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def write_wheel(site: Path, state: str) -> Path:
    """Unpack a wheel `mone_llama` of this state of the source; returns its folder of programs."""
    folder = site / "mone_llama" / state
    (folder / "source" / "vendor" / "llama.cpp" / "conversion").mkdir(parents=True)
    (site / "mone_llama" / "__init__.py").touch()
    (folder / "cpu" / "bin").mkdir(parents=True)
    made = runtime.Build(folder / "cpu", "cpu", True, "1", ("llama-cli",), (), "any")
    made.save(made.bin)
    return made.bin


def n_call(tools: Path) -> int:
    calls = tools / "calls"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def test_tree_is_patched_and_stock_is_not(release: Path) -> None:
    assert (runtime.tree() / "greeting.txt").read_text() == "hello, expert\nworld\n"
    assert (runtime.tree(patched=False) / "greeting.txt").read_text() == "hello\nworld\n"
    assert not (runtime.tree() / ".git").exists()


def test_tree_is_patched_inside_another_repository(release: Path, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    assert (runtime.tree() / "greeting.txt").read_text().startswith("hello, expert")


def test_patch_program_does_what_git_does(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = upstream.shutil.which("patch")
    if found is None:
        pytest.skip("no patch program here")
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "patch").symlink_to(found)
    monkeypatch.setenv("PATH", str(tmp_path / "only"))
    assert (runtime.tree() / "greeting.txt").read_text().startswith("hello, expert")
    assert (runtime.tree() / "tests" / "test-greeting.cpp").is_file()


def test_neither_git_nor_patch_is_named(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MoneError, match="apt install git"):
        runtime.tree()


def test_patch_that_does_not_apply_leaves_no_tree(release: Path) -> None:
    (release / "greet.patch").write_text(PATCH.replace("-hello", "-goodbye"))
    with pytest.raises(MoneError, match=r"greet\.patch does not apply"):
        runtime.tree()
    assert not runtime.source().package.exists()


def test_interrupted_unpacking_starts_again(release: Path) -> None:
    part = runtime.source().folder / "source.part"
    part.mkdir(parents=True)
    (part / "half").touch()
    assert (runtime.tree() / "greeting.txt").is_file()
    assert not (runtime.source().package / "half").exists()


def test_wrong_sha256_is_refused(release: Path) -> None:
    write_pin(release, "0" * 64)
    with pytest.raises(MoneError, match=rf"has SHA-256 [0-9a-f]{{64}}, .* pins {'0' * 64}"):
        runtime.fetch()


def test_wrong_archive_is_never_opened(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(upstream, "unpack", lambda sdist, _target: opened.append(sdist))
    write_pin(release, "0" * 64)
    with pytest.raises(MoneError, match="has SHA-256"):
        runtime.tree()
    assert not opened and not list(runtime.source().folder.glob("source*"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tiny-1/../outside.txt", tarfile.REGTYPE),
        ("tiny-1/a/../../outside.txt", tarfile.REGTYPE),
        ("/outside.txt", tarfile.REGTYPE),
        ("tiny-1/C:/outside.txt", tarfile.REGTYPE),
        ("tiny-1/..\\outside.txt", tarfile.REGTYPE),
        ("tiny-1/link", tarfile.SYMTYPE),
        ("tiny-1/hard", tarfile.LNKTYPE),
        ("tiny-1/device", tarfile.CHRTYPE),
        ("tiny-1/pipe", tarfile.FIFOTYPE),
    ],
)
def test_members_that_lead_out_are_refused(name: str, kind: bytes, tmp_path: Path) -> None:
    """On each Python, whether or not its tarfile has filters."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "../outside.txt"
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.addfile(member)
    with pytest.raises(MoneError, match="is refused: .* no plain file or folder"):
        upstream.unpack(tmp_path / "x.tar.gz", tmp_path / "in" / "source")
    assert not list(tmp_path.rglob("outside*")) and not list(tmp_path.rglob("in/source/*"))


def test_unpacked_files_are_ours_and_plain(tmp_path: Path) -> None:
    """No other owner, no set-user-id bit, nothing that everybody may write."""
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        for name, mode in (("tool", 0o6777), ("text", 0o666)):
            member = tarfile.TarInfo(f"tiny-1/{name}")
            member.mode, member.uid, member.gid = mode, 4321, 4321
            archive.addfile(member, io.BytesIO())
    upstream.unpack(tmp_path / "x.tar.gz", tmp_path / "source")
    found = {file.name: file.stat() for file in (tmp_path / "source").iterdir()}
    assert {name: stat.st_mode & 0o7777 for name, stat in found.items()} == {"tool": 0o755, "text": 0o644}
    assert {stat.st_uid for stat in found.values()} == {os.getuid()}


def test_download_that_fails_says_how_to_go_on(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (upstream.cache_dir() / "tiny-1.tar.gz").unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(MoneError, match="download the sdist of tiny 1 by hand into"):
        runtime.fetch()
    assert not (upstream.cache_dir() / "tiny-1.tar.gz").exists()


def test_series_that_names_a_missing_patch_is_refused(release: Path) -> None:
    (release / "greet.patch").unlink()
    with pytest.raises(MoneError, match=r"names greet\.patch, not there"):
        runtime.source()


def test_a_pin_that_lacks_something_is_refused(release: Path) -> None:
    pin = (release / "UPSTREAM").read_text().splitlines()
    (release / "UPSTREAM").write_text(
        "\n".join(line for line in pin if not line.startswith(("sha256", "tree")))
    )
    with pytest.raises(MoneError, match="UPSTREAM lacks sha256, tree: restore it from version control"):
        runtime.source()


def test_python_without_pip_is_told_what_to_do(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (release.parent / "cache" / "tiny-1.tar.gz").unlink()
    monkeypatch.setattr(upstream.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MoneError, match="has no pip: run `.* -m ensurepip`, or download .* tiny 1 by hand"):
        runtime.fetch()


def test_source_key_follows_the_patches(release: Path) -> None:
    first = runtime.source().key
    assert runtime.source().key == first
    assert runtime.source(patched=False).key != first
    (release / "greet.patch").write_text(PATCH + "\n")
    assert runtime.source().key != first


def test_build_key_follows_the_options(release: Path, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [
        runtime.build().folder,
        runtime.build(cmake_args=["-DGGML_NATIVE=OFF"]).folder,
        runtime.build(targets=["llama"]).folder,
        runtime.build(patched=False, targets=["llama"]).folder,
    ]
    write_script(tools / "c++", "#!/bin/sh\necho stand-in 2.0\n")
    folders.append(runtime.build().folder)
    assert len(set(folders)) == len(folders)


def test_second_build_does_nothing(release: Path, tools: Path) -> None:
    first = runtime.build()
    calls = n_call(tools)
    assert runtime.build() == first
    assert n_call(tools) == calls == 2
    assert runtime.path() == first.bin
    assert sorted(item.name for item in first.folder.iterdir()) == ["bin", "build.log"]


def test_build_makes_the_tests_that_patches_touch(release: Path, tools: Path) -> None:
    targets = runtime.build().targets
    assert {"llama-cli", "test-backend-ops", "test-greeting"} <= set(targets)
    assert not any(target.startswith("test-") for target in runtime.build(patched=False).targets)


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_programs_find_the_libraries_beside_them(
    release: Path, tools: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    """When `bin` has been moved, too: what CMake does for that it does not do for macOS."""
    monkeypatch.setattr(sys, "platform", platform)
    runtime.build()
    calls = (tools / "calls").read_text()
    assert "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON" in calls
    assert ("-DCMAKE_BUILD_RPATH=@loader_path" in calls) == (platform == "darwin")


def test_failed_build_is_not_taken_for_a_finished_one(release: Path, tools: Path) -> None:
    (tools / "fail").touch()
    with pytest.raises(runtime.BuildError, match=r"compiling llama\.cpp failed: .*build\.log") as caught:
        runtime.build()
    assert caught.value.tail[-1] == "greeting.cpp:1: error: no such expert"
    with pytest.raises(MoneError, match="run `mone-llama build`"):
        runtime.path()
    (tools / "fail").unlink()
    built = runtime.build()
    assert runtime.path() == built.bin


def test_build_killed_before_its_last_step_is_not_finished(release: Path, tools: Path) -> None:
    done = runtime.build()
    done.bin.rename(done.folder / "work")  # as it lies while compiling
    assert runtime.info().builds == ()
    assert runtime.build().bin.is_dir()


def test_build_for_another_cpu_is_not_offered(
    release: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.build()
    generic = runtime.build(cmake_args=["-DGGML_NATIVE=OFF"])
    monkeypatch.setattr(builds, "cpu_identity", lambda _args: "another")
    assert runtime.info().builds == (generic,)


def test_build_for_another_system_is_not_offered(release: Path, tools: Path) -> None:
    runtime.build(cmake_args=["-DCMAKE_SYSTEM_NAME=Windows", "-DGGML_NATIVE=OFF"])
    with pytest.raises(MoneError, match="run `mone-llama build`"):
        runtime.path()
    assert runtime.info().builds == ()


def test_progress_shows_the_steps(release: Path, tools: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    runtime.build(progress=lambda *step: steps.append(step))
    assert (0, 1, "applying the patches") in steps
    assert steps[-1] == (2, 2, "compiling llama.cpp")


def test_missing_tools_are_all_named_at_once(release: Path, tools: Path) -> None:
    for name in ("cmake", "c++", "ninja"):
        (tools / name).unlink()
    with pytest.raises(MoneError) as caught:
        runtime.build()
    assert "needs cmake, a C++ compiler, ninja or make, not found" in str(caught.value)
    assert str(caught.value).endswith("apt install cmake g++ ninja-build")
    assert not runtime.source().folder.exists()


def test_wheel_serves_without_a_build(
    release: Path, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is fetched, unpacked or patched; there is no program to do it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    state = runtime.source().folder
    programs = write_wheel(site, state.name)
    assert runtime.path() == runtime.path("cpu") == programs
    assert runtime.tree() == runtime.info().tree == programs.parents[1] / "source" / "vendor" / "llama.cpp"
    assert [build.bin for build in runtime.info().builds] == [programs]
    assert not state.exists()


def test_wheel_of_a_gpu_adds_a_library(release: Path, site: Path) -> None:
    programs = write_wheel(site, runtime.source().folder.name)
    with pytest.raises(MoneError, match="run `mone-llama build --backend vulkan`"):
        runtime.path("vulkan")
    (programs / runtime.library("ggml-vulkan")).touch()
    assert runtime.path("vulkan") == runtime.path("cpu") == programs


def test_own_build_comes_before_the_wheel(
    release: Path, tools: Path, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = write_wheel(site, runtime.source().folder.name)
    assert cli_llama.main(["build", "--no-python"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(runtime.path()) != str(programs)
    gain = runtime.WHEEL_SPEED
    assert f"it was {gain['prompt']:.2f} times as fast as a build for the CPU in prompts" in err
    assert [build.bin for build in runtime.info().builds] == [runtime.path(), programs]
    assert (runtime.tree() / "greeting.txt").read_text().startswith("hello, expert")


def test_wheel_has_a_part_of_the_tree(release: Path, site: Path) -> None:
    write_wheel(site, runtime.source().folder.name)
    assert runtime.tree().is_relative_to(site)
    assert (runtime.tree(whole=True) / "greeting.txt").is_file()


def test_wheel_of_other_patches_does_not_serve(release: Path, tools: Path, site: Path) -> None:
    write_wheel(site, f"{runtime.source().folder.name}-no-more")
    with pytest.raises(MoneError, match=r", and .*mone_llama is of other patches: run `mone-llama build`$"):
        runtime.path()
    with pytest.raises(MoneError, match=r"no llama.cpp 1-stock-\w+ for this CPU in [^,]*: run"):
        runtime.path(patched=False)
    assert (runtime.tree() / "greeting.txt").is_file()


def test_missing_vulkan_compiler_is_named(release: Path, tools: Path) -> None:
    with pytest.raises(MoneError, match="building llama.cpp for vulkan needs glslc"):
        runtime.build("vulkan")


def test_cuda_without_a_gpu_asks_for_its_architecture(
    release: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_script(tools / "nvcc", "#!/bin/sh\necho release 13.0\n")
    if Path("/proc/driver/nvidia/gpus").is_dir():
        pytest.skip("there is a GPU")
    with pytest.raises(
        MoneError, match="no NVIDIA GPU: name the GPU to build for, such as -DCMAKE_CUDA_ARCH"
    ):
        runtime.build("cuda")
    assert runtime.build("cuda", ["-DCMAKE_CUDA_ARCHITECTURES=89"]).bin.is_dir()


@pytest.mark.parametrize(
    ("line", "step"),
    [("[3/240] Building C object ggml.c.o", ("3", "240")), ("[ 12%] Linking CXX executable", ("12", None))],
)
def test_steps_of_ninja_and_make_are_read(line: str, step: tuple[str, str | None]) -> None:
    found = builds._STEP.match(line)
    assert found is not None
    assert found.groups() == step


def test_second_process_waits(release: Path) -> None:
    folder = runtime.source().folder
    said = threading.Event()
    with upstream.locked(folder):
        waiting = threading.Thread(target=runtime.tree, kwargs={"progress": lambda *_: said.set()})
        waiting.start()
        assert said.wait(10)
        assert not runtime.source().package.exists()
    waiting.join(10)
    assert runtime.source().package.is_dir()


@pytest.mark.parametrize("place", ["/dev/null/cache", "/proc/cache"])
def test_cache_that_cannot_be_made_is_one_line(
    release: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("MONE_CACHE", place)
    with pytest.raises(
        MoneError, match=r"^cannot write to /.*cache.*: .*set MONE_CACHE to a folder elsewhere$"
    ):
        runtime.tree()
    with pytest.raises(
        MoneError, match=r"^cannot write to /.*cache.*: .*set MONE_CACHE to a folder elsewhere$"
    ):
        runtime.fetch()


def test_lock_that_cannot_be_made_is_one_line(release: Path) -> None:
    """As where the cache may be read only."""
    (runtime.source().folder / "lock").mkdir(parents=True)
    with pytest.raises(MoneError, match=r"^cannot write to .*lock \(Is a directory\): .*set MONE_CACHE"):
        runtime.tree()


def test_full_disk_while_unpacking_is_one_line(release: Path, tmp_path: Path) -> None:
    """In a process that may write 1000 bytes to a file."""
    cache = tmp_path / "full"
    write_sdist(cache / "tiny-1.tar.gz", {"vendor/llama.cpp/large.txt": "x" * 5000})
    write_pin(release, hashlib.sha256((cache / "tiny-1.tar.gz").read_bytes()).hexdigest())
    code = (
        "import pathlib, resource, signal, sys\n"
        "from mone_export.errors import MoneError\n"
        "from mone_export.runtime import upstream\n"
        "upstream.patches_dir = lambda: pathlib.Path(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: upstream.tree(patched=False)\n"
        "except MoneError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(release)]
    env = os.environ | {"MONE_CACHE": str(cache)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert "cannot write to" in done.stdout and "(File too large)" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1 and "MONE_CACHE" in done.stdout


def test_finished_tree_needs_no_writing(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a cache that is shared and read-only."""
    tree = runtime.tree()
    (runtime.source().folder / "lock").unlink()
    assert runtime.tree() == tree
    assert not (runtime.source().folder / "lock").exists()


def test_full_temporary_folder_is_one_line(
    release: Path, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = runtime.build()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    monkeypatch.setattr(binding, "_package_folder", lambda _name: None)
    with pytest.raises(MoneError, match=r"missing.*: free some space there, or set TMPDIR$"):
        runtime.install_python_binding(built)


def test_lock_stays_while_a_child_lives(release: Path, tools: Path, tmp_path: Path) -> None:
    """The compiler goes on when the process that started it is killed: nobody else may begin meanwhile."""
    write_script(tools / "cmake", f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    code = (
        "import pathlib, sys\n"
        "from mone_export.runtime import builds, toolchain, upstream\n"
        "upstream.patches_dir = builds.patches_dir = lambda: pathlib.Path(sys.argv[1])\n"
        "toolchain.search_path = lambda: sys.argv[2]\n"
        "builds.build()"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(release), str(tools)]) as process:
        for _ in range(500):
            if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip():
                break
            time.sleep(0.05)
        process.kill()
    child = int((tmp_path / "pid").read_text())
    lock = runtime.source().folder / "lock"
    try:
        with tried(lock) as taken:
            assert not taken, "its child lives"
    finally:
        os.kill(child, signal.SIGKILL)
    for _ in range(200):
        with tried(lock) as taken:
            if taken:
                break
        time.sleep(0.05)
    assert taken


@pytest.mark.parametrize(
    ("platform", "library", "program"),
    [
        ("linux", "libggml-base.so", "llama-cli"),
        ("darwin", "libggml-base.dylib", "llama-cli"),
        ("win32", "ggml-base.dll", "llama-cli.exe"),
    ],
)
def test_files_are_named_as_the_platform_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, library: str, program: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert runtime.library("ggml-base") == library
    assert runtime.program(tmp_path, "llama-cli") == tmp_path / program


def test_binding_points_at_the_build(
    release: Path, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = runtime.build()
    site = tmp_path / "site"
    for name in ("llama_cpp", "gguf"):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").touch()
    monkeypatch.setattr(binding, "_package_folder", lambda name: site / name)
    assert runtime.install_python_binding(built)
    assert (site / "llama_cpp" / "lib" / "libllama.so.0").samefile(built.bin / "libllama.so.0")
    assert not runtime.install_python_binding(built)


def test_linked_build_comes_before_the_wheel_if_it_is_of_the_same_source(
    release: Path, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    monkeypatch.setattr(binding, "_package_folder", lambda _name: site / "llama_cpp")
    lib = site / "llama_cpp" / "lib"
    assert runtime.linked_build() == lib, "no wheel"
    state = runtime.source().folder
    programs = write_wheel(site, state.name)
    assert runtime.linked_build() == programs
    for built, expected in (("1-mone-old", programs), (state.name, tmp_path / state.name / "cuda" / "bin")):
        folder = tmp_path / built / "cuda" / "bin"
        folder.mkdir(parents=True)
        (folder / runtime.library("llama")).touch()
        lib.mkdir(parents=True, exist_ok=True)
        (lib / runtime.library("llama")).unlink(missing_ok=True)
        (lib / runtime.library("llama")).symlink_to(folder / runtime.library("llama"))
        assert runtime.linked_build() == expected


def test_binding_of_another_commit_is_replaced(
    release: Path, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = runtime.build()
    (tmp_path / "__init__.py").write_text("stale = True\n")
    monkeypatch.setattr(binding, "_package_folder", lambda _name: tmp_path)
    installed: list[runtime.Source] = []
    monkeypatch.setattr(binding, "_install", installed.append)
    assert runtime.install_python_binding(built)
    assert installed == [runtime.source()]


def test_command_prints_one_line_for_an_error(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_llama.main(["path"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mone-llama: no llama.cpp 1-mone-")
    assert err.count("\n") == 1


def test_command_builds_and_prints_the_folder(
    release: Path, tools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli_llama.main(["build", "--no-python", "-j", "3", "-DGGML_OPENMP=OFF"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert (folder / "llama-cli").is_file()
    calls = (tools / "calls").read_text()
    assert "-DGGML_OPENMP=OFF" in calls
    assert "--parallel 3" in calls
    assert cli_llama.main(["path"]) == 0
    assert capsys.readouterr().out.strip() == str(folder)
    assert cli_llama.main(["info"]) == 0
    assert str(folder) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "target", "status"),
    [("info", "closed pipe", 0), ("info", "/dev/full", 1), ("--help", "closed pipe", 0)],
)
def test_command_survives_its_reader(argument: str, target: str, status: int) -> None:
    code = f"import sys; from mone_export.cli_llama import main; sys.exit(main(['{argument}']))"
    read, write = os.pipe()
    os.close(read)
    if target == "/dev/full":
        os.close(write)
        write = os.open(target, os.O_WRONLY)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr.count("\n")) == (status, status), done.stderr


def test_usage_error_exits_with_2() -> None:
    with pytest.raises(SystemExit, match="2"):
        cli_llama.main(["build", "--backend", "abacus"])


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, mone_export.cli_llama; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
