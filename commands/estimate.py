"""`thresher estimate`: what a recipe takes on so many GPUs, reckoned without model, network or data."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.filesize import decimal

from thresher.cache.errors import UserError
from thresher.commands.document import Json, write
from thresher.commands.options import Assignments, RecipeName, examples, out
from thresher.commands.wiring import plans_of, read_recipe

if TYPE_CHECKING:
    from thresher.cache.contracts import Site
    from thresher.cache.estimate import Workload
    from thresher.cache.hardware import Hardware
    from thresher.cache.layout import Codec
    from thresher.harvest.shapes import TargetShape
    from thresher.recipes.reading import Recipe
    from thresher.train.costs.prospect import Job, Prospect
    from thresher.train.costs.sizes import Sizes

EXAMPLES = examples(
    "thresher estimate gpt2-clt-topk --gpus 8",
    "thresher estimate mine.toml --gpus 4 --gpu A100 --tokens 50000000",
    "thresher estimate books-demo --measure",
)

FORWARD_SHARE = 0.5
"""Of a large product's rate that a target's forward passes reach."""


class Budget(NamedTuple):
    """What a recipe takes."""

    hardware: "Hardware"
    job: "Job"
    work: "Workload"
    basis: str
    """Where the number of rows comes from."""
    prospects: "tuple[Prospect, ...]"
    """By layout, the least divided first."""
    chosen: "Prospect | None"
    """The one to take; None: none fits."""
    wider: "Prospect | None"
    """Where none fits: the fewest ranks that would do."""
    sizes: "Mapping[str, Sizes]"
    """By dictionary."""
    cache: "dict[Codec, int]"
    """Bytes by codec; bf16-lz4 as if it did not compress."""
    harvest_s: "dict[Codec, float]"
    """By codec, seconds on all GPUs: the longer of passes and writing."""
    assumed: tuple[str, ...]
    """What the numbers rest on, a sentence each."""


def estimate(
    name: RecipeName,
    assignments: Assignments = None,
    gpus: Annotated[int, typer.Option(metavar="N", min=1, help="GPUs, of all hosts together.")] = 1,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="H100, H200, B200, A100, L40S and others.")] = "H100",
    tflops: Annotated[float | None, typer.Option(metavar="X", min=0, help="Of a bfloat16 product, sustained.")] = None,
    bandwidth: Annotated[float | None, typer.Option(metavar="GB/S", min=0, help="Of its memory, sustained.")] = None,
    memory_gb: Annotated[float | None, typer.Option(metavar="GB", min=0, help="Its memory.")] = None,
    per_host: Annotated[int, typer.Option(min=1, metavar="N", help="GPUs of a host.")] = 8,
    disk: Annotated[float, typer.Option(metavar="GB/S", min=0, help="Of the cache's disk, for each host.")] = 5.0,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens to reckon with, in place of the text's.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time a product and a copy on this machine, and reckon with those.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Memory, hours and disk of a recipe on so many GPUs, and how to divide the work among them."""
    from thresher.train.costs.display import advice, details_table, layouts_table

    recipe = read_recipe(name, assignments)
    wanted = Wanted(gpus, gpu, tflops, bandwidth, memory_gb, per_host, disk, tokens, measure)
    found = budget(recipe, wanted)
    _tell(recipe, found)
    own = recipe.tables["parallel"]
    out.print(layouts_table(found.prospects, found.hardware, (own.data, own.latents)))
    shown = found.chosen or found.wider
    if shown is not None:
        out.print(details_table(found.prospects[0], shown))
    for line in advice(found.chosen, found.wider, found.prospects, found.hardware):
        out.print(line, highlight=False, soft_wrap=True)
    for line in found.assumed:
        out.print(f"[dim]Assumed: {line}[/]", highlight=False, soft_wrap=True)
    if as_json:
        write(_document(recipe, found))


class Wanted(NamedTuple):
    """What is asked for on the command line."""

    gpus: int = 1
    gpu: str = "H100"
    tflops: float | None = None
    bandwidth: float | None = None
    memory_gb: float | None = None
    per_host: int = 8
    disk: float = 5.0
    tokens: int | None = None
    measure: bool = False


