"""Laws that hold whatever the weights: perfect, zero and mean dictionaries under every protocol."""

import pytest
import torch

from thresher.evaluate.run import Replacement
from thresher.evaluate.splice import PROTOCOLS

OUTS = ("L00.mlp_out", "L01.mlp_out", "L02.mlp_out")


def one(name, *dictionaries, **facts):
    return Replacement(name, dictionaries, facts)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_identity_dictionary_changes_nothing_in_float64(kit, scan, protocol):
    sets = [
        one("outs", *[kit.Identity([s], [s]) for s in OUTS]),
        one("stream", *[kit.Identity([f"L{i:02d}.resid_post"], [f"L{i:02d}.resid_post"]) for i in range(3)]),
    ]
    results = scan(sets, kit.TinyTarget(), kit.contexts(), protocols=(protocol,))
    for name in ("outs", "stream"):
        found = results.find(name, protocol).metrics
        assert (found["delta"], found["kl"], found["agree"], found["fvu"]) == (0, 0, 1, 0)
        assert found["recovered_zero"] == found["recovered_mean"] == 1
        assert (found["acc_drop"], found["ppl_ratio"]) == (0, 1)
    assert all(check["passed"] and check["delta"] == check["kl"] == 0 for check in results.checks)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_identity_dictionary_changes_less_than_a_millionth_in_float32(kit, scan, protocol):
    target = kit.TinyTarget(dtype=torch.float32)
    results = scan([one("a", *[kit.Identity([s], [s]) for s in OUTS])], target, kit.contexts(), protocols=(protocol,))
    found = results.find("a", protocol).metrics
    assert max(abs(found["delta"]), abs(found["kl"])) <= 1e-6
