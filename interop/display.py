"""What exports and imports print; of an import every reading of the files, and what it comes to on real activations."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from thresher.interop.export import Written
from thresher.interop.importing import Imported

_BETTER = 0.9
"""A reading whose FVU is below this share of the chosen one's is worth a word."""
_EXACT = 1e-5
"""Further than this share of the largest value, folded weights are another dictionary."""


def print_written(written: Sequence[Written], console: Console) -> None:
    """Where it is, and what calibrated thresholds changed."""
    for part in written:
        for run, facts in part.thresholds.items():
            before, after = facts["before"], facts["after"]
            console.print(
                f"{run}: {facts['was']} k = {facts['k']} as thresholds over {facts['rows']:,} rows: L0 "
                f"{before['l0']:.1f} -> {after['l0']:.1f}, FVU {before['fvu']:.4f} -> {after['fvu']:.4f} on held-out "
                "rows",
                highlight=False,
                soft_wrap=True,
            )
        console.print(f"{part.path}  {', '.join(part.runs)}", highlight=False, soft_wrap=True)


def print_imported(done: Sequence[Imported], console: Console) -> None:
    """One table per dictionary, its run directory, and a warning where another reading reconstructs better."""
    for each in done:
        table = Table("reading", "FVU", "L0", "folded weights differ by", box=None, pad_edge=False)
        for row in each.readings:
            style = "bold" if row.label == each.chosen else ""
            table.add_row(escape(row.label), f"{row.fvu:.4f}", f"{row.l0:.1f}", f"{row.folding:.1e}", style=style)
        console.print(table)
        taken = next(row for row in each.readings if row.label == each.chosen)
        if not taken.folding <= _EXACT:
            console.print(
                f"[yellow]The run is not what the files compute: a code or an output differs by {taken.folding:.1e} of "
                "the largest. What has no form here, such as negative thresholds, was changed.[/]",
                highlight=False,
            )
        console.print(
            f"As saved, in float32, outputs differ by {each.served.output:.1e} of the largest and L0 on "
            f"{each.served.other_l0} of {each.served.rows:,} rows.",
            highlight=False,
            soft_wrap=True,
        )
        best = min(each.readings, key=lambda row: row.fvu)
        if best.fvu < _BETTER * taken.fvu:
            console.print(
                f"[yellow]Read as {best.label!r} it would reconstruct better; if its files are silent or wrong about "
                f"that, import it with --reading {best.label!r}.[/]",
                highlight=False,
            )
        console.print(str(each.path), highlight=False, soft_wrap=True)