def budget(recipe: "Recipe", wanted: Wanted) -> Budget:
    """Reckon a recipe. Raises UserError where sites or the length of the text cannot be known."""
    from thresher.cache.estimate import array_bytes, sketched
    from thresher.cache.layout import CODECS
    from thresher.harvest.estimate import expected
    from thresher.train.costs.memory import Assumed
    from thresher.train.costs.prospect import Job, counted, prospects, recommended, smallest

    shape, sites, note = _target(recipe)
    target, data, harvest = (recipe.tables[table] for table in ("target", "data", "harvest"))
    work, basis = expected(target, data, harvest, tuple(sites.values()), shape.context, wanted.tokens, out)
    plan = sketched(work, harvest.codec)
    rows = plan.splits["train"].rows
    plans = tuple(plans_of(recipe, sites))
    steps = tuple(plan.train.total_steps(rows) for plan in plans)
    job = Job(plans, steps, sites, harvest.codec, rows, counted(plans))
    hardware, assumed = _hardware(wanted, job), Assumed()
    found = tuple(prospects(job, wanted.gpus, hardware, wanted.disk * 1e9, assumed, _threads(hardware)))
    chosen = recommended(found)
    cache = {codec: array_bytes(sketched(work, codec)) for codec in CODECS}
    blocks = 1 + max(site.layer for site in work.sites)
    forward_s = work.tokens * shape.flop(blocks, work.context) / (FORWARD_SHARE * wanted.gpus * hardware.product)
    hosts = -(-wanted.gpus // wanted.per_host)
    harvest_s = {codec: max(forward_s, size / (wanted.disk * 1e9 * hosts)) for codec, size in cache.items()}
    wider = None if chosen is not None else smallest(job, hardware, wanted.disk * 1e9, assumed)
    said = (*note, *_assumptions(wanted, hardware, job, assumed))
    if harvest.window_gb is not None and wanted.gpus > 1:
        said += ("a cache of all rows: a ring (harvest.window_gb) feeds one process only.",)
    return Budget(hardware, job, work, basis, found, chosen, wider, job.sizes, cache, harvest_s, said)


def _target(recipe: "Recipe") -> "tuple[TargetShape, dict[str, Site], tuple[str, ...]]":
    """Shape and sites of the recipe's target, which is not loaded, and what had to be assumed of it."""
    from thresher.harvest.shapes import KNOWN, usual
    from thresher.harvest.sites import TAPS
    from thresher.recipes.checking import Shape, shape_of, sites_of

    model, told, harvest = recipe.tables["target"].model, shape_of(recipe), recipe.tables["harvest"]
    known = KNOWN.get(model)
    if known is None and told is None:
        raise UserError(
            f"Of the target {model!r} neither layers nor width are known without loading it. Write them into the "
            "recipe, as [reference] layers and width, or with --set reference.layers=… --set reference.width=…."
        )
    if known is not None and told is not None and (told.layers, told.width) != (known.layers, known.width):
        known = None
    told = told or Shape(known.layers, known.width)  # type: ignore[union-attr]
    sites = sites_of(told, harvest.sites, harvest.layers, tuple(TAPS))
    if sites is None:
        raise UserError(
            f"harvest.sites = {list(harvest.sites)} names more than taps, and the widths of others are known to the "
            "model alone. Name taps to reckon with, for example --set harvest.sites='[\"resid_post\"]'."
        )
    if known is not None:
        return known, sites, ()
    return usual(*told), sites, (f"{model} is shaped like GPT-2, with {told.layers} blocks {told.width} wide.",)


def _hardware(wanted: Wanted, job: "Job") -> "Hardware":
    from thresher.cache.hardware import gpu

    found = _measured(gpu(wanted.gpu), job) if wanted.measure else gpu(wanted.gpu)
    given = {
        "low": None if wanted.tflops is None else wanted.tflops * 1e12,
        "bandwidth": None if wanted.bandwidth is None else wanted.bandwidth * 1e9,
        "memory": None if wanted.memory_gb is None else int(wanted.memory_gb * 1e9),
    }
    told = {key: value for key, value in given.items() if value is not None}
    return found._replace(**told, per_host=wanted.per_host)  # type: ignore[arg-type]


def _measured(like: "Hardware", job: "Job") -> "Hardware":
    """This machine's own rates, on the shape of the recipe's largest product; links are those of the GPU named."""
    from thresher.cache.devices import resolve_device
    from thresher.train.costs.measure import measure

    device = resolve_device("auto", "--measure")
    plan = max(job.plans, key=lambda each: each.train.part_rows * each.spec.row_work)
    found = measure(device, plan.train.part_rows, plan.spec.d_in, plan.spec.n_latents)
    if device.type != "cuda":  # processes of one machine exchange through its memory: there, and back
        like = like._replace(kind="cpu", link=found.bandwidth / 4, network=found.bandwidth / 4)
    return like._replace(
        name=f"this machine ({device})",
        memory=found.memory,
        low=found.low,
        full=found.full,
        bandwidth=found.bandwidth,
    )


def _threads(hardware: "Hardware") -> int:
    import torch

    return torch.get_num_threads() if hardware.kind == "cpu" else 1


def _assumptions(wanted: Wanted, hardware: "Hardware", job: "Job", assumed: Any) -> list[str]:
    source = "measured here" if wanted.measure else "data sheets times what an H200 sustains of its own"
    said = [
        f"{hardware.name} multiplies {hardware.product / 1e12:,.3g} TFLOP/s and moves {hardware.bandwidth / 1e9:,.0f} "
        f"GB/s ({source}), {hardware.link / 1e9:,.0f} GB/s between GPUs of a host; the target's passes reach "
        f"{FORWARD_SHARE:.0%} of the former.",
        f"a host reads and writes {wanted.disk:g} GB/s of the cache (--disk). Times are the least to be expected: "
        "launches, kernels that fall short of the memory's rate, checkpoints and starting up come on top.",
    ]
    specs = [plan.spec for plan in job.plans]
    if any(spec.aux > 0 for spec in specs):
        said.append(f"AuxK finds {assumed.dead:.0%} of the latents dead.")
    if any(spec.k is None for spec in specs):
        said.append(f"{assumed.l0:g} active latents per token and layer, where a penalty decides.")
    if any(plan.train.objective != "local" for plan in job.plans):
        said.append("passes of the language model in training (objective kl or ce) are not counted.")
    return said


def _tell(recipe: "Recipe", found: Budget) -> None:
    """What is trained, from what, and what lies on the disk."""
    from thresher.cache.estimate import duration
    from thresher.train.costs.display import short

    job, work = found.job, found.work
    sizes = list(found.sizes.values())
    parameters = [size.parameters for size in sizes]
    codec = job.codec
    steps = sorted(set(job.steps))
    lengths = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
    out.print(
        f"[bold]{recipe.name}[/]: {len(job.plans):,} {'dictionary' if len(job.plans) == 1 else 'dictionaries'} of "
        f"{short(max(parameters))} parameters at most, {short(sum(parameters))} in all; {lengths} steps.",
        highlight=False,
        soft_wrap=True,
    )
    others = ", ".join(f"{name} {decimal(size)}" for name, size in found.cache.items() if name != codec)
    window = recipe.tables["harvest"].window_gb
    ring = "" if window is None else f" harvest.window_gb keeps {window:g} GB of it at a time."
    out.print(
        f"Cache: {sum(work.rows.values()):,} rows at {len(work.sites)} sites ({found.basis}), "
        f"{decimal(found.cache[codec])} in {codec} ({others}); harvest at least "
        f"{duration(found.harvest_s[codec])}.{ring}",
        highlight=False,
        soft_wrap=True,
    )
    out.print(
        f"Disk for runs: {decimal(sum(2 * size.checkpoint for size in sizes))} of checkpoints (two are kept of each) "
        f"and {decimal(sum(size.run for size in sizes))} of weights.",
        highlight=False,
        soft_wrap=True,
    )


def _document(recipe: "Recipe", found: Budget) -> dict[str, Any]:
    """As in docs/terminal.md."""
    sizes = list(found.sizes.values())
    return {
        "recipe": recipe.name,
        "hardware": found.hardware,
        "dictionaries": len(found.job.plans),
        "parameters": sum(size.parameters for size in sizes),
        "steps": sorted(set(found.job.steps)),
        "rows": found.work.rows,
        "tokens": found.work.tokens,
        "cache": found.cache,
        "codec": found.job.codec,
        "harvest_s": found.harvest_s[found.job.codec],
        "checkpoints": sum(2 * size.checkpoint for size in sizes),
        "weights": sum(size.run for size in sizes),
        "layouts": [_layout(each) for each in found.prospects],
        "chosen": None if found.chosen is None else found.chosen.layout,
        "assumed": found.assumed,
    }


def _layout(found: "Prospect") -> dict[str, Any]:
    numbers = found.memory._asdict() | {"step": found.memory.step, "total": found.memory.total}
    return {**found.layout._asdict(), "fits": found.fits, "memory": numbers, "step_s": found.step} | {
        "reading_s": found.reading_s,
        "sent": found.traffic,
        "seconds": found.seconds,
        "bound": found.bound,
    }
