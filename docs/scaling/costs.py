"""The cost table of docs/scaling.md, from the calculator: put what this prints between the page's two marks.

python docs/scaling/costs.py
"""

from collections.abc import Iterator

from rich.filesize import decimal

from thresher.cache.estimate import duration
from thresher.commands.estimate import Budget, Wanted, budget
from thresher.commands.wiring import read_recipe
from thresher.train.costs.display import short

GPUS = 8
RECIPES = {
    "gpt2-clt-topk": "GPT-2 small",
    "llama1b-clt": "Llama-3.2-1B",
    "gemma2b-clt": "Gemma-2-2B",
    "gpt2-small": "GPT-2 small, a sweep of 49",
}


def table() -> str:
    """Markdown: what each recipe takes, then every layout of eight GPUs."""
    eight = {name: budget(read_recipe(name, None), Wanted(gpus=GPUS)) for name in RECIPES}
    alone = {name: budget(read_recipe(name, None), Wanted()) for name in RECIPES}
    return "\n".join([*_sizes(eight), "", *_layouts(alone, eight)]) + "\n"


def _sizes(eight: dict[str, Budget]) -> Iterator[str]:
    yield "| recipe | target | parameters | rows × sites | cache, int8z | checkpoints | harvest, 8 GPUs |"
    yield "|---|---|---|---|---|---|---|"
    for name, found in eight.items():
        sizes = found.sizes.values()
        cells = (
            f"`{name}`",
            RECIPES[name],
            short(sum(size.parameters for size in sizes)),
            f"{found.job.rows:,} × {len(found.job.sites)}",
            decimal(found.cache["int8z"]),
            decimal(sum(2 * size.checkpoint for size in sizes)),
            duration(found.harvest_s["int8z"]),
        )
        yield f"| {' | '.join(cells)} |"


def _layouts(alone: dict[str, Budget], eight: dict[str, Budget]) -> Iterator[str]:
    yield "| recipe | GPUs | groups × data × latents | memory of a GPU | fits 80 GB | sent | training | bound by |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in eight:
        for gpus, found in ((1, alone[name]), (GPUS, eight[name])):
            for each in found.prospects:
                chosen = found.chosen is not None and each.layout == found.chosen.layout and gpus > 1
                cells = (
                    f"`{name}`",
                    str(gpus),
                    f"**{each.layout}**" if chosen else str(each.layout),
                    decimal(each.memory.total),
                    "yes" if each.fits else "no",
                    decimal(each.traffic.total) if each.traffic.total else "–",
                    duration(each.seconds),
                    each.bound,
                )
                yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(table(), end="")
