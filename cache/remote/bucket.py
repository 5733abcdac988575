"""Requests to one bucket of an object store, with patience, and their failures in words.

`obstore` speaks the protocols (it is what zarr's `ObjectStore` wraps). Its own retries are off but for the parts of a
large upload: here they are counted, bounded in time, told apart from what waiting does not mend, and reported.

Credentials are whatever obstore finds in the environment (variables, web identity, the metadata service of a machine).
They are not looked at here. Texts of errors are not passed on either: a server or a proxy may repeat a query string or
a header in them. What is told is a status, a code and the place.
"""

import os
import random
import re
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn, TypeVar

import obstore
from obstore import store as stores
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from thresher.cache.errors import UserError

T = TypeVar("T")

PART_BYTES = 8 << 20
"""Larger objects are uploaded in parts of this size."""


class Patience(NamedTuple):
    """How long a request is tried for."""

    overall_s: float = 120.0
    """From the first try to giving up."""
    unknown_s: float = 20.0
    """The same, of a store that has not answered yet: mostly its address is wrong."""
    request_s: float = 30.0
    """One request, to its last byte."""
    first_s: float = 0.1
    """Wait after the first failure; doubled after each, up to `longest_s`, and shortened by chance to a half."""
    longest_s: float = 10.0


def patience() -> Patience:
    """The patience that the environment asks for: $THRESHER_STORE_PATIENCE, seconds overall."""
    text = os.environ.get("THRESHER_STORE_PATIENCE")
    if text is None:
        return Patience()
    try:
        overall = float(text)
    except ValueError:
        overall = 0.0
    if not overall > 0:
        raise UserError(f"THRESHER_STORE_PATIENCE is {text!r}; expected seconds, as 120.")
    usual = Patience()
    return usual._replace(
        overall_s=overall, unknown_s=min(usual.unknown_s, overall), request_s=min(usual.request_s, overall)
    )


class ShortError(Exception):
    """An answer with fewer bytes than were asked for: of an object that is shorter, or cut by something in between."""


class Cause(NamedTuple):
    """Why a request failed."""

    text: str
    """In words of our own, with status and code of the answer."""
    passing: bool
    """Whether it is worth trying again."""
    remedy: str


