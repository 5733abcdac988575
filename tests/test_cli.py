"""The command line as a user meets it: exit codes, one paragraph per mistake, nothing half-written."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tests.documents import document
from tests.program import SMALL, environment, line_of, thresher
from thresher import cli


def started(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`thresher ARGUMENTS` in `folder`, as a process of its own."""
    command = [sys.executable, "-m", "thresher", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all three stages of the small recipe have run."""
    folder = tmp_path_factory.mktemp("house")
    for stage, *more in (("harvest",), ("train",), ("evaluate", "--wandb", "offline")):
        done = thresher(folder, stage, "books-demo", "--json", *more, pictures=True)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / f"{stage}.json").write_text(done.stdout)
        (folder / f"{stage}.txt").write_text(done.stderr, newline="")
    return folder


def cache_of(house: Path) -> Path:
    (cache,) = (house / "caches").iterdir()
    return cache


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2, one paragraph on stderr with the words in it, no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    text = " ".join(done.stderr.split())
    assert text.startswith("error:")
    for word in words:
        assert word in text, text


def test_three_commands_lead_from_text_to_report(house: Path) -> None:
    report = house / "reports" / "books-demo"
    results = json.loads((report / "results.json").read_text())
    assert {row["protocol"] for row in results["rows"]} == {"cascade", "clean_input", "single_site"}
    labels = {row["name"] for row in results["rows"] if row["kind"] == "replacement"}
    assert labels == {
        "transcoder-batchtopk-k8", "transcoder-batchtopk-k16", "transcoder-batchtopk-k32",
        "transcoder-jumprelu", "sae-topk", "clt-batchtopk",
    }  # fmt: skip
    assert all((report / name).stat().st_size for name in ("results.csv", "results.md", "report.html"))
    assert list((report / "plots").glob("*.png"))
    assert list(report.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(list((house / "runs/books-demo").iterdir())) == 4 * 5 + 1


def test_stages_tell_scripts_what_they_did_and_people_in_plain_text(house: Path) -> None:
    harvested, trained, judged = (
        document(stage, (house / f"{stage}.json").read_text()) for stage in ("harvest", "train", "evaluate")
    )
    assert house / harvested["path"] == cache_of(house)
    assert [run["status"] for run in trained["runs"]] == ["trained"] * 21
    results = json.loads((house / judged["report"] / "results.json").read_text())
    assert judged["notes"] == results["notes"]
    assert [row["metrics"] for row in judged["rows"]] == [row["metrics"] for row in results["rows"]]
    for stage in ("harvest", "train", "evaluate"):
        text = (house / f"{stage}.txt").read_bytes()
        assert len(text) > 100
        assert b"\x1b" not in text
        assert b"\r" not in text


def test_a_second_run_reuses_everything_and_says_so(house: Path) -> None:
    harvested = thresher(house, "harvest", "books-demo")
    trained = thresher(house, "train", "books-demo")
    assert harvested.returncode == trained.returncode == 0
    assert "Reusing" in harvested.stdout
    assert "Reusing 21 finished of 21 runs" in trained.stdout


def test_runs_named_one_by_one_are_judged_as_from_the_recipe(house: Path) -> None:
    names = [f"runs/books-demo/transcoder-batchtopk-k16-L{layer:02d}" for layer in range(4)]
    few = ("evaluate.tokens=1500", "evaluate.resamples=100")
    done = thresher(house, "evaluate", *names, "--out", "four", sets=few)
    assert done.returncode == 0, done.stderr
    alone = json.loads((house / "four/results.json").read_text())["rows"]
    among = json.loads((house / "reports/books-demo/results.json").read_text())["rows"]
    for row in alone:
        if row["kind"] == "replacement":
            (twin,) = [r for r in among if (r["name"], r["protocol"]) == (row["name"], row["protocol"])]
            assert row["metrics"] == pytest.approx(twin["metrics"], rel=1e-6)


def test_evaluation_reads_the_text_again_when_the_cache_is_gone(house: Path, tmp_path: Path) -> None:
    few = ("evaluate.tokens=1500", "evaluate.resamples=100")
    run = house / "runs/books-demo/clt-batchtopk"
    with_cache = thresher(house, "evaluate", str(run), "--out", str(tmp_path / "a"), sets=few)
    without = thresher(
        house, "evaluate", str(run), "--out", str(tmp_path / "b"), "--cache", str(tmp_path / "no"), sets=few
    )
    assert with_cache.returncode == without.returncode == 0, without.stderr
    a, b = (json.loads((tmp_path / x / "results.json").read_text()) for x in "ab")
    assert a["rows"] == b["rows"]
    assert a["masks"] == b["masks"]


OWN = "".join(
    json.dumps({"body": f"{i}. The {ship} lay at anchor, and nobody on board of her had slept since {i} o'clock."})
    + "\n"
    for i, ship in enumerate(["Hispaniola", "Walrus", "Royal Fortune", "Pandora", "Nautilus", "Swallow"] * 8)
)


def test_runs_are_judged_on_text_of_ones_own(house: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(OWN)
    few = ("evaluate.protocols=['cascade']", "evaluate.resamples=100", "data.column=body")
    run = str(house / "runs/books-demo/clt-batchtopk")
    command = ("evaluate", run, "--text", "own.jsonl", "--cache", str(cache_of(house)), "--out", "report")
    done = thresher(tmp_path, *command, sets=few)
    assert done.returncode == 0, done.stderr
    assert "not the held-out split" in " ".join(done.stdout.split())
    own = json.loads((tmp_path / "report/results.json").read_text())
    assert own["provenance"]["contexts"] == "all of own.jsonl"
    assert own["provenance"]["text"]["documents"] == own["provenance"]["text"]["documents_read"] == 48
    assert own["masks"]["rows_of_split"] == own["provenance"]["text"]["contexts"]
    assert own["masks"]["documents"] >= 45
    assert (
        own["masks"]["sha256"] != json.loads((house / "reports/books-demo/results.json").read_text())["masks"]["sha256"]
    )
    assert "not the held-out split" in own["notes"][0]


def test_text_of_ones_own_that_cannot_be_used_is_refused(house: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(OWN)
    run = ("evaluate", str(house / "runs/books-demo/clt-batchtopk"), "--text")
    refused(thresher(tmp_path, *run, "gone.txt", sets=()), "--text", "gone.txt", "not there")
    refused(thresher(tmp_path, *run, "own.jsonl", sets=["data.context=64"]), "data.context", "expected one of subset")
    assert not (tmp_path / "reports").exists()


def test_cache_info_and_verify(house: Path) -> None:
    info = thresher(house, "cache", "info", str(cache_of(house)), sets=())
    assert info.returncode == 0, info.stderr
    assert "L03.mlp_out" in info.stdout
    assert "int8z" in info.stdout
    good = thresher(house, "cache", "verify", str(cache_of(house)), sets=())
    assert good.returncode == 0
    assert "every checksum holds" in " ".join(good.stdout.split())


def test_both_other_names_are_the_same_program(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "cli.py"
    direct = subprocess.run(
        [sys.executable, str(script), "recipes", "list"],
        cwd=script.parent,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert direct.returncode == 0, direct.stderr
    assert direct.stdout == started(tmp_path, "recipes", "list").stdout
    assert direct.stdout == thresher(tmp_path, "recipes", "list", sets=()).stdout


def test_every_command_has_help(tmp_path: Path) -> None:
    for command in ([], ["harvest"], ["train"], ["evaluate"], ["demo"], ["cache", "info"], ["recipes", "keys"]):
        done = thresher(tmp_path, *command, "--help", sets=())
        assert done.returncode == 0
        assert "Usage" in done.stdout


def commands(group: Any, *names: str) -> Iterator[tuple[list[str], Any]]:
    """Every command with the words that call it, groups among them."""
    yield list(names), group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, *names, name)


def test_help_keeps_its_brackets() -> None:
    """In help texts `[word]` is markup, which is not shown, unless it is escaped."""
    seen = set()
    for words, command in commands(typer.main.get_command(cli.app)):
        shown = CliRunner().invoke(cli.app, [*words, "--help"]).output
        below = getattr(command, "commands", {}).values()
        texts = [each.help or "" for each in (command, *below)] + [getattr(p, "help", "") or "" for p in command.params]
        for text in texts:
            found = re.findall(r"\[[^\]\s]+\]", text)
            assert all(bracket in shown for bracket in found), f"{words}: {found}"
            seen.update(found)
    assert "[pretrain]" in seen


def test_bundled_recipes_check_without_loading_anything(tmp_path: Path) -> None:
    for name in ("books-demo", "gpt2-small"):
        done = thresher(tmp_path, "recipes", "check", name, sets=())
        assert done.returncode == 0, done.stderr


def test_keys_of_a_table_are_listed_with_their_meaning(tmp_path: Path) -> None:
    done = thresher(tmp_path, "recipes", "keys", "train", sets=())
    assert "batch_rows" in done.stdout
    assert "Cached rows per optimiser step" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("command", "sets", "words"),
    [
        ("harvest", ["train.lrr=1"], ["[train]", "'lrr'", "Did you mean 'lr'"]),
        ("harvest", ["harvest.codec=int9"], ["harvest.codec", "'int9'", "int8z"]),
        ("harvest", ["target.model=./nowhere"], ["nowhere"]),
        ("harvest", ["target.device=cuda"], ["target.device", "cuda"]),
        ("harvest", ["data.source=missing.jsonl"], ["missing.jsonl"]),
        ("harvest", ["data.column=txt"], ["column", "txt", "text"]),
        ("harvest", ["harvest.sites=['mlp_inn']"], ["mlp_inn", "mlp_in"]),
        ("harvest", ["data.context=4096"], ["context", "4096", "256"]),
        ("train", ["data.max_tokens=999"], ["no cache", "thresher harvest"]),
    ],
)  # fmt: skip
def test_bad_input_ends_before_any_work(tmp_path: Path, command: str, sets: list[str], words: list[str]) -> None:
    refused(thresher(tmp_path, command, "books-demo", sets=sets), *words)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == [], f"half-written: {left}"


def test_a_process_ends_as_the_command_does_and_asks_no_network_when_offline(tmp_path: Path) -> None:
    command = line_of(["harvest", "books-demo"], [*SMALL, "target.model=no/such-model"])
    refused(started(tmp_path, *command), "no/such-model")
    assert not list(tmp_path.iterdir())


def test_a_cache_of_other_settings_is_refused_by_name(house: Path, tmp_path: Path) -> None:
    cache = str(cache_of(house))
    done = thresher(tmp_path, "train", "books-demo", "--cache", cache, sets=[*SMALL, "data.split_seed=7"])
    refused(done, "split_seed", "7", "0")


def test_a_dictionary_of_sites_the_cache_lacks_is_refused(house: Path) -> None:
    done = thresher(house, "train", "books-demo", "--runs", "x", sets=[*SMALL, "dictionary.writes=resid_mid"])
    refused(done, "resid_mid", "mlp_in")


def test_a_directory_that_is_no_run_is_refused(house: Path, tmp_path: Path) -> None:
    refused(thresher(house, "evaluate", str(tmp_path), sets=()), str(tmp_path), "config.json")


def test_a_run_of_another_model_is_refused(house: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    source = house / "runs/books-demo/clt-batchtopk"
    config = json.loads((source / "config.json").read_text())
    key = next(iter(config["cache"]["identity"]["target"]))
    config["cache"]["identity"]["target"][key] = "another"
    (run / "config.json").write_text(json.dumps(config))
    (run / "weights.safetensors").write_bytes((source / "weights.safetensors").read_bytes())
    refused(thresher(house, "evaluate", str(run), sets=()), "another target", key, "'another'")


def test_runs_of_other_splits_are_not_judged_together(house: Path, tmp_path: Path) -> None:
    runs = []
    for name, seed in (("one", 0), ("two", 7)):
        runs.append(tmp_path / name)
        (tmp_path / name).mkdir()
        config = json.loads((house / "runs/books-demo/sae-topk-L01/config.json").read_text())
        config["cache"]["identity"]["data"]["split_seed"] = seed
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        weights = (house / "runs/books-demo/sae-topk-L01/weights.safetensors").read_bytes()
        (tmp_path / name / "weights.safetensors").write_bytes(weights)
    refused(
        thresher(house, "evaluate", *map(str, runs), sets=()), "split_seed: expected 0, got 7", "evaluate them apart"
    )


def test_held_out_text_cannot_be_exchanged_under_a_run(house: Path, tmp_path: Path) -> None:
    run = str(house / "runs/books-demo/sae-topk-L01")
    refused(thresher(house, "evaluate", run, sets=["data.split_seed=5"]), "data.split_seed", "train anew")


def test_a_recipe_judges_all_its_runs_and_no_stale_ones(house: Path, tmp_path: Path) -> None:
    refused(
        thresher(house, "evaluate", "books-demo", sets=[*SMALL, "train.lr=0.5"]), "another recipe", "train.lr", "0.5"
    )
    runs = tmp_path / "runs"
    shutil.copytree(house / "runs/books-demo", runs, ignore=shutil.ignore_patterns("sae-topk-L02"))
    refused(thresher(house, "evaluate", "books-demo", "--runs", str(runs)), "no run sae-topk-L02", "thresher train")


def test_a_finished_run_with_damaged_weights_is_not_reused(house: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(house / "runs/books-demo", runs)
    weights = runs / "sae-topk-L02/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    refused(
        thresher(house, "train", "books-demo", "--runs", str(runs)), "sae-topk-L02", "weights.safetensors", "delete"
    )


def test_cuda_that_is_absent_is_refused_by_every_stage(house: Path) -> None:
    refused(thresher(house, "train", "books-demo", "--runs", "cuda", "--device", "cuda"), "--device", "'cuda'", "cpu")
    refused(thresher(house, "harvest", "books-demo", sets=["target.device=mps"]), "target.device", "'mps'", "cpu")


def test_a_swept_key_may_be_fixed_from_outside(tmp_path: Path) -> None:
    done = thresher(tmp_path, "recipes", "check", "books-demo", sets=["dictionary.k=16"])
    assert done.returncode == 0, done.stderr


def test_a_mistyped_option_says_so_without_a_traceback(tmp_path: Path) -> None:
    done = thresher(tmp_path, "harvest", "books-demo", "--cahce", "x", sets=())
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "--cache" in done.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = started(tmp_path, "harvest", "nothing", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


LONGER = (*SMALL, "train.epochs=1.5", "train.checkpoint_every=1000000", "train.log_every=1", "dictionary.k=16")
"""Of 13 dictionaries, so that a signal finds them at work."""


@pytest.fixture(scope="module")
def straight(house: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    done = thresher(folder, "train", "books-demo", "--cache", str(cache_of(house)), "--runs", "runs", sets=LONGER)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_resume_ends_with_the_same_bits(
    house: Path, straight: Path, tmp_path: Path, number: int
) -> None:
    common = ["train", "books-demo", "--cache", str(cache_of(house))]
    command = [sys.executable, "-m", "thresher", *line_of([*common, "--runs", "stopped"], LONGER)]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_lines(tmp_path / "stopped/clt-batchtopk/metrics.jsonl", 3, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    refused(thresher(tmp_path, *common, "--runs", "stopped", sets=LONGER), "--resume")
    assert thresher(tmp_path, *common, "--runs", "stopped", "--resume", sets=LONGER).returncode == 0
    for run in ("clt-batchtopk", "transcoder-jumprelu-L02", "sae-topk-L00"):
        weights = [(runs / run / "weights.safetensors").read_bytes() for runs in (tmp_path / "stopped", straight)]
        assert weights[0] == weights[1], run


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"{path} never had {count} lines: {process.communicate()}")


def test_runs_of_a_set_can_be_judged_one_by_one(house: Path, tmp_path: Path) -> None:
    names = [f"runs/books-demo/transcoder-batchtopk-k16-L{layer:02d}" for layer in (1, 3)]
    alone = ("evaluate.tokens=1500", "evaluate.resamples=100", "evaluate.together=false")
    done = thresher(house, "evaluate", *names, "--out", str(tmp_path), sets=alone)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    sites = {row["name"]: row["sites"] for row in rows if row["kind"] == "replacement"}
    assert sites == {f"transcoder-batchtopk-k16-L{layer:02d}": [f"L{layer:02d}.mlp_out"] for layer in (1, 3)}


def test_text_that_is_empty_or_out_of_the_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "ids.jsonl").write_text(json.dumps({"ids": [1, 2, 99999] * 200}) + "\n")
    refused(thresher(tmp_path, "harvest", "books-demo", sets=["data.source=empty.jsonl"]), "empty.jsonl")
    out_of_range = ["data.source=ids.jsonl", "data.column=ids"]
    refused(thresher(tmp_path, "harvest", "books-demo", sets=out_of_range), "99999", "4096")
    assert not list(tmp_path.glob("caches/*"))


def test_a_loss_that_is_not_finite_fails_its_run_and_is_not_reused(house: Path, tmp_path: Path) -> None:
    sets = [*SMALL, "train.lr=1e30", "train.clip=1e30", "train.warmup=0"]
    common = ("train", "books-demo", "--cache", str(cache_of(house)), "--runs", str(tmp_path / "runs"))
    done = thresher(tmp_path, *common, sets=sets)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "not finite" in " ".join(done.stdout.split())
    assert "Traceback" not in done.stderr
    refused(thresher(tmp_path, *common, sets=sets), "has failed", "not finite")
