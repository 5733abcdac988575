"""What is asked of libraries before they are loaded."""

import subprocess
import sys

import pytest

from thresher.cache import process


def test_the_command_line_loads_nothing_heavy_before_it_has_asked() -> None:
    code = "import sys, thresher.cli; print([name for name in ('torch', 'numpy', 'numba') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in process._WANTED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert process.prepare_process()
    assert process.os.environ["GOMP_SPINCOUNT"] == "7"
    assert process.os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    assert not process.prepare_process()
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch asks only there")
def test_large_tensors_lie_in_huge_pages_where_the_kernel_lets_them() -> None:
    code = """
from pathlib import Path
from thresher.cache.process import prepare_process
prepare_process()
import torch
large = torch.ones(16 << 20)
allowed = "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
pages = [line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("AnonHugePages")]
print(int(pages[0].split()[1]) > 0 or not allowed)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "smaps_rollup" in done.stderr or "transparent_hugepage" in done.stderr:
        pytest.skip("this kernel does not say")
    assert done.stdout.strip() == "True", done.stderr