class Bucket:
    """One bucket. Threads may share it."""

    def __init__(self, scheme: str, name: str, patient: Patience | None = None) -> None:
        self.scheme, self.name = scheme, name
        self.patience = patient or patience()
        self.answered = False
        """Whether it ever gave an answer other than a failure."""
        self.store = _open(scheme, name, self.patience, 0)
        self._uploads = _open(scheme, name, self.patience, 8) if scheme != "memory" else self.store

    def head(self, key: str) -> dict[str, Any] | None:
        """Size and tag of an object; None when it is not there."""
        return self._found("look at", key, lambda: dict(obstore.head(self.store, key)))

    def get(self, key: str) -> tuple[bytes, dict[str, Any]] | None:
        """Content, size and tag of an object; None when it is not there."""

        def request() -> tuple[bytes, dict[str, Any]]:
            answer = obstore.get(self.store, key)
            meta, data = dict(answer.meta), bytes(answer.bytes())
            if len(data) != meta["size"]:
                raise ShortError(f"{len(data):,} of {meta['size']:,} bytes came")
            return data, meta

        return self._found("read", key, request)

    def get_range(self, key: str, start: int, length: int) -> memoryview | None:
        """Bytes [start, start + length) of an object; None when it is not there, or too short."""

        def request() -> memoryview:
            data = memoryview(obstore.get_range(self.store, key, start=start, length=length))
            if len(data) != length:
                raise ShortError(f"{len(data):,} of {length:,} bytes came")
            return data

        return self._found("read", key, request)

    def listing(self, prefix: str) -> dict[str, int]:
        """Size of every object below a prefix, by key."""

        def request() -> dict[str, int]:
            return {each["path"]: each["size"] for batch in obstore.list(self.store, prefix) for each in batch}

        return self._call("list", prefix, request)

    def folder(self, prefix: str) -> list[str]:
        """Keys and prefixes directly below a prefix."""

        def request() -> list[str]:
            found = obstore.list_with_delimiter(self.store, prefix)
            return [*found["common_prefixes"], *(each["path"] for each in found["objects"])]

        return self._call("list", prefix, request)

    def put(self, key: str, pieces: list[memoryview]) -> None:
        """Write an object whole, over whatever is there; a large one in parts."""
        total = sum(map(len, pieces))
        if total <= PART_BYTES:
            data = b"".join(pieces)
            self._call("write", key, lambda: obstore.put(self.store, key, data, use_multipart=False))
            return

        def request() -> object:
            parts = (piece[at : at + PART_BYTES] for piece in pieces for at in range(0, len(piece), PART_BYTES))
            return obstore.put(self._uploads, key, parts, chunk_size=PART_BYTES, max_concurrency=4)

        self._call("write", key, request)

    def create(self, key: str, data: bytes) -> dict[str, Any] | None:
        """Write an object that is not there yet; its tag, or None when there was one.

        A try whose answer was lost may have written it, which the next one then finds: so what is there is looked at.
        """
        return self._conditionally(key, data, "create")

    def replace(self, key: str, data: bytes, tag: dict[str, Any]) -> dict[str, Any] | None:
        """Write over an object that still has a tag; the new tag, or None when it has another by now."""
        return self._conditionally(key, data, {name: value for name, value in tag.items() if value is not None})

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        self._found("remove", key, lambda: obstore.delete(self.store, key))

    def _conditionally(self, key: str, data: bytes, mode: Any) -> dict[str, Any] | None:
        tries = 0

        def request() -> dict[str, Any] | None:
            nonlocal tries
            tries += 1
            try:
                return tag_of(dict(obstore.put(self.store, key, data, mode=mode, use_multipart=False)))
            except (AlreadyExistsError, PreconditionError):
                return None
            except FileNotFoundError:
                if mode == "create":
                    raise
                return None  # what was to be replaced is gone

        made = self._call("write", key, request)
        if made is None and tries > 1:
            there = self.get(key)
            if there is not None and there[0] == data:
                return tag_of(there[1])
        return made

    def _found(self, verb: str, key: str, request: Callable[[], T]) -> T | None:
        """`_call`, or None where there is no such object."""
        try:
            return self._call(verb, key, request)
        except FileNotFoundError:
            return None

    def _call(self, verb: str, key: str, request: Callable[[], T]) -> T:
        """Make a request until it succeeds, as long as that makes sense. Raises FileNotFoundError, UserError."""
        began, tries, wait = time.monotonic(), 0, self.patience.first_s
        while True:
            tries += 1
            try:
                answer = request()
                self.answered = True
                return answer
            except FileNotFoundError as error:
                if verb == "write" or "NoSuchBucket" in str(error) or not (self.answered or self._there()):
                    self._refuse(verb, key, _no_bucket(self.scheme, self.name), tries, began)
                self.answered = True
                raise FileNotFoundError(f"{self.scheme}://{self.name}/{key}") from None
            except (BaseError, ShortError, OSError) as error:
                cause = explain(self.scheme, self.name, error)
                if isinstance(error, ShortError) and tries >= _SHORT_TRIES:
                    cause = cause._replace(passing=False)
            pause = wait * random.uniform(0.5, 1.0)
            bound = self.patience.overall_s if self.answered else self.patience.unknown_s
            if not cause.passing or time.monotonic() - began + pause > bound:
                self._refuse(verb, key, cause, tries, began)
            time.sleep(pause)
            wait = min(2 * wait, self.patience.longest_s)

    def _there(self) -> bool:
        """Whether the bucket exists: a question for an object in it does not tell."""
        try:
            obstore.list_with_delimiter(self.store, "thresher-is-there-a-bucket")
        except (BaseError, OSError) as error:
            return explain(self.scheme, self.name, error) != _no_bucket(self.scheme, self.name)
        return True

    def _refuse(self, verb: str, key: str, cause: Cause, tries: int, began: float) -> NoReturn:
        tried = f" Tried {tries} times in {time.monotonic() - began:.1f} s." if tries > 1 else ""
        raise UserError(
            f"cannot {verb} {self.scheme}://{self.name}/{key}: {cause.text}.{tried} {cause.remedy}"
        ) from None


def tag_of(meta: dict[str, Any]) -> dict[str, Any]:
    """What tells this version of an object from others."""
    return {name: meta.get(name) for name in ("e_tag", "version")}


_SHORT_TRIES = 4
_PASSING = {408, 409, 425, 429}
_AGAIN = "Whatever was committed stays valid: run the same command again once the store answers, and it goes on."
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (with AWS_SESSION_TOKEN where they are temporary), or a role of "
    "the machine",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or an account of the machine",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or a managed identity",
}
_NO_METADATA = ("169.254.169.254", "169.254.170.2", "metadata.google.internal", "fd00:ec2", "Account must be specified")


