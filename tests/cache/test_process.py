"""What is asked of libraries before they are loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from thresher.cache import process


def test_the_command_line_loads_nothing_heavy_before_it_has_asked() -> None:
    code = "import sys, thresher.cli; print([name for name in ('torch', 'numpy', 'numba') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}):
        environment = dict(given)
        monkeypatch.setattr(process.os, "environ", environment)
        assert process.prepare_process()
        assert environment == given | {"THP_MEM_ALLOC_ENABLE": "1"}
        assert not process.prepare_process()


def _huge_pages_are_for_those_who_ask() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[madvise]" in setting.read_text() and Path("/proc/self/smaps_rollup").exists()


@pytest.mark.skipif(not _huge_pages_are_for_those_who_ask(), reason="this kernel gives them to all or to nobody")
def test_large_tensors_lie_in_huge_pages() -> None:
    code = """
from pathlib import Path
from thresher.cache.process import prepare_process
prepare_process()
import torch
large = torch.ones(16 << 20)
pages = [line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("AnonHugePages")]
print(int(pages[0].split()[1]))
"""
    asked = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=asked)
    assert int(done.stdout) > 0
