"""Push and pull against a hub on loopback: what arrives is what was sent, and what goes wrong leaves nothing half."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from typer.testing import CliRunner

from tests.documents import document
from tests.sharing.conftest import House, everything_in
from tests.sharing.hub_server import READER, WRITER, HubServer, Repo
from thresher.cache.errors import UserError
from thresher.cli import app
from thresher.sharing import pull as pulling
from thresher.sharing.index import INDEX
from thresher.sharing.pull import pull
from thresher.sharing.push import push
from thresher.train.files import load_run, read_config, write_config

SHARED = {"config.json", "weights.safetensors", "metrics.jsonl"}


@pytest.fixture
def full(hub: HubServer, house: House) -> HubServer:
    """A hub with all runs of the house in ada/books."""
    push([house.runs], "ada/books", report=house.report, license="mit")
    return hub


def copied(house: House, to: Path, name: str = "clt") -> Path:
    """A run directory of one's own to spoil."""
    shutil.copytree(house.runs / name, to / name)
    return to / name


def test_what_is_pulled_is_what_was_pushed_to_the_bit(hub: HubServer, house: House, tmp_path: Path) -> None:
    done = push([house.runs], "ada/books", report=house.report, cache=house.cache.path)
    assert done.new == ("clt", "topk-L00", "topk-L01")
    assert set(hub.repos["ada/books"].head()) >= {"README.md", INDEX, "runs/clt/config.json", "report/results.json"}
    extra = {"report": tmp_path / "report", "cache": tmp_path / "cache.zarr"}
    got = pull("ada/books", out=tmp_path / "runs", **extra)
    assert [path.name for path in got.runs] == ["clt", "topk-L00", "topk-L01"]
    for path in got.runs:
        assert everything_in(path) == {name: (house.runs / path.name / name).read_bytes() for name in SHARED}
        load_run(path)
    pushed = everything_in(house.report)
    assert everything_in(tmp_path / "report") == {k: v for k, v in pushed.items() if not k.startswith("sums/")}
    manifest, here = everything_in(house.cache.path), everything_in(tmp_path / "cache.zarr")
    assert here == {name: manifest[name] for name in here}
    assert {"MANIFEST.json", "zarr.json", "stats/L00.mlp_in/zarr.json"} <= set(here)
    assert not any(name.startswith(("train", "test", "validation", "commits")) for name in here)


def test_one_run_a_folder_and_the_stem_of_a_set_can_be_pushed_and_pulled(
    hub: HubServer, house: House, tmp_path: Path
) -> None:
    assert push([house.runs / "clt"], "ada/one").new == ("clt",)
    assert push([house.runs / "topk"], "ada/set").new == ("topk-L00", "topk-L01")
    assert push([house.runs / "topk", house.runs / "topk-L00"], "ada/one").new == ("topk-L00", "topk-L01")
    got = pull("ada/one", ["topk"], out=tmp_path)
    assert [path.name for path in got.runs] == ["topk-L00", "topk-L01"]
    with pytest.raises(UserError, match=r"no run 'tpok-L00'\. Did you mean 'topk-L00'"):
        pull("ada/one", ["tpok-L00"], out=tmp_path)


