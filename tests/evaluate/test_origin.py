"""What the report is told of runs: enough to see which of them differ in their seed alone."""

from pathlib import Path

import pytest

from thresher.evaluate.origin import Run, replacements


def run(kit, name, seed=0, lr=1e-3, k=16):
    config = {
        "name": name,
        "group": name,
        "dictionary": {"kind": "sae", "firing": "topk", "n_latents": 16, "k": k},
        "training": {"settings": {"lr": lr, "seed": seed}, "seed": seed, "rows": 1000},
        "cache": {"fingerprint": "c"},
        "git_commit": name,
    }
    return Run(Path(name), kit.Identity(["x"], ["x"]), f"k={k}", config, name, {})


@pytest.mark.parametrize(("change", "same"), [({"seed": 1}, True), ({"lr": 2e-3}, False), ({"k": 8}, False)])
def test_setting_is_all_that_a_run_was_told_but_its_seed(kit, change, same):
    first, second = replacements([run(kit, "a"), run(kit, "b", **change)], together=True)
    assert (first.facts["setting"] == second.facts["setting"]) == same
