"""Safetensors files of dictionaries whose latents several ranks share: written together, read in part.

The file is the one that a single process would write, header byte for byte. The rank that leads makes it under a
temporary name, with the header of the whole tensors and room for all of them; every rank then writes its own rows where
they belong, a piece at a time, and flushes them; once all have, the leader gives the file its name. So nobody ever
holds more than its rows, and whoever sees the name sees all of it. What fails on one rank fails on all: they tell one
another after every stage, and the leader takes the temporary file away.

All ranks have to see one file system; whoever does not find the temporary file says so.
"""

import functools
import json
import os
import secrets
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor

from thresher.cache.errors import UserError
from thresher.cache.publish import explained, flush_directory, make_directory
from thresher.train.dictionary.holding import Holding
from thresher.train.mesh import Group

_PIECE = 1 << 22
"""Numbers that are brought from a device and written at a time."""
_SEEN_SECONDS = 30.0
"""How long a file system may take to show a file that another host has made."""
_NAMES = {torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16"}
"""What safetensors calls a format, in the order in which it stores tensors."""

RowsOf = Callable[[str, int], slice | None]
"""Rows of a tensor that a rank has, by the tensor's name and number of dimensions; None: it has all."""
Whole = Mapping[str, tuple[int, ...]]
"""Shapes of the whole tensors, by name, of those of which a rank has rows."""


class Writers(NamedTuple):
    """Who writes a file together."""

    holding: Holding
    everyone: Group
    """All who wait for it."""
    writes: bool
    """Whether this rank writes its rows: one of those that have the same."""

    @property
    def leads(self) -> bool:
        """Whether it writes what all have, and gives the file its name."""
        return self.everyone.index == 0

    def together(self, path: Path, act: Callable[[], None]) -> None:
        """Let every rank do its part, and go on when all have; a collective.

        Raises what failed here, and UserError where it failed elsewhere.
        """
        failure: Exception | None = None
        try:
            act()
        except (OSError, UserError) as error:
            failure = error
        failed = self.everyone.gather(torch.tensor([int(failure is not None)])).view(-1).tolist()
        if failure is not None:
            raise failure
        if any(failed):
            raise UserError(
                f"{path} was not written: rank {failed.index(1)} of the {len(failed)} that share the dictionary "
                "could not do its part, and says why. What was saved before stays: go on from there with --resume."
            )


class Place(NamedTuple):
    """Where a tensor stands in a file."""

    start: int
    """First byte."""
    shape: tuple[int, ...]
    """Of the whole tensor."""


class Plan(NamedTuple):
    """A file before it is written."""

    header: bytes
    places: dict[str, Place]
    size: int


def plan_file(tensors: Mapping[str, Tensor], whole: Whole) -> Plan:
    """Header and places of a file, as safetensors lays it out: wide formats first, then by name."""
    shapes = {name: tuple(whole.get(name, tensor.shape)) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (list(_NAMES).index(tensors[name].dtype), name.encode()))
    entries, offsets, end = {}, {}, 0
    for name in order:
        numbers = 1
        for side in shapes[name]:
            numbers *= side
        offsets[name], end = end, end + numbers * tensors[name].element_size()
        kind = _NAMES[tensors[name].dtype]
        entries[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    places = {name: Place(len(header) + offsets[name], shapes[name]) for name in order}
    return Plan(header, places, len(header) + end)


def publish_together(
    path: Path, tensors: Mapping[str, Tensor], whole: Whole, by: Writers, before: Callable[[int], None] | None = None
) -> None:
    """Write a safetensors file that appears whole or not at all, from the rows that each rank has; collective.

    `before`: asked by the leader, with the bytes it is going to take, whether it may. Raises UserError on all ranks
    when one of them cannot write.
    """
    plan = plan_file(tensors, whole)
    mark = torch.tensor([secrets.randbits(48)])
    temporary = path.with_name(f"{path.name}.{int(by.everyone.gather(mark)[0]):012x}.tmp")

    def create() -> None:
        if before is not None:
            before(plan.size)
        make_directory(path.parent)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.truncate(descriptor, plan.size)
            _write(descriptor, 0, memoryview(plan.header))
        finally:
            os.close(descriptor)

    def finish() -> None:
        temporary.rename(path)
        flush_directory(path.parent)

    def write() -> None:
        _write_rows(temporary, path, plan, tensors, whole, by)

    try:
        for act, all_do in ((create, False), (write, True), (finish, False)):
            if all_do or by.leads:
                by.together(path, functools.partial(_explained, path, plan.size, act))
            else:
                by.together(path, _nothing)
    finally:
        if by.leads:
            temporary.unlink(missing_ok=True)


def _nothing() -> None:
    """What a rank does while another one does its part."""


def _explained(path: Path, size: int, act: Callable[[], None]) -> None:
    try:
        act()
    except OSError as error:
        raise explained(error, path, size) from error


def _write_rows(
    temporary: Path, path: Path, plan: Plan, tensors: Mapping[str, Tensor], whole: Whole, by: Writers
) -> None:
    """This rank's rows, and on the leader what all have."""
    if not by.writes:
        return
    descriptor = _found(temporary, path)
    try:
        for name, tensor in tensors.items():
            if name in whole:
                row = tensor[0].numel() * tensor.element_size()
                _write_tensor(descriptor, plan.places[name].start + by.holding.first * row, tensor)
            elif by.leads:
                _write_tensor(descriptor, plan.places[name].start, tensor)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _found(temporary: Path, path: Path) -> int:
    """A descriptor of the file that the leader has made."""
    until = time.monotonic() + _SEEN_SECONDS
    while True:
        try:
            return os.open(temporary, os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"{path.parent} is not the same on all ranks that share the dictionary: the file that one of them "
                    "has just made there is not to be seen here. Expected a file system that all hosts share; name a "
                    "place on one with --runs."
                ) from error
        time.sleep(0.1)


def _write_tensor(descriptor: int, offset: int, tensor: Tensor) -> None:
    for piece in _pieces(tensor):
        _write(descriptor, offset, piece)
        offset += len(piece)


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    for piece in tensor.detach().reshape(-1).split(_PIECE):
        yield memoryview(piece.cpu().contiguous().view(torch.uint8).numpy())


def _write(descriptor: int, offset: int, view: memoryview) -> None:
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


def read_rows(path: Path, rows_of: RowsOf) -> dict[str, Tensor]:
    """Tensors of a file by name; of those that `rows_of` has an answer for, these rows alone.

    Raises OSError or SafetensorError when it cannot be read.
    """
    found = {}
    with safetensors.safe_open(path, framework="pt") as file:  # which looks whether the file is whole
        names = list(file.keys())
    with path.open("rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(size))
        for name in names:
            shape, (offset, _) = header[name]["shape"], header[name]["data_offsets"]
            rows = rows_of(name, len(shape)) or slice(0, shape[0] if shape else 1)
            kind = next(kind for kind, called in _NAMES.items() if called == header[name]["dtype"])
            tensor = torch.empty([rows.stop - rows.start, *shape[1:]] if shape else [], dtype=kind)
            if tensor.numel():
                each = tensor.nbytes // (rows.stop - rows.start)
                raw.seek(8 + size + offset + rows.start * each)
                raw.readinto(tensor.view(-1).view(torch.uint8).numpy().data)
            found[name] = tensor
    return found
