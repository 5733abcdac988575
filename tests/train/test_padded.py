"""Selections of fixed capacity are the exact ones with padding behind; nothing reads back; padding matters nowhere."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from thresher.train.dictionary.coder import Coder
from thresher.train.dictionary.rules import JumpReLU
from thresher.train.dictionary.rules.base import seen
from thresher.train.dictionary.spec import DictionarySpec
from thresher.train.dictionary.topologies import build
from thresher.train.kernels import firing, padded
from thresher.train.kernels.padded import PADDING, Padded, Room
from thresher.train.kernels.sparse import Selection

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

N, D, F = 24, 6, 40
RULES: dict[str, dict[str, Any]] = {
    "topk": {"k": 3},
    "batchtopk": {"k": 2.5},
    "relu": {"sparsity": 0.1},
    "jumprelu": {"sparsity": 0.1},
    "groupmax": {"k": 4},
    "gated": {"sparsity": 0.1},
}


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def real_of(selection: Padded) -> Tensor:
    return selection.positions[selection.real]


def flat(mask: Tensor) -> Tensor:
    return torch.nonzero(mask.reshape(-1)).view(-1)


class ReadingBack(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    WAITING = (
        "_local_scalar_dense",
        "aten.nonzero.default",
        "bincount",
        "masked_select",
        "unique",
        "aten.equal.default",
        "lift_fresh",  # a tensor of numbers of the host: to copy them waits too
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = any(name in str(func) for name in self.WAITING)
        waits |= "index.Tensor" in str(func) and any(i is not None and i.dtype == torch.bool for i in args[1])
        waits |= "repeat_interleave" in str(func) and (kwargs or {}).get("output_size") is None
        assert not waits, f"{func} reads back"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selectors take the way of CUDA, on a CPU."""
    monkeypatch.setattr(firing, "fixed_capacity", lambda a_NF, kernels: padded)


@pytest.mark.parametrize("levels", [1, 3, 1000])
@pytest.mark.parametrize("count", [0, 1, 40, 500, 960])
def test_padded_batch_topk_equals_the_plain_selection_with_ties(levels: int, count: int) -> None:
    a = (rand(N, F).float() * levels).round() / levels
    selection = padded.batch_topk(a, count)
    expected = flat(firing.plain_batch_topk(a, count))
    assert torch.equal(real_of(selection), expected)
    assert selection.latents.shape[0] == count
    assert selection.offsets[-1] == expected.shape[0]
    assert torch.equal(selection.take(a)[expected.shape[0] :], torch.full((count - expected.shape[0],), PADDING))


def test_padded_topk_equals_the_selection_of_a_cpu() -> None:
    a = rand(N, F).float()
    left, right = padded.topk(a, 4), firing.select_topk(a, 4)
    for name in ("latents", "offsets", "rows"):
        assert torch.equal(getattr(left, name), getattr(right, name))


def test_the_first_entries_above_a_floor_fill_the_capacity_and_the_rest_overflows() -> None:
    a, floor = rand(N, F).float(), rand(F, seed=1).float().abs()
    expected = flat(a > floor)
    roomy, count = padded.above(a, floor, expected.shape[0])
    assert torch.equal(real_of(roomy), expected)
    assert roomy.overflowed is not None
    assert int(count) == expected.shape[0]
    assert not roomy.overflowed
    tight, count = padded.above(a, floor, 50)
    assert torch.equal(real_of(tight), expected[:50])
    assert tight.overflowed
    assert int(count) == expected.shape[0]


def test_a_cut_over_parts_equals_the_selection_of_the_whole() -> None:
    a = (rand(N, F).float() * 4).round() / 4
    parts = [
        (s, s.take(part)) for part in a.split([10, 1, 13]) if (s := padded.batch_topk(part, min(90, part.numel())))
    ]
    kept = padded.cut(parts, 90)
    starts = (0, 10 * F, 11 * F)
    together = torch.cat(
        [real_of(s) + start for (s, _), start in zip(kept, starts, strict=True) if isinstance(s, Padded)]
    )
    assert torch.equal(together, flat(firing.plain_batch_topk(a, 90)))
    for (selection, values), part in zip(kept, a.split([10, 1, 13]), strict=True):
        assert torch.equal(values, selection.take(part))


