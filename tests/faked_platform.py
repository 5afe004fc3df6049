"""A pytest plugin in which the package believes to be on another system: `FAKED_PLATFORM=win32`.

What Python lacks there is gone: functions of `os`, modules, signals. And what the system refuses is refused,
on Windows to rename onto a file, to remove or rename an open one, to open a folder, to call a file `a:b`, to
make links without the right to. All this for the package alone: Python's library and other packages have code
of their own for each system, and tests look at the results.
"""

import builtins
import ctypes
import errno
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = str(Path(__file__).parents[1] / "mone_export") + os.sep
LIBRARY = str(Path(os.__file__).parent) + os.sep
MODULES = {
    "win32": ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"),
    "darwin": (),
}
MISSING: Mapping[str, Mapping[ModuleType, tuple[str, ...]]] = {
    "win32": {
        os: (
            *("chown", "fchmod", "fchown", "fork", "forkpty", "getegid", "geteuid", "getgid", "getgroups"),
            *("getloadavg", "getpgid", "getpgrp", "getpriority", "getresuid", "getsid", "getuid", "killpg"),
            *("lchown", "lockf", "major", "mkfifo", "mknod", "nice", "openpty", "pathconf", "posix_fadvise"),
            *("posix_fallocate", "posix_spawn", "pread", "preadv", "pwrite", "pwritev", "readv", "sendfile"),
            *("sched_getaffinity", "sched_setaffinity", "sched_yield", "setpgid", "setsid", "setuid"),
            *("statvfs", "sync", "sysconf", "ttyname", "uname", "wait3", "wait4", "writev"),
            *("O_CLOEXEC", "O_DIRECT", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC", "O_TMPFILE"),
        ),
        signal: (
            *("SIGALRM", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP"),
            *("SIGUSR1", "SIGUSR2", "SIGXFSZ", "alarm", "pause", "pthread_sigmask", "setitimer"),
        ),
    },
    "darwin": {
        os: (
            *("copy_file_range", "eventfd", "getrandom", "getresuid", "memfd_create", "pidfd_open"),
            *("posix_fadvise", "posix_fallocate", "sched_getaffinity", "sched_setaffinity", "splice"),
            *("O_DIRECT", "O_TMPFILE", "O_LARGEFILE", "O_NOATIME"),
        ),
        signal: ("SIGPWR", "SIGRTMIN", "SIGSTKFLT"),
    },
}
READING = ("open", "os.listdir", "os.scandir")
RESERVED = set('<>:"|?*')


class Faked(ModuleType):
    """A module without some of its names, and with others instead."""

    def __init__(self, module: ModuleType, missing: tuple[str, ...], instead: Mapping[str, Any]) -> None:
        object.__getattribute__(self, "__dict__").update(_real=module, _missing=missing, _instead=instead)

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        if name in own["_missing"]:
            raise AttributeError(f"module {own['_real'].__name__!r} has no attribute {name!r}")
        return own["_instead"][name] if name in own["_instead"] else getattr(own["_real"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(object.__getattribute__(self, "__dict__")["_real"], name, value)


def fake(platform: str) -> None:
    """Have modules of the package that are imported from now on believe to be on `platform`."""
    instead = {module.__name__: Faked(module, names, {}) for module, names in MISSING[platform].items()}
    instead["sys"] = Faked(sys, (), {"platform": platform})
    real_import = builtins.__import__

    def imported(
        name: str, importer: Mapping[str, Any] | None = None, *others: Any, **more: Any
    ) -> ModuleType:
        if str((importer or {}).get("__name__", "")).startswith("mone_export"):
            if name in MODULES[platform]:
                raise ModuleNotFoundError(f"No module named {name!r}")
            if name in instead:
                return instead[name]
        return real_import(name, importer, *others, **more)

    builtins.__import__ = imported
    sys.addaudithook(lambda event, args: _no_proc(args[0]) if event in READING and from_package() else None)
    os.stat = _refusing(os.stat, _no_proc)
    if platform == "win32":
        _refuse_as_windows()


def from_package() -> bool:
    """Say whether the package, and no other code, has led here by way of Python's own library."""
    frame = sys._getframe(1)
    while frame:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if file == __file__ and function == _open_files.__name__:
            return False
        if file.startswith(PACKAGE):
            return True
        inside = file.startswith(LIBRARY) and "site-packages" not in file
        if not inside and file != __file__ and not file.startswith("<"):
            return False
        frame = frame.f_back
    return False


def _refusing(function: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    def checked(*args: Any, **kwargs: Any) -> Any:
        if from_package():
            check(*args)
        return function(*args, **kwargs)

    return checked


def _no_proc(path: Any, *_: Any) -> None:
    if str(path).startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _refuse_as_windows() -> None:
    shutil._use_fd_functions = False  # it removes by name, as on Windows
    tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # which has a name until it is closed
    for name, check in {
        "open": _open,
        "rename": _rename,
        "replace": _replace,
        "remove": _closed,
        "unlink": _closed,
        "mkdir": _name,
        "symlink": _symlink,
    }.items():
        setattr(os, name, _refusing(getattr(os, name), check))
    ctypes.CDLL.__init__ = _refusing(ctypes.CDLL.__init__, _library)
    sys.addaudithook(lambda event, args: _name(args[0]) if event == "open" and from_package() else None)


def _open(path: Any, *_: Any) -> None:
    if Path(path).is_dir():
        raise PermissionError(errno.EACCES, "a folder is no file", str(path))


def _rename(source: Any, target: Any) -> None:
    _closed(source)
    if Path(target).exists():
        raise FileExistsError(errno.EEXIST, "the target exists", str(target))


def _replace(source: Any, target: Any) -> None:
    _closed(source)
    _closed(target)
    if Path(target).is_dir():
        raise PermissionError(errno.EACCES, "the target is a folder", str(target))


def _symlink(_source: Any, target: Any, *_: Any) -> None:
    raise OSError(errno.EPERM, "a required privilege is not held", str(target))


def _library(_self: Any, name: Any, *_: Any) -> None:
    if name is None:
        raise TypeError("argument of type 'NoneType' is not iterable")


def _name(path: Any, *_: Any) -> None:
    if isinstance(path, str | os.PathLike) and RESERVED.intersection(str(path)):
        raise OSError(errno.EINVAL, "not a name of a file", str(path))


def _closed(path: Any) -> None:
    """Raise PermissionError if this process has the file open or mapped, or one in the folder."""
    name = os.path.realpath(path)
    if any(file == name or file.startswith(name + os.sep) for file in _open_files()):
        raise PermissionError(errno.EACCES, "the process cannot access an open file", str(path))


def _open_files() -> Iterator[str]:
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            yield str(descriptor.readlink())
        except OSError:
            continue
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    yield from {line.split(maxsplit=5)[5] for line in lines if "/" in line}


if "FAKED_PLATFORM" in os.environ:
    fake(os.environ["FAKED_PLATFORM"])
