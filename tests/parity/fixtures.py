"""Write the files in tests/interop/fixtures anew, each by its own package.

    python -m tests.parity.fixtures [TOOL …]

Weights are seeded: only a package that writes or computes otherwise changes them.
"""

import shutil
import sys
from pathlib import Path

from tests.parity import environments

FIXTURES = environments.ROOT / "tests" / "interop" / "fixtures"
MAKERS = {
    "saelens": ("saelens", "with_saelens.py"),
    "circuit_tracer": ("circuit-tracer", "with_circuit_tracer.py"),
    "gemma_scope": ("circuit-tracer", "with_gemma_scope.py"),
    "dictionary_learning": ("dictionary-learning", "with_dictionary_learning.py"),
    "sparsify": ("sparsify", "with_sparsify.py"),
    "openmoss": ("openmoss", "with_openmoss.py"),
}
"""Environment and script, by tool."""


def main(tools: list[str]) -> None:
    """Replace the directories of these tools, of all when none is named."""
    for tool in tools or MAKERS:
        folder: Path = FIXTURES / tool
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print(environments.run(*MAKERS[tool], ["make", folder]))


if __name__ == "__main__":
    main(sys.argv[1:])