def test_the_inverted_index_leaves_padding_out() -> None:
    selection, _ = padded.above(rand(N, F).float(), 1.0, 400)
    turned, exact = selection.by_latent, firing.compress(rand(N, F).float() > 1.0).by_latent
    count = int(turned.offsets[-1])
    assert count == exact.tokens.shape[0]
    assert torch.equal(turned.offsets, exact.offsets)
    assert torch.equal(turned.tokens[:count], exact.tokens)
    assert torch.equal(turned.order[:count], exact.order)


@pytest.mark.parametrize("rule", ["topk", "batchtopk", "relu", "jumprelu"])
def test_selectors_of_fixed_capacity_run_where_nothing_can_be_read(rule: str) -> None:
    with FakeTensorMode():
        a = torch.empty(N, F)
        room = Room()
        room.peak = 2.0
        made = {
            "topk": lambda: padded.topk(a, 3),
            "batchtopk": lambda: padded.batch_topk(a, 60),
            "relu": lambda: padded.above(a, 0.0, 60)[0],
            "jumprelu": lambda: padded.above(a, torch.empty(F), 60)[0],
        }[rule]()
        for tensor in (made.rows, made.take(a), made.by_latent.tokens, made.by_latent.offsets):
            assert tensor.device.type == "cpu"


def coder_of(rule: str, kind: str) -> Coder:
    layers = 2 if kind == "clt" else 1
    spec = DictionarySpec(
        kind=kind, firing=rule, reads=("a", "b")[:layers], writes=("c", "d")[:layers] if kind == "clt" else ("c",),
        layers=tuple(range(layers)), d_in=D, d_out=D, n_latents=F, unit_norm=False, aux=0.0, bandwidth=0.5,
        **RULES[rule],
    )  # fmt: skip
    coder = build(spec).double()
    with torch.no_grad():
        for index, parameter in enumerate(coder.parameters()):
            parameter.copy_(rand(*parameter.shape, seed=index))
        for source in range(layers):
            encoder = coder.encoder(source)
            encoder.b_enc.sub_(3.5)  # few enough fire that a selection pays
            if isinstance(encoder.rule, JumpReLU):
                encoder.rule.start(0.3)
    return coder


def known(coder: Coder, peak: float) -> None:
    for module in coder.modules():
        if isinstance(module, Room):
            module.peak = peak


