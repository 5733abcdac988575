"""Time of the toy's sweep: 40 scales × 2 kinds of mixing × 10,000 steps at batch 1024 (docs/toy.md).

    python benchmarks/toy.py [--steps 200] [--threads 1]

Times a number of steps of all 80 models in one call, under both input modes, merged rows and plain ones, and says what
10,000 steps come to. CPU time is printed too: on a machine with other work it is the number that holds.
"""

import argparse
import time

import torch

from thresher.toy import inputs as toy_inputs
from thresher.toy.inputs import Inputs
from thresher.toy.labels import Labels
from thresher.toy.training import Fit, train

SCALES = [i * 0.002 for i in range(40)]
BAR_S = 15 * 60
WHOLE = 10_000


def fits(inputs: Inputs, steps: int) -> list[Fit]:
    """The sweep: two kinds, one M each; inputs and initial weights are shared by all 80."""
    return [
        Fit(inputs=inputs, labels=Labels(scale=scale, symmetric=symmetric), steps=steps, batch=1024)
        for symmetric in (True, False)
        for scale in SCALES
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    for inputs in (Inputs(p=0.01), Inputs(mode="single")):
        for merge in (True, False):
            drawn = toy_inputs.batches(inputs, 1024, toy_inputs.stream(0, "training"), merge=merge)
            rows = sum(len(batch.x) for _, batch in zip(range(20), drawn, strict=False)) / 20
            if not merge:
                print(f"{inputs.label}: {rows:.0f} rows a batch without merging")
                continue
            train(fits(inputs, 2))
            wall, cpu = time.perf_counter(), time.process_time()
            train(fits(inputs, chosen.steps))
            wall, cpu = (
                (now - before) / chosen.steps * WHOLE
                for now, before in ((time.perf_counter(), wall), (time.process_time(), cpu))
            )
            print(
                f"{inputs.label}: {rows:.0f} rows a batch; 80 models × 10,000 steps: {cpu / 60:.1f} CPU-minutes on "
                f"{chosen.threads} thread(s), {wall / 60:.1f} minutes by the clock (bar {BAR_S / 60:.0f})"
            )


if __name__ == "__main__":
    main()
