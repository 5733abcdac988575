"""A run as an object of SAELens, without a detour over files.

It is made of the same config and tensors as the files that saelens.py writes, in the way SAELens itself loads them. The
package is imported when asked for, and is no dependency.
"""

import importlib
from pathlib import Path
from typing import Any

from thresher.cache.errors import UserError
from thresher.interop import saelens
from thresher.interop.export import check_form, exported
from thresher.train.files import load_run


def to_saelens(run: Path | str, device: str = "cpu") -> Any:
    """`sae_lens.SAE` (or a transcoder of its) of a run directory, float32, acting on raw activations.

    Raises UserError where SAELens is not installed, has no form for the dictionary, or is too old for that form.
    """
    try:
        package = importlib.import_module("sae_lens")
    except ImportError as error:
        raise UserError(
            f"SAELens cannot be imported ({error}). Install it beside Thresher: pip install sae-lens. Or write its "
            "files with `thresher export RUN --to saelens`, which needs no SAELens."
        ) from error
    item = exported(Path(run), load_run(Path(run)))
    check_form(saelens.FORMAT, [item])
    config = saelens.config(item)
    try:
        made = package.SAE.from_dict(config)
    except (KeyError, ValueError) as error:
        version = getattr(package, "__version__", "unknown")
        raise UserError(
            f"SAELens {version} knows no architecture {config['architecture']!r} ({error}). Update it: pip install -U "
            "sae-lens."
        ) from error
    state = saelens.tensors(item.dictionary)
    made.process_state_dict_for_loading(state)
    made.load_state_dict(state)
    return made.to(device)