def explain(scheme: str, bucket: str, error: Exception) -> Cause:
    """What a failure of obstore comes to. Pure; nothing of the error's own text is repeated but status and code."""
    text = str(error)
    status = int(found[1]) if (found := re.search(r"status code: (\d{3})", text)) else None
    code = found[1] if (found := re.search(r"<Code>(\w{1,60})</Code>", text)) else None
    said = f"the store answered {status}{f' ({code})' if code else ''}" if status else ""
    names = _CREDENTIALS.get(scheme, "credentials")
    if any(word in text for word in _NO_METADATA):
        return Cause("there are no credentials for it in the environment", False, f"Set {names}.")
    if code == "NoSuchBucket" or (status == 404 and "list request" in text):
        return _no_bucket(scheme, bucket)
    if code in ("ExpiredToken", "TokenRefreshRequired", "RequestExpired"):
        return Cause(f"the credentials have expired ({said})", False, "Get new ones and run the same command again.")
    if code == "RequestTimeTooSkewed":
        return Cause(f"the clock of this machine is wrong ({said})", False, "Set it and run the same command again.")
    moved = "Received redirect" in text or (status is not None and 300 <= status < 400)
    if moved or code in ("AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"):
        advice = "Set AWS_REGION to the bucket's region (and AWS_ENDPOINT_URL, if it is not Amazon's)."
        said = said or "the store answered with a redirect to nowhere"
        return Cause(f"the bucket is in another region or at another address ({said})", False, advice)
    if status in (401, 403):
        advice = f"Check {names}, and that they may read, list, write and delete below this prefix."
        return Cause(f"access was denied ({said})", False, advice)
    if isinstance(error, ShortError):
        return Cause(f"the answer was cut short: {error}", True, _AGAIN)
    if status is None:
        slow = re.search(r"TimedOut|operation timed out", text)
        what = "there was no answer in time" if slow else "the connection failed or broke off"
        where = f" Check the network{', AWS_ENDPOINT_URL' if scheme == 's3' else ''} and proxies."
        return Cause(what, True, _AGAIN + where)
    if status in _PASSING or status >= 500:
        return Cause(said, True, _AGAIN)
    return Cause(said, False, "Check the URI, and the store's own log for this request.")


def _no_bucket(scheme: str, bucket: str) -> Cause:
    return Cause(
        f"there is no bucket {bucket!r}",
        False,
        f"Correct the URI, make the bucket first, or set the address of the store that has it"
        f"{' (AWS_ENDPOINT_URL, AWS_REGION)' if scheme == 's3' else ''}.",
    )


@lru_cache(maxsize=64)
def _memory(name: str) -> stores.MemoryStore:
    """The bucket of this name in this process."""
    return stores.MemoryStore()


def _open(scheme: str, name: str, patient: Patience, retries: int) -> Any:
    """A client for a bucket; nothing is asked of it yet."""
    if scheme == "memory":
        return _memory(name)
    from datetime import timedelta

    plain = any(os.environ.get(key, "").startswith("http://") for key in _ENDPOINTS)
    options: Any = {
        "timeout": timedelta(seconds=patient.request_s),
        "connect_timeout": timedelta(seconds=min(5.0, patient.request_s)),
        "allow_http": plain,  # only where the user's own address says so
    }
    retry: Any = {"max_retries": retries, "retry_timeout": timedelta(seconds=patient.overall_s)}
    kind = {"s3": stores.S3Store, "gs": stores.GCSStore, "az": stores.AzureStore}[scheme]
    try:
        return kind(name, client_options=options, retry_config=retry)
    except (BaseError, ValueError, OSError) as error:
        cause = explain(scheme, name, error)
        text = cause.text if not cause.passing else "the environment has settings for it that do not fit together"
        advice = cause.remedy if not cause.passing else f"Check {_CREDENTIALS[scheme]}."
        raise UserError(f"cannot use {scheme}://{name}: {text}. {advice}") from None


_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")

_buckets: dict[tuple[str, str, int], Bucket] = {}
_opening = threading.Lock()


def bucket(scheme: str, name: str) -> Bucket:
    """The bucket of this name, opened once a process (a child that was forked opens its own)."""
    key = (scheme, name, os.getpid())
    with _opening:
        if key not in _buckets:
            _buckets[key] = Bucket(scheme, name)
        return _buckets[key]
