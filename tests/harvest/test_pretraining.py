"""Training a language model from text: the stream of rows, the step, exact resume, what is written."""

import itertools
import json
import math
import os
import signal
from dataclasses import replace
from importlib import resources
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted
from thresher.harvest.corpus import DataConfig, read_corpus
from thresher.harvest.pretraining import run
from thresher.harvest.pretraining.feed import Cursor, Rows, Text, chunks
from thresher.harvest.pretraining.models import cross_entropy_sum, fresh_model
from thresher.harvest.pretraining.optimiser import adamw, learning_rate, optimise
from thresher.harvest.pretraining.run import target_folder, train_target
from thresher.harvest.pretraining.settings import PretrainConfig, PretrainResult
from thresher.harvest.pretraining.tokenizer import tokenizer_at
from thresher.harvest.target import TargetConfig, load_target, load_tokenizer
from thresher.harvest.tokenising import token_ids

TARGET = TargetConfig(device="cpu")
CONFIG = PretrainConfig(
    n_layers=2,
    width=32,
    n_heads=2,
    n_kv_heads=1,
    context=32,
    n_vocab=400,
    steps=40,
    batch_contexts=16,
    lr=1e-2,
    warmup=5,
    validation_tokens=2880,
    log_every=8,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """The beginnings of some of the bundled passages."""
    path = tmp_path_factory.mktemp("text") / "passages.jsonl"
    with (Path(str(resources.files("thresher.harvest"))) / "bundled" / "books.jsonl").open() as lines:
        passages = [json.loads(line)["text"][:1000] for line in itertools.islice(lines, 0, 300, 5)]
    path.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages))
    return DataConfig(source=str(path), validation_fraction=0.15, test_fraction=0.1)


@pytest.fixture(scope="module")
def text(data: DataConfig) -> Text:
    """As one chunk."""
    return Text(data, load_tokenizer(TargetConfig()), 4096, 32, 1 << 20)


@pytest.fixture(scope="module")
def small_chunks(text: Text) -> Text:
    return text._replace(chunk_tokens=4000)


def trained(path: Path, config: PretrainConfig, data: DataConfig) -> PretrainResult:
    return train_target(TARGET, data, config, path=path, console=Console(quiet=True))


def log(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, data: DataConfig) -> PretrainResult:
    return trained(tmp_path_factory.mktemp("target") / "lsm", CONFIG, data)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, data: DataConfig) -> PretrainResult:
    config = replace(CONFIG, architecture="gpt2", n_kv_heads=None, weights="bfloat16")
    return trained(tmp_path_factory.mktemp("target") / "gpt2", config, data)


@pytest.mark.parametrize("architecture", ["made", "gpt2"])
def test_the_loss_falls_and_the_saved_model_has_the_cross_entropy_that_was_reported(
    architecture: str, request: pytest.FixtureRequest, console: Console, data: DataConfig
) -> None:
    result: PretrainResult = request.getfixturevalue(architecture)
    losses = [line["loss"] for line in log(result.path)]
    assert losses[0] > math.log(400) - 1.0
    assert losses[-1] < losses[0] - 0.5
    assert result.facts["train_ce"] == losses[-1]
    config = TargetConfig(model=str(result.path), device="cpu")
    target, tokenizer = load_target(config), load_tokenizer(config)
    assert (target.n_ctx, target.n_vocab, target.n_layers) == (32, 400, 2)
    rows = read_corpus(replace(data, context=33), tokenizer, 33, 400, console).splits["validation"]
    tokens = torch.from_numpy(rows.token_id[:90].astype(np.int64))
    assert (tokens[:, 0] == 0).all(), "every row begins with BOS"
    with torch.no_grad():
        log_p = target.logits(tokens[:, :-1]).log_softmax(-1)
    ce = -log_p.gather(-1, tokens[:, 1:, None]).mean().item()
    assert result.facts["validation_ce"] == pytest.approx(ce, rel=1e-4)
    assert result.facts["validation_tokens"] == 90 * 32
    assert ce < losses[0] - 0.5
    assert {path.name for path in result.path.iterdir()} >= {"config.json", "model.safetensors", "pretraining.json"}
    assert not list(result.path.glob("checkpoint*"))
    assert target.sites(["mlp_in", "mlp_out", "resid_mid", "blocks.*.attn.hook_out"])


