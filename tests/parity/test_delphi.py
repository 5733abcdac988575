"""delphi's own loader finds in our latent cache what our dictionaries do on its tokens: `make parity`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity import environments, zoo
from thresher.harvest.target import TargetConfig, load_target
from thresher.train.files import load_run

pytestmark = pytest.mark.parity
RUNS = ("sae-batchtopk", "transcoder-topk")
TOKENS = 4096


@pytest.mark.parametrize("name", RUNS)
def test_delphi_loads_what_our_latents_do(name: str, tmp_path: Path) -> None:
    [path] = zoo.runs()[name]
    out = tmp_path / "latents"
    export = [sys.executable, "-m", "thresher", "export", path, "--to", "delphi-cache", "--out", out]
    subprocess.run([*map(str, export), "--cache", str(zoo.CACHE), "--tokens", str(TOKENS)], check=True)
    dictionary = load_run(path).dictionary
    rows, outputs = tmp_path / "rows.safetensors", tmp_path / "read.out"
    save_file({"x": torch.zeros(1, dictionary.n_latents)}, rows)  # tells how many latents there are
    print(environments.run("sparsify", "with_delphi.py", ["load", out, rows, outputs]))
    assert outputs.is_file(), outputs.with_suffix(".error").read_text()
    read = load_file(outputs)
    [config] = out.glob("*/config.json")
    tokens_BT = read["output"].long().reshape(-1, json.loads(config.read_text())["cache_ctx_len"])
    target = load_target(TargetConfig(model="bundled:books-128", device="cpu"))
    acts = target.record(tokens_BT, target.sites(list(dictionary.reads)))
    x_ND = acts[dictionary.reads[0]].flatten(0, 1)
    ours_NF, theirs_NF = dictionary.encode(0, x_ND).dense(), read["code"][0]
    special_N = torch.isin(tokens_BT.flatten(), tokens_BT[:, 0])  # contexts begin with one
    assert 0 < special_N.float().mean() < 0.05
    assert not theirs_NF[special_N].any(), "special tokens have no entries"
    kept_N = ~special_N
    expected = torch.where(ours_NF > 1e-5, ours_NF, 0.0)[kept_N]
    torch.testing.assert_close(theirs_NF[kept_N], expected.half().float(), rtol=2e-3, atol=1e-4)
