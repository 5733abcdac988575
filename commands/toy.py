"""`thresher toy`: the study of compressed computation, and its models as targets."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thresher.commands.document import Json, write
from thresher.commands.options import examples, out, refuse_several

if TYPE_CHECKING:
    from thresher.toy.study import Done
    from thresher.toy.targets import Stack

app = typer.Typer(help="Study a toy model of superposition, and make targets of it.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="An experiment, or all.", show_default=False)]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Of mixing, inputs and weights.")]


@app.command("list", epilog=examples("thresher toy list"))
def toy_list(as_json: Json = False) -> None:
    """Name experiments and targets."""
    from thresher.toy.experiments.registry import EXPERIMENTS
    from thresher.toy.targets import TARGETS

    for each in EXPERIMENTS.values():
        out.print(f"{each.name:<12} {each.also:<12} {each.title}", highlight=False)
    out.print(f"targets      {', '.join(TARGETS)}", highlight=False)
    if as_json:
        rows = [{"name": each.name, "also": each.also, "title": each.title} for each in EXPERIMENTS.values()]
        write({"experiments": rows, "targets": list(TARGETS)})


@app.command(
    "run",
    epilog=examples(
        "thresher toy run transplant --quick", "thresher toy run all", "thresher toy run nb3 --out studies/toy --json"
    ),
)
def toy_run(
    name: Name,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps and settings, wider tolerances.")] = False,
    seed: Seed = 0,
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where everything goes; by default toy, or toy-quick.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run an experiment, or all, and compare its numbers with those expected.

    What was finished is reused; after Ctrl-C the same command goes on.
    """
    import dataclasses

    import torch

    from thresher.toy.experiments.registry import chosen
    from thresher.toy.sizes import FULL, QUICK
    from thresher.toy.study import PAGE, run

    refuse_several("thresher toy run", "an experiment is run by one process", "Run it without torchrun.")
    experiments = chosen(name)
    size = dataclasses.replace(QUICK if quick else FULL, seed=seed)
    place = folder or Path("toy-quick" if quick else "toy")
    torch.set_num_threads(1)  # the products are small: a second thread waits more than it works
    done = run(experiments, size, place, out)
    for one in done:
        _print(one)
    out.print(f"page     {place / PAGE}", highlight=False, soft_wrap=True)
    if as_json:
        write({"page": place / PAGE, "experiments": [_told(one) for one in done]})


@app.command("target", epilog=examples("thresher toy target stack --out targets/stack"))
def toy_target(
    name: Annotated[str, typer.Argument(metavar="NAME", help="mlp, stack, embed, chain or xor.", show_default=False)],
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="The model's directory.", show_default=False)],
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Of training, where there is one.")] = 15_774,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make a toy model that can be harvested: a directory for target.model."""
    import torch

    from thresher.toy.targets import made

    refuse_several("thresher toy target", "a model is made by one process", "Run it without torchrun.")
    torch.set_num_threads(1)
    with out.status(f"making {name}"):
        stack = made(name, seed, steps)
        _save(stack, folder, seed)
    out.print(f"{folder}: {stack.about}.", highlight=False, soft_wrap=True)
    if as_json:
        write({"path": folder, "about": stack.about, "layers": len(stack.w_in)})


def _save(stack: "Stack", folder: Path, seed: int) -> None:
    """In the form that harvest reads."""
    from thresher.harvest.toy_inputs import ToyInputs
    from thresher.harvest.toy_stack import built, save_toy

    inputs = ToyInputs(mode=stack.mode, p=stack.p, seed=seed)
    save_toy(built(inputs, stack.w_in, stack.w_out, stack.embedding, stack.mixing), folder, stack.about)


def _print(one: "Done") -> None:
    passed = sum(verdict.passed for verdict in one.verdicts)
    state = "reused" if one.reused else f"{one.seconds:.0f} s"
    of = f"{passed} of {len(one.verdicts)} as expected"
    out.print(f"[bold]{one.experiment.name}[/] ({one.experiment.also}), {state}: {of}", highlight=False)
    for verdict in one.verdicts:
        mark = "[green]ok  [/]" if verdict.passed else "[red]MISS[/]"
        told = f"{verdict.what}: {verdict.measured:.4g}, expected {verdict.expected}"
        out.print(f"  {mark} {told}", highlight=False, soft_wrap=True)


def _told(one: "Done") -> dict[str, Any]:
    return {
        "name": one.experiment.name,
        "path": one.folder,
        "reused": one.reused,
        "seconds": one.seconds,
        "verdicts": one.verdicts,
        "figures": one.figures,
    }