def test_two_commands_carry_a_run_over_the_hub(
    hub: HubServer, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pushed = CliRunner().invoke(app, ["push", str(house.runs / "topk"), "ada/books", "--license", "mit", "--private"])
    assert pushed.exit_code == 0, pushed.output
    assert pushed.stdout.startswith("2 runs pushed: http://"), pushed.output
    assert hub.repos["ada/books"].private
    pulled = CliRunner().invoke(app, ["pull", "ada/books", "topk-L01"])
    assert pulled.output.startswith("runs/books/topk-L01\n1 runs pulled from ada/books at ")
    assert load_run(tmp_path / "runs" / "books" / "topk-L01").config["name"] == "topk-L01"
    told = document("push", CliRunner().invoke(app, ["push", str(house.runs), "ada/books", "--json"]).stdout)
    assert (told["new"], told["held"]) == (["clt"], ["topk-L00", "topk-L01"])
    told = document("pull", CliRunner().invoke(app, ["pull", "ada/books", "--json"]).stdout)
    assert (told["reused"], len(told["runs"])) == (["runs/books/topk-L01"], 2)
    alone = CliRunner().invoke(app, ["push", "ada/books"])
    assert "expected run directories and then the repository" in str(alone.exception)


def test_checkpoints_travel_only_when_asked_for(hub: HubServer, house: House, tmp_path: Path) -> None:
    push([house.runs / "clt"], "ada/plain")
    push([house.runs / "clt"], "ada/whole", checkpoints=True)
    assert not any("checkpoints" in path for path in hub.repos["ada/plain"].head())
    assert pull("ada/whole", out=tmp_path / "plain").runs
    assert not (tmp_path / "plain" / "clt" / "checkpoints").exists()
    pull("ada/whole", out=tmp_path / "whole", checkpoints=True)
    assert everything_in(tmp_path / "whole" / "clt") == everything_in(house.runs / "clt")


def test_a_second_push_adds_and_an_equal_one_changes_nothing(hub: HubServer, house: House) -> None:
    push([house.runs / "clt"], "ada/books", license="mit")
    repo = hub.repos["ada/books"]
    before = repo.branches["main"]
    assert push([house.runs / "clt"], "ada/books").held == ("clt",)
    assert repo.branches["main"] == before
    push([house.runs / "topk"], "ada/books", report=house.report)
    card = repo.head()["README.md"].decode()
    assert all(f"| `{name}` |" in card for name in ("clt", "topk-L00", "topk-L01"))
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"


def test_another_run_of_the_same_name_is_refused(full: HubServer, house: House, tmp_path: Path) -> None:
    other = copied(house, tmp_path)
    weights = bytearray((other / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "weights.safetensors").write_bytes(weights)
    before = dict(full.repos["ada/books"].branches)
    with pytest.raises(UserError, match=r"holds another run called clt: its weights\.safetensors differs"):
        push([other], "ada/books")
    with pytest.raises(UserError, match="are both called clt"):
        push([other, house.runs / "clt"], "ada/new")
    assert full.repos["ada/books"].branches == before
    assert "ada/new" not in full.repos


def test_unfinished_and_damaged_runs_are_refused_before_the_hub_is_asked(
    hub: HubServer, house: House, tmp_path: Path
) -> None:
    run = copied(house, tmp_path)
    config = read_config(run)
    write_config(run, {**config, "training": {**config["training"], "finished": False}})
    with pytest.raises(UserError, match="its training has not finished"):
        push([run], "ada/books")
    write_config(run, {**config, "training": {**config["training"], "finished": False, "failed": "step 3: not finite"}})
    with pytest.raises(UserError, match="it failed: step 3"):
        push([run], "ada/books")
    write_config(run, config)
    (run / "weights.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="cannot be read"):
        push([run], "ada/books")
    with pytest.raises(UserError, match="expected owner/name"):
        push([house.runs / "clt"], "books")
    assert hub.log == []


def test_a_report_or_a_cache_of_other_runs_is_refused(hub: HubServer, house: House, tmp_path: Path) -> None:
    report = tmp_path / "report"
    shutil.copytree(house.report, report)
    results = json.loads((report / "results.json").read_text())
    for row in results["rows"]:
        row["facts"]["seed"] = 7
    (report / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="judges another run that is called clt as well: its seed is 7"):
        push([house.runs / "clt"], "ada/books", report=report)
    for row in results["rows"]:
        row["facts"]["runs"] = ["somewhere/else"]
    (report / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="judges none of these runs: it names else"):
        push([house.runs / "clt"], "ada/books", report=report)
    cache = tmp_path / "cache.zarr"
    shutil.copytree(house.cache.path, cache)
    (cache / "stats" / "L00.mlp_in" / "zarr.json").write_text("{}")
    with pytest.raises(UserError, match=r"stats/L00.mlp_in/zarr.json is not what MANIFEST\.json says"):
        push([house.runs / "clt"], "ada/books", cache=cache)
    run = copied(house, tmp_path)
    config = read_config(run)
    write_config(run, {**config, "cache": {**config["cache"], "fingerprint": "0" * 64}})
    with pytest.raises(UserError, match="was trained from 000000000000"):
        push([run], "ada/books", cache=house.cache.path)
    assert hub.log == []


def test_without_a_token_nothing_is_asked_and_no_token_is_ever_shown(
    hub: HubServer, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"needs a token .* `hf auth login`, or set HF_TOKEN"):
        push([house.runs / "clt"], "ada/books")
    assert hub.log == []
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(UserError, match="the token may not do that") as caught:
        push([house.runs / "clt"], "ada/books")
    monkeypatch.setenv("HF_TOKEN", WRITER)
    push([house.runs / "clt"], "ada/books")
    pull("ada/books", out=tmp_path)
    shown = capfd.readouterr()
    held = [content for files in hub.repos["ada/books"].commits.values() for content in files.values()]
    for token in (READER, WRITER):
        assert token not in shown.out + shown.err + str(caught.value)
        assert not any(token.encode() in content for content in held)


def test_a_private_repository_stays_private(full: HubServer, house: House, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match="exists and is public"):
        push([house.runs / "clt"], "ada/books", private=True)
    push([house.runs / "clt"], "ada/secret", private=True)
    assert full.repos["ada/secret"].private
    pull("ada/secret", out=tmp_path / "mine")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="does not accept the token, or has no such repository"):
        pull("ada/secret", out=tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_revisions_are_made_and_kept_apart(full: HubServer, house: House, tmp_path: Path) -> None:
    first = full.repos["ada/books"].branches["main"]
    push([house.runs / "clt"], "ada/new", revision="wide")
    assert "runs/clt/config.json" not in full.repos["ada/new"].head("main")
    assert [path.name for path in pull("ada/new", out=tmp_path / "a", revision="wide").runs] == ["clt"]
    with pytest.raises(UserError, match="holds no runs of Thresher"):
        pull("ada/new", out=tmp_path / "b")
    assert pull("ada/books", ["clt"], out=tmp_path / "c", revision=first).commit == first
    with pytest.raises(UserError, match="no revision 'v9'"):
        pull("ada/books", out=tmp_path / "d", revision="v9")
    with pytest.raises(UserError, match="ada/none is not on the hub"):
        pull("ada/none", out=tmp_path / "e")


def test_an_equal_run_is_reused_and_another_is_not_touched(full: HubServer, house: House, tmp_path: Path) -> None:
    mine = copied(house, tmp_path)
    before = everything_in(mine)
    got = pull("ada/books", out=tmp_path)
    assert got.reused == (mine,)
    assert [path.name for path in got.runs] == ["topk-L00", "topk-L01"]
    assert everything_in(mine) == before
    write_config(mine, {**read_config(mine), "git_commit": "another"})
    (tmp_path / "other" / "clt").mkdir(parents=True)
    (tmp_path / "other" / "clt" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds another run: its config\.json is not"):
        pull("ada/books", out=tmp_path)
    with pytest.raises(UserError, match="it is no finished run"):
        pull("ada/books", out=tmp_path / "other")
    assert everything_in(tmp_path / "other") == {"clt/notes.txt": b"mine"}


def test_a_card_that_people_edited_is_left_alone(full: HubServer, house: House) -> None:
    repo = full.repos["ada/books"]
    repo.add({**repo.head(), "README.md": b"---\nlicense: mit\n---\nBy hand.\n"}, "main")
    done = push([house.runs / "clt"], "ada/books", license="apache-2.0")
    assert "is not as a push made it, and is left as it is" in done.notes[0]
    assert repo.head()["README.md"].endswith(b"By hand.\n")
    full.repos["ada/hers"] = Repo(private=False)
    full.repos["ada/hers"].add({"README.md": b"Begun on the web.\n"}, "main")
    assert push([house.runs / "clt"], "ada/hers").notes
    assert full.repos["ada/hers"].head()["README.md"] == b"Begun on the web.\n"


def test_somebody_elses_push_meanwhile_is_not_overwritten(full: HubServer, house: House, tmp_path: Path) -> None:
    repo = full.repos["ada/books"]
    run = copied(house, tmp_path).rename(tmp_path / "again")
    full.before_commit = lambda: repo.add({**repo.head(), "theirs": b"1"}, "main") and None
    with pytest.raises(UserError, match=r"Nothing was pushed .* changed by someone else meanwhile"):
        push([run], "ada/books")
    assert "theirs" in repo.head()
    assert "runs/again/config.json" not in repo.head()


@pytest.mark.parametrize(
    ("method", "path", "act", "says"),
    [
        ("POST", "/commit/", 500, "an error of its own"),
        ("POST", "/objects/batch", 503, "an error of its own"),
        ("PUT", "/lfs/", 500, "an error of its own"),
        ("PUT", "/lfs/", 403, "the token may not"),
        ("POST", "/preupload/", 429, "no more requests"),
        ("POST", "/commit/", "reset", "Check the network"),
        ("POST", "/preupload/", 401, "does not accept the token"),
    ],
)
def test_a_push_that_fails_changes_nothing(
    method: str, path: str, act: str | int, says: str, hub: HubServer, house: House
) -> None:
    push([house.runs / "clt"], "ada/books")
    before = hub.repos["ada/books"].head()
    fault = hub.fail(method, path, act)
    if act == "reset":
        hub.before_commit = broken
    with pytest.raises(UserError, match=f"Nothing was pushed to ada/books.*{says}"):
        push([house.runs / "topk"], "ada/books")
    assert fault.met > 0
    assert hub.repos["ada/books"].head() == before
    hub.faults.clear()
    hub.before_commit = lambda: None
    assert push([house.runs / "topk"], "ada/books").new == ("topk-L00", "topk-L01")


def test_a_push_whose_answer_is_lost_may_have_arrived_and_can_be_repeated(hub: HubServer, house: House) -> None:
    hub.fail("POST", "/commit/", "reset", 1)
    with pytest.raises(UserError, match="has a new commit: the push may have arrived"):
        push([house.runs / "clt"], "ada/books")
    assert "runs/clt/config.json" in hub.repos["ada/books"].head()
    assert push([house.runs / "clt"], "ada/books").held == ("clt",)


def broken() -> None:
    raise ConnectionResetError


@pytest.mark.parametrize(
    ("path", "act", "says"),
    [
        ("/cdn/", 500, "an error of its own"),
        ("/cdn/", "reset", "Check the network"),
        ("/cdn/", 403, "the token may not"),
        ("/cdn/", "garble", "is not what thresher.json says it is"),
        ("/resolve/.*/runs/topk-L01/config.json", 404, "none of that name"),
        ("/api/models/ada/books$", 500, "an error of its own"),
    ],
)
def test_a_pull_that_fails_leaves_nothing_behind(
    path: str, act: str | int, says: str, full: HubServer, house: House, tmp_path: Path
) -> None:
    fault = full.fail("GET", path, act)
    with pytest.raises(UserError, match=says):
        pull("ada/books", out=tmp_path / "runs")
    assert fault.met > 0
    assert everything_in(tmp_path / "runs") == {}
    full.faults.clear()
    assert len(pull("ada/books", out=tmp_path / "runs").runs) == 3


@pytest.mark.parametrize("act", ["reset", "garble"])
def test_a_passing_fault_is_got_over(act: str | int, full: HubServer, house: House, tmp_path: Path) -> None:
    fault = full.fail("GET", "/cdn/", act, 1)
    pull("ada/books", ["clt"], out=tmp_path)
    assert fault.met == 1
    weights = tmp_path / "clt" / "weights.safetensors"
    assert weights.read_bytes() == (house.runs / "clt" / "weights.safetensors").read_bytes()


def test_a_full_disk_leaves_nothing_behind(full: HubServer, tmp_path: Path, monkeypatch) -> None:
    real: Callable[..., object] = shutil.copyfile

    def full_at_last(source: Path, target: Path) -> object:
        if "topk-L01" in str(source):
            target.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(pulling.shutil, "copyfile", full_at_last)
    with pytest.raises(UserError, match="No space left on device"):
        pull("ada/books", out=tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []


def test_offline_a_pull_takes_what_the_hub_cache_has(
    full: HubServer, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull("ada/books", ["clt"], out=tmp_path / "online")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(full.log)
    got = pull("ada/books", ["clt"], out=tmp_path / "offline")
    assert everything_in(got.runs[0]) == everything_in(tmp_path / "online" / "clt")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and the local hub cache does not have all of it"):
        pull("ada/books", ["topk"], out=tmp_path / "more")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and ada/other is not in the local hub cache"):
        pull("ada/other", out=tmp_path / "more")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, so nothing can be pushed"):
        push([house.runs / "clt"], "ada/books")
    assert len(full.log) == asked
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"runs": {"../evil": {}}}, "cannot be a folder"),
        ({"runs": {"clt": {"../../evil.json": {"bytes": 1, "sha256": ""}}}}, "a path inside the folder"),
        ({"runs": {"clt": {"weights.pkl": {"bytes": 1, "sha256": ""}}}}, "run no code"),
        ({"report": {"plots/x.py": {"bytes": 1, "sha256": ""}}}, "run no code"),
        ({"version": 99}, "version 99"),
        ({"format": "other"}, "not the index"),
        ({"runs": []}, "is damaged"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(change: dict, says: str, full: HubServer, tmp_path: Path) -> None:
    repo = full.repos["ada/books"]
    index = json.loads(repo.head()[INDEX]) | change
    repo.add({**repo.head(), INDEX: json.dumps(index).encode(), "runs/clt/weights.pkl": b"x"}, "main")
    with pytest.raises(UserError, match=says):
        pull("ada/books", out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "evil.json").exists()