def test_bfloat16_weights_are_what_was_measured(gpt2: PretrainResult) -> None:
    from safetensors.torch import load_file

    assert {x.dtype for x in load_file(gpt2.path / "model.safetensors").values()} == {torch.bfloat16}


def test_a_finished_model_is_reused_and_another_is_refused(made: PretrainResult, data: DataConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.path.iterdir()}
    again = trained(made.path, CONFIG, data)
    assert (again.reused, again.facts) == (True, made.facts)
    assert trained(made.path, replace(CONFIG, log_every=3), data).reused, "how often is logged makes no other model"
    with pytest.raises(UserError, match=r"holds another model: pretrain\.lr: expected 0\.1, got 0\.01.*--out"):
        trained(made.path, replace(CONFIG, lr=0.1), data)
    assert before == {path: path.stat().st_mtime_ns for path in made.path.iterdir()}


@pytest.mark.parametrize("chunk_tokens", [1 << 25, 7000])
def test_resume_equals_uninterrupted(
    chunk_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: DataConfig
) -> None:
    config = replace(
        CONFIG,
        width=8,
        steps=24,
        batch_contexts=50,
        chunk_tokens=chunk_tokens,
        checkpoint_every=50,
        validation_tokens=500,
    )
    whole = trained(tmp_path / "whole", config, data)
    assert whole.facts["epochs_begun"] == 2

    def stop_at(number: int, step: int) -> None:
        def stopped(*args: Any) -> Any:
            if args[-1] == step:
                os.kill(os.getpid(), number)
            return optimise(*args)

        monkeypatch.setattr(run, "optimise", stopped)

    for number, step in ((signal.SIGINT, 6), (signal.SIGTERM, 19)):
        stop_at(number, step)
        with pytest.raises(Interrupted, match=rf"Stopped after step {step + 1} of 24.*same command"):
            trained(tmp_path / "parts", config, data)
        assert not (tmp_path / "parts" / "config.json").exists(), "an unfinished model is none"
    resumed = trained(tmp_path / "parts", config, data)
    assert log(resumed.path) == log(whole.path)
    assert (resumed.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()
    same = ("validation_ce", "train_ce", "steps", "tokens", "epochs_begun")
    assert [resumed.facts[key] for key in same] == [whole.facts[key] for key in same]


def test_the_log_loses_what_a_killed_training_did_after_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: DataConfig
) -> None:
    config = replace(CONFIG, width=8, steps=14, log_every=1, checkpoint_every=8, validation_tokens=500)

    def killed(*args: Any) -> Any:
        if args[-1] == 11:
            raise MemoryError
        return optimise(*args)

    monkeypatch.setattr(run, "optimise", killed)
    with pytest.raises(MemoryError):
        trained(tmp_path / "x", config, data)
    assert len(log(tmp_path / "x")) == 11
    monkeypatch.undo()
    trained(tmp_path / "x", config, data)
    assert [line["step"] for line in log(tmp_path / "x")] == list(range(1, 15))
    assert log(tmp_path / "x") == log(trained(tmp_path / "y", config, data).path)


def test_what_was_only_begun_makes_way(tmp_path: Path, data: DataConfig) -> None:
    with pytest.raises(UserError, match=r"pretrain\.tokenizer is the directory.*no tokenizer files"):
        trained(tmp_path / "x", replace(CONFIG, tokenizer=str(tmp_path)), data)
    result = trained(tmp_path / "x", replace(CONFIG, steps=1, tokenizer="bundled:books-128"), data)
    assert load_target(TargetConfig(model=str(result.path))).n_vocab == 4096


def test_every_row_comes_once_an_epoch_and_held_out_documents_never(text: Text, small_chunks: Text) -> None:
    for some in (text, small_chunks):
        found = list(chunks(some, Cursor(), Event()))
        assert (len(found) > 2) == (some is small_chunks)
        assert [chunk.last for chunk in found] == [False] * (len(found) - 1) + [True]
        stored = np.concatenate([chunk.train for chunk in found])
        rows = Rows(some, 3, Cursor())
        first, second = rows.take(len(stored)), rows.take(len(stored))
        rows.close()
        for epoch in (first, second):
            assert sorted(map(bytes, epoch)) == sorted(map(bytes, stored))
        assert not np.array_equal(first, second), "another order"
        assert not np.array_equal(first, stored)
        assert rows.cursor.epoch == 1
    sentences = {bytes(row[1:9]) for chunk in found for row in chunk.held_out}
    assert sentences
    assert sentences.isdisjoint(bytes(row[1:9]) for row in stored)


