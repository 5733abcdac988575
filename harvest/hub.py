"""What is asked of the Hugging Face hub before anything is downloaded from it: one question with a short deadline.

The hub's own clients retry an unreachable host five times with growing pauses and then raise a chain of exceptions.
Here one request decides whether a name can be had at all, so a mistyped name or a machine without network costs
seconds and gives one paragraph. Nothing is asked when the files already lie in the hub's local cache.
"""

from typing import Literal

from thresher.cache.errors import UserError

DEADLINE_S = 8.0
"""Longest wait for the hub's answer, seconds."""


def check_on_hub(kind: Literal["model", "dataset"], name: str, revision: str | None, field: str) -> list[str]:
    """The files that the hub has for `name` at `revision`; UserError when it has none, or does not answer."""
    import transformers.utils  # noqa: F401 - first, or huggingface_hub 2.4 prints a failed import of its own
    from huggingface_hub import constants, hf_api
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    tried = f"{field} is {name!r}: no such file or directory here, so it was looked up as a {kind} on the hub"
    api = hf_api.HfApi()
    try:
        ask = api.model_info if kind == "model" else api.dataset_info
        info = ask(name, revision=revision, timeout=DEADLINE_S)
        return [file.rfilename for file in info.siblings or []]
    except GatedRepoError as error:
        raise UserError(
            f"{tried}, where it is gated. Accept its terms on {constants.ENDPOINT}, log in with `hf auth login`, "
            "and run again."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{tried} ({constants.ENDPOINT}), which has none of that name that you may read. Check the spelling "
            "(owner/name), give a path that exists, or log in with `hf auth login` if it is private."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{tried}, which has it, but not at the revision {revision!r}. Give a branch, tag or commit that exists, "
            "or leave `revision` out."
        ) from error
    except OfflineModeIsEnabled as error:
        raise UserError(
            f"{tried}, but HF_HUB_OFFLINE is set and the local hub cache does not have it. Unset HF_HUB_OFFLINE, or "
            "download it first and give its directory."
        ) from error
    except Exception as error:  # the HTTP library and its exceptions differ between versions of the hub's client
        raise UserError(
            f"{tried}, and {constants.ENDPOINT} cannot be reached ({type(error).__name__}: {_short(error)}). Check the "
            "network, or download it elsewhere and give its directory; `bundled:` names need no network."
        ) from error


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else "no message"
