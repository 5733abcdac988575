"""What `thresher target train` says at its end."""

from rich.console import Console
from rich.table import Table

from thresher.harvest.pretraining.settings import PretrainResult


def print_result(result: PretrainResult, out: Console) -> None:
    """Where the model is, how large, how well it predicts, and how to go on."""
    facts = result.facts
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("model", str(result.path))
    table.add_row(
        "parameters", f"{facts['parameters']:,}, {facts['parameters_without_embedding']:,} without the embedding"
    )
    table.add_row("trained on", f"{facts['tokens']:,} tokens in {facts['steps']:,} steps, {facts['seconds']:.0f} s")
    table.add_row("cross-entropy", f"{facts['train_ce']:.3f} nats per token in the last steps")
    table.add_row("held out", f"{facts['validation_ce']:.3f} nats per token, {facts['validation_tokens']:,} tokens")
    out.print(table, highlight=False, soft_wrap=True)
    out.print(f'To explain it: target.model = "{result.path}".', highlight=False, soft_wrap=True)
