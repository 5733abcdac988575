"""Training that goes on from a finished run: weights taken back into training space, and which run a name means."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.testing
from rich.console import Console

from tests.train.conftest import RULES, plans_for, stop_at
from tests.train.test_dictionary import RULES as FIRING
from tests.train.test_dictionary import spec, trained
from thresher import cli
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.cache.reader import CacheReader
from thresher.commands import train as commands
from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.fold import deploy
from thresher.train.dictionary.rules import Deployed, JumpReLU
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.dictionary.topologies import build
from thresher.train.dictionary.unfold import unfold
from thresher.train.files import load_run, read_config, weights_hash
from thresher.train.finetune import origin
from thresher.train.fit import Fit
from thresher.train.normalise import Affine
from thresher.train.run import train

CPU = torch.device("cpu")
KINDS = ["sae", "transcoder", "clt"]
MODES = ["none", "scale", "per_dim"]


def unfolded(saved: Coder, wanted: DictionarySpec, reads: list[Affine], writes: list[Affine]) -> Coder:
    coder = build(wanted).double()
    unfold(saved, coder, reads, writes)
    return coder


SAME = [rule for rule in FIRING if rule["firing"] != "gated" and rule.get("rank_by") != "norm"]
"""Rules whose parameters the saved form determines. Gated's two biases come back as others of the same codes; what a
threshold on a · n was, a first batch finds anew."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("rule", SAME, ids=lambda rule: rule["firing"])
def test_unfolding_takes_back_what_folding_did(kind: str, mode: str, unit: bool, rule: dict[str, Any]) -> None:
    settings = spec(kind, normalise=mode, unit_norm=unit, pre_bias=kind == "sae", **rule)
    coder, _, reads, writes = trained(settings)
    if unit:
        with torch.no_grad():
            for source, weight in enumerate(coder.W_dec):
                weight.div_(coder.decoder_norm(source)[:, None, None])
    coder.encoder(0).tokens_since_fired[3] = 77
    back = unfolded(deploy(coder, reads, writes, dtype=torch.float64), settings, reads, writes)
    for (name, value), other in zip(coder.state_dict().items(), back.state_dict().values(), strict=True):
        if name.endswith(("mean", "window", "aux_threshold")):
            continue  # follow from statistics and from rows
        bound = 1e-6 if "rule" in name else 1e-11  # frozen thresholds are float32
        torch.testing.assert_close(other, value, rtol=bound, atol=bound, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("unit", [True, False])
def test_another_normalisation_and_constraint_begin_with_the_same_dictionary(kind: str, mode: str, unit: bool) -> None:
    rule = {"firing": "jumprelu", "k": None, "sparsity": 1.0}
    coder, raw, reads, writes = trained(spec(kind, normalise="scale", unit_norm=False, **rule))
    saved = deploy(coder, reads, writes, dtype=torch.float64)
    wanted = spec(kind, normalise=mode, unit_norm=unit, pre_bias=kind == "sae", **rule)
    _, _, new_reads, new_writes = trained(wanted)
    back = unfolded(saved, wanted, new_reads, new_writes)
    if unit:
        torch.testing.assert_close(back.decoder_norm(0), torch.ones(20, dtype=torch.float64))
    again = deploy(back, new_reads, new_writes, dtype=torch.float64)
    codes, expected = ([one.encode(i, x) for i, x in enumerate(raw)] for one in (again, saved))
    assert all(torch.equal(a.dense() > 0, b.dense() > 0) for a, b in zip(codes, expected, strict=True))
    for j in range(len(writes)):
        got, want = (one.decode(j, [c[i] for i in one.sources(j)]) for one, c in ((again, codes), (saved, expected)))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_rows_without_a_norm_keep_their_first_direction_where_norms_are_1() -> None:
    coder, _, reads, writes = trained(spec("transcoder", unit_norm=False))
    with torch.no_grad():
        coder.W_dec[0][4] = 0.0
    fresh = build(spec("transcoder", unit_norm=True)).double()
    with torch.no_grad():
        fresh.W_dec[0][:, :, 0] = 1.0
    unfold(deploy(coder, reads, writes, dtype=torch.float64), fresh, reads, writes)
    torch.testing.assert_close(fresh.decoder_norm(0), torch.ones(20, dtype=torch.float64))
    assert fresh.W_dec[0][4, 0].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert all(bool(parameter.isfinite().all()) for parameter in fresh.parameters())


def test_thresholds_pass_from_rule_to_rule() -> None:
    jump = {"firing": "jumprelu", "k": None, "sparsity": 1.0}
    one, raw, reads, writes = trained(spec("transcoder", **jump))
    saved = deploy(one, reads, writes, dtype=torch.float64)
    assert isinstance(saved.encoder(0).rule, Deployed)
    theta = saved.encoder(0).rule.thresholds()
    mean = unfolded(saved, spec("transcoder", firing="batchtopk"), reads, writes).encoder(0).rule
    assert float(mean.threshold) == pytest.approx(float(theta.mean()))  # type: ignore[arg-type]
    saved.encoder(0).rule.threshold[:5] = 0.0  # type: ignore[index]
    jumps = unfolded(saved, spec("transcoder", **jump), reads, writes).encoder(0).rule
    assert isinstance(jumps, JumpReLU)
    torch.testing.assert_close(jumps.theta()[5:].float(), theta[5:].float())
    assert jumps.theta()[:5].tolist() == pytest.approx([float(jumps.window) / 2] * 5)

    topk, raw, reads, writes = trained(spec("transcoder", k=4))
    fresh = build(spec("transcoder", **jump)).double()
    samples = [space.apply(x) for x, space in zip(raw, reads, strict=True)]
    unfold(deploy(topk, reads, writes, dtype=torch.float64), fresh, reads, writes, samples)
    l0 = (fresh.encoder(0).preactivations(samples[0], fresh.bias(0)) > fresh.encoder(0).rule.theta()).sum(1)
    assert float(l0.double().mean()) == pytest.approx(4.0, abs=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gated_dictionary_begins_as_the_thresholds_it_comes_from(kind: str) -> None:
    one, raw, reads, writes = trained(spec(kind, firing="jumprelu", k=None, sparsity=1.0, unit_norm=False))
    saved = deploy(one, reads, writes, dtype=torch.float64)
    wanted = spec(kind, firing="gated", k=None, sparsity=1.0, pre_bias=kind == "sae", unit_norm=False)
    again = deploy(unfolded(saved, wanted, reads, writes), reads, writes, dtype=torch.float64)
    for source, x_ND in enumerate(raw):
        want, got = (each.encode(source, x_ND).dense() for each in (saved, again))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert bool((want > 0).any())
    one_threshold = unfolded(saved, spec(kind, firing="global", unit_norm=False), reads, writes).encoder(0).rule
    theta = saved.encoder(0).rule.thresholds()
    assert theta is not None
    assert float(one_threshold.threshold) * float(reads[0].scale[0] if kind == "sae" else 1) == pytest.approx(
        float(theta.mean()), rel=1e-5
    )


@pytest.fixture(scope="module")
def parents(cache: CacheReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished sets of every kind in one folder."""
    out = tmp_path_factory.mktemp("parents")
    plans = [
        *plans_for(cache, "plt-k3", {"steps": 30}, kind="transcoder", firing="topk", k=3),
        *plans_for(cache, "plt-k2", {"steps": 4}, kind="transcoder", firing="topk", k=2),
        *plans_for(cache, "sae", {"steps": 4}, kind="sae", **RULES["jumprelu"]),
        *plans_for(cache, "clt", {"steps": 4}, kind="clt", **RULES["batchtopk"]),
    ]
    train(plans, cache, out=out, device="cpu", console=Console(quiet=True))
    return out


def test_a_set_goes_on_from_a_set_with_another_rule_and_says_from_what(
    cache: CacheReader, parents: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 4, "init_from": str(parents / "plt-k3"), "lr": 1e-9}
    other = {"kind": "transcoder", "firing": "batchtopk", "k": 3, "normalise": "per_dim", "aux": 0.0}
    plans = plans_for(cache, "on", settings, **other)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Interrupted):
            train(plans, cache, out=tmp_path, device="cpu", console=console)
    results = train(plans, cache, out=tmp_path, device="cpu", resume=True, console=console)
    for result, layer in zip(results, ("L00", "L01"), strict=True):
        parent = parents / f"plt-k3-{layer}"
        before, after = load_run(parent).dictionary, load_run(result.path).dictionary
        for name, value in before.named_parameters():
            torch.testing.assert_close(dict(after.named_parameters())[name], value, rtol=1e-4, atol=1e-5, msg=name)
        assert result.metrics["held_out"]["l0"] == [pytest.approx(3.0, rel=0.1)]
        stored = read_config(result.path)
        assert stored["init_from"] == {"path": str(parent), "weights": weights_hash(parent)}
        assert result.metrics["held_out"]["fvu"][0] < 1.05 * read_config(parent)["training"]["held_out"]["fvu"][0]
    assert [r.status for r in train(plans, cache, out=tmp_path, device="cpu", console=console)] == ["reused"] * 2


def test_other_weights_of_the_parent_make_another_run(
    cache: CacheReader, parents: Path, tmp_path: Path, console: Console
) -> None:
    (plan,) = plans_for(cache, "on", {"steps": 2, "init_from": str(parents)}, kind="clt", **RULES["jumprelu"])
    train([plan], cache, out=tmp_path, device="cpu", console=console)
    config = json.loads((tmp_path / "on" / "config.json").read_text())
    config["init_from"]["weights"] = "0" * 64
    (tmp_path / "on" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"other settings \(init_from.weights"):
        train([plan], cache, out=tmp_path, device="cpu", console=console)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_that_begins_from_a_run_is_that_run(kind: str, cache: CacheReader, parents: Path) -> None:
    name = {"sae": "sae", "transcoder": "plt-k2", "clt": "clt"}[kind]
    (plan, *_) = plans_for(cache, "on", {"init_from": str(parents / name)}, kind=kind, **RULES["topk"])
    begun = origin(plan)
    assert begun is not None
    assert begun.path.name == (name if kind == "clt" else f"{name}-L00")
    fit = Fit(plan, cache, CPU)
    fit.start(cache, begun.load())
    for (key, value), other in zip(fit.deployed().named_parameters(), begun.load().parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("plt-k2-L00", {"n_latents": 32}, "dictionary.n_latents is 32 in the recipe and 64 in that run"),
        ("clt", {}, "dictionary.kind is 'transcoder' in the recipe and 'clt' in that run"),
        ("plt-k2-L01", {}, "dictionary.reads is L00.mlp_in in the recipe and L01.mlp_in in that run"),
        ("", {}, r"several runs.*plt-k2-L00, plt-k3-L00\. Name one of them, or the stem"),
        ("sae", {}, r"holds no run that on-L00 could begin from.*got sae-L00, sae-L01"),
        ("plt", {"writes": "mlp_in", "reads": "mlp_out"}, "holds no run that on-L00"),
        ("plt-k", {}, "is no run: expected a run directory"),
        ("gone/x", {}, "is no run"),
    ],
)
def test_what_cannot_be_begun_from_says_which_field_differs(
    name: str, settings: dict[str, Any], message: str, cache: CacheReader, parents: Path
) -> None:
    base = {"kind": "transcoder", "firing": "topk", "k": 3}
    (plan, *_) = plans_for(cache, "on", {"init_from": str(parents / name)}, **(base | settings))
    with pytest.raises(UserError, match=message):
        origin(plan)


def test_only_finished_runs_are_begun_from(cache: CacheReader, parents: Path, tmp_path: Path) -> None:
    config = json.loads((parents / "clt" / "config.json").read_text())
    config["training"]["finished"] = False
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text(json.dumps(config))
    (plan,) = plans_for(cache, "on", {"init_from": str(tmp_path / "half")}, kind="clt", **RULES["topk"])
    with pytest.raises(UserError, match="not finished"):
        origin(plan)
    narrow = plan._replace(spec=dataclasses.replace(plan.spec, d_out=8))
    with pytest.raises(UserError, match=r"dictionary\.d_out is 8 in the recipe and 16"):
        origin(narrow)


def test_the_command_line_has_a_short_word_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(commands, "train_recipe", lambda recipe, *given, **more: seen.append(recipe) or [])
    done = typer.testing.CliRunner().invoke(cli.app, ["train", "books-demo", "--finetune", "runs/a é/b"])
    assert done.exit_code == 0, done.output
    assert {variant.tables["train"].init_from for variant in seen[0].variants} == {"runs/a é/b"}
