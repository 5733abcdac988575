"""A foreign dictionary becomes a run like ours, and its conventions are tried on real activations."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import typer
from rich.console import Console

from tests.interop.conftest import LATENTS, WIDTH, Made, finished
from tests.train.conftest import RULES, plans_for
from thresher.cache.errors import UserError
from thresher.cache.reader import CacheReader
from thresher.commands.interop import export as command
from thresher.interop import circuit_tracer, saelens
from thresher.interop.canonical import codes
from thresher.interop.display import print_imported
from thresher.interop.export import export
from thresher.interop.formats import Exported
from thresher.interop.importing import Naming, called_after, import_dictionaries
from thresher.train.files import load_run, weights_hash
from thresher.train.run import train

RECIPE = {"target": {}, "data": {}, "harvest": {}, "evaluate": {}}


@pytest.fixture
def foreign(made: Made, facts: Mapping[str, Any], tmp_path: Path) -> Path:
    """A SAELens directory of a JumpReLU SAE that reads L01.resid_post."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    saelens.write(folder, [Exported(made("sae", "threshold"), facts)])
    return folder


def test_an_import_is_a_run_with_the_same_codes(foreign: Path, made: Made, cache: CacheReader, tmp_path: Path) -> None:
    [done] = import_dictionaries(foreign, "saelens", cache, RECIPE, tmp_path / "runs", Naming("theirs"))
    run = load_run(done.path)
    assert run.dictionary.reads == ("L01.resid_post",)
    rows = cache.gather("validation", "L01.resid_post", cache.sample("validation", 100))
    expected = codes(made("sae", "threshold"), 0, rows)
    torch.testing.assert_close(run.dictionary.encode(0, rows).dense(), expected.float(), rtol=1e-4, atol=1e-5)
    assert done.readings[0].folding < 1e-12
    assert done.served.output < 1e-5
    assert done.served.other_l0 <= done.served.rows // 100
    assert done.readings[0].l0 == pytest.approx(float((expected > 0).sum(1).double().mean()), rel=0.1)
    mean = torch.from_numpy(cache.statistics("L01.resid_post").mean).float()
    torch.testing.assert_close(run.dictionary.mean[0], mean)
    assert run.config["training"]["held_out"]["split"] == "validation"
    assert run.config["training"]["held_out"]["rows"] == len(cache.sample("validation", 4096))
    imported = run.config["imported"]
    assert imported["tool"] == "SAELens"
    assert len(imported["sha256"]) == 64
    assert run.config["cache"]["fingerprint"] == cache.fingerprint


def test_a_wrong_reading_shows_in_the_table(
    foreign: Path, made: Made, facts: Mapping[str, Any], cache: CacheReader, tmp_path: Path
) -> None:
    """An identity dictionary reconstructs its input under one reading and not under the other."""
    eye = torch.eye(WIDTH, dtype=torch.float64)
    both = torch.cat([eye, -eye])
    base = made("sae", "relu")
    b_dec = torch.full((WIDTH,), 3.0, dtype=torch.float64)
    part = base.sources[0]._replace(
        W_enc=both, b_enc=-(both @ b_dec), W_dec=both[:, None], threshold=torch.zeros(2 * WIDTH, dtype=torch.float64)
    )
    folder = tmp_path / "eye"
    folder.mkdir()
    saelens.write(folder, [Exported(base._replace(sources=(part,), b_dec=(b_dec,)), facts)])
    [done] = import_dictionaries(folder, "saelens", cache, RECIPE, tmp_path / "runs", Naming("eye"))
    as_said, other = done.readings
    assert as_said.fvu < 1e-4 < 0.5 < other.fvu
    [forced] = import_dictionaries(
        folder, "saelens", cache, RECIPE, tmp_path / "runs", Naming("forced"), reading=other.label
    )
    assert load_run(forced.path).config["training"]["held_out"]["fvu"] == [other.fvu]


def test_an_import_exports_again_unchanged_and_says_what_it_was(
    foreign: Path, cache: CacheReader, tmp_path: Path
) -> None:
    [done] = import_dictionaries(foreign, "saelens", cache, RECIPE, tmp_path / "runs", Naming("theirs"))
    [back] = export([done.path], "saelens", tmp_path / "back")
    theirs, ours = (safetensors.torch.load_file(at / saelens.WEIGHTS) for at in (foreign, back.path))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    told = json.loads((back.path / "cfg.json").read_text())["metadata"]["thresher"]["imported"]
    assert told["sha256"] == load_run(done.path).config["imported"]["sha256"]
    assert (told["tool"], told["reading"]) == ("SAELens", "as its config says")


