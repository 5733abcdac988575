"""Files that ranks write together: byte for byte those of one process, whole or not there, never whole in memory."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.groups import latent_meshes, side_by_side
from tests.train.conftest import plans_for
from thresher.cache.errors import UserError
from thresher.cache.reader import CacheReader
from thresher.cache.records import to_dict
from thresher.train import streamed
from thresher.train.dictionary import drawing
from thresher.train.dictionary.drawing import drawn_rows
from thresher.train.dictionary.holding import Holding
from thresher.train.dictionary.initial import generator
from thresher.train.files import load_run, save_run
from thresher.train.fit import Fit
from thresher.train.mesh import Group, Mesh
from thresher.train.state import Checkpoint, load_checkpoint, save_checkpoint
from thresher.train.streamed import Writers, publish_together, read_rows
from thresher.train.views import Views

BOUNDS = (0, 3, 4, 9)
"""Latents of three ranks."""
SHARED = ("model.W_dec.0", "model.W_enc", "model.counter", "optimiser.1.exp_avg", "low")


def whole_tensors() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        "model.W_enc": torch.randn(9, 5, generator=rng),
        "model.W_dec.0": torch.randn(9, 2, 3, generator=rng),
        "model.counter": torch.arange(9),
        "model.threshold": torch.tensor(0.5, dtype=torch.float64),
        "optimiser.1.exp_avg": torch.randn(9, 7, generator=rng, dtype=torch.float64),
        "optimiser.1.step": torch.tensor(3.0),
        "low": torch.randn(9, generator=rng).bfloat16(),
        "empty": torch.zeros(0, 4),
    }


def holding(group: Group) -> Holding:
    return Holding(group=group, bounds=BOUNDS)


def publish(path: Path, mesh: Mesh, **settings: Any) -> None:
    """One rank's part of writing `whole_tensors`."""
    mine = holding(mesh.latents)
    own = {n: t[mine.first : mine.stop].clone() if n in SHARED else t for n, t in whole_tensors().items()}
    whole = {name: tuple(whole_tensors()[name].shape) for name in SHARED}
    publish_together(path, own, whole, Writers(mine, mesh.everyone, mesh.data.index == 0), **settings)


@pytest.mark.parametrize("data", [1, 2])
def test_the_file_is_the_one_of_a_single_process_byte_for_byte(
    tmp_path: Path, data: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "_PIECE", 4)  # numbers: every tensor in several pieces
    safetensors.torch.save_file(whole_tensors(), tmp_path / "one")
    side_by_side(lambda mesh: publish(tmp_path / "sub" / "all", mesh), latent_meshes(3, data))
    assert (tmp_path / "sub" / "all").read_bytes() == (tmp_path / "one").read_bytes()
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["all"]
    mine = slice(3, 4)
    found = read_rows(tmp_path / "one", lambda name, _: mine if name in SHARED else None)
    for name, tensor in whole_tensors().items():
        assert torch.equal(found[name], tensor[mine] if name in SHARED else tensor)


def told_on(work: Callable[[Mesh], None], ranks: int = 3) -> list[str]:
    """What every rank ends with."""

    def ended(mesh: Mesh) -> str:
        try:
            work(mesh)
        except UserError as error:
            return str(error)
        return ""

    return list(side_by_side(ended, latent_meshes(ranks)))


def test_a_disk_that_is_full_for_one_rank_stops_all_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = streamed._write_rows

    def full(temporary: Path, path: Path, plan: Any, tensors: Any, whole: Any, by: Writers) -> None:
        if by.everyone.index == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(temporary, path, plan, tensors, whole, by)

    monkeypatch.setattr(streamed, "_write_rows", full)
    first, second, third = told_on(lambda mesh: publish(tmp_path / "all", mesh))
    assert "No space left on device" in second
    assert "rank 1 of the 3 that share the dictionary could not do its part" in first
    assert first == third
    assert list(tmp_path.iterdir()) == []


def test_a_leader_that_has_no_room_stops_all_before_anything_is_written(tmp_path: Path) -> None:
    def no_room(needed: int) -> None:
        raise UserError(f"{needed} bytes are too many")

    first, *others = told_on(lambda mesh: publish(tmp_path / "all", mesh, before=no_room))
    assert "bytes are too many" in first
    assert all("rank 0 of the 3" in other for other in others)
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_do_not_see_one_file_system_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "_SEEN_SECONDS", 0.0)

    def work(mesh: Mesh) -> None:
        place = tmp_path / str(mesh.latents.index)
        place.mkdir()
        publish(place / "all", mesh)

    first, second, third = told_on(work)
    assert "rank 1 of the 3" in first
    assert "is not the same on all ranks" in second
    assert "is not the same on all ranks" in third
    assert not [file for place in tmp_path.iterdir() for file in place.iterdir()]


@pytest.mark.parametrize("width", [1, 3, 16, 50, 257])
@pytest.mark.parametrize("draw", [torch.rand, torch.randn])
def test_rows_are_drawn_as_if_all_were(
    width: int, draw: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "_DRAWN", 64)
    bounds = (0, 1, 18, 41)
    whole, after = generator(0, "rows"), []
    expected = draw(41, width, generator=whole)
    for rank in range(3):
        rng = generator(0, "rows")
        mine = Holding(group=Group(rank, 3), bounds=bounds)
        assert torch.equal(drawn_rows(draw, width, rng, mine), expected[mine.first : mine.stop])
        after.append(torch.rand(3, generator=rng))
    assert all(torch.equal(one, torch.rand(3, generator=whole)) for one in after[:1])  # what is drawn next is the same
    assert torch.equal(after[0], after[2])


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, in numbers; bytes are views of those."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.dtype != torch.uint8:
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_no_rank_holds_a_whole_matrix_when_it_begins_saves_or_loads(
    cache: CacheReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "_DRAWN", 1 << 10)
    monkeypatch.setattr(streamed, "_PIECE", 1 << 10)
    latents, ranks = 20_000, 4
    (plan,) = plans_for(cache, "wide", kind="sae", firing="topk", k=3, n_latents=latents, layers=(1,))
    monkeypatch.setattr("thresher.train.fit._SAMPLE_ROWS", 8)
    whole = latents * plan.spec.d_in
    sites = {*plan.spec.reads, *plan.spec.writes}
    (tmp_path / "run").mkdir()

    def work(mesh: Mesh) -> int:
        with Largest() as seen:
            fit = Fit(plan, cache, torch.device("cpu"), mesh=mesh)
            fit.start(cache)
            fit.step(fit.inputs(Views({site: cache.gather("train", site, np.arange(8)) for site in sites})), 8)
            assert fit.writers is not None
            save_checkpoint(tmp_path, fit.checkpoint(), by=fit.writers)
            found = load_checkpoint(tmp_path, fit.rows_of)
            assert isinstance(found, Checkpoint)
            fit.load(found)
            config = {"name": "wide", "dictionary": to_dict(plan.spec), "training": {"finished": True}}
            save_run(tmp_path / "run", fit.deployed(), config, fit.writers)
            load_run(tmp_path / "run", holding=fit.coder.holding)
        return seen.numbers

    largest = side_by_side(work, latent_meshes(ranks))
    assert max(largest) < 0.3 * whole, [number / whole for number in largest]
    assert load_run(tmp_path / "run").dictionary.n_latents == latents
