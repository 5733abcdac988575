"""A user's mistakes each get a message that names what does not fit, before anything is computed."""

import pytest
import torch

from thresher.cache.errors import UserError
from thresher.evaluate.run import EvaluateConfig, Replacement


def one(name, *dictionaries):
    return Replacement(name, dictionaries, {})


def refused(scan, kit, sets, *parts, target=None, contexts=None):
    target = target or kit.TinyTarget()
    with pytest.raises(UserError) as caught:
        scan(sets, target, contexts or kit.contexts())
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert "\n" not in message
    return target


def test_a_site_the_target_lacks_names_both(kit, scan):
    sets = [one("set", kit.Random(["L07.mlp_in"], ["L00.mlp_out"], name="run-7"))]
    target = refused(scan, kit, sets, "run-7", "set", "L07.mlp_in", "tiny-3")
    assert target.passes == 0


def test_a_written_width_that_differs_names_both(kit, scan):
    class Wide(kit.Random):
        def decode(self, destination, codes):
            return torch.zeros(codes[0].tokens, 9)

    refused(scan, kit, [one("x", Wide(["L00.mlp_in"], ["L00.mlp_out"], name="wide"))], "wide", "width 9", "width 8")


def test_a_read_width_that_differs_names_both(kit, scan):
    sets = [one("x", kit.Identity(["L00.mlp_in"], ["L00.mlp_out"], d=9, name="wide"))]
    refused(scan, kit, sets, "wide", "L00.mlp_in", "8 wide", "expected width 9")


def test_a_missing_or_short_mean_is_refused(kit, scan):
    for means in ({"other": torch.zeros(8)}, {"L00.mlp_out": torch.zeros(3)}):
        d = kit.Random(["L00.mlp_in"], ["L00.mlp_out"], means=means, name="m")
        refused(scan, kit, [one("x", d)], "training mean", "L00.mlp_out")


def test_a_site_written_twice_names_both_writers(kit, scan):
    a, b = (kit.Random(["L00.mlp_in"], ["L00.mlp_out"], name=name) for name in ("first", "second"))
    refused(scan, kit, [one("pair", a, b)], "pair", "first", "second", "written twice")


def test_reading_what_comes_later_is_refused(kit, scan):
    d = kit.Random(["L02.mlp_in"], ["L00.mlp_out"], name="back")
    refused(scan, kit, [one("x", d)], "back", "L02.mlp_in", "L00.mlp_out", "forward order")


def test_no_replacement_and_no_dictionary_are_refused(kit, scan):
    refused(scan, kit, [], "nothing to evaluate")
    refused(scan, kit, [one("hollow")], "hollow", "no dictionary")


def test_equal_names_are_refused(kit, scan):
    d = kit.Random(["L00.mlp_in"], ["L00.mlp_out"])
    refused(scan, kit, [one("twin", d), one("twin", d)], "2 replacements", "twin")


def test_nan_in_a_dictionary_names_the_row_and_position(kit, scan):
    class Broken(kit.Random):
        def decode(self, destination, codes):
            out = super().decode(destination, codes)
            out[0] = torch.nan
            return out

    sets = [one("broken", Broken(["L00.mlp_in"], ["L00.mlp_out"]))]
    refused(scan, kit, sets, "broken", "row 0", "position 1", "L00.mlp_out")


def test_nan_in_the_target_is_an_error_of_the_target(kit, scan):
    table = torch.zeros(4, 4, dtype=torch.float64)
    table[3, 3] = torch.nan
    contexts = kit.contexts(rows=4, length=6)
    contexts.token_id[:] = 1
    contexts.token_id[2, 3] = 3
    sets = [one("x", kit.Identity(["logits"], ["logits"], d=4))]
    refused(scan, kit, sets, "target itself", "row 2", "position 3", target=kit.Readout(table), contexts=contexts)


def test_token_ids_beyond_the_vocabulary_name_the_row(kit, scan):
    contexts = kit.contexts()
    contexts.token_id[4, 2] = 23
    refused(
        scan, kit, [one("x", kit.Random(["L00.mlp_in"], ["L00.mlp_out"]))], "row 4", "23", "0 to 22", contexts=contexts
    )


def test_rows_longer_than_the_context_are_refused(kit, scan):
    sets = [one("x", kit.Random(["L00.mlp_in"], ["L00.mlp_out"]))]
    short = kit.TinyTarget(n_ctx=8)
    refused(scan, kit, sets, "12 tokens long", "at most 8", target=short)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"tokens": -1}, "evaluate.tokens"),
        ({"batch_contexts": 0}, "evaluate.batch_contexts"),
        ({"resamples": 10}, "evaluate.resamples"),
        ({"single_site_share": 0.0}, "evaluate.single_site_share"),
        ({"single_site_share": 1.5}, "evaluate.single_site_share"),
        ({"protocols": ()}, "evaluate.protocols"),
        ({"protocols": ("cascade", "cascade")}, "evaluate.protocols"),
    ],
)
def test_bad_settings_name_their_field(settings, part):
    with pytest.raises(UserError, match=part):
        EvaluateConfig(**settings)