def passed(coder: Coder, xs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and all gradients of a pass, of its gates too."""
    out = coder(xs)
    loss = (out.y * rand(*out.y.shape, seed=50)).sum()
    for fired in out.fired:
        loss = loss + fired.z.square().sum()
        if fired.gate is not None:
            loss = loss + 0.3 * fired.gate.sum()
    parameters = list(coder.parameters())
    return [out.y, *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("kind", ["sae", "transcoder", "clt"])
@pytest.mark.parametrize("rule", RULES)
def test_padding_changes_no_output_and_no_gradient(rule: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    coder = coder_of(rule, kind)
    xs = [rand(N, D, seed=90 + source) for source in range(len(coder.inputs))]
    exact = passed(coder, xs)
    known(coder, 3.0)
    monkeypatch.setattr(firing, "DENSE_SHARE", 1.0)
    monkeypatch.setattr(firing, "fixed_capacity", lambda a_NF, kernels: padded)
    for got, expected in zip(passed(coder, xs), exact, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("rule", RULES)
def test_a_pass_of_fixed_capacity_never_reads_back(rule: str, fixed: None) -> None:
    coder = coder_of(rule, "clt")
    known(coder, 3.0)
    xs = [rand(N, D, seed=90 + source) for source in range(2)]
    with ReadingBack():
        out = coder(xs)
        (out.y.sum() + sum(fired.z.sum() for fired in out.fired)).backward()
        for source, fired in enumerate(out.fired):
            coder.encoder(source).rule.observe(seen(fired.z, N))
    assert all(isinstance(fired.selection, Padded) or rule in ("relu", "jumprelu", "gated") for fired in out.fired)


def test_what_reads_back_is_noticed() -> None:
    a = rand(N, F).float()
    with ReadingBack(), pytest.raises(AssertionError, match="reads back"):
        firing.select_above(a, torch.zeros(F))


def test_room_goes_dense_until_it_knows_and_then_follows_the_counts(fixed: None) -> None:
    room, widths = Room(), []
    for step in range(30):
        a = rand(200, 100, seed=step).float()
        selection = firing.select_above(a, 2.0 if step < 15 else 1.6, room)
        widths.append(None if selection is None else selection.latents.shape[0])
        if isinstance(selection, Padded) and step < 15:
            assert not selection.overflowed
    assert widths[: Room.LAG] == [None] * Room.LAG
    assert all(width is not None and width < 20_000 / 12 for width in widths[Room.LAG :])
    assert widths[-1] > widths[10]


def test_room_grows_after_an_overflow(fixed: None) -> None:
    room, left_out = Room(), []
    for step in range(14):
        selection = firing.select_above(rand(200, 100, seed=step).float(), 2.4 if step < 7 else 1.6, room)
        left_out.append(isinstance(selection, Padded) and bool(selection.overflowed))
    assert left_out == [False] * 7 + [True] * Room.LAG + [False] * (7 - Room.LAG)


def test_a_room_goes_on_from_its_state_as_if_uninterrupted(fixed: None) -> None:
    def widths(room: Room, steps: range) -> list[int | None]:
        made: list[Selection | None] = [firing.select_above(rand(200, 100, seed=s).float(), 1.9, room) for s in steps]
        return [None if s is None else s.latents.shape[0] for s in made]

    for cut in (1, 3, 9):
        whole, first, second = Room(), Room(), Room()
        expected = widths(whole, range(20))
        before = widths(first, range(cut))
        second.load_state_dict(first.state_dict())
        assert before + widths(second, range(cut, 20)) == expected


@pytest.mark.parametrize("rule", ["relu", "jumprelu"])
def test_counts_are_saved_with_the_weights_of_rules_that_need_them(rule: str) -> None:
    assert any("room" in key for key in coder_of(rule, "sae").state_dict())
    assert not any("room" in key for key in coder_of("topk", "sae").state_dict())


@pytest.mark.parametrize("module", [None, padded])
def test_short_numbers_are_compared_as_float32(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # 1.004 rounds to 1.0 in bfloat16: a floor taken there would let 1.0 pass as not above, and 1.0078 at 1.0079
    if module is not None:
        monkeypatch.setattr(firing, "fixed_capacity", lambda a_NF, kernels: padded)
    a = torch.tensor([[1.0, 1.0078125, 1.015625, 0.5] * 20] * 4).bfloat16()
    room = Room()
    room.peak = 20.0
    selection = firing.select_above(a, torch.full((80,), 1.0079), room, dense_share=1.0)
    assert selection is not None
    assert selection.take(a)[: int(selection.offsets[-1])].unique().tolist() == [1.015625]
    for made in (firing.select_batch_topk(a, 80), firing.select_topk(a, 20)):
        values = made.take(a)
        assert values[: int(made.offsets[-1])].unique().tolist() == [1.015625]


def test_rows_with_ties_leave_the_other_rows_alone() -> None:
    a = rand(6, 64).float()
    alone = firing.select_topk(a, 5).latents.view(6, 5)
    tied = a.clone()
    tied[2] = 0.0
    tied[4] = torch.nan
    together = firing.select_topk(tied, 5).latents.view(6, 5)
    for row in (0, 1, 3, 5):
        assert torch.equal(alone[row], together[row])
    assert together[2].tolist() == together[4].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(together, together.sort(dim=1).values)
