"""Every change of files below a folder, told before it is made and after: faults come in its place."""

import builtins
import io
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

KINDS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir")


def _nothing(operation: "Operation") -> None:
    pass


@dataclass(frozen=True)
class Operation:
    """One change: a file opened to be written, a write, a sync, a name that comes, moves or goes.

    target: of a rename.
    half: makes the first half of a write, and sees that the system has it; nothing of other kinds.
    """

    kind: str
    path: Path
    target: Path | None = None
    half: Callable[[], object] = lambda: None


Told = Callable[[Operation], None]


@contextmanager
def watched(folder: Path, before: Told, after: Told = _nothing) -> Iterator[None]:
    """Tell of all changes that Python code makes below `folder`, in whatever thread.

    before: may raise, or not return at all; then the change is not made.
    """
    watch = _Watch(folder.resolve(), before, after)
    with ExitStack() as stack:
        for owner, name, function in watch.functions():
            stack.enter_context(mock.patch.object(owner, name, function))
        yield


class _Watch:
    def __init__(self, folder: Path, before: Told, after: Told) -> None:
        self._folder, self._before, self._after = str(folder) + os.sep, before, after
        self._lock = threading.RLock()  # one change at a time: a fault stops all that come after it

    def functions(self) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        names = {"mkdir": "mkdir", "rename": "rename", "replace": "rename", "unlink": "unlink"}
        for name, kind in (names | {"remove": "unlink", "rmdir": "rmdir", "fsync": "fsync"}).items():
            yield os, name, self._changing(kind, getattr(os, name))
        for module in (io, builtins):
            yield module, "open", self._opening(module.open)

    def tell(self, operation: Operation, change: Callable[[], Any]) -> Any:
        with self._lock:
            self._before(operation)
            result = change()
            self._after(operation)
            return result

    def _changing(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def changed(where: Any, *args: Any, **options: Any) -> Any:
            path = _path(where, options.get("dir_fd"))
            change = lambda: function(where, *args, **options)  # noqa: E731
            if not path.startswith(self._folder) and path + os.sep != self._folder:
                return change()
            target = Path(_path(args[0], None)) if kind == "rename" else None
            return self.tell(Operation(kind, Path(path), target), change)

        return changed

    def _opening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def opened(where: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            open_file = lambda: function(where, mode, *args, **options)  # noqa: E731
            path = "" if isinstance(where, int) else _path(where, None)
            if not set(mode) & set("wxa+") or not path.startswith(self._folder):
                return open_file()
            file = self.tell(Operation("open", Path(path)), open_file)
            return _WatchedFile(file, Path(path), self)

        return opened


class _WatchedFile:
    """A file whose writes are told."""

    def __init__(self, file: Any, path: Path, watch: _Watch) -> None:
        self._file, self._path, self._watch = file, path, watch

    def write(self, data: Any) -> Any:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        operation = Operation("write", self._path, half=half)
        return self._watch.tell(operation, lambda: self._file.write(data))

    def __enter__(self) -> "_WatchedFile":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _path(where: Any, folder: int | None) -> str:
    """The absolute path of a name, or of an open file; `folder`: that a relative name lies in, opened."""
    if isinstance(where, int):
        return os.readlink(f"/proc/self/fd/{where}")
    name = os.fsdecode(where)
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}") if folder is not None else os.getcwd(), name)


def identity(path: Path) -> int:
    """What a file keeps while its names change."""
    return os.stat(path)[stat.ST_INO]
