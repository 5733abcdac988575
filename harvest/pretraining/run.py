"""`thresher target train`: text to a language model that `target.model` can name.

The directory gets its tokenizer first, checkpoints as training goes, and the model last: before that it has no
config.json. Ctrl-C or SIGTERM saves after the present step, and the same command goes on; a finished one is reused.
"""

import json
import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import nn

from thresher.cache.devices import resolve_device
from thresher.cache.errors import UserError
from thresher.cache.interrupts import Interrupted, StopFlag, deferred_interrupts
from thresher.cache.publish import make_directory, publish
from thresher.cache.records import differences
from thresher.harvest.checkpoint import digest, looks_like_path, tokenizer_files
from thresher.harvest.corpus import DataConfig, data_identity
from thresher.harvest.fill import versions
from thresher.harvest.pretraining.feed import Rows, Text
from thresher.harvest.pretraining.models import cross_entropy_sum, fresh_model, round_weights, save_model
from thresher.harvest.pretraining.optimiser import adamw, learning_rate, optimise
from thresher.harvest.pretraining.settings import PretrainConfig, PretrainResult, made_from
from thresher.harvest.pretraining.state import FILE, load_checkpoint, save_checkpoint
from thresher.harvest.pretraining.state import Progress as State
from thresher.harvest.pretraining.tokenizer import tokenizer_at
from thresher.harvest.target import DTYPES, TargetConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD, LOG = "pretraining.json", "log.jsonl"


def target_folder(target: TargetConfig) -> Path:
    """Where a recipe's own target is: the directory that target.model names. Raises UserError for any other name."""
    if not looks_like_path(target.model):
        raise UserError(
            f"target.model is {target.model!r}; expected the directory that the model is to be trained into, such as "
            "./targets/mine, which the recipe's other stages then use. Set it, or give --out."
        )
    return Path(target.model).expanduser()


def train_target(
    target: TargetConfig, data: DataConfig, config: PretrainConfig, *, path: Path, console: Console
) -> PretrainResult:
    """Train the language model of [pretrain] on the text of [data] into the directory `path`, or find it there.

    Raises UserError for anything the user can mend, and Interrupted after Ctrl-C or SIGTERM, with everything saved.
    """
    device = resolve_device(target.device, "target.device")
    if not data.test_fraction + data.validation_fraction:
        raise UserError(
            "data.test_fraction and data.validation_fraction are 0, so nothing is held out to measure the model on. "
            "Set one of them, for example data.test_fraction = 0.01."
        )
    wanted = made_from(config, data_identity(data))
    finished = _begun(path, wanted)
    if finished is not None:
        console.print(f"[bold]Reusing[/bold] the model {path}, made with the same settings.", soft_wrap=True)
        return PretrainResult(path, True, finished)
    make_directory(path)
    _write(path, {"made_from": wanted, "finished": False})
    with console.status("tokenizer"):
        tokenizer = tokenizer_at(path, config, data)
    model = fresh_model(config, tokenizer).to(device)
    optimiser = adamw(model, config, device)
    state = load_checkpoint(path, model, optimiser)
    with console.status("reading text"):
        text = Text(data, tokenizer, len(tokenizer), config.context, config.chunk_tokens)
        rows = Rows(text, config.seed, state.cursor)
    try:
        held_out = rows.held_out(config.validation_tokens)
        if not len(held_out):
            raise UserError(
                f"data.source {data.source!r} gives no held-out row of {config.context + 1} tokens to measure the "
                "model on. Set a larger data.validation_fraction or data.test_fraction, or a shorter pretrain.context."
            )
        state = _Training(path, model, optimiser, rows, config, console).run(state)
    finally:
        rows.close()
    round_weights(model, DTYPES[config.weights])
    facts = _facts(path, model, config, state) | _measured(model, torch.from_numpy(held_out), config, device)
    save_model(model, path, DTYPES[config.weights])
    _write(path, _record(path, wanted, tokenizer, facts))
    (path / FILE).unlink(missing_ok=True)
    return PretrainResult(path, False, facts)


