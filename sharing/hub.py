"""One repository on the Hugging Face hub, and its answers in the user's terms.

Everything goes through huggingface_hub: its endpoint (HF_ENDPOINT), its token chain (HF_TOKEN, the file that `hf auth
login` writes), its local cache and its offline mode (HF_HUB_OFFLINE). A token is handed to the client and nowhere else.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from thresher.cache.errors import UserError
from thresher.cache.publish import explained
from thresher.sharing.index import INDEX

DEADLINE_S = 10.0
"""Longest wait for the first answer of the hub, seconds."""

_AT_ONCE = 8
"""Downloads at the same time."""


class Remote(NamedTuple):
    """A repository as it is now."""

    commit: str
    private: bool | None
    """None where nobody was asked: offline."""


class Hub:
    """A repository by name, at a revision; nothing is asked of the hub before a method is called."""

    def __init__(self, repo: str, revision: str | None, *, token: str | None = None) -> None:
        """`token`: for writing; reading uses whatever the client finds by itself. Raises UserError for a bad name."""
        from huggingface_hub import HfApi

        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
            raise UserError(
                f"{repo!r} is no repository's name: expected owner/name, for example ada/books-transcoders."
            )
        self.repo, self.revision = repo, revision
        self._api = HfApi(token=token, library_name="thresher", library_version=version("thresher"))

    def look(self) -> Remote | None:
        """The repository's present commit, or None where there is none of that name; UserError for all else."""
        from huggingface_hub import constants
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        if constants.is_offline_mode():
            return Remote(self._cached_commit(), None)
        try:
            with told(f"{self._named()} cannot be looked up"):
                info = self._api.model_info(self.repo, revision=self.revision, timeout=DEADLINE_S)
        except UserError as error:
            cause = error.__cause__
            if isinstance(cause, RepositoryNotFoundError) and cause.response.status_code == 404:
                return None
            if isinstance(cause, RevisionNotFoundError):
                raise UserError(
                    f"{self.repo} has no revision {self.revision!r}. Give a branch, a tag or a commit that exists, or "
                    "leave --revision out."
                ) from cause
            raise
        assert info.sha is not None, "the hub names the commit of what it finds"
        return Remote(info.sha, bool(info.private))

    def _cached_commit(self) -> str:
        """The commit that was last downloaded at this revision."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            found = hf_hub_download(self.repo, INDEX, revision=self.revision, local_files_only=True)
        except LocalEntryNotFoundError as error:
            raise UserError(
                f"HF_HUB_OFFLINE is set, and {self._named()} is not in the local hub cache. Unset it, or pull once "
                "while the hub can be reached."
            ) from error
        return Path(found).parent.name

    def read(self, commit: str, path: str) -> bytes | None:
        """A small file of the repository, or None where it has none of that name."""
        from huggingface_hub.errors import RemoteEntryNotFoundError

        with told(f"{path} of {self._named()} cannot be read"):
            try:
                return self._download(path, commit).read_bytes()
            except RemoteEntryNotFoundError:
                return None

    def head(self, path: str) -> tuple[str, bytes] | None:
        """A small file as it is at the revision now, and the commit it is of; the client keeps what the revision meant,
        for pulls offline. None where there is no such file."""
        from huggingface_hub.errors import RemoteEntryNotFoundError

        with told(f"{path} of {self._named()} cannot be read"):
            try:
                found = self._download(path, self.revision)
            except RemoteEntryNotFoundError:
                return None
        return found.parents[path.count("/")].name, found.read_bytes()

    def fetch(self, commit: str, paths: Sequence[str], *, again: bool = False) -> Path:
        """Bring files into the hub's local cache; the folder in which they lie. `again`: also those that are there.

        File by file: the client's download of a whole snapshot takes what it finds here when the hub fails to list it.
        """

        def one(path: str) -> Path:
            return self._download(path, commit, force_download=again)

        with told(f"{self._named()} cannot be downloaded"), ThreadPoolExecutor(_AT_ONCE) as pool:
            found = list(pool.map(one, paths))
        return found[0].parents[paths[0].count("/")]

    def _download(self, path: str, revision: str | None, *, force_download: bool = False) -> Path:
        """A file's place in the hub's local cache, once it is there."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            found = hf_hub_download(
                self.repo,
                path,
                revision=revision,
                token=self._api.token,
                library_name=self._api.library_name,
                library_version=self._api.library_version,
                force_download=force_download,
            )
        except LocalEntryNotFoundError as error:  # why it was looked for here alone says more
            raise error if error.__cause__ is None else error.__cause__ from None
        return Path(found)

    def create(self, *, private: bool) -> Remote:
        """Make the repository. Raises UserError where the token may not."""
        with told(f"{self.repo} cannot be made"):
            self._api.create_repo(self.repo, private=private, exist_ok=True)
            if self.revision is not None:
                self._api.create_branch(self.repo, branch=self.revision, exist_ok=True)
        made = self.look()
        assert made is not None, "the hub has what it has just made"
        return made

    def branch(self) -> None:
        """Make the branch of this revision where there is none."""
        if self.revision is not None:
            with told(f"The branch {self.revision} of {self.repo} cannot be made"):
                self._api.create_branch(self.repo, branch=self.revision, exist_ok=True)

    def commit(self, files: Mapping[str, Path | bytes], delete: Sequence[str], message: str, *, onto: str) -> str:
        """One commit of all files onto the commit `onto`: all of it appears, or nothing. Its address."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        steps: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path, str(content) if isinstance(content, Path) else content)
            for path, content in files.items()
        ]
        steps += [CommitOperationDelete(path) for path in delete]
        try:
            done = self._api.create_commit(
                self.repo, steps, commit_message=message, revision=self.revision, parent_commit=onto
            )
        except Exception as error:  # as in `told`
            raise UserError(f"{self._fate(error, onto)}: {_reason(error)}") from error
        return str(done.commit_url)

    def _fate(self, error: Exception, onto: str) -> str:
        """What a failed commit left: an answer that was lost may have been a good one."""
        nothing = f"Nothing was pushed to {self._named()}"
        if _status(_root(error)) is not None:
            return nothing
        try:
            now = self.look()
        except UserError:
            return f"It is not known whether the push to {self._named()} arrived"
        if now is not None and now.commit == onto:
            return nothing
        return f"The answer of {self._named()} was lost, and it has a new commit: the push may have arrived"

    def _named(self) -> str:
        return self.repo if self.revision is None else f"{self.repo} at {self.revision}"


def writing_token() -> str:
    """The user's token by the client's own chain. Raises UserError, without asking the hub, when there is none."""
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it and run again.")
    token = get_token()
    if token is None:
        raise UserError(
            "Pushing needs a token of the Hugging Face hub with write access, and none was found. Log in with `hf auth "
            "login`, or set HF_TOKEN."
        )
    return token


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turn whatever the client raises into one UserError that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the HTTP library and its exceptions differ between versions of the client
        raise UserError(f"{what}: {_reason(error)}") from error


def _root(error: Exception) -> Exception:
    """What is behind an error: the client wraps an upload's in one that names the file alone."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _status(error: Exception) -> int | None:
    """The hub's HTTP status, if it was that which failed."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return None if status is None else int(status)


def _reason(error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled

    cause = _root(error)
    status = _status(cause)
    if isinstance(error, GatedRepoError):
        return f"it is gated. Accept its terms on {constants.ENDPOINT}, log in with `hf auth login`, and run again."
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and the local hub cache does not have all of it. Unset it and run again."
    if status in _ANSWERS:
        return _ANSWERS[status].format(endpoint=constants.ENDPOINT)
    if status is not None and status >= 500:
        return f"{constants.ENDPOINT} answered with an error of its own ({status}). Try again later."
    if isinstance(cause, OSError) and cause.errno is not None and status is None:
        place = Path(cause.filename) if isinstance(cause.filename, str) else Path(constants.HF_HUB_CACHE)
        if isinstance(explained(cause, place, 0), UserError):
            return str(explained(cause, place, 0))
    lines = str(cause).strip().splitlines()
    return (
        f"{type(cause).__name__} ({lines[0][:200] if lines else 'no message'}). Check the network and "
        f"{constants.ENDPOINT}, then run the same command again."
    )


_ANSWERS = {
    400: "{endpoint} refused the request as malformed. The client may be too old: update huggingface_hub.",
    401: "{endpoint} does not accept the token, or has no such repository for those without one. Check the name; log "
    "in with `hf auth login`, or set HF_TOKEN.",
    403: "the token may not do that. Use one with write access to the owner's repositories (`hf auth login`).",
    404: "{endpoint} has none of that name that you may see. Check the spelling (owner/name), or log in with `hf auth "
    "login` if it is private.",
    409: "it was changed by someone else meanwhile. Run the same command again.",
    412: "it was changed by someone else meanwhile. Run the same command again.",
    413: "{endpoint} refused it as too large. Push fewer runs at once.",
    429: "{endpoint} allows no more requests for now. Try again later.",
}
