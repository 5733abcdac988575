"""What the writer refuses, and what it does with other dtypes and odd contents."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from thresher.cache.contracts import Site, UserError
from thresher.cache.layout import Contexts
from thresher.cache.reader import CacheReader


def run_shard(toy: ModuleType, path: Path, spoil: Callable[[dict[str, torch.Tensor], np.ndarray], None], **k: object):  # type: ignore[no-untyped-def]
    """Write train shard 0 with activations changed by `spoil`, and wait for it."""
    with toy.open_writer(path, **k) as writer:
        shard = writer.shard("train", 0)
        acts = toy.activations("train", shard.contexts)
        spoil(acts, shard.contexts)
        shard.add(acts)
        shard.commit()
        writer.shard("train", 0) if writer.pending() else None
        writer.settle()


@pytest.mark.parametrize("codec", ["int8z", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_stops_and_is_located(
    codec: str, value: float, toy: ModuleType, tmp_path: Path
) -> None:
    where: list[int] = []

    def spoil(acts: dict[str, torch.Tensor], contexts: np.ndarray) -> None:
        acts["L00.mlp_out"][3, 11, 5] = value
        where.append(int(contexts[3]))

    with pytest.raises(UserError) as caught:
        run_shard(toy, tmp_path / "c", spoil, codec=codec)
    for part in ("'L00.mlp_out'", f"context {where[0]} of 'train'", "position 11"):
        assert part in str(caught.value)
    assert not list((tmp_path / "c").glob("commits/*.json"))


def test_a_value_that_is_not_stored_may_be_anything(toy: ModuleType, finished: Callable[..., Path]) -> None:
    reader = CacheReader.open(finished(store="kept"))
    assert (reader.provenance("train").position > 0).all()


def test_a_shard_above_the_gate_stops_with_advice_and_is_not_committed(toy: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'fvu_gate = 1e-07.*codec = "bf16"'):
        run_shard(toy, tmp_path / "c", lambda acts, contexts: None, fvu_gate=1e-7)
    assert not list((tmp_path / "c").glob("commits/*.json"))


def test_a_failed_commit_surfaces_at_the_next_call(toy: ModuleType, tmp_path: Path) -> None:
    with toy.open_writer(tmp_path / "c", fvu_gate=1e-7) as writer:
        shard = writer.shard("train", 0)
        shard.add(toy.activations("train", shard.contexts))
        shard.commit()
        with pytest.raises(UserError, match="loses too much"):
            writer.finalize()
        with pytest.raises(UserError, match="loses too much"):
            writer.shard("train", 1)


def test_an_abandoned_shard_leaves_nothing(toy: ModuleType, tmp_path: Path) -> None:
    with toy.open_writer(tmp_path / "c") as writer:
        before = len(writer.pending())
        shard = writer.shard("train", 0)
        shard.add(toy.activations("train", shard.contexts[:5]))
        shard.abandon()
        assert len(writer.pending()) == before
        assert writer.pending()[0] == ("train", 0)


@pytest.mark.parametrize("codec", ["int8z", "bf16"])
def test_bfloat16_activations_are_taken_as_they_are(codec: str, toy: ModuleType, tmp_path: Path) -> None:
    toy.fill(tmp_path / "low", codec=codec, dtype=torch.bfloat16)
    reader = CacheReader.open(tmp_path / "low")
    p = reader.provenance("train")
    for site in toy.SITES:
        acts = toy.activations("train", p.context, torch.bfloat16)[site.name]
        x = acts[torch.arange(len(p.context)), torch.from_numpy(p.position).long()]
        back = reader.gather("train", site.name, np.arange(len(p.context)))
        if codec == "bf16":
            assert torch.equal(back, x.float())
            assert reader.summary()["sites"][site.name]["fvu_worst_shard"] == 0.0
        else:
            assert (back - x.float()).square().sum() < 1e-3 * x.float().var(0).sum() * len(x)


def test_empty_test_split_is_allowed_and_empty_train_is_not(toy: ModuleType, tmp_path: Path) -> None:
    none = Contexts(np.zeros((0, 32), np.int32), np.zeros((0, 32), np.int32), np.zeros((0, 32), np.uint8))
    toy.fill(tmp_path / "c", contexts={"train": toy.CONTEXTS["train"], "test": none})
    reader = CacheReader.open(tmp_path / "c")
    assert reader.rows("test") == 0
    assert reader.provenance("test").token_id.shape == (0,)
    assert reader.contexts("test").token_id.shape == (0, 32)
    assert reader.gather("test", "L00.mlp_in", np.array([], np.int64)).shape == (0, 24)
    assert reader.verify() == []
    with pytest.raises(UserError, match="train split has 0 rows"):
        toy.open_writer(tmp_path / "d", contexts={"train": none})


def test_sites_that_cannot_be_folders_are_refused(toy: ModuleType, tmp_path: Path) -> None:
    for name in ("a/b", "keep", "contexts", "", ".hidden"):
        with pytest.raises(UserError, match="cannot name an array"):
            toy.open_writer(tmp_path / "c", sites=[Site(name, 0, "x", 4)])
    with pytest.raises(UserError, match="is empty"):
        toy.open_writer(tmp_path / "c", sites=[])
    with pytest.raises(UserError, match=r"codec is 'fp8'"):
        toy.open_writer(tmp_path / "c", codec="fp8")


def test_inference_tensors_are_taken(toy: ModuleType, finished: Callable[..., Path], tmp_path: Path) -> None:
    with torch.inference_mode(), toy.open_writer(tmp_path / "c") as writer:
        shard = writer.shard("train", 0)
        for at in range(0, len(shard.contexts), 4):
            shard.add(toy.activations("train", shard.contexts[at : at + 4]))
        shard.commit()
        writer.settle()
    name = "train/L00.mlp_in/c.0.0"
    assert (tmp_path / "c" / name).read_bytes() == (finished() / name).read_bytes()
