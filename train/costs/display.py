"""Layouts on screen: memory, time, what is exchanged, and which to take."""

from collections.abc import Iterator, Sequence

from rich.filesize import decimal
from rich.table import Table

from thresher.cache.estimate import duration
from thresher.cache.hardware import Hardware
from thresher.train.costs.prospect import ROOM, Prospect

_BOUNDS = {"matmul": "matmul", "memory": "memory", "exchange": "exchange", "reading": "reading"}
_ITEMS = {
    "weights": "weights, float32",
    "gradients": "gradients",
    "moments": "optimiser's state",
    "buffers": "counters, thresholds, means",
    "low": "bfloat16 copies of encoders",
    "block": "pre-activations",
    "codes": "active entries",
    "reconstructions": "reconstructions and residuals",
    "auxk": "AuxK",
    "muon": "Muon",
    "batch": "rows of this batch and the next",
    "exchange": "exchange",
}


def layouts_table(found: Sequence[Prospect], hardware: Hardware, own: tuple[int, int]) -> Table:
    """A line for every layout; `own`: data and latents of the recipe."""
    table = Table(box=None, header_style="bold", title="Groups of the sweep × data × latents", title_justify="left")
    table.add_column("layout", no_wrap=True)
    for column in (f"memory of {decimal(hardware.memory)}", "", "a step", "sent a step", "training", "bound by"):
        table.add_column(column, justify="right")
    for each in found:
        table.add_row(
            f"{each.layout} (recipe)" if (each.layout.data, each.layout.latents) == own else str(each.layout),
            decimal(each.memory.total),
            "fits" if each.fits else "[red]too large[/]",
            _milliseconds(max(each.step.total, each.reading_s)),
            decimal(each.traffic.total) if each.traffic.total else "–",
            duration(each.seconds),
            _BOUNDS[each.bound],
        )
    return table


def details_table(first: Prospect, chosen: Prospect) -> Table:
    """Where the memory of a GPU goes, by item: undivided, and as chosen."""
    table = Table(box=None, header_style="bold", title="Memory of a GPU", title_justify="left")
    table.add_column("")
    shown = [first] if first.layout == chosen.layout else [first, chosen]
    for each in shown:
        table.add_column(str(each.layout), justify="right")
    for item, label in _ITEMS.items():
        sizes = [getattr(each.memory, item) for each in shown]
        if any(sizes):
            table.add_row(label, *map(decimal, sizes))
    table.add_row("at the peak of a step", *(decimal(each.memory.step) for each in shown), style="bold")
    table.add_row("at the end, folding weights", *(decimal(each.memory.ending) for each in shown), style="bold")
    return table


def advice(
    chosen: Prospect | None, wider: Prospect | None, found: Sequence[Prospect], hardware: Hardware
) -> Iterator[str]:
    """What to write into the recipe, and how to start it."""
    if chosen is not None:
        yield f"[bold green]Take[/] {_told(chosen)}{_launch(chosen)}"
        return
    least = min(found, key=lambda each: each.memory.total)
    yield (
        f"[bold red]Nothing fits[/]: at least {decimal(least.memory.total)} of {decimal(hardware.memory)} "
        f"({ROOM:.0%} are planned with). "
        + (
            f"{wider.layout.ranks} GPUs would do: {_told(wider)}{_launch(wider)}"
            if wider is not None
            else "Make dictionaries smaller, or train fewer at a time."
        )
        + " A smaller train.micro_rows takes less of what is no weight."
    )


def _told(chosen: Prospect) -> str:
    layout = chosen.layout
    if layout.data == layout.latents == 1:
        groups = "one process" if layout.groups == 1 else f"the sweep spread over {layout.groups} processes"
        return f"{groups}, no table \\[parallel]: {duration(chosen.seconds)}, bound by {_BOUNDS[chosen.bound]}."
    keys = ", ".join(f"{name} = {value}" for name, value in layout._asdict().items() if name != "groups" and value > 1)
    return f"\\[parallel] {keys} in the recipe: {duration(chosen.seconds)}, bound by {_BOUNDS[chosen.bound]}."


def _launch(chosen: Prospect) -> str:
    ranks = chosen.layout.ranks
    return "" if ranks == 1 else f" Start it with torchrun, {ranks} processes in all."


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g} ms" if seconds < 1 else f"{seconds:,.2f} s"


def short(number: float) -> str:
    """`1.38G`, `420M`, `9.5k`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