def test_chunks_hold_the_documents_that_one_piece_holds(console: Console, data: DataConfig, small_chunks: Text) -> None:
    whole = read_corpus(replace(data, context=33), small_chunks.tokenizer, 33, 4096, console).splits["train"].token_id
    found = list(chunks(small_chunks, Cursor(), Event()))
    for chunk in found:
        assert chunk.train.shape[1] == 33
        assert (chunk.behind.tokens - chunk.first.tokens >= 4000) or chunk.last
    # Each chunk starts with a document of its own; only its last tokens, fewer than a row, are dropped.
    assert len(whole) - len(found) <= sum(len(chunk.train) for chunk in found) <= len(whole)
    assert np.array_equal(found[0].train, whole[: len(found[0].train)])


def test_limits_of_the_text_hold_over_all_chunks(data: DataConfig, small_chunks: Text) -> None:
    text = small_chunks._replace(data=replace(data, max_tokens=14_000))
    found = list(chunks(text, Cursor(), Event()))
    assert len(found) > 2
    rest = list(chunks(text, found[0].behind, Event()))
    for one, other in zip(found[1:], rest, strict=True):
        assert np.array_equal(one.train, other.train)
    total = sum(chunk.train.size + chunk.held_out.size for chunk in found)
    assert 12_500 < total < 15_000, "14,000 tokens, a BOS and a separator here and there, less what fills no row"


@pytest.mark.parametrize("name", ["text", "small_chunks"])
def test_rows_go_on_from_any_cursor(name: str, request: pytest.FixtureRequest) -> None:
    text: Text = request.getfixturevalue(name)
    rows = Rows(text, 0, Cursor())
    taken, cursors = [], []
    for _ in range(14):
        cursors.append(rows.cursor)
        taken.append(rows.take(90))
    held_out = rows.held_out(1000)
    rows.close()
    assert cursors[-1].epoch >= 1
    for start in (0, 3, 6, 9, 13):
        again = Rows(text, 0, cursors[start])
        assert all(np.array_equal(again.take(90), expected) for expected in taken[start:])
        assert np.array_equal(again.held_out(1000), held_out)
        again.close()


