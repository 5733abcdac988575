"""The toy as a target: its rows, sites and truths; exact solutions entered by hand are perfect."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.program import thresher
from thresher.cache.contracts import Site
from thresher.cache.errors import UserError
from thresher.cache.layout import Contexts
from thresher.commands.toy import _save
from thresher.evaluate import recovery
from thresher.evaluate.checks import Replacement
from thresher.evaluate.vector_report import flat, markdown, to_json, write_vector_report
from thresher.evaluate.vectors import VectorResults, evaluate_vectors
from thresher.harvest.corpus import DataConfig, read_corpus
from thresher.harvest.documents import documents
from thresher.harvest.target import TargetConfig, TransformerTarget, load_target
from thresher.harvest.toy_inputs import ToyInputs, input_rows
from thresher.interop.canonical import Canonical, Source, to_coder
from thresher.toy.baselines import half_identity
from thresher.toy.targets import TARGETS, Stack, chain, made, xor
from thresher.train.dictionary.coder import Coder
from thresher.train.directions import directions

N = 20


def small(folder: Path, mode: str = "single", layers: int = 1) -> TransformerTarget:
    """A random toy model with a label."""
    generator = torch.Generator().manual_seed(0)
    w_in, w_out = (torch.randn(layers, *shape, generator=generator) / 4 for shape in ((N, 10), (10, N)))
    mixing = 0.1 * torch.randn(N, N, generator=generator)
    _save(Stack(w_in, w_out, mode, 0.1, "a test's", mixing=mixing), folder, seed=5)  # type: ignore[arg-type]
    return load_target(TargetConfig(model=str(folder), dtype="float32", device="cpu"))


def contexts(rows: int = 16) -> Contexts:
    ids = np.arange(rows * 64, dtype=np.int32).reshape(rows, 64)
    return Contexts(ids, np.arange(rows, dtype=np.int32)[:, None].repeat(64, 1), np.ones((rows, 64), np.uint8))


def judge(target: TransformerTarget, coders: Sequence[Coder]) -> VectorResults:
    whole = Replacement("by hand", tuple(coders), {"kind": coders[0].spec.kind, "firing": "relu"})
    return evaluate_vectors(
        [whole],
        target,
        contexts(),
        known={id(coder): directions(coder) for coder in coders},
        protocols=("cascade", "clean_input", "single_site"),
        tokens=0,
        provenance={},
    )


def entered(
    target: TransformerTarget,
    reads: Sequence[str],
    writes: Sequence[str],
    kind: str,
    rows: slice = slice(None),
    skip: torch.Tensor | None = None,
) -> Coder:
    """The exact solution of the first site read, as a dictionary: its encoder rows and all that they write."""
    sites = {site.name: site for site in target.sites([*reads, *writes])}
    truths = target.truths(list(sites.values()))
    assert truths is not None
    read = truths.directions[reads[0]]
    left = 0 if skip is None else read @ skip.double().T
    sources = []
    for s, name in enumerate(reads):
        written = torch.stack([truths.directions[w] - left for w in writes[s:]], 1)[rows]
        unit = truths.directions[name][rows]
        used, zeros = float(s == 0), torch.zeros(len(unit)).double()
        encoder = used * unit / unit.norm(dim=1, keepdim=True) ** 2
        sources.append(Source(encoder, zeros, zeros, used * written))
    width = sites[writes[0]].width
    return to_coder(
        Canonical(
            "exact",
            kind,  # type: ignore[arg-type]
            tuple(reads),
            tuple(writes),
            tuple(sites[name].layer for name in reads),
            "relu",
            None,
            tuple(sources),
            tuple(torch.zeros(width).double() for _ in writes),
            None if skip is None else (skip.double(),),
        )
    )


def test_the_exact_solution_entered_by_hand_is_perfect(tmp_path: Path) -> None:
    target = small(tmp_path)
    row, *baselines = judge(target, [entered(target, ["L00.mlp_in"], ["L00.mlp_out"], "transcoder")]).rows
    numbers = flat(row)
    assert numbers["fvu"] < 1e-10
    assert numbers["l0"] == numbers["l0_ratio"] == pytest.approx(1, abs=1e-6)
    assert numbers["dead"] == numbers["duplicates"] == numbers["missing"] == 0
    for key in ("encoder", "decoder", "encoder_weighted", "decoder_weighted", "encoder_matched", "decoder_matched"):
        assert numbers[key] == pytest.approx(1, abs=1e-6)
        assert numbers[f"{key}_null"] < 0.8
    assert max(row.output_mse.values()) < 1e-12
    assert min(next(iter(one.output_mse.values())) for one in baselines) > 1e-4


def test_several_active_features_break_exactness_inside_the_mlp(tmp_path: Path) -> None:
    target = small(tmp_path, "bernoulli")
    row = judge(target, [entered(target, ["L00.mlp_in"], ["L00.mlp_out"], "transcoder")]).rows[0]
    assert flat(row)["fvu"] > 0.01
    assert flat(row)["l0_ratio"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("mode", ["single", "bernoulli"])
def test_a_skip_and_a_plain_solution_of_the_label_are_exact_for_any_inputs(mode: str, tmp_path: Path) -> None:
    target = small(tmp_path, mode)
    label = "blocks.0.hook_label"
    mixing = target.model.h[0].label.mixing
    plain = entered(target, ["L00.mlp_in"], [label], "transcoder")
    skipping = entered(target, ["L00.mlp_in"], [label], "transcoder", slice(0, N), mixing)
    for coder, latents in ((plain, 2 * N), (skipping, N)):
        row = judge(target, [coder]).rows[0]
        numbers = flat(row)
        assert numbers["fvu"] < 1e-10
        assert numbers["truths"] == latents
        assert numbers["decoder"] == pytest.approx(1, abs=1e-6)
        assert numbers["l0_ratio"] == pytest.approx(1, abs=1e-6)
        assert numbers["missing"] == 0


def test_a_chain_needs_one_latent_of_a_clt_and_one_per_layer_of_transcoders(tmp_path: Path) -> None:
    _save(chain(features=6, layers=3), tmp_path, seed=0)
    target = load_target(TargetConfig(model=str(tmp_path), dtype="float32", device="cpu"))
    reads, writes = [f"L{i:02d}.mlp_in" for i in range(3)], [f"L{i:02d}.mlp_out" for i in range(3)]
    clt = flat(judge(target, [entered(target, reads, writes, "clt", slice(0, 6))]).rows[0])
    each = [entered(target, [r], [w], "transcoder", slice(0, 6)) for r, w in zip(reads, writes, strict=True)]
    transcoders = flat(judge(target, each).rows[0])
    assert clt["fvu"] < 1e-10
    assert transcoders["fvu"] < 1e-10
    assert clt["l0_ratio"] == pytest.approx(1)
    assert transcoders["l0_ratio"] == pytest.approx(3)


def test_the_xor_network_computes_xor_and_can_be_bypassed(tmp_path: Path) -> None:
    _save(xor(pairs=3), tmp_path, seed=0)
    target = load_target(TargetConfig(model=str(tmp_path), dtype="float32", device="cpu"))
    ids = torch.arange(64)[None]
    out = target.logits(ids)[0]
    a, b = out[:, :3] > 0, out[:, 3:6] > 0
    torch.testing.assert_close(out[:, -3:], (a ^ b).float())
    torch.testing.assert_close(out[:, 7:10], (a & b).float())
    (first, second) = target.sites(["mlp_out"])
    truths = target.truths([first, second])
    assert truths is not None
    # one of a pair alone: nothing in layer 0, XOR in layer 1; both: AND and then nothing
    assert not truths.directions[first.name][:6].any()
    assert not truths.directions[second.name][6:].any()
    assert truths.directions[second.name][:6].sum() == 6


def test_recovery_sees_duplicates_missing_truths_and_signs() -> None:
    truth = recovery.truth_of(torch.eye(3).double(), torch.eye(3).double())
    rows = torch.eye(3).double()[[0, 0, 1]]
    rows[2] *= -1  # of the right line, and the wrong sign
    found = recovery.recovery(truth, rows, rows)
    assert found.duplicates == 1
    assert found.missing == 2
    assert found.encoder == pytest.approx(2 / 3)
    assert found.encoder_matched == pytest.approx((1 + 0 - 0) / 3)
    assert recovery.null(truth, 3) == recovery.null(truth, 3)
    nothing = recovery.recovery(truth, rows[:0], rows[:0])
    assert (nothing.encoder, nothing.missing) == (0.0, 3)


def test_weights_of_truths_are_what_they_write() -> None:
    truth = recovery.truth_of(torch.eye(2).double(), torch.diag(torch.tensor([3.0, 1.0])).double())
    found = recovery.recovery(truth, torch.eye(2).double()[:1], torch.eye(2).double()[:1])
    assert found.decoder == pytest.approx(0.5)
    assert found.decoder_weighted == pytest.approx(0.9)
    assert (found.missing, found.missing_weight) == (1, pytest.approx(0.1))


def test_a_row_is_a_function_of_its_number_alone() -> None:
    inputs = ToyInputs(mode="bernoulli", p=0.1, seed=3)
    numbers = torch.randint(1 << 31, (4, 64), generator=torch.Generator().manual_seed(0))
    x = input_rows(inputs, numbers, 50)
    assert x.shape == (4, 64, 50)
    assert torch.equal(x[2, 5], input_rows(inputs, numbers[2, 5:6], 50)[0])
    assert not torch.equal(x, input_rows(ToyInputs(mode="bernoulli", p=0.1, seed=4), numbers, 50))


@pytest.mark.parametrize(("mode", "rate"), [("bernoulli", 0.1), ("single", 1 / 50)])
def test_rows_by_number_are_distributed_like_drawn_ones(mode: str, rate: float) -> None:
    x = input_rows(ToyInputs(mode=mode, p=0.1, seed=0), torch.arange(20_000), 50)  # type: ignore[arg-type]
    active = x != 0
    assert active.float().mean().item() == pytest.approx(rate, rel=0.03)
    assert x[active].square().mean().item() == pytest.approx(1 / 3, rel=0.03)
    assert x[active].mean().item() == pytest.approx(0, abs=0.02)
    if mode == "single":
        assert (active.sum(1) == 1).all()
    counts = active.float().mean(0)
    assert counts.min() > 0.8 * rate
    assert torch.corrcoef(active[:, :8].T.float()).fill_diagonal_(0).abs().max() < 0.05


def test_the_corpus_of_a_toy_is_row_numbers() -> None:
    data = DataConfig(
        source="rows:6_400", packing="document", bos=False, separator="none", keep="all", test_fraction=0.2
    )
    corpus = read_corpus(data, None, 64, 1 << 31, Console(quiet=True))
    ids = np.concatenate([split.token_id.ravel() for split in corpus.splits.values()])
    assert sorted(ids) == list(range(6400))
    assert all((split.keep == 1).all() for split in corpus.splits.values())


@pytest.mark.parametrize("source", ["rows:", "rows:0", "rows:many", "rows:3000000000"])
def test_a_number_of_rows_that_is_none_is_refused(source: str) -> None:
    with pytest.raises(UserError, match="rows:N"):
        list(documents(DataConfig(source=source).place))


def test_sites_of_a_toy_are_those_of_any_target(tmp_path: Path) -> None:
    target = small(tmp_path, layers=2)
    names = [site.name for site in target.sites(["resid_pre", "mlp_in", "mlp_hidden", "mlp_out", "resid_post"])]
    assert len(names) == 10
    acts = target.record(torch.arange(8)[None], target.sites(["resid_pre", "mlp_out", "resid_post"]))
    torch.testing.assert_close(acts["L00.resid_pre"] + acts["L00.mlp_out"], acts["L00.resid_post"])
    torch.testing.assert_close(acts["L00.resid_post"], acts["L01.resid_pre"])
    with pytest.raises(UserError, match="resid_mid"):
        target.sites(["resid_mid"])


def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path: Path) -> None:
    small(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "neurons": 11}))
    with pytest.raises(UserError, match="does not hold the ToyStack"):
        load_target(TargetConfig(model=str(tmp_path), device="cpu"))


def test_a_language_model_has_no_truths() -> None:
    target = load_target(TargetConfig(device="cpu"))
    assert target.truths(target.sites(["mlp_in"])) is None


@pytest.mark.parametrize("name", TARGETS)
def test_bundled_toys_load_and_are_what_their_maker_makes(name: str) -> None:
    target = load_target(TargetConfig(model=f"bundled:toy-{name}", device="cpu"))
    if name in ("embed", "chain", "xor"):
        stack = made(name, 0, 0)
        torch.testing.assert_close(target.model.h[0].mlp.w_in.weight, stack.w_in[0])
    with pytest.raises(UserError, match="Did you mean"):
        made(f"{name}x", 0, 0)


def test_the_report_has_every_number(tmp_path: Path) -> None:
    target = small(tmp_path / "model")
    results = judge(target, [entered(target, ["L00.mlp_in"], ["L00.mlp_out"], "transcoder")])
    results = results._replace(provenance={**results.provenance, "runs": []})
    paths = write_vector_report(results, tmp_path / "report")
    stored = json.loads(paths.json.read_text())
    assert stored == json.loads(json.dumps(to_json(results)))
    assert "by hand" in paths.html.read_text()
    assert "by hand" in markdown(results)
    assert all(path.stat().st_size > 1000 for path in paths.plots)


def test_harvest_train_and_evaluate_work_on_a_toy_as_on_any_target(tmp_path: Path) -> None:
    sets = ["data.source=rows:6400", "train.batch_rows=512", "train.epochs=1", "dictionary.dead_after=2000"]
    for command in ("harvest", "train", "evaluate"):
        done = thresher(tmp_path, command, "toy-chain", sets=sets)
        assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "reports/toy-chain/results.json").read_text())
    rows = {row["name"]: row["metrics"] for row in results["rows"]}
    assert set(rows) == {"transcoder-batchtopk", "clt-batchtopk", "clt-joint", "mean ablation", "zero ablation"}
    for name in ("transcoder-batchtopk", "clt-batchtopk", "clt-joint"):
        assert 0 < rows[name]["encoder"] <= 1
        assert rows[name]["output_mse_cascade"] >= 0


def test_half_identity_is_a_solution_that_serves_half_of_the_features(tmp_path: Path) -> None:
    naive = half_identity(N, 10)
    _save(Stack(naive.w_in, naive.w_out, "single", 0.1, "naive"), tmp_path, seed=0)
    target = load_target(TargetConfig(model=str(tmp_path), device="cpu"))
    sites: tuple[Site, ...] = target.sites(["mlp_in", "mlp_out"])
    truths = target.truths(sites)
    assert truths is not None
    truth = recovery.truth_of(truths.directions["L00.mlp_in"], truths.directions["L00.mlp_out"])
    assert truth.kept.sum() == 10
