"""Requests to the Azure Retail Prices API: paging, waiting, limits. Each way to fail is one sentence."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from pydantic import ValidationError

from planner.catalog.prices.rows import Item, Page, number
from planner.errors import PlannerError

if TYPE_CHECKING:
    import httpx

API_VERSION = "2023-01-01-preview"  # the version that lists savings plans
MAX_RETRIES = 4
MAX_WAIT_S = 60
MAX_PAGES = 200
MAX_BYTES = 32 * 1024 * 1024
KEPT = "the price sheet in use stays as it is"


class Timeouts(NamedTuple):
    """Seconds to connect, to wait for more of an answer, and for one answer as a whole."""

    connect_s: float = 10
    read_s: float = 30
    whole_s: float = 120


class Api:
    """Reads the price list; each way in which that can fail is one sentence. requests: sent so far."""

    def __init__(self, client: httpx.Client, endpoint: str, timeouts: Timeouts, sleep: Callable[[float], None]) -> None:
        self._client, self._timeouts, self._sleep = client, timeouts, sleep
        self._address = f"{endpoint.rstrip('/')}/api/retail/prices"
        self.requests = 0

    def items(self, label: str, equal: Mapping[str, str], currency: str = "USD", *, primary: bool) -> list[Item]:
        """All rows whose fields equal those values; primary: only those of meters that belong to their region."""
        where = f"{self._address.partition('://')[2]} ({label})"
        parameters = {"api-version": API_VERSION, "currencyCode": f"'{currency}'"}
        parameters |= {"meterRegion": "'primary'"} if primary else {}
        parameters["$filter"] = " and ".join(f"{field} eq {_quoted(value)}" for field, value in equal.items())
        link: str | None = f"{self._address}?{urlencode(parameters, quote_via=quote)}"
        seen: set[str] = set()
        found: list[Item] = []
        while link:
            if link in seen or len(seen) == MAX_PAGES:
                raise _refusal(where, f"does not end: a page came twice, or there are over {MAX_PAGES}")
            seen.add(link)
            page = self._page(link, where)
            if page.billing_currency != currency:
                what = f"answers in {page.billing_currency[:10]!r} where {currency} was asked for"
                raise _refusal(where, f"{what}: choose a currency that Azure bills in")
            found += page.items
            link = page.next_page_link
            if link and origin(link) != origin(self._address):
                raise _refusal(where, f"names a next page at another address, which is not followed: {link[:100]!r}")
        return found

    def _page(self, url: str, where: str) -> Page:
        for attempt in range(MAX_RETRIES + 1):
            status, retry_after, body = self._get(url, where)
            if status not in (429, 503):
                break
            if attempt == MAX_RETRIES:
                raise _refusal(where, f"still answers {status} after {MAX_RETRIES} retries: try again later")
            self._sleep(_wait_s(retry_after, attempt))
        if 300 <= status < 400:
            raise _refusal(where, f"answers with a redirect ({status}), which is not followed: check the address")
        if status != 200:
            raise _refusal(where, f"refuses with status {status}: check the size, the currency and the address")
        try:
            return Page.model_validate(json.loads(body, parse_float=Decimal, parse_constant=number))
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc'])) or 'its top level'}: {' '.join(first['msg'].split())}"
        except (ValueError, InvalidOperation, RecursionError):
            reason = "no JSON that can be read"
        raise _refusal(where, f"answers something other than a price list ({reason}): try again later")

    def _get(self, url: str, where: str) -> tuple[int, str, bytes]:
        """Status, Retry-After and, of a good answer, the body."""
        import httpx

        limits, body = self._timeouts, bytearray()
        deadline = time.monotonic() + limits.whole_s
        self.requests += 1
        # the read timeout ends a silent server; only this, a little later, ends one that trickles its header
        late = threading.Timer(limits.whole_s + limits.read_s, self._client.close)
        late.daemon = True
        late.start()
        try:
            timeout = httpx.Timeout(limits.read_s, connect=limits.connect_s)
            with self._client.stream("GET", url, follow_redirects=False, timeout=timeout) as response:
                for chunk in response.iter_bytes() if response.status_code == 200 else ():
                    body += chunk
                    if len(body) > MAX_BYTES:
                        raise _refusal(where, f"sends more than {MAX_BYTES:,} bytes on one page: try again later")
                    if time.monotonic() > deadline:
                        raise _refusal(where, f"is not done after {limits.whole_s:g} s: try again later")
                return response.status_code, response.headers.get("retry-after", ""), bytes(body)
        except httpx.TimeoutException as error:
            raise _refusal(where, "does not answer in time: try again later") from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError, RuntimeError, ValueError) as error:
            if time.monotonic() >= deadline:  # closed under the request's feet
                raise _refusal(where, f"is not done after {limits.whole_s:g} s: try again later") from error
            if not isinstance(error, httpx.HTTPError | httpx.InvalidURL):
                raise
            raise _refusal(where, f"cannot be read ({type(error).__name__}): check the network and proxy") from error
        finally:
            late.cancel()


def own_client() -> httpx.Client:
    import httpx

    try:
        return httpx.Client()
    except (httpx.InvalidURL, ValueError, ImportError) as error:  # what a malformed or unsupported proxy raises
        raise PlannerError("the proxy in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be used: correct it") from error


def _refusal(where: str, what: str) -> PlannerError:
    return PlannerError(f"{where} {what}; {KEPT}")


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def origin(url: str) -> tuple[str, str, int] | None:
    """Scheme, host and port; None for what is no web address, or carries a user name."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"https": 443, "http": 80}[parts.scheme]
    except (ValueError, KeyError):
        return None
    return (parts.scheme, parts.hostname, port) if parts.hostname and "@" not in parts.netloc else None


def _wait_s(retry_after: str, attempt: int) -> float:
    """Seconds to wait: what Retry-After says (seconds or a date), at most a minute, else 1, 2, 4 .. 30."""
    if re.fullmatch(r"[0-9]{1,9}", retry_after):
        return min(int(retry_after), MAX_WAIT_S)
    try:
        when = parsedate_to_datetime(retry_after)
    except ValueError:
        return min(1 << attempt, 30)
    seconds = (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0), MAX_WAIT_S)