def test_padding_is_no_target(text: Text) -> None:
    text = text._replace(data=replace(text.data, packing="document"), context=500)
    [chunk] = chunks(text, Cursor(), Event())
    model = fresh_model(replace(CONFIG, context=500, width=8), text.tokenizer)
    row = torch.from_numpy(chunk.train[:1]).long()
    length = int((row[0] >= 0).sum())
    assert 200 < length < 450
    assert (row[0, length:] == -1).all()
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy_sum(model, row), cross_entropy_sum(model, row[:, :length]))


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    config = PretrainConfig(steps=111, warmup=10, lr=2.0, final_lr=0.1)
    assert [learning_rate(step, config) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert [learning_rate(step, config) for step in (10, 60, 110)] == pytest.approx([2.0, 1.1, 0.2])
    assert learning_rate(35, config) == pytest.approx(0.2 + 1.8 * (1 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize("architecture", ["llama_simple_mlp", "gpt2"])
def test_matrices_decay_and_gains_and_biases_do_not(architecture: Any, tokenizer: Any) -> None:
    config = replace(CONFIG, architecture=architecture, n_kv_heads=None, weight_decay=0.5, lr=0.1)
    model = fresh_model(config, tokenizer)
    optimiser = adamw(model, config, torch.device("cpu"))
    assert all(group["betas"] == (0.9, 0.95) for group in optimiser.param_groups)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5 if parameter.dim() == 2 else 1)
        torch.testing.assert_close(parameter.detach(), expected)


def test_a_batch_in_parts_gives_the_step_of_the_whole_and_a_long_gradient_is_cut(tokenizer: Any, text: Text) -> None:
    rows = torch.from_numpy(next(chunks(text, Cursor(), Event())).train[:7]).long()
    rows[2, 20:] = -1  # parts with unequal numbers of targets
    results = []
    for config in (CONFIG, replace(CONFIG, pass_contexts=3), replace(CONFIG, clip=1e-3)):
        model = fresh_model(config, tokenizer)
        optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        loss, length = optimise(model, optimiser, rows, config, 0)
        moved = before - torch.cat([p.detach().flatten() for p in model.parameters()])
        results.append((loss, length, moved / learning_rate(0, config)))
    whole, parts, cut = results
    torch.testing.assert_close(parts[0], whole[0])
    torch.testing.assert_close(parts[2], whole[2], rtol=1e-3, atol=1e-5)
    assert whole[1].item() == pytest.approx(parts[1].item(), rel=1e-4)
    assert cut[2].norm().item() == pytest.approx(1e-3, rel=0.02)


def test_a_made_tokenizer_gives_every_text_back(made: PretrainResult) -> None:
    tokenizer: Any = load_tokenizer(TargetConfig(model=str(made.path)))
    assert len(tokenizer) == 400
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    text = 'Jim, lad — "naïve"\n\t日本 \x00 end'
    [ids] = token_ids([text], tokenizer, "text")
    assert tokenizer.decode(ids) == text
    assert len(token_ids(["The captain and the squire"], tokenizer, "text")[0]) < 16


def test_held_out_documents_make_no_tokens(tmp_path: Path) -> None:
    source = tmp_path / "text.jsonl"
    words = ["zebra" * 3, "plain" * 3]
    rows = [{"text": f"{words[i % 2]} {i} " * 40} for i in range(40)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(source=str(source), test_fraction=0.5)
    from thresher.harvest.corpus import document_split

    kept = {row["text"] for row in rows if document_split(row["text"], data) == "train"}
    only_plain = [row for row in rows if row["text"] not in kept or "plain" in row["text"]]
    source.write_text("".join(json.dumps(row) + "\n" for row in only_plain))
    assert any("zebra" in row["text"] for row in only_plain)
    tokenizer: Any = tokenizer_at(tmp_path / "made", CONFIG, data)
    assert not any("ze" in token for token in tokenizer.get_vocab())
    assert any("lain" in token for token in tokenizer.get_vocab())


def test_the_bundled_tokenizer_can_be_taken(tmp_path: Path, tokenizer: Any, data: DataConfig) -> None:
    taken = tokenizer_at(tmp_path, replace(CONFIG, tokenizer="bundled:books-128"), data)
    assert taken.get_vocab() == tokenizer.get_vocab()


def test_fresh_weights_depend_on_the_seed_alone(tokenizer: Any) -> None:
    state = torch.get_rng_state()
    one, same = fresh_model(CONFIG, tokenizer), fresh_model(CONFIG, tokenizer)
    other = fresh_model(replace(CONFIG, seed=1), tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [model.get_parameter("h.0.mlp.c_fc.weight") for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 30, "n_heads": 4}, r"pretrain\.width is 30.*Try 32"),
        ({"architecture": "gpt2", "n_kv_heads": 2}, "gpt2 has as many as n_heads"),
        ({"steps": 0}, r"pretrain\.steps is 0; expected at least 1"),
        ({"lr": 0.0}, r"pretrain\.lr is 0\.0; expected more than 0"),
        ({"final_lr": 1.5}, r"pretrain\.final_lr"),
        ({"n_vocab": 100}, "at least 257"),
        ({"context": 1}, "at least 2"),
    ],
)
def test_settings_that_make_no_model_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        PretrainConfig(**changes)


def test_text_and_places_that_do_not_serve_are_refused(tmp_path: Path, data: DataConfig, text: Text) -> None:
    with pytest.raises(UserError, match="nothing is held out"):
        trained(tmp_path / "a", CONFIG, replace(data, validation_fraction=0, test_fraction=0))
    with pytest.raises(UserError, match="gives no held-out row of 20001 tokens"):
        trained(tmp_path / "b", replace(CONFIG, context=20_000, tokenizer="bundled:books-128"), data)
    rows = Rows(text._replace(context=20_000), 0, Cursor())
    with pytest.raises(UserError, match="gives no row to train on"):
        rows.take(1)
    rows.close()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        trained(tmp_path / "mine", CONFIG, data)
    with pytest.raises(UserError, match=r"expected the directory.*--out"):
        target_folder(TARGET)
    ids = tmp_path / "ids.jsonl"
    ids.write_text('{"text": [1, 2, 3]}\n')
    with pytest.raises(UserError, match="holds token ids"):
        trained(tmp_path / "c", CONFIG, replace(data, source=str(ids)))
    with pytest.raises(UserError, match=r"The loss is .*smaller pretrain\.lr"):
        trained(tmp_path / "d", replace(CONFIG, lr=1e30, steps=5, warmup=0), data)
