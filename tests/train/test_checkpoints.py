"""Checkpoints: whole or not at all, the last two kept, and none begun that the disk cannot take."""

import os
from pathlib import Path

import pytest
import torch

from thresher.cache.errors import UserError
from thresher.train import state
from thresher.train.state import Checkpoint, latest_position, load_checkpoint, save_checkpoint


def checkpoint(step: int, rows: int = 4) -> Checkpoint:
    return Checkpoint(step, 10 * step, {"model.a": torch.full((rows, 3), float(step)), "adam.b": torch.ones(2)})


def names(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "checkpoints").iterdir())


def test_the_last_two_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    assert latest_position(tmp_path) == (0, 0)
    for step in (1, 5, 12):
        save_checkpoint(tmp_path, checkpoint(step))
    assert names(tmp_path) == [f"step-{n:08d}.{kind}" for n in (5, 12) for kind in ("json", "safetensors")]
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.position) == latest_position(tmp_path) == (12, 120)
    assert torch.equal(found.tensors["model.a"], torch.full((4, 3), 12.0))


def test_a_checkpoint_that_the_disk_cannot_take_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "free_bytes", lambda path: 55)
    with pytest.raises(UserError, match=r"step 1 needs 56 bytes, but 55 are free.*It has none before it.*--resume"):
        save_checkpoint(tmp_path, checkpoint(1))
    monkeypatch.setattr(state, "free_bytes", lambda path: 56)
    save_checkpoint(tmp_path, checkpoint(1))
    save_checkpoint(tmp_path, checkpoint(2))
    before = names(tmp_path)
    with pytest.raises(UserError, match="Its checkpoint of step 2 is whole"):
        save_checkpoint(tmp_path, checkpoint(3, rows=5))
    assert names(tmp_path) == before


def test_a_write_that_fails_half_way_leaves_the_last_good_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    before = names(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match="No space left"):
            save_checkpoint(tmp_path, checkpoint(2))
    assert names(tmp_path) == before
    assert latest_position(tmp_path) == (1, 10)


def test_tensors_without_their_record_do_not_count(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    save_checkpoint(tmp_path, checkpoint(2))
    (tmp_path / "checkpoints" / "step-00000002.json").unlink()  # as when the power fails between the two
    assert latest_position(tmp_path) == (1, 10)
    (tmp_path / "checkpoints" / "step-00000003.safetensors.0a1b.tmp").touch()
    save_checkpoint(tmp_path, checkpoint(4))
    assert names(tmp_path) == [f"step-{n:08d}.{kind}" for n in (1, 4) for kind in ("json", "safetensors")]


def test_a_damaged_checkpoint_says_how_to_go_on(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    save_checkpoint(tmp_path, checkpoint(2))
    (tmp_path / "checkpoints" / "step-00000002.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"Delete step-00000002\.json to go on from the one before it"):
        load_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "step-00000002.json").unlink()
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
