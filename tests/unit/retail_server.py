"""A stand-in for the Azure Retail Prices API on 127.0.0.1, and rows shaped like its rows."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, urlencode, urlsplit

Row = dict[str, Any]
Fault = Callable[["Handler"], None]

A100 = "Standard_NC24ads_A100_v4"
H200 = "Standard_ND96isr_H200_v5"


class Request(NamedTuple):
    path: str
    query: dict[str, str]

    @property
    def filter(self) -> str:
        return self.query.get("$filter", "")


class RetailServer:
    """Answers /api/retail/prices from `rows` as the API does; `faults` are used up first, one a request, then `always`.

    page_size: rows on a page; rates: other currencies that it knows; unknown ones get status 400
    """

    def __init__(self, rows: Iterable[Row] = (), page_size: int = 1000) -> None:
        self.rows = list(rows)
        self.page_size = page_size
        self.rates = {"USD": 1.0, "EUR": 0.8587}
        self.faults: list[Fault | None] = []
        self.always: Fault | None = None
        self.requests: list[Request] = []
        self.stopped = threading.Event()
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.retail = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> RetailServer:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def page(self, request: Request) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a normal answer."""
        currency = request.query.get("currencyCode", "'USD'").strip("'")
        if currency not in self.rates:
            return 400, {"Error": {"Code": "BadRequest", "Message": "Invalid currency"}}
        equal = dict(re.findall(r"(\w+) eq '([^']*)'", request.filter))
        equal = {"type" if field == "priceType" else field: value for field, value in equal.items()}
        rows = [row for row in self.rows if all(row[field] == value for field, value in equal.items())]
        if request.query.get("meterRegion") == "'primary'":
            rows = [row for row in rows if row["isPrimaryMeterRegion"]]
        start = int(request.query.get("$skip", "0"))
        shown = [_converted(row, currency, self.rates[currency]) for row in rows[start : start + self.page_size]]
        link = None
        if start + self.page_size < len(rows):
            onward = request.query | {"$skip": str(start + self.page_size)}
            link = f"{self.url}{request.path}?{urlencode(onward, quote_via=quote)}"
        return 200, {
            "BillingCurrency": currency,
            "CustomerEntityId": "Default",
            "CustomerEntityType": "Retail",
            "Items": shown,
            "NextPageLink": link,
            "Count": len(shown),
        }


