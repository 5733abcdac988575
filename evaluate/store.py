"""Sums of earlier evaluations, found by content: what was measured once is not measured again.

    KEY.npz        the whole sums of one ledger (evaluate/ledger.py), or what was learned from training rows
    KEY.part.npz   those of an evaluation that was stopped, after so many batches of so many contexts

KEY is a fingerprint of everything that the sums depend on: target, text, masks, protocols, the dictionaries' weights
and the definitions. A file that cannot be read counts as missing, since it can be computed again; files are
replaced whole.
"""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from thresher.evaluate.ledger import Ledger

_DONE, _CONTEXTS = "done", "batch_contexts"


class Store:
    """A directory of sums."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take_up(self, ledger: Ledger, batch_contexts: int, batches: int, device: torch.device) -> None:
        """Fill an empty ledger with what is known of it; `done` says how far that goes."""
        if ledger.key is None:
            return
        whole = self._read(self._path(ledger.key, whole=True))
        part = None if whole is not None else self._read(self._path(ledger.key, whole=False))
        if whole is not None:
            ledger.done = batches
        elif part is not None and int(part[_CONTEXTS]) == batch_contexts:
            ledger.done = int(part[_DONE])
        found = whole if whole is not None else part
        if found is not None and ledger.done:
            ledger.load({name: found[name] for name in found if name not in (_DONE, _CONTEXTS)}, device)

    def put(self, ledger: Ledger, batch_contexts: int, *, whole: bool) -> None:
        """Keep a ledger's sums, if it has a key."""
        if ledger.key is None:
            return
        arrays = {**ledger.arrays(), _DONE: np.asarray(ledger.done), _CONTEXTS: np.asarray(batch_contexts)}
        self._write(self._path(ledger.key, whole=whole), arrays)
        if whole:
            self._path(ledger.key, whole=False).unlink(missing_ok=True)

    def get(self, key: str) -> dict[str, np.ndarray] | None:
        """Arrays that were set under a key."""
        return self._read(self._path(key, whole=True))

    def set(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays under a key."""
        self._write(self._path(key, whole=True), arrays)

    def _write(self, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        with unfinished.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **dict(arrays))
        os.replace(unfinished, path)

    def _path(self, key: str, *, whole: bool) -> Path:
        return self.folder / (f"{key}.npz" if whole else f"{key}.part.npz")

    @staticmethod
    def _read(path: Path) -> dict[str, np.ndarray] | None:
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, zipfile.BadZipFile, KeyError, EOFError):
            return None
