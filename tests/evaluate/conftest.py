"""A random two- or three-layer transformer as `Target`, and hand-made dictionaries whose behaviour is known exactly."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from thresher.cache.contracts import Codes, Edit, Site
from thresher.cache.errors import UserError
from thresher.cache.layout import Contexts

TAPS = ("resid_pre", "mlp_in", "mlp_hidden", "mlp_out", "resid_post")


class TinyTarget:
    """Pre-norm transformer with one attention head, weights from a seed, float64 unless told otherwise."""

    def __init__(self, n_layers: int = 3, d: int = 8, n_vocab: int = 23, n_ctx: int = 12, dtype=torch.float64) -> None:
        g = torch.Generator().manual_seed(7)

        def w(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

        self.name, self.n_layers, self.d, self.n_vocab, self.n_ctx = f"tiny-{n_layers}", n_layers, d, n_vocab, n_ctx
        self.device, self.dtype, self.gated_mlp = torch.device("cpu"), dtype, False
        self.embed, self.position, self.unembed = w(n_vocab, d), w(n_ctx, d, scale=0.3), w(d, n_vocab)
        self.qkv = [w(d, 3 * d, scale=d**-0.5) for _ in range(n_layers)]
        self.up = [w(d, 4 * d, scale=d**-0.5) for _ in range(n_layers)]
        self.down = [w(4 * d, d, scale=0.7 * d**-0.5) for _ in range(n_layers)]
        self.passes = 0

    @property
    def identity(self) -> Mapping[str, object]:
        return {"model": self.name, "dtype": str(self.dtype)}

    def sites(self, patterns: Sequence[str], layers: Sequence[int] | None = None) -> tuple[Site, ...]:
        known = [
            Site(f"L{i:02d}.{tap}", i, tap, self.d * (4 if tap == "mlp_hidden" else 1))
            for i in range(self.n_layers)
            for tap in TAPS
        ]
        for pattern in patterns:
            if pattern not in [site.name for site in known]:
                raise UserError(f"no site {pattern!r}; the model has {self.n_layers} layers.")
        return tuple(site for site in known if site.name in patterns)

    def record(self, tokens: Tensor, sites: Sequence[Site]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        self.logits(tokens, {s.name: lambda x, name=s.name: out.__setitem__(name, x) for s in sites})
        return out

    def hidden(self, i: int, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x @ self.up[i])

    def mlp(self, i: int, x: Tensor) -> Tensor:
        return self.hidden(i, x) @ self.down[i]

    def attention(self, i: int, x: Tensor) -> Tensor:
        q, k, v = (self.norm(x) @ self.qkv[i]).chunk(3, dim=-1)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return ((q @ k.mT) / self.d**0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v

    @staticmethod
    def norm(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def logits(self, tokens: Tensor, edits: Mapping[str, Edit] | None = None) -> Tensor:
        self.passes += 1

        def at(name: str, x: Tensor) -> Tensor:
            new = (edits or {}).get(name, lambda _: None)(x)
            return x if new is None else new

        x = self.embed[tokens] + self.position[: tokens.shape[1]]
        for i in range(self.n_layers):
            x = at(f"L{i:02d}.resid_pre", x)
            x = x + self.attention(i, x)
            hidden = at(f"L{i:02d}.mlp_hidden", self.hidden(i, at(f"L{i:02d}.mlp_in", self.norm(x))))
            x = x + at(f"L{i:02d}.mlp_out", hidden @ self.down[i])
            x = at(f"L{i:02d}.resid_post", x)
        return self.norm(x) @ self.unembed


class Readout:
    """A model without depth: its logits are its one site, a row of a table per token. Hand-worked numbers fit in it."""

    def __init__(self, table_VV: Tensor, n_ctx: int = 16) -> None:
        self.table, self.n_vocab, self.n_ctx, self.n_layers = table_VV, table_VV.shape[1], n_ctx, 1
        self.name, self.device, self.dtype, self.passes = "readout", torch.device("cpu"), table_VV.dtype, 0
        self.identity = {"model": "readout"}

    def sites(self, patterns: Sequence[str], layers: Sequence[int] | None = None) -> tuple[Site, ...]:
        return (Site("logits", -1, "logits", self.n_vocab),)

    def logits(self, tokens: Tensor, edits: Mapping[str, Edit] | None = None) -> Tensor:
        self.passes += 1
        value = self.table[tokens]
        new = (edits or {}).get("logits", lambda _: None)(value)
        return value if new is None else new


def codes_of(z_NF: Tensor) -> Codes:
    """Dense non-negative activations as `Codes`."""
    rows, latents = (z_NF > 0).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(z_NF))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Codes(z_NF[rows, latents], latents, offsets, z_NF.shape[1])


class Base:
    """Everything of `Dictionary` but the arithmetic; one source per read site."""

    def __init__(self, reads: Sequence[str], writes: Sequence[str], d: int = 8, name: str = "", means=None) -> None:
        self.reads, self.writes, self.d = tuple(reads), tuple(writes), d
        self.name = name or f"{type(self).__name__}-{'-'.join(writes)}"
        self.inputs, self.causal, self.fixed_cost = tuple((site,) for site in reads), True, 0
        self.n_latents, self.n_parameters = 2 * d, 4 * d * d
        self.means = means or {site: torch.full((d,), 0.25) for site in writes}

    def sources(self, destination: int) -> range:
        return range(destination + 1) if len(self.reads) > 1 else range(1)

    def write_norms(self) -> Tensor:
        out = torch.full((len(self.reads), len(self.writes)), torch.nan)
        for j in range(len(self.writes)):
            out[list(self.sources(j)), j] = 1.0 + j
        return out

    def latent_costs(self, source: int) -> Tensor:
        written = sum(source in self.sources(j) for j in range(len(self.writes)))
        return torch.full((self.n_latents,), self.d * (1.0 + written), dtype=torch.float64)

    def encode(self, source: int, x_ND: Tensor) -> Codes:
        if x_ND.shape[1] != self.d:
            raise RuntimeError(f"expected width {self.d}, got {x_ND.shape[1]}")
        return codes_of(torch.cat([x_ND.relu(), (-x_ND).relu()], dim=1))

    def value(self, codes: Codes) -> Tensor:
        z_NF = codes.dense()
        return z_NF[:, : self.d] - z_NF[:, self.d :]


class Identity(Base):
    """An SAE that returns what it reads, bit for bit."""

    def decode(self, destination: int, codes: Sequence[Codes]) -> Tensor:
        return self.value(codes[-1])


class Constant(Base):
    """Predicts one vector per site whatever it reads."""

    def __init__(self, site: str, value: Tensor, **kwargs) -> None:
        super().__init__([site], [site], len(value), **kwargs)
        self.vector = value

    def decode(self, destination: int, codes: Sequence[Codes]) -> Tensor:
        return self.vector.expand(codes[0].tokens, -1)


class Exact(Base):
    """A transcoder or CLT that computes the model's own MLPs from the codes of its own layer."""

    def __init__(self, target: TinyTarget, layers: Sequence[int], **kwargs) -> None:
        reads, writes = [f"L{i:02d}.mlp_in" for i in layers], [f"L{i:02d}.mlp_out" for i in layers]
        super().__init__(reads, writes, target.d, **kwargs)
        self.target, self.layers = target, list(layers)

    def decode(self, destination: int, codes: Sequence[Codes]) -> Tensor:
        return self.target.mlp(self.layers[destination], self.value(codes[-1]))