class _Server(ThreadingHTTPServer):
    retail: RetailServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that give up are what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        request = Request(parts.path, {name: values[0] for name, values in parse_qs(parts.query).items()})
        retail = self.server.retail
        retail.requests.append(request)
        fault = retail.faults.pop(0) if retail.faults else retail.always
        if fault is not None:
            fault(self)
        else:
            code, content = retail.page(request)
            self.send(code, json.dumps(content).encode())

    def send(self, code: int, body: bytes = b"", headers: dict[str, str] | None = None, length: int = -1) -> None:
        self.send_response(code)
        for name, value in ((headers or {}) | {"Content-Length": str(len(body) if length < 0 else length)}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def _converted(row: Row, currency: str, rate: float) -> Row:
    if currency == "USD":
        return row
    return row | {"currencyCode": currency, "retailPrice": round(row["retailPrice"] * rate, 6)}


# ------------------------------------------------------------------------------------------------- what can go wrong


def status(code: int, **headers: str) -> Fault:
    return lambda handler: handler.send(code, b"no", {name.replace("_", "-"): value for name, value in headers.items()})


def body(content: bytes | str | dict[str, Any]) -> Fault:
    """An answer with status 200 and this content."""
    text = json.dumps(content) if isinstance(content, dict) else content
    return lambda handler: handler.send(200, text.encode() if isinstance(text, str) else text)


def onward(link: Callable[[Handler], str]) -> Fault:
    """A page without rows whose next page is wherever `link` says."""
    return lambda handler: body(page(NextPageLink=link(handler)))(handler)


def page(*rows: Row, **other: Any) -> dict[str, Any]:
    return {"BillingCurrency": "USD", "Items": list(rows), "NextPageLink": None, "Count": len(rows)} | other


def hang(handler: Handler) -> None:
    """Never answers."""
    handler.server.retail.stopped.wait(30)


def trickle(handler: Handler) -> None:
    """One byte at a time, for ever, each in good time."""
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(ConnectionError):
        while not handler.server.retail.stopped.wait(0.01):
            handler.wfile.write(b" ")


def trickling_header(handler: Handler) -> None:
    """A header that goes on for ever, a byte at a time, each in good time."""
    with contextlib.suppress(ConnectionError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while not handler.server.retail.stopped.wait(0.01):
            handler.wfile.write(b"x")


def endless(handler: Handler) -> None:
    """More and more, as fast as the client takes it."""
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(ConnectionError):
        while not handler.server.retail.stopped.is_set():
            handler.wfile.write(b" " * 65536)


def cut_short(handler: Handler) -> None:
    """Half of what its header promises."""
    handler.send(200, b'{"BillingCurrency":', length=1000)
    handler.close_connection = True


# -------------------------------------------------------------------------------------------------------------- rows


def row(price: float, region: str = "eastus", sku: str = A100, **other: Any) -> Row:
    """A Linux on-demand row of a size, all fields of the API; other: fields that differ."""
    meter = sku.removeprefix("Standard_")
    fields: Row = {
        "currencyCode": "USD",
        "tierMinimumUnits": 0.0,
        "retailPrice": price,
        "unitPrice": price,
        "armRegionName": region,
        "location": "US East",
        "effectiveStartDate": "2022-06-01T00:00:00Z",
        "meterId": "4e763e64-5ae4-5ed3-8892-902bb82ca7d3",
        "meterName": meter,
        "productId": "DZH318Z09TGJ",
        "skuId": "DZH318Z09TGJ/0065",
        "availabilityId": None,
        "productName": "Virtual Machines NCads A100 v4 Series Linux",
        "skuName": meter,
        "serviceName": "Virtual Machines",
        "serviceId": "DZH313Z7MMC8",
        "serviceFamily": "Compute",
        "unitOfMeasure": "1 Hour",
        "type": "Consumption",
        "isPrimaryMeterRegion": True,
        "armSkuName": sku,
    }
    return fields | other


def spot(price: float, since: str = "2026-07-01", region: str = "eastus", sku: str = A100, **other: Any) -> Row:
    name = f"{sku.removeprefix('Standard_')} Spot"
    names = {"skuName": name, "meterName": name, "meterId": f"spot-{price}-{since}"}
    return row(price, region, sku, **names, effectiveStartDate=f"{since}T00:00:00Z", **other)


def reservation(total: float, term: str, region: str = "eastus", sku: str = A100, **other: Any) -> Row:
    """The whole term's price, although the unit says an hour."""
    return row(total, region, sku, type="Reservation", reservationTerm=term, **other)


def plans(one_year: float, three_years: float) -> list[Row]:
    return [
        {"unitPrice": three_years, "retailPrice": three_years, "term": "3 Years"},
        {"unitPrice": one_year, "retailPrice": one_year, "term": "1 Year"},
    ]


# What the size costs in eastus, and rows beside it that are no price of it: each has a price of its own.
GOOD = [
    row(3.673, savingsPlan=plans(3.0574, 2.2659)),
    spot(0.678775, "2026-07-01"),
    reservation(21033.0, "1 Year"),
    reservation(37000.0, "3 Years"),
]
LOW = {"skuName": "NC24ads_A100_v4 Low Priority", "meterName": "NC24ads_A100_v4 Low Priority"}
POISON = [
    row(4.777, productName="Virtual Machines NCads A100 v4 Series Windows"),
    row(4.778, productName="Virtual Machines NCads A100 v4 Srs Win"),
    row(4.779, productName="NCadsA100v4 Series Cloud Services"),
    row(4.781, productName="NCadsA100v4 Series CloudServices"),
    row(4.041, productName="NCadsA100v4 Series Dedicated Host"),
    row(0.735, **LOW),
    row(1.911, productName="Virtual Machines NCads A100 v4 Series Windows", **LOW),
    row(3.111, type="DevTestConsumption"),
    spot(0.88279, productName="Virtual Machines NCads A100 v4 Series Windows"),
    spot(0.699, "2026-05-01"),
    spot(0.555, "2026-12-01"),
    spot(0.566, "2026-08-01", effectiveEndDate="2026-08-31T23:59:00Z"),
    row(3.4, effectiveStartDate="2020-01-01T00:00:00Z", effectiveEndDate="2022-05-31T23:59:59Z"),
    row(3.5, effectiveStartDate="2027-01-01T00:00:00Z"),
    row(3.9, effectiveEndDate="2026-12-31T23:59:59Z"),  # of the same meter as the lasting row
    row(3.61, unitOfMeasure="1/Month"),
    row(3.62, currencyCode="EUR"),
    row(3.63, region=""),
    row(3.64, region="Global"),
    row(0.0),
    row(3.66, serviceName="Azure Machine Learning"),
    reservation(63000.0, "5 Years"),
    reservation(1800.0, "1 Month"),
]


def service(price: float, names: str, region: str = "eastus", unit: str = "1 Hour", **other: Any) -> Row:
    """A row of a service; names: serviceName | productName | skuName | meterName."""
    service_name, product, sku, meter = names.split(" | ")
    fields = {"serviceName": service_name, "productName": product, "skuName": sku, "meterName": meter}
    return row(price, region, "", **fields, meterId=meter, unitOfMeasure=unit, **other)


AKS = "Azure Kubernetes Service | Azure Kubernetes Service | Standard | "
LB = "Load Balancer | Load Balancer | Standard | "
LOGS = "Log Analytics | Log Analytics | Analytics Logs | "
HOT = "Storage | General Block Blob v2 | Hot LRS | "
LINK = "Virtual Network | Virtual Network Private Link | Standard | "
SERVICES = [
    service(0.1, AKS + "Standard Uptime SLA"),
    service(0.1, AKS + "Standard Uptime SLA", "swedencentral", isPrimaryMeterRegion=False),
    # Announced under the same meter, and gone again at the end of the year.
    service(0.05, AKS + "Standard Uptime SLA", effectiveEndDate="2026-12-31T00:00:00Z"),
    service(0.6, AKS + "Standard Long Term Support"),
    service(0.0081, "Azure Kubernetes Service | Anyscale | Standard | Anyscale", "Global"),
    service(0.025, LB + "Standard Included LB Rules and Outbound Rules", "Global"),
    service(0.0, LB + "Standard Included LB Rules and Outbound Rules - Free", "Global"),
    service(0.01, LB + "Standard Overage LB Rules and Outbound Rules", "Global", "1/Hour"),
    service(0.0, LOGS + "Analytics Logs Data Ingestion", unit="1 GB"),
    service(2.76, LOGS + "Analytics Logs Data Ingestion", unit="1 GB", tierMinimumUnits=5.0),
    service(2.3, LOGS + "Analytics Logs Data Analyzed", unit="1 GB", isPrimaryMeterRegion=False),
    service(0.017664, HOT + "Hot LRS Data Stored", unit="1 GB/Month", tierMinimumUnits=51200.0),
    service(0.0184, HOT + "Hot LRS Data Stored", unit="1 GB/Month"),
    service(0.016928, HOT + "Hot LRS Data Stored", unit="1 GB/Month", tierMinimumUnits=512000.0),
    service(36.0, HOT + "Hot LRS Data Stored", unit="100 TB/Month", type="Reservation", reservationTerm="1 Year"),
    service(19.71, "Storage | Premium SSD Managed Disks | P10 LRS | P10 LRS Disk", unit="1/Month"),
    service(0.9, "Storage | Premium SSD Managed Disks | P10 LRS | P10 LRS Disk Mount", unit="1/Month"),
    service(0.16, "Azure Monitor | Azure Monitor | Metrics ingestion | Metrics ingestion Metric samples", unit="10M"),
    service(0.6666, "Container Registry | Container Registry | Standard | Standard Registry Unit", unit="1/Day"),
    service(0.1, "Container Registry | Container Registry | Standard | Data Stored", unit="1 GB/Month"),
    service(0.11, "Container Registry | Container Registry | Premium | Data Stored", unit="1 GB/Month"),
    service(0.5, "Azure DNS | Azure DNS | Private | Private Zone", "", "1"),
    service(0.1, "Azure DNS | Azure DNS | Private | Private Zone", "", "1", tierMinimumUnits=25.0),
    service(0.7, "Azure DNS | Azure DNS | Private | Private Zone", "Zone 2", "1"),
    service(0.01, LINK + "Standard Private Endpoint", "Global"),
    service(0.01, LINK + "Standard Data Processed - Ingress", "Global", "1 GB"),
    service(0.01, LINK + "Standard Data Processed - Egress", "Global", "1 GB"),
]
# Another size: no savings plan, spot at the price of on-demand; and places that are no planner's region.
SIZES = [
    *GOOD,
    *POISON,
    row(84.8, sku=H200, productName="Virtual Machines NDsrH200v5-series Linux"),
    spot(84.8, sku=H200, productName="Virtual Machines NDsrH200v5-series Linux"),
    row(4.2, "attdetroit1"),
    row(4.775, "westeurope", savingsPlan=plans(3.9747, 2.9)),
    row(5.1, "northeurope"),
    row(5.2, "northeurope", meterId="another"),  # two prices: which one holds nobody can tell
]