def test_nothing_is_written_for_sites_or_widths_that_are_not_there(
    made: Made, facts: Mapping[str, Any], cache: CacheReader, tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    dictionary = made("sae", "threshold")
    saelens.write(folder, [Exported(dictionary._replace(reads=("blocks.9.hook_resid_post",)), facts)])
    with pytest.raises(UserError, match=r"--reads is 'blocks.9.hook_resid_post'.*not in the cache"):
        import_dictionaries(folder, "saelens", cache, RECIPE, tmp_path / "runs", Naming("theirs"))
    with pytest.raises(UserError, match=r"width 16, but L00\.narrow has width 12"):
        import_dictionaries(folder, "saelens", cache, RECIPE, tmp_path / "runs", Naming("theirs", reads="L00.narrow"))
    saelens.write(folder, [Exported(dictionary, facts)])
    with pytest.raises(UserError, match=r"--writes is 'L01.mlp_out', but the files say that this is an SAE"):
        import_dictionaries(folder, "saelens", cache, RECIPE, tmp_path / "runs", Naming("x", writes="L01.mlp_out"))
    assert not (tmp_path / "runs").exists()


def test_a_run_directory_that_exists_is_left_alone(foreign: Path, cache: CacheReader, tmp_path: Path) -> None:
    import_dictionaries(foreign, "saelens", cache, RECIPE, tmp_path / "runs", Naming("theirs"))
    with pytest.raises(UserError, match="is there already"):
        import_dictionaries(foreign, "saelens", cache, RECIPE, tmp_path / "runs", Naming("theirs"))


def test_unknown_formats_and_readings_name_the_known(foreign: Path, cache: CacheReader, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'sealens'; expected one of saelens"):
        import_dictionaries(foreign, "sealens", cache, RECIPE, tmp_path, Naming("x"))
    with pytest.raises(UserError, match="expected one of 'as its config says'"):
        import_dictionaries(foreign, "saelens", cache, RECIPE, tmp_path / "runs", Naming("x"), reading="backwards")
    with pytest.raises(UserError, match="does not exist"):
        import_dictionaries(tmp_path / "none", "saelens", cache, RECIPE, tmp_path, Naming("x"))
    with pytest.raises(UserError, match="is not a run directory"):
        export([tmp_path], "saelens", tmp_path / "out")


def test_overwriting_never_deletes_a_run(made: Made, facts: Mapping[str, Any], tmp_path: Path) -> None:
    run = finished(tmp_path / "runs" / "r", made("sae", "threshold"), facts)
    for out in (run, tmp_path / "runs", tmp_path):
        with pytest.raises(UserError, match="--overwrite would delete"):
            export([run], "saelens", out, overwrite=True)
    assert (run / "config.json").is_file()
    export([run], "saelens", tmp_path / "out")
    export([run], "saelens", tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("option", ["delphi-cache", "hook"])
def test_what_is_loaded_once_has_to_be_that_of_all_runs(
    option: str, made: Made, facts: Mapping[str, Any], tmp_path: Path
) -> None:
    one = finished(tmp_path / "a", made("transcoder", "threshold"), facts)
    two = finished(tmp_path / "b", made("transcoder", "threshold"), {**facts, "target": {"model": "other"}})
    to, hook = ("delphi-cache", None) if option == "delphi-cache" else ("saelens", "ln2.hook_normalized")
    with pytest.raises(UserError, match="b has another target than"):
        command([one, two], to, tmp_path / "out", hook=hook)


@pytest.mark.parametrize(("theta", "warned"), [(0.5, False), (-0.5, True)])
def test_a_run_that_is_not_what_its_files_compute_is_announced(
    theta: float, warned: bool, made: Made, facts: Mapping[str, Any], cache: CacheReader, tmp_path: Path
) -> None:
    """circuit-tracer lets what lies between a negative threshold and 0 through; no dictionary of ours does."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    base = made("transcoder", "threshold")._replace(reads=("L00.mlp_in",), writes=("L00.mlp_out",), layers=(0,))
    circuit_tracer.write(folder, [Exported(base, facts)])
    layer = safetensors.torch.load_file(folder / "layer_0.safetensors")
    layer["activation_function.threshold"] = torch.full_like(layer["b_enc"], theta)
    safetensors.torch.save_file(layer, folder / "layer_0.safetensors")
    done = import_dictionaries(folder, "circuit-tracer", cache, RECIPE, tmp_path / "runs", Naming("theirs"))
    console = Console(file=io.StringIO(), width=200)
    print_imported(done, console)
    assert ("not what the files compute" in console.file.getvalue()) is warned  # type: ignore[attr-defined]


def test_training_goes_on_from_an_import(foreign: Path, cache: CacheReader, tmp_path: Path) -> None:
    [done] = import_dictionaries(foreign, "saelens", cache, RECIPE, tmp_path / "runs", Naming("theirs"))
    settings: dict[str, Any] = {"steps": 2, "batch_rows": 64, "lr": 1e-9, "init_from": str(done.path)}
    plans = plans_for(cache, "on", settings, kind="sae", writes="resid_post", layers=(1,), n_latents=LATENTS,
                      normalise="none", decoder="free", aux=0.0, **RULES["jumprelu"])  # fmt: skip
    [result] = train(plans, cache, out=tmp_path / "more", device="cpu", console=Console(quiet=True))
    before, after = load_run(done.path), load_run(result.path)
    assert after.config["init_from"] == {"path": str(done.path), "weights": weights_hash(done.path)}
    for name, value in before.dictionary.named_parameters():
        torch.testing.assert_close(dict(after.dictionary.named_parameters())[name], value, rtol=1e-4, atol=1e-5)
    [again] = export([result.path], "saelens", tmp_path / "back")
    told = json.loads((again.path / "cfg.json").read_text())["metadata"]["thresher"]
    assert told["finetuned_from_sha256"] == weights_hash(done.path)


def test_of_a_sweep_what_fits_is_written_and_the_rest_named(
    made: Made, facts: Mapping[str, Any], tmp_path: Path
) -> None:
    runs = [
        finished(tmp_path / "runs" / name, made(kind, firing), facts, group=name)
        for name, kind, firing in (("a", "sae", "threshold"), ("b", "clt", "threshold"), ("c", "transcoder", "topk"))
    ]
    with pytest.raises(UserError, match=r"^b cannot be written"):
        export(runs, "saelens", tmp_path / "none")
    reasons: list[str] = []
    [done] = export(runs, "saelens", tmp_path / "some", left_out=reasons.append)
    assert (done.path, done.runs) == (tmp_path / "some" / "a", ("a",))
    assert [reason.split()[0] for reason in reasons] == ["b", "c"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "some"]
    with pytest.raises(UserError, match=r"^b cannot be written"):
        export(runs[1:], "saelens", tmp_path / "none", left_out=reasons.append)
    with pytest.raises(typer.Exit):
        command([tmp_path / "runs"], "saelens", tmp_path / "more")
    assert (tmp_path / "more" / "a" / "cfg.json").is_file()


def test_one_export_to_the_default_place_stands_beside_the_others(
    foreign: Path, cache: CacheReader, tmp_path: Path
) -> None:
    runs = [
        import_dictionaries(foreign, "saelens", cache, RECIPE, tmp_path / "runs", Naming(name))[0].path
        for name in ("a", "b")
    ]
    for overwrite in (False, True):
        for run in runs:
            export([run], "saelens", tmp_path / "out", nested=True, overwrite=overwrite)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]
    assert {path.name for path in (tmp_path / "out" / "a").iterdir()} == {"cfg.json", "sae_weights.safetensors"}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("average_l0_71/params.npz", "average_l0_71"),
        ("trainer_0/ae.pt", "trainer_0"),
        ("theirs/mine.safetensors", "mine"),
        ("theirs.v2/cfg.json", "cfg"),
    ],
)
def test_a_run_without_a_name_is_called_after_what_says_most(file: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir()
    path.touch()
    assert called_after(path) == name
    assert called_after(path.parent) == path.parent.name, "a directory, with what looks like a suffix too"
