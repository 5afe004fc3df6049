"""Get, patch, build and find llama.cpp: what `mone-llama` does, for programs.

A MoNE file runs in llama.cpp with the few patches in `patches/` applied. The source is the release pinned in
`patches/UPSTREAM`: the sdist of llama-cpp-python, which carries the whole llama.cpp tree. Everything lands in
one cache:

    $MONE_CACHE, else $XDG_CACHE_HOME/mone_export, else ~/.cache/mone_export
      llama_cpp_python-<version>.tar.gz       as downloaded, SHA-256 checked
      llama.cpp/<version>-<key>/source/       unpacked and patched; key: sdist and patches
      llama.cpp/<version>-<key>/<build>/bin/  programs and libraries; build: backend, options, compiler, CPU

`source/` and `bin/` appear by a rename when they are complete, so what is there is finished. The wheel
mone_llama (`make wheel`) brings a `<version>-<key>/` of its own, which serves where nothing was built.
"""

from mone_export.runtime.binding import install_python_binding, linked_build
from mone_export.runtime.builds import WHEEL_SPEED, Build, BuildError, RuntimeInfo, build, info, path
from mone_export.runtime.proofs import DeviceCheck, check, environment, proved, switch_on
from mone_export.runtime.toolchain import BACKENDS, Backend, library, program
from mone_export.runtime.upstream import (
    Progress,
    Source,
    Upstream,
    cache_dir,
    fetch,
    patches_dir,
    source,
    tree,
)

__all__ = [
    "BACKENDS",
    "WHEEL_SPEED",
    "Backend",
    "Build",
    "BuildError",
    "DeviceCheck",
    "Progress",
    "RuntimeInfo",
    "Source",
    "Upstream",
    "build",
    "cache_dir",
    "check",
    "environment",
    "fetch",
    "info",
    "install_python_binding",
    "library",
    "linked_build",
    "patches_dir",
    "path",
    "program",
    "proved",
    "source",
    "switch_on",
    "tree",
]
