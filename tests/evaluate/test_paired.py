"""Two evaluations of one text are paired as exactly as two rows of one; of two texts, never."""

import numpy as np
import pytest

from thresher.cache.errors import UserError
from thresher.evaluate.paired import paired_difference, segments_from
from thresher.evaluate.passes import patched_label
from thresher.evaluate.report import write_report
from thresher.evaluate.run import Replacement
from thresher.evaluate.splice import PROTOCOLS
from thresher.evaluate.verdict import Draw

INS, OUTS = [f"L{i:02d}.mlp_in" for i in range(2)], [f"L{i:02d}.mlp_out" for i in range(2)]
DRAW = Draw(200, 0)


def labels(name, protocol):
    sites = OUTS if protocol == "single_site" else [None]
    return [patched_label(protocol, name, site) for site in sites]


@pytest.fixture(scope="module")
def sets(kit):
    return [Replacement(name, (kit.Random(INS, OUTS, seed=seed),), {}) for name, seed in (("one", 0), ("two", 1))]


@pytest.fixture(scope="module")
def apart(kit, scan, sets):
    return [scan([own], kit.TinyTarget(), kit.contexts(rows=9), single_site_share=0.5).segments for own in sets]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_separate_evaluations_differ_by_what_a_joint_one_says(kit, scan, sets, apart, protocol):
    joint = scan(sets, kit.TinyTarget(), kit.contexts(rows=9), single_site_share=0.5)
    (pair,) = [pair for pair in joint.pairs if pair["protocol"] == protocol]
    order = [apart[sets.index(next(s for s in sets if s.name == pair[key]))] for key in ("a", "b")]
    found = paired_difference(*order, labels(pair["a"], protocol), labels(pair["b"], protocol), protocol, DRAW)
    assert (found.value, *found.interval) == pytest.approx((pair["difference"], pair["low"], pair["high"]), abs=1e-12)


@pytest.mark.usefixtures("no_pictures")
def test_documents_file_holds_all_that_a_comparison_needs(kit, scan, sets, apart, tmp_path):
    paths = write_report(scan(sets, kit.TinyTarget(), kit.contexts(rows=9), single_site_share=0.5), tmp_path)
    with np.load(paths.segments, allow_pickle=False) as arrays:
        read = segments_from(dict(arrays))
    assert read.l0.keys() == {"one", "two"}
    arms = labels("one", "cascade"), labels("two", "cascade")
    assert paired_difference(read, read, *arms, "cascade", DRAW) == paired_difference(*apart, *arms, "cascade", DRAW)
    with pytest.raises(UserError, match=r"documents\.npz.*got x"):
        segments_from({"x": np.zeros(1)})


def refused(a, b, protocol="cascade", names=("one", "one")):
    with pytest.raises(UserError) as caught:
        paired_difference(a, b, *[labels(name, protocol) for name in names], protocol, DRAW)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_text_is_refused_by_what_shows_it(kit, scan, sets, apart):
    def of(target=None, **settings):
        return scan(sets[:1], target or kit.TinyTarget(), kit.contexts(**settings), single_site_share=0.5).segments

    assert "row has" in refused(apart[0], of(rows=8))
    assert "untouched model's loss" in refused(apart[0], of(rows=9, seed=4))
    assert "untouched model's loss" in refused(apart[0], of(kit.TinyTarget(n_layers=2), rows=9))
    moved = apart[0]._replace(document=apart[0].document + (apart[0].document == 3))
    assert "document of segment" in refused(apart[0], moved)
    assert "tokens of segment 0" in refused(apart[0], apart[0]._replace(tokens=apart[0].tokens + 1))


def test_other_rows_of_single_site_are_refused_under_it_alone(kit, scan, sets, apart):
    whole = scan(sets[:1], kit.TinyTarget(), kit.contexts(rows=9), single_site_share=1.0).segments
    assert "tokens_single" in refused(apart[0], whole, "single_site")
    found = paired_difference(apart[0], whole, labels("one", "cascade"), labels("one", "cascade"), "cascade", DRAW)
    assert found.value == pytest.approx(0, abs=1e-12)


def test_what_was_not_run_is_refused(kit, scan, sets, apart):
    assert "cascade|two" in refused(apart[0], apart[0], names=("one", "two"))
    short = scan(sets[:1], kit.TinyTarget(), kit.contexts(rows=9), protocols=("cascade",)).segments
    assert "Nothing was scored under single_site" in refused(short, short, "single_site")