class _Training:
    """The loop: steps, log, checkpoints, display."""

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        rows: Rows,
        config: PretrainConfig,
        console: Console,
    ) -> None:
        self.path, self.model, self.optimiser, self.rows, self.config = path, model, optimiser, rows, config
        self.device = next(model.parameters()).device
        self.console = console

    def run(self, state: State) -> State:
        """From a state to the last step. Raises Interrupted when asked to stop, with the state saved."""
        if state.step:
            self.console.print(f"Going on from step {state.step:,} of {self.config.steps:,}.", highlight=False)
        _cut_log(self.path, state.step)
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        with (
            deferred_interrupts() as stop,
            Bar(*columns, TimeRemainingColumn(), console=self.console, transient=True) as bar,
        ):
            task = bar.add_task("", total=self.config.steps, completed=state.step)
            self.model.train()
            while state.step < self.config.steps:
                state, line = self._one(state)
                bar.update(task, completed=state.step)
                if line:
                    shown = f"loss {line['loss']:.3f}  {line['tokens_per_s']:,.0f} tokens/s"
                    bar.update(task, description=shown)
                self._keep(state, stop)
        return state

    def _one(self, state: State) -> tuple[State, dict[str, Any] | None]:
        """A step; a line of the log where one is due."""
        began = time.perf_counter()
        rows = torch.from_numpy(self.rows.take(self.config.batch_contexts)).to(self.device, torch.int64)
        loss, length = optimise(self.model, self.optimiser, rows, self.config, state.step)
        done, loss_sum = state.step + 1, state.loss_sum + loss.item()
        if not math.isfinite(loss_sum):
            raise UserError(
                f"The loss is {loss_sum} at step {done:,}. Remove {self.path}, and set a smaller pretrain.lr or a "
                "longer pretrain.warmup."
            )
        seconds = state.seconds + time.perf_counter() - began
        state = State(done, self.rows.cursor, loss_sum, seconds)
        if done % self.config.log_every and done != self.config.steps:
            return state, None
        since = done % self.config.log_every or self.config.log_every
        tokens = done * self.config.batch_contexts * self.config.context
        line = {
            "step": done,
            "loss": loss_sum / since,
            "lr": learning_rate(done - 1, self.config),
            "grad_norm": length.item(),
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
        }
        with (self.path / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        return state._replace(loss_sum=0.0), line

    def _keep(self, state: State, stop: StopFlag) -> None:
        """A checkpoint where one is due; at the end too, so that only measuring is left to do again."""
        ended = state.step == self.config.steps
        if stop.requested or ended or state.step % self.config.checkpoint_every == 0:
            save_checkpoint(self.path, self.model, self.optimiser, state)
        if stop.requested and not ended:
            raise Interrupted(
                f"Stopped after step {state.step:,} of {self.config.steps:,}; {self.path} has it. The same command "
                "goes on from there."
            )


def _begun(path: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a finished directory, None for one that is new or was begun. Raises UserError for another's."""
    if not (path / RECORD).is_file():
        if path.is_dir() and any(path.iterdir()):
            raise UserError(
                f"{path} is no directory of `thresher target train`, and it is not empty; expected a new directory or "
                "one that it began. Choose another with --out."
            )
        return None
    record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    unlike = differences(json.loads(json.dumps(wanted)), record["made_from"])
    if unlike and not record["finished"] and not (path / FILE).is_file():
        shutil.rmtree(path)  # begun, and nothing was trained: there is nothing to lose
        return None
    if unlike:
        raise UserError(
            f"{path} holds another model: {'; '.join(unlike[:5])} ('expected' is this recipe's). Choose another place "
            "with --out, or remove that directory if it is no longer wanted."
        )
    return record["result"] if record["finished"] else None


def _cut_log(path: Path, step: int) -> None:
    """Without the lines of steps that will be done again."""
    log = path / LOG
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    publish(log, ["".join(f"{line}\n" for line in kept).encode()])


def _measured(model: nn.Module, rows: torch.Tensor, config: PretrainConfig, device: torch.device) -> dict[str, Any]:
    """Cross-entropy of held-out rows [M, T + 1], in float32."""
    total, count = 0.0, 0
    model.eval()
    with torch.inference_mode():
        for some in rows.split(config.pass_contexts or config.batch_contexts):
            some = some.to(device, torch.int64)
            total += cross_entropy_sum(model, some).item()
            count += int((some[:, 1:] >= 0).sum())
    return {"validation_ce": total / count, "validation_tokens": count}


def _facts(path: Path, model: Any, config: PretrainConfig, state: State) -> dict[str, Any]:
    last = json.loads((path / LOG).read_text(encoding="utf-8").splitlines()[-1])
    embedding = model.get_input_embeddings().weight.numel()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": parameters,
        "parameters_without_embedding": parameters - embedding,
        "steps": state.step,
        "tokens": state.step * config.batch_contexts * config.context,
        "epochs_begun": state.cursor.epoch + 1,
        "seconds": state.seconds,
        "device": str(next(model.parameters()).device),
        "train_ce": last["loss"],
    }


def _record(
    path: Path, wanted: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", facts: dict[str, Any]
) -> dict[str, Any]:
    return {
        "made_from": wanted,
        "finished": True,
        "result": facts,
        "tokenizer": {"tokens": len(tokenizer), "digest": digest(tokenizer_files(path))},
        "versions": versions(),
    }


def _write(path: Path, record: dict[str, Any]) -> None:
    publish(path / RECORD, [json.dumps(record, indent=1).encode()])
