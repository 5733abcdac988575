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


def test_dictionaries_of_a_group_are_one_set_whatever_their_k(kit):
    """Four layers with a k of their own: one replacement of four sites, at the mean k; alone, four."""
    runs = []
    for layer, k in enumerate((21, 8, 13, 27)):
        one = run(kit, f"plt-L{layer:02d}", k=k)
        site = [f"L{layer:02d}.mlp_out"]
        runs.append(one._replace(config={**one.config, "group": "plt"}, dictionary=kit.Identity(site, site)))
    (one,) = replacements(runs, together=True)
    assert [d.writes for d in one.dictionaries] == [(f"L{layer:02d}.mlp_out",) for layer in range(4)]
    assert one.facts["k"] == 17.25
    assert one.facts["sparsity"] == "k=21 / k=8 / k=13 / k=27"
    assert [one.facts["k"] for one in replacements(runs, together=False)] == [21, 8, 13, 27]
    (even,) = replacements(
        [
            run._replace(config={**run.config, "dictionary": {**run.config["dictionary"], "k": 16}}, sparsity="k=16")
            for run in runs
        ],
        together=True,
    )
    assert (even.facts["k"], even.facts["sparsity"]) == (16, "k=16")
