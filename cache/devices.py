"""Which device a setting means."""

import torch

from thresher.cache.errors import UserError
from thresher.cache.world import from_environment


def resolve_device(device: str, field: str) -> torch.device:
    """The device meant by `device`; `field` names the setting in messages.

    `auto` is CUDA when there is one: under torchrun, the process's own GPU.

    Raises UserError for a word that is no device and for CUDA where there is none.
    """
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        local = from_environment().local_rank
        return torch.device("cuda", local) if 0 < local < torch.cuda.device_count() else torch.device("cuda")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"{field} is {device!r}; expected auto, cpu, cuda, or cuda:N.") from error
    if wanted.type not in ("cpu", "cuda"):
        raise UserError(f"{field} is {device!r}; expected auto, cpu, cuda, or cuda:N.")
    if wanted.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (wanted.index or 0) >= count:
            found = f"PyTorch sees {count} CUDA device(s)" if count else "PyTorch sees no CUDA device"
            raise UserError(
                f'{field} is {device!r}, but {found} here. Use "cpu" or "auto", or install a CUDA build of PyTorch and '
                "check the driver with nvidia-smi."
            )
    return wanted
