"""What tests/train/test_triton.py runs in a process of its own: Triton's kernels against their specifications.

In Triton's interpreter on CPU tensors, or compiled on CUDA ones. Shapes are small and awkward.
"""

import os
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from thresher.train.kernels import firing, padded, sparse
from thresher.train.kernels.choice import Kernels
from thresher.train.kernels.gradients import Facts
from thresher.train.kernels.sparse import Selection
from thresher.train.kernels.triton import (
    adam,
    decode,
    decoder_gradient,
    encoder_gradient,
    gradients,
    latent_sums,
    select,
)
from thresher.train.optim import plain_step

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TYPES = [torch.float32, torch.float64]
SHAPES = [("gaps", 9, 11, 37), ("crowd", 9, 4, 5), ("padded", 9, 11, 37), ("nothing", 4, 3, 16), ("gaps", 5, 3, 300),
          ("crowd", 1, 1, 1)]  # fmt: skip
"""Kind of selection (`selection_of`), N, F, M: M within a block, beyond one, no multiple of one, and 1."""


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(got: Tensor, expected: Tensor) -> None:
    bound = 1e-12 if got.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=bound, atol=bound)


def selection_of(kind: str, tokens: int, latents: int) -> Selection:
    """Some entries with an empty token and an empty latent; all of one latent; or with padding behind."""
    mask = rand(tokens, latents) > 0.3
    if kind == "gaps":
        mask[tokens // 2] = False
        mask[:, latents // 3] = False
    if kind == "crowd":
        mask[:, latents - 1] = True
    if kind == "nothing":
        mask[:] = False
    if kind == "padded":
        block = mask.double()
        return padded.batch_topk(block, min(int(mask.sum()) + 17, block.numel()))
    return firing.compress(mask)


def case(shape: tuple[str, int, int, int], dtype: torch.dtype) -> tuple[Selection, Tensor, Tensor, Tensor, Tensor]:
    """A selection, z [A] (0 in padding), rows g [N, M], table W [F, M], and the dense z [N, F]."""
    kind, tokens, latents, width = shape
    selection = selection_of(kind, tokens, latents)
    dense = rand(tokens, latents, seed=1, dtype=dtype)
    count = int(selection.offsets[-1])
    z = selection.take(dense)
    z[count:] = 0.0
    mask = torch.zeros(tokens, latents, dtype=torch.bool, device=DEVICE)
    mask[selection.rows[:count], selection.latents[:count]] = True
    g = rand(tokens, width + 3, seed=2, dtype=dtype)[:, 3:]  # rows that lie apart
    return selection, z.to(dtype), g, rand(latents, width, seed=3, dtype=dtype), dense * mask


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_decoding_adds_each_tokens_weighted_rows(shape: tuple[str, int, int, int], dtype: torch.dtype) -> None:
    selection, z, _, W, dense = case(shape, dtype)
    out = rand(shape[1], shape[3] + 2, seed=4, dtype=dtype)[:, 2:]
    expected = out.double() + dense.double() @ W.double()
    decode(out, z, W, selection)
    close(out, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("chunk", [2, 256])
def test_decoder_gradients_equal_the_dense_products(
    shape: tuple[str, int, int, int], dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "CHUNK", chunk)
    selection, z, g, W, dense = case(shape, dtype)
    count = int(selection.offsets[-1])
    dW = torch.full_like(W, torch.nan)
    facts = Facts(*torch.zeros(3, W.shape[0], dtype=torch.float64, device=DEVICE).unbind(0))
    dz = decoder_gradient(z, g, W, selection, dW, True, facts)
    expected, dots = dense.double().T @ g.double(), g.double() @ W.double().T
    close(dW, expected)
    close(dz[:count], dots[selection.rows[:count], selection.latents[:count]])
    close(facts.squares, dW.double().square().sum(1))
    close(facts.dots, (dW.double() * W.double()).sum(1))
    close(facts.weights, W.double().square().sum(1))
    first = dW.clone()
    decoder_gradient(z, g, W, selection, dW, False)
    close(dW, 2 * expected)
    assert torch.equal(decoder_gradient(z, g, W, selection, None, True), dz)
    again = torch.empty_like(dW)
    decoder_gradient(z, g, W, selection, again, True)
    assert torch.equal(again, first)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_encoder_gradients_equal_the_dense_products(shape: tuple[str, int, int, int], dtype: torch.dtype) -> None:
    selection, da, x, W, dense = case(shape, dtype)
    dW = torch.full_like(W, torch.nan)
    facts = Facts(*torch.zeros(3, W.shape[0], dtype=torch.float64, device=DEVICE).unbind(0))
    db = encoder_gradient(da, x, selection, dW, True, facts)
    close(dW, dense.double().T @ x.double())
    close(db, dense.double().sum(0))
    close(facts.squares, dW.double().square().sum(1))
    close(latent_sums(da, selection), dense.double().sum(0))


@pytest.mark.parametrize("chunk", [256, 1000])
def test_a_crowded_latents_sum_is_the_same_in_pieces(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "CHUNK", chunk)
    selection, z, g, W, dense = case(("crowd", 1500, 2, 5), torch.float32)
    dW = torch.empty_like(W)
    decoder_gradient(z, g, W, selection, dW, True)
    torch.testing.assert_close(dW.double(), dense.double().T @ g.double(), rtol=1e-4, atol=1e-4)


def numbers(go: bool = True, decay: float = 0.0) -> adam.Numbers:
    rate, step = torch.tensor(3e-2, device=DEVICE), torch.tensor(7.0, device=DEVICE)
    return adam.Numbers(0.9, 0.999, 1e-8, rate, step, torch.tensor(go, device=DEVICE), (decay,))


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize("width", [37, 1500])
@pytest.mark.parametrize("dtype", TYPES)
def test_an_update_equals_the_plain_one(unit: bool, along: bool, width: int, dtype: torch.dtype) -> None:
    left = [rand(4, width, seed=s, dtype=dtype).abs() for s in range(4)]
    left[1][2] = 0.0  # a row without gradient moves too
    right = [t.clone() for t in left]
    shadows = [torch.zeros(4, width, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    multiples = rand(4, seed=9, dtype=dtype) if along else None
    scale = torch.tensor(0.25, device=DEVICE)
    decay = 0.5 if width == 37 else 0.0
    adam.update(*left, multiples, scale, numbers(decay=decay), unit, shadows[0])
    adam.plain_update(*right, multiples, scale, numbers(decay=decay), unit, shadows[1])
    for got, expected in zip(left, right, strict=True):
        close(got, expected)
    torch.testing.assert_close(*shadows, rtol=2**-7, atol=0)  # the interpreter cuts off where a GPU rounds


def test_an_update_left_out_changes_nothing() -> None:
    tensors = [rand(4, 20, seed=s) for s in range(4)]
    before = [t.clone() for t in tensors]
    adam.update(*tensors, None, 1.0, numbers(go=False), True)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("clip", [None, 0.1, 1e6])
def test_a_step_equals_the_plain_one_with_projection_and_clipping(clip: float | None) -> None:
    weights = [torch.nn.Parameter(torch.nn.functional.normalize(rand(6, 10, seed=s), dim=1)) for s in range(2)]
    copies = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    plain = torch.optim.Adam(copies, lr=1e-2, foreach=False)
    state = [[torch.zeros_like(w.data), torch.zeros_like(w.data), torch.zeros((), device=DEVICE)] for w in weights]
    shadows = [None, weights[1].detach().bfloat16()]
    for turn in range(3):
        grads = [rand(6, 10, seed=20 + 2 * turn + i) for i in range(2)]
        rows = [
            adam.Rows(w.data, g.clone(), m, v, s, None, None, unit, low)
            for w, g, (m, v, s), unit, low in zip(weights, grads, state, (True, False), shadows, strict=True)
        ]
        norm = adam.step(rows, 1e-2, torch.tensor(True, device=DEVICE), clip, (0.9, 0.999), 1e-8)
        for copy, g in zip(copies, grads, strict=True):
            copy.grad = g.clone()
        assert norm.isfinite()
        plain_step(copies, copies[:1], plain, clip)
        for w, copy in zip(weights, copies, strict=True):
            close(w.data, copy.data)
        torch.testing.assert_close(shadows[1], weights[1].detach().bfloat16(), rtol=2**-7, atol=0)
    rows[0].grad.fill_(torch.inf)
    before = [w.detach().clone() for w in weights]
    low_before = shadows[1].clone()
    assert adam.step(rows, 1e-2, torch.tensor(True, device=DEVICE), clip, (0.9, 0.999), 1e-8).isinf()
    assert state[0][2] == 3
    assert all(torch.equal(w.data, b) for w, b in zip(weights, before, strict=True))
    assert torch.equal(shadows[1], low_before)


BLOCKS: dict[str, Any] = {
    "few values": lambda: (rand(10, 45) * 2).round(),
    "many values": lambda: rand(4, 128),
    "one value": lambda: torch.full((5, 40), 0.5),
    "none positive": lambda: -rand(5, 40).abs(),
    "sample misleads": lambda: torch.cat([torch.full((32, 1), 5.0), torch.full((32, 15), 0.5)], 1),
    "row of one": lambda: rand(1, 1).abs(),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several spans, and a sample that does not see all, in blocks that the interpreter gets through."""
    for name, value in {"_TILE": 64, "_ROUNDS": 2, "_SAMPLE": 128, "_GROUP": 16}.items():
        monkeypatch.setattr(select, name, value)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selections_equal_the_plain_ones(block: str, dtype: torch.dtype, small: None) -> None:
    a = BLOCKS[block]().to(DEVICE, dtype)
    size, width = a.numel(), a.shape[1]
    for count in {0, size // 7, size}:
        got, expected = select.batch_topk(a, count), padded.batch_topk(a, count)
        assert torch.equal(got.positions, expected.positions)
        assert torch.equal(got.offsets, expected.offsets)
    floor = rand(width, seed=5, dtype=torch.float32)
    for limit, capacity in ((floor, size // 3), (floor, size), (0.25, 7)):
        (got, count), (expected, expected_count) = select.above(a, limit, capacity), padded.above(a, limit, capacity)
        assert torch.equal(got.positions, expected.positions)
        assert int(count) == int(expected_count)
        assert got.overflowed is not None
        assert bool(got.overflowed) == (int(count) > capacity)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_takes_the_lower_of_equal_latents(block: str, dtype: torch.dtype, small: None) -> None:
    a = BLOCKS[block]().to(DEVICE, dtype)[:5]
    for k in {min(3, a.shape[1]), a.shape[1] // 2 + 1, a.shape[1]}:
        best = torch.sort(a, dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
        assert torch.equal(select.topk(a, k).latents.view(-1, k), best)


def test_topk_of_what_is_no_number_stays_within_the_row() -> None:
    a = rand(3, 128, dtype=torch.float32)
    a[1] = torch.nan
    a[2, 5:] = torch.nan
    latents = select.topk(a, 4).latents.view(3, 4)
    assert ((latents >= 0) & (latents < 128)).all()
    assert latents[1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("firing_name", ["topk", "batchtopk"])
def test_a_pass_through_triton_equals_autograd_with_all_gradients(
    firing_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kernels, "pick", lambda self, operation, device, dtype, work: "triton")
    x, W_enc, b = rand(12, 9), rand(30, 9, seed=1), rand(30, seed=2)
    W_dec, base = rand(30, 2, 7, seed=3), rand(12, 3, 7, seed=4)
    leaves = [t.requires_grad_() for t in (x, W_enc, b, W_dec, base)]
    a_NF = (x @ W_enc.T + b).detach()
    selection = padded.topk(a_NF, 4) if firing_name == "topk" else padded.batch_topk(a_NF, 300)
    a = sparse.gathered_linear(x, W_enc, b, selection.take(a_NF), selection, Kernels())
    y = sparse.add_decoded(base.clone(), torch.relu(a), W_dec, selection, 1, Kernels())
    exact = firing.compress(firing.plain_topk(a_NF, 4)) if firing_name == "topk" else firing.compress(a_NF > 0)
    if firing_name == "batchtopk":
        exact = firing.compress(firing.plain_batch_topk(a_NF, 300))
    plain_a = sparse.plain_gathered_linear(x, W_enc, b, exact)
    plain_y = sparse.plain_add_decoded(base, torch.relu(plain_a), W_dec, exact, 1)
    close(y, plain_y)
    weights = rand(*y.shape, seed=8)
    got = torch.autograd.grad((y * weights).sum(), leaves)
    for left, right in zip(got, torch.autograd.grad((plain_y * weights).sum(), leaves), strict=True):
        close(left, right)


def test_the_interpreter_runs_where_there_is_no_gpu() -> None:
    assert (type(gradients._sums).__name__ == "InterpretedFunction") == (DEVICE == "cpu"), triton.__version__
