"""A foreign dictionary becomes a run like ours, and its conventions are tried on real activations."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interop.conftest import WIDTH, Made, finished
from thresher.cache.errors import UserError
from thresher.cache.reader import CacheReader
from thresher.interop import saelens
from thresher.interop.canonical import codes, from_coder
from thresher.interop.export import export
from thresher.interop.formats import Exported
from thresher.interop.importing import Naming, import_dictionaries
from thresher.train.files import load_run

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
    assert done.readings[0].l0 == pytest.approx(float((expected > 0).sum(1).double().mean()), rel=0.1)
    mean = torch.from_numpy(cache.statistics("L01.resid_post").mean).float()
    torch.testing.assert_close(run.dictionary.mean[0], mean)
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


def test_an_import_exports_again_unchanged(foreign: Path, cache: CacheReader, tmp_path: Path) -> None:
    cacheless = dict(RECIPE)
    [done] = import_dictionaries(foreign, "saelens", cache, cacheless, tmp_path / "runs", Naming("theirs"))
    first = from_coder(load_run(done.path).dictionary)
    [again] = saelens.read(foreign)
    torch.testing.assert_close(first.sources[0].W_enc, again.readings[0].dictionary.sources[0].W_enc)
    assert first.firing == "threshold"


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
