"""Which runs the page may show: those it was started with, or those found under a folder. Nothing else can be named in an address."""

import hashlib
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from async_rlhf.dashboard.folder import RunFolder, is_run

MAX_RUNS = 500
"""The newest ones are listed."""


class Catalogue:
    """Runs by their name in an address. Safe for several threads: one at a time looks into runs."""

    def __init__(self, given: Sequence[Path], root: Path) -> None:
        """
        Args:
            given: run folders; none: those found in `root`, looked for again at each listing.
        """
        self._given = [folder.resolve() for folder in given]
        self._root = root
        self._runs: dict[str, RunFolder] = {}
        self._lock = threading.Lock()

    @property
    def follows(self) -> bool:
        """Whether runs are looked for."""
        return not self._given

    def folders(self) -> list[Path]:
        """The run folders; those looked for newest first."""
        if self._given:
            return self._given
        try:
            # Without following links: a run folder in `root` lies in `root`.
            found = [path for path in self._root.iterdir() if path.is_dir() and not path.is_symlink() and is_run(path)]
            return sorted((path.resolve() for path in found), key=lambda path: -(path / "config.yaml").stat().st_mtime_ns)[:MAX_RUNS]
        except OSError:  # no such folder, or one that is going
            return []

    @contextmanager
    def listed(self) -> Generator[dict[str, RunFolder]]:
        """All runs by name, in order."""
        with self._lock:
            folders = {name_of(folder): folder for folder in self.folders()}
            self._runs = {name: self._runs.get(name) or RunFolder(folder) for name, folder in folders.items()}
            yield self._runs

    @contextmanager
    def opened(self, name: str) -> Generator[RunFolder | None]:
        """The run of this name, read anew; None where there is none."""
        if name not in self._runs:
            with self.listed():
                pass
        with self._lock:
            run = self._runs.get(name)
            if run is not None:
                run.refresh()
            yield run

    @contextmanager
    def all_opened(self, names: Sequence[str]) -> Generator[dict[str, RunFolder]]:
        """Several runs, read anew; names of no run are left out."""
        with self.listed() as runs:
            found = {name: runs[name] for name in dict.fromkeys(names) if name in runs}
            for run in found.values():
                run.refresh()
            yield found


def name_of(folder: Path) -> str:
    """What a run is called in addresses: two folders of the same name differ."""
    return hashlib.blake2b(str(folder).encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()
