"""The `mone-llama` command: build the patched llama.cpp, say where it is, say what is there."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing

from mone_export import runtime
from mone_export.errors import MoneError
from mone_export.terminal import ProgressLine, steady_output

_DESCRIPTION = "Get, patch, build and find the llama.cpp that runs MoNE files."
_EPILOG = """examples:
  mone-llama build                            for this CPU
  mone-llama build --backend cuda             for NVIDIA GPUs
  mone-llama build -DGGML_NATIVE=OFF          for any CPU of this kind
  $(mone-llama path)/llama-cli -m model.gguf  run a program of the newest build

The cache is $MONE_CACHE, else $XDG_CACHE_HOME/mone_export, else ~/.cache/mone_export."""

_GAIN = (
    "the wheel mone_llama runs on this CPU without a build; where both were measured, it was {prompt:.2f} "
    "times as fast as a build for the CPU in prompts, {generation:.2f} times in generation"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mone-llama`; returns the exit status: 0 done, 1 a MoneError, 2 usage, 130 interrupted."""
    with steady_output() as output:
        args = _parser().parse_args(argv)
        try:
            {"build": _build, "path": _path, "info": _info}[args.command](args)
            output.check()
        except runtime.BuildError as error:
            print(*error.tail, sep="\n", file=sys.stderr)
            return _fail(error)
        except MoneError as error:
            return _fail(error)
        except KeyboardInterrupt:
            print("mone-llama: interrupted; the same command continues", file=sys.stderr)
            return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mone-llama",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{build,path,info}")
    which = argparse.ArgumentParser(add_help=False)
    which.add_argument(
        "--backend", choices=("cpu", "cuda", "vulkan"), help="default: cpu to build, any to find"
    )
    which.add_argument("--stock", action="store_true", help="llama.cpp without the patches, for comparisons")
    _add_build_options(commands.add_parser("build", parents=[which], help="build it once; prints its folder"))
    commands.add_parser("path", parents=[which], help="print the folder of the newest build's programs")
    commands.add_parser("info", help="print the pinned release, the patches and the builds")
    return parser


def _add_build_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-j", "--jobs", type=int, metavar="N", help="files compiled at a time (default: one a core)"
    )
    parser.add_argument(
        "--target", action="append", metavar="NAME", help="only this CMake target (repeatable)"
    )
    parser.add_argument(
        "--no-python", action="store_true", help="leave llama_cpp and gguf of this Python alone"
    )
    parser.add_argument(
        "-D", action="append", default=[], dest="options", metavar="NAME=VALUE", help="for CMake"
    )


def _build(args: argparse.Namespace) -> None:
    if args.backend in (None, "cpu") and runtime.source(patched=not args.stock).packaged:
        print(f"mone-llama: {_GAIN.format(**runtime.WHEEL_SPEED)}", file=sys.stderr)
    with closing(ProgressLine()) as show:
        found = runtime.build(
            args.backend or "cpu",
            [f"-D{option}" for option in args.options],
            patched=not args.stock,
            targets=args.target,
            jobs=args.jobs,
            progress=show,
        )
        if not (args.no_python or args.stock or args.target):
            runtime.install_python_binding(found, progress=show)
    print(found.bin)


def _path(args: argparse.Namespace) -> None:
    print(runtime.path(args.backend, patched=not args.stock))


def _info(_args: argparse.Namespace) -> None:
    info = runtime.info()
    pin = info.upstream
    print(f"release  {pin.package} {pin.version} (llama.cpp {pin.llama_cpp_commit})")
    print(f"patches  {info.patches_dir}: {', '.join(info.patches) or 'none'}")
    print(f"cache    {info.cache}")
    print(f"tree     {info.tree or 'not unpacked yet: mone-llama build'}")
    for build in info.builds:
        kind = "patched" if build.patched else "stock"
        print(f"build    {build.backend}, {kind}, {len(build.targets)} targets: {build.bin}")
    if not info.builds:
        print("build    none for this CPU yet: mone-llama build")


def _fail(error: MoneError) -> int:
    print(f"mone-llama: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
