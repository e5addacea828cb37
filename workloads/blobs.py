"""A container of Blob Storage: where it is, what can be asked of it, and Azure's answer.

Each request says how it failed: Lost may succeed when it is tried again, a PlannerError will not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from planner.errors import PlannerError

REQUEST_BYTES = 8 << 20  # of a block up or down; up to 50,000 blocks of a blob: 390 GiB

Answer = TypeVar("Answer")


class Lost(Exception):
    """The network or the service did not answer; trying again may help."""


class Changed(Exception):
    """The blob is not the one that was begun with."""


class Place(NamedTuple):
    """Where a folder lies: account https://NAME.blob.core.windows.net, its container, and the path in it."""

    account: str
    container: str
    prefix: str

    def name(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix else path

    def __str__(self) -> str:
        return "/".join(part for part in (self.account, self.container, self.prefix) if part)


class Blob(NamedTuple):
    """sha256: as the uploader noted it; None of blobs that others wrote."""

    size: int
    sha256: str | None
    etag: str


class Blobs(Protocol):
    """What is asked of a container. Each raises Lost where a second try may help, PlannerError where not."""

    def find(self, prefix: str) -> dict[str, Blob]: ...
    def staged(self, name: str) -> dict[str, int]: ...
    def stage(self, name: str, block: str, content: bytes) -> None: ...
    def commit(self, name: str, blocks: list[str], sha256: str) -> None: ...
    def put(self, name: str, content: bytes, sha256: str) -> None: ...
    def read(self, name: str, start: int, size: int, etag: str) -> bytes: ...
    def delete(self, name: str) -> None: ...


class Leases(Protocol):
    """What is asked of a container to hold something in it alone: a lease of Azure's own on a small blob.

    lease: the holder's own UUID. acquire: whether it is the holder's now; renew: whether it still is.
    """

    def acquire(self, name: str, lease: str, seconds: int) -> bool: ...
    def renew(self, name: str, lease: str) -> bool: ...
    def release(self, name: str, lease: str) -> None: ...


ACCOUNT = "AZURE_STORAGE_ACCOUNT_NAME"  # adlfs and vLLM's streamer read az:// by it, too
EMULATOR_KEY = "AZURE_STORAGE_KEY"  # of an emulator on this machine alone; Azure's accounts take no keys here
_LOCAL = ("127.0.0.1", "localhost", "::1")


def is_url(text: str) -> bool:
    return text.startswith(("https://", "http://", "az://"))


def parse_place(url: str) -> Place:
    """The place that a URL names: https://ACCOUNT.blob.core.windows.net/CONTAINER/PATH, or az://CONTAINER/PATH.

    The account of az:// is the environment's. PlannerError for what names no place, or carries a key in it.
    """
    parts = urlsplit(url)
    if parts.query:
        raise PlannerError("a Blob URL must not carry a signature or key: give it without, access goes by identity")
    if parts.scheme == "az":
        return _of_environment(url, parts.netloc, [part for part in parts.path.split("/") if part])
    names = [unquote(part) for part in parts.path.split("/") if part]
    local = parts.hostname in _LOCAL
    if parts.scheme not in ("http", "https") or not parts.hostname or (parts.scheme == "http" and not local):
        raise PlannerError(f"{url} is no Blob URL: write https://ACCOUNT.blob.core.windows.net/CONTAINER/FOLDER")
    account = f"{parts.scheme}://{parts.netloc}"
    if local and names:  # the emulator has the account in the path
        account, names = f"{account}/{names[0]}", names[1:]
    if not names or any(name in (".", "..") for name in names):
        raise PlannerError(f"{url} names no container: write https://ACCOUNT.blob.core.windows.net/CONTAINER/FOLDER")
    return Place(account, names[0], "/".join(names[1:]))


def _of_environment(url: str, container: str, names: list[str]) -> Place:
    """The place of an az:// URL, whose names are taken as they are."""
    if not re.fullmatch(r"[$a-z0-9-]+", container) or any(name in (".", "..") for name in names):
        raise PlannerError(f"{url} names no container: write az://CONTAINER/FOLDER")
    said = os.environ.get(ACCOUNT, "").rstrip("/")
    address = f"https://{said}.blob.core.windows.net" if re.fullmatch(r"[a-z0-9]{3,24}", said) else said
    try:
        account = parse_place(f"{address}/{container}").account if address.startswith("http") else ""
    except PlannerError:
        account = ""
    if not account or account != address:  # no address, one with a key, or one of more than an account
        raise PlannerError(
            f"{url} is in the account that {ACCOUNT} names, which is {'no account' if said else 'not set'}: set it to"
            " the account's name, or to the address of its Blob endpoint"
        )
    return Place(account, container, "/".join(names))


# --- Azure ------------------------------------------------------------------------------------------------------------


class AzureBlobs:
    """A container of Azure Blob Storage, by identity (DefaultAzureCredential); an emulator on 127.0.0.1 by its key."""

    def __init__(self, place: Place, *, credential: Any = None) -> None:
        try:
            from azure.storage.blob import ContainerClient
        except ImportError as error:
            raise PlannerError("Blob needs azure-storage-blob: pip install 'tonnage[store]'") from error
        self._place = place
        self._client = ContainerClient(
            place.account,
            place.container,
            credential=credential or _credential(place),
            # this module tries again itself, and nothing is kept in memory twice
            retry_total=0,
            connection_timeout=20,
            read_timeout=60,
            max_single_get_size=REQUEST_BYTES,
            max_chunk_get_size=REQUEST_BYTES,
            max_single_put_size=REQUEST_BYTES,
        )

    def find(self, prefix: str) -> dict[str, Blob]:
        def ask() -> dict[str, Blob]:
            listed = self._client.list_blobs(name_starts_with=prefix or None, include=["metadata"])
            return {
                blob.name: Blob(blob.size, (blob.metadata or {}).get("sha256"), blob.etag)
                for blob in listed
                if (blob.metadata or {}).get("hdi_isfolder") != "true"
            }

        return self._ask(ask)

    def staged(self, name: str) -> dict[str, int]:
        from azure.core.exceptions import ResourceNotFoundError

        def ask() -> dict[str, int]:
            try:
                _, waiting = self._client.get_blob_client(name).get_block_list("uncommitted")
            except ResourceNotFoundError:
                return {}
            return {block.id: block.size for block in waiting}

        return self._ask(ask)

    def stage(self, name: str, block: str, content: bytes) -> None:
        client = self._client.get_blob_client(name)
        self._ask(lambda: client.stage_block(block, content, length=len(content), validate_content=True))

    def commit(self, name: str, blocks: list[str], sha256: str) -> None:
        from azure.storage.blob import BlobBlock

        client = self._client.get_blob_client(name)
        chosen = [BlobBlock(block_id=block) for block in blocks]
        self._ask(lambda: client.commit_block_list(chosen, metadata={"sha256": sha256}, validate_content=True))

    def put(self, name: str, content: bytes, sha256: str) -> None:
        client = self._client.get_blob_client(name)
        self._ask(
            lambda: client.upload_blob(content, overwrite=True, metadata={"sha256": sha256}, validate_content=True)
        )

    def read(self, name: str, start: int, size: int, etag: str) -> bytes:
        from azure.core import MatchConditions
        from azure.core.exceptions import ResourceModifiedError

        client = self._client.get_blob_client(name)

        def ask() -> bytes:
            try:
                stream = client.download_blob(start, size, etag=etag, match_condition=MatchConditions.IfNotModified)
                content: bytes = stream.readall()
            except ResourceModifiedError as error:
                raise Changed(name) from error
            if len(content) != size:
                raise Lost(f"{len(content)} of {size} bytes came")
            return content

        return self._ask(ask)

    def delete(self, name: str) -> None:
        from azure.core.exceptions import ResourceNotFoundError

        def ask() -> None:
            try:
                self._client.get_blob_client(name).delete_blob()
            except ResourceNotFoundError:
                return  # a try that was thought lost had reached it

        self._ask(ask)

    def acquire(self, name: str, lease: str, seconds: int) -> bool:
        """Whether the lease is ours now; False while another has it. Asked again, it begins anew. 15 to 60 seconds."""
        from azure.core.exceptions import HttpResponseError, ResourceExistsError, ResourceNotFoundError

        client = self._client.get_blob_client(name)

        def create() -> None:
            try:
                client.upload_blob(b"", overwrite=False, **_SOON)
            except ResourceExistsError:
                return  # another was faster
            except HttpResponseError as error:
                if not _is_of_lease(error):
                    raise

        def ask() -> bool:
            try:
                client.acquire_lease(seconds, lease_id=lease, **_SOON)
            except ResourceNotFoundError:
                create()
                client.acquire_lease(seconds, lease_id=lease, **_SOON)
            return True

        return self._ask(lambda: _unless_held(ask))

    def renew(self, name: str, lease: str) -> bool:
        """Whether it is still ours; False when another has taken it, it was broken, or its blob is gone."""
        return self._of_lease(name, lease, lambda held: held.renew(**_SOON))

    def release(self, name: str, lease: str) -> None:
        """Give it up, so that nobody waits; nothing where it is not ours."""
        self._of_lease(name, lease, lambda held: held.release(**_SOON))

    def _of_lease(self, name: str, lease: str, act: Callable[[Any], object]) -> bool:
        """Do that with a lease that we have. False where it is not ours any more."""
        from azure.core.exceptions import ResourceNotFoundError
        from azure.storage.blob import BlobLeaseClient

        client = BlobLeaseClient(self._client.get_blob_client(name), lease)

        def ask() -> bool:
            try:
                act(client)
            except ResourceNotFoundError:
                return False
            return True

        return self._ask(lambda: _unless_held(ask))

    def _ask(self, ask: Callable[[], Answer]) -> Answer:
        from azure.core.exceptions import (
            ClientAuthenticationError,
            HttpResponseError,
            IncompleteReadError,
            ResourceNotFoundError,
            ServiceRequestError,
            ServiceResponseError,
        )

        try:
            return ask()
        except (ServiceRequestError, ServiceResponseError, IncompleteReadError, OSError) as error:
            raise Lost(_first_line(error)) from error
        except ResourceNotFoundError as error:
            if _code(error) == "ContainerNotFound":
                raise PlannerError(
                    f"{self._place.account} has no container {self._place.container}: create it, or correct the URL"
                ) from error
            raise PlannerError(f"a blob at {self._place} was taken away meanwhile: start again") from error
        except ClientAuthenticationError as error:
            raise PlannerError(
                f"access to {self._place} is refused: give this identity the role Storage Blob Data Contributor on the"
                " container"
            ) from error
        except HttpResponseError as error:
            code = error.status_code or 0
            if code == 403:
                raise PlannerError(
                    f"access to {self._place} is refused: give this identity the role Storage Blob Data Contributor on"
                    " the container"
                ) from error
            if code in (408, 409, 429) or code >= 500 or code == 0:
                raise Lost(_first_line(error)) from error
            raise PlannerError(f"Blob refuses {self._place} ({_first_line(error)}): correct the URL") from error


# a lease is renewed while it lasts or not at all, so no answer is waited for as long as for a block
_SOON: dict[str, Any] = {"connection_timeout": 5, "read_timeout": 10}


def _code(error: Any) -> str:
    """Azure's own word for an error, such as LeaseAlreadyPresent."""
    code = getattr(error, "error_code", None)
    return str(getattr(code, "value", code))


def _is_of_lease(error: Any) -> bool:
    return error.status_code in (409, 412) and _code(error).startswith("Lease")


def _unless_held(ask: Callable[[], bool]) -> bool:
    """The answer; False where Azure refuses because the lease is another's."""
    from azure.core.exceptions import HttpResponseError

    try:
        return ask()
    except HttpResponseError as error:
        if _is_of_lease(error):
            return False
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _credential(place: Place) -> Any:
    if urlsplit(place.account).hostname in _LOCAL:
        key = os.environ.get(EMULATOR_KEY)
        if not key:
            raise PlannerError(f"{place} is an emulator's: set {EMULATOR_KEY} to its key, which Azurite publishes")
        return {"account_name": place.account.rsplit("/", 1)[-1], "account_key": key}
    from azure.identity import DefaultAzureCredential

    return DefaultAzureCredential()
