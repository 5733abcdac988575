"""Our exports give the same forward in the foreign class: `make parity`.

Each environment is made on first use, and each of its scripts runs once, on all variants that go there.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.parity import environments, page, zoo
from tests.parity.compare import Result, Verdict, close_gates, judge, rechecked
from tests.parity.inputs import Rows, rows_for
from tests.parity.variants import VARIANTS, Variant
from thresher.cache.reader import CacheReader
from thresher.interop.export import export
from thresher.train.dictionary.coder import Coder
from thresher.train.files import load_run

pytestmark = pytest.mark.parity
MANY = ("circuit-tracer",)
"""Formats that take all layers together."""


class Ready(NamedTuple):
    """A variant on the disk."""

    variant: Variant
    dictionaries: list[Coder]
    rows: Rows
    close: Tensor
    """[S, N, F] latents whose gate float32 may not decide."""
    files: Path
    """What the script is given."""
    folder: Path
    """Where its inputs lie and its outputs go."""

    @property
    def triples(self) -> list[str | Path]:
        """Arguments of the script: all rows in float32, those with a close gate in float64."""
        names = ["plain", *(["wide"] if rechecked(self.close).any() else [])]
        places = [(self.files, self.folder / f"{name}.safetensors", self.folder / f"{name}.out") for name in names]
        return [part for triple in places for part in triple]


class Read(NamedTuple):
    """A variant as the foreign object computes it."""

    ready: Ready
    version: str


def prepare(variant: Variant, folder: Path) -> Ready:
    """Export a variant's runs and draw its rows."""
    paths = zoo.runs()[variant.runs]
    chosen = paths if variant.to in MANY else [path for path in paths if "-L01" in path.name]
    dictionaries = [load_run(path).dictionary for path in chosen]
    with CacheReader.open(zoo.CACHE) as cache:
        rows = rows_for(cache, dictionaries)
    close_SNF = close_gates(dictionaries, rows.x)
    folder.mkdir(parents=True)
    save_file({"x": _flat(rows.x)}, folder / "plain.safetensors")
    save_file({"x": _flat(rows.x[:, rechecked(close_SNF)].double())}, folder / "wide.safetensors")
    files = chosen[0]
    if variant.to:
        [written] = export(chosen, to=variant.to, out=folder / "files")
        # sparsify keeps a folder per module, dictionary_learning one per trainer.
        inner = [path.parent for name in ("sae.safetensors", "ae.pt") for path in written.path.rglob(name)]
        files = inner[0] if inner else written.path
    return Ready(variant, dictionaries, rows, close_SNF, files, folder)


def _flat(x_SND: Tensor) -> Tensor:
    """[N, D] of one source, [S, N, D] of several."""
    return (x_SND[0] if len(x_SND) == 1 else x_SND).contiguous()


def _result(path: Path) -> Result:
    failure = path.with_suffix(".error")
    assert not failure.is_file(), failure.read_text()
    tensors = load_file(path)
    shaped = [tensors[name] if tensors[name].ndim == 3 else tensors[name][None] for name in ("code", "output")]
    return Result(*shaped)


@functools.cache
def outcomes(environment: str, script: str, folder: Path) -> dict[Variant, Read | Exception]:
    """All variants of a script, read by it in one go; an exception where it got no files."""
    out: dict[Variant, Read | Exception] = {}
    ready: list[Ready] = []
    for index, variant in enumerate(VARIANTS):
        if (variant.environment, variant.script) == (environment, script):
            try:
                ready.append(prepare(variant, folder / str(index)))
            except Exception as error:  # told by that variant's own test
                out[variant] = error
    try:
        version = environments.run(environment, script, ["load", *(part for item in ready for part in item.triples)])
    except RuntimeError as error:  # of all of them; raised here, it would not be remembered
        return out | {item.variant: error for item in ready}
    return out | {item.variant: Read(item, version) for item in ready}


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


def verdict(ready: Ready) -> Verdict:
    results = [_result(Path(path)) for path in ready.triples[2::3]]
    wide = results[1] if len(results) > 1 else None
    return judge(ready.dictionaries, ready.rows.x, ready.rows.blocks, ready.close, results[0], wide)


def _named(variant: Variant) -> str:
    tool = variant.script.removeprefix("with_").removesuffix(".py")
    return f"{tool}-{variant.environment.rpartition('-')[2] if tool == 'saelens' else ''}-{variant.runs}"


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.environment in environments.environments()], ids=_named)
def test_the_foreign_class_computes_what_ours_does(variant: Variant, place: Path) -> None:
    folder = place / f"{variant.environment}-{variant.script}"
    read = outcomes(variant.environment, variant.script, folder)[variant]
    if isinstance(read, Exception):
        raise read
    found = verdict(read.ready)
    page.record(variant, read.version, found, silent=read.ready.rows.silent)
    assert found.passed, found


def test_enough_variants_are_compared() -> None:
    assert len({(v.script, v.environment, v.runs) for v in VARIANTS}) >= 16
