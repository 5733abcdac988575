"""Passes: results in memory that is used again, what a pass takes, and threads that are those of the beginning."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from thresher.harvest import fill, passes
from thresher.harvest.fill import pass_size
from thresher.harvest.footprint import Footprint, context_bytes
from thresher.harvest.passes import Job, Passes, threads_per_pass, workers_for
from thresher.harvest.settings import HarvestConfig
from thresher.harvest.target import TransformerTarget


def jobs(model: TransformerTarget, count: int) -> Iterator[Job]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield Job("train", 0, torch.randint(model.n_vocab, (2, 16), generator=generator), False, False)


def test_results_are_those_of_record_whether_given_back_or_kept(books: TransformerTarget) -> None:
    sites = books.sites(("mlp_in", "resid_post"))
    expected = [books.record(job.tokens, sites) for job in jobs(books, 9)]
    with Passes(books, sites) as running:
        kept = [done[1] for done in running.run(jobs(books, 9)) if done is not None]
        for i, done in enumerate(running.run(jobs(books, 9))):
            assert done is not None
            assert all(torch.equal(done[1][site.name], expected[i][site.name]) for site in sites)
            running.give(done[1])
    for i, acts in enumerate(kept):
        assert all(torch.equal(acts[site.name], expected[i][site.name]) for site in sites)


def test_results_given_back_take_one_room_more_than_passes_run_at_a_time(books: TransformerTarget) -> None:
    sites, places = books.sites(("mlp_in",)), set()
    with Passes(books, sites) as running:
        for done in running.run(jobs(books, 12)):
            assert done is not None
            places.add(done[1][sites[0].name].data_ptr())
            running.give(done[1])
        assert len(places) <= running.workers + 1


def test_footprint_counts_what_lives_at_one_time() -> None:
    layer, x_ND = nn.Linear(8, 16, bias=False), torch.ones(4, 8)
    with torch.inference_mode(), Footprint() as footprint:
        y_NE = layer(x_ND)  # 4 × 16
        z_NE = y_NE + 1  # another
        del y_NE
        z_NE.mul_(2).view(2, 32)  # none
        w_NE = torch.cat([z_NE, z_NE])  # two more, as the first is gone
    assert footprint.peak_bytes == 3 * 4 * 16 * 4
    assert footprint.bytes == 3 * 4 * 16 * 4
    del w_NE, z_NE
    assert footprint.bytes == 0


def test_a_pass_takes_as_many_times_more_as_it_has_contexts(books: TransformerTarget) -> None:
    sites = books.sites(("mlp_in", "mlp_out"))
    one = context_bytes(books, sites, 64)
    assert one > 64 * books.model.config.n_embd * 4 * 8  # at the least the MLP's hidden layer, twice
    assert context_bytes(books, sites, 128) == pytest.approx(2 * one, rel=0.05)


def test_a_cache_that_is_gone_on_with_keeps_contexts_and_threads_of_its_passes(
    books: TransformerTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = books.sites(("mlp_in",))
    monkeypatch.setattr(passes.torch, "get_num_threads", lambda: 32)
    here = pass_size(HarvestConfig(), books, sites, 256, {})
    assert here == (fill.BATCH_TOKENS["cpu"] // 256, 4)
    assert (threads_per_pass(), workers_for(books)) == (4, 8)
    begun = {"device": "cpu", "batch_contexts": 3, "threads_per_pass": 1}
    assert pass_size(HarvestConfig(), books, sites, 256, begun) == (3, 1)
    assert pass_size(HarvestConfig(), books, sites, 256, begun | {"device": "cuda:0"}) == here
    assert (workers_for(books, threads=1), workers_for(books, threads=16)) == (8, 2)
    monkeypatch.setattr(passes.torch, "get_num_threads", lambda: 2)
    assert workers_for(books, threads=4) == 1
