"""The `mone-llama` command: build the patched llama.cpp, say where it is and what is there, test devices."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict

from mone_export import runtime
from mone_export.errors import MoneError
from mone_export.runtime import BACKENDS
from mone_export.terminal import ProgressLine, steady_output

_DESCRIPTION = "Get, patch, build and find the llama.cpp that runs MoNE files."
_EPILOG = """examples:
  mone-llama build                            for this CPU
  mone-llama build --backend cuda             for NVIDIA GPUs
  mone-llama build -DGGML_NATIVE=OFF          for any CPU of this kind
  mone-llama check                            are this machine's devices right?
  $(mone-llama path)/llama-cli -m model.gguf  run a program of the newest build

The cache is $MONE_CACHE, else $XDG_CACHE_HOME/mone_export, else ~/.cache/mone_export."""

_SHOWN = 5  # failed cases of a device
_GAIN = (
    "the wheel mone_llama runs on this CPU without a build; where both were measured, it was {prompt:.2f} "
    "times as fast as a build for the CPU in prompts, {generation:.2f} times in generation"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mone-llama`; returns the exit status.

    0 done, 1 a MoneError or a device that fails, 2 usage, 130 interrupted.
    """
    done = True
    with steady_output() as output:
        args = _parser().parse_args(argv)
        try:
            if args.command == "check":
                done = _check(args)
            else:
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
    return 0 if done else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mone-llama",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{build,path,info,check}")
    which = argparse.ArgumentParser(add_help=False)
    which.add_argument("--backend", choices=BACKENDS, help="default: cpu to build, any to find")
    which.add_argument("--stock", action="store_true", help="llama.cpp without the patches, for comparisons")
    _add_build_options(commands.add_parser("build", parents=[which], help="build it once; prints its folder"))
    commands.add_parser("path", parents=[which], help="print the folder of the newest build's programs")
    commands.add_parser("info", help="print the pinned release, the patches and the builds")
    check = commands.add_parser(
        "check", help="test novice layers on every device of the newest build; switch on what passes"
    )
    check.add_argument("--backend", choices=BACKENDS, help="default: any")
    check.add_argument("--json", action="store_true", help="print the results as JSON")
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


def _check(args: argparse.Namespace) -> bool:
    folder = runtime.path(args.backend)
    with closing(ProgressLine()) as show:
        found = runtime.check(folder, progress=show)
    if args.json:
        devices = [asdict(item) | {"verdict": item.verdict} for item in found]
        values = {"programs": str(folder), "devices": devices, "variables": runtime.proved(folder)}
        print(json.dumps(values, indent=1))
    else:
        _show_check(found, runtime.proved(folder))
    return not any(item.verdict == "failed" for item in found)


def _show_check(found: Sequence[runtime.DeviceCheck], variables: Mapping[str, str]) -> None:
    rows: list[tuple[str, ...]] = [("device", "passed", "failed", "not supported", "verdict", "what it is")]
    for item in found:
        counts = map(str, (item.passed, len(item.failed), item.not_supported))
        rows.append((item.device, *counts, item.verdict, item.description))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for item in found:
        for line in (*item.failed[:_SHOWN], *([item.error] if item.error else [])):
            print(f"{item.device}: {line}")
        if len(item.failed) > _SHOWN:
            print(f"{item.device}: {len(item.failed) - _SHOWN} more, see --json")
        if item.verdict == "not declared":
            print(f"{item.device}: layers with novices run on the CPU")
    if variables:
        print("switched on for what mone_export starts; for programs that you start yourself:")
    for name, value in variables.items():
        print(f"{'set' if sys.platform == 'win32' else 'export'} {name}={value}")


def _fail(error: MoneError) -> int:
    print(f"mone-llama: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