class Random(Base):
    """Random ReLU encoder and decoders: an SAE, a transcoder, or a CLT with a decoder per source and destination."""

    def __init__(
        self, reads: Sequence[str], writes: Sequence[str], d: int = 8, seed: int = 0, scale: float = 0.3, **kwargs
    ) -> None:
        super().__init__(reads, writes, d, **kwargs)
        g = torch.Generator().manual_seed(seed)

        def w(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

        self.enc, self.bias = [w(d, 2 * d) for _ in reads], [w(2 * d) for _ in reads]
        self.dec = {(s, j): w(2 * d, d) for j in range(len(writes)) for s in self.sources(j)}

    def pre(self, source: int, x_ND: Tensor) -> Tensor:
        return (x_ND.double() @ self.enc[source] + self.bias[source]).relu()

    def encode(self, source: int, x_ND: Tensor) -> Codes:
        return codes_of(self.pre(source, x_ND))

    def decode(self, destination: int, codes: Sequence[Codes]) -> Tensor:
        return sum(c.dense() @ self.dec[s, destination] for s, c in zip(self.sources(destination), codes, strict=True))


@torch.inference_mode()
def make_contexts(rows: int = 6, length: int = 12, seed: int = 3, n_layers: int = 3) -> Contexts:
    """Text that a TinyTarget wrote, so that its own loss is the lowest: special first position, several documents in
    a row, every third row padded on the right."""
    g = torch.Generator().manual_seed(seed)
    target = TinyTarget(n_layers)
    token = torch.randint(0, target.n_vocab, (rows, 1), generator=g)
    while token.shape[1] < length:
        p = target.logits(token)[:, -1].softmax(-1)
        token = torch.cat([token, torch.multinomial(p, 1, generator=g)], dim=1)
    token_id = token.numpy().astype(np.int32)
    keep = np.ones((rows, length), dtype=np.uint8)
    keep[:, 0] = 2
    document = (np.arange(rows * length).reshape(rows, length) // 7).astype(np.int32)
    for row in range(0, rows, 3):
        keep[row, length - 3 :], document[row, length - 3 :], token_id[row, length - 3 :] = 0, -1, 0
    return Contexts(token_id, document, keep)


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    return SimpleNamespace(
        TinyTarget=TinyTarget,
        Identity=Identity,
        Constant=Constant,
        Exact=Exact,
        Random=Random,
        Readout=Readout,
        Base=Base,
        codes_of=codes_of,
        contexts=make_contexts,
    )


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture(scope="session")
def scan() -> Callable[..., object]:
    """`evaluate` with small settings; keyword arguments go into the config."""
    from thresher.evaluate.run import EvaluateConfig, evaluate

    def run(replacements, target, contexts, store=None, training=None, **settings):
        config = EvaluateConfig(
            **({"resamples": 200, "single_site_share": 1.0, "batch_contexts": 2, "neurons": ()} | settings)
        )
        console = Console(quiet=True)
        given = {"console": console, "provenance": {"test": True}, "store": store, "training": training}
        return evaluate(replacements, target, contexts, config, **given)

    return run
