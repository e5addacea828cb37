"""A budget as finance reads it: Markdown, one page of HTML, JSON, and CSV with the column names of FOCUS 1.2."""

from __future__ import annotations

import csv
import io
import re
from datetime import date
from decimal import Decimal
from functools import cache
from typing import TYPE_CHECKING

from planner.budget import Budget, BudgetLine
from planner.catalog.prices import COMMITTED, Priority
from planner.cost.lines import Group
from planner.pages.content import page_of

if TYPE_CHECKING:
    from jinja2 import Environment

FOCUS_VERSION = "1.2"
_PROVIDER = "Microsoft"
_PRICE_PLACES, _QUANTITY_PLACES = 10, 6  # so that price x quantity, the cost, is exact in the file

# https://github.com/microsoft/finops-toolkit src/open-data/Services.csv: Microsoft's own categories for its services
_SERVICE_CATEGORIES = {
    "Virtual Machines": "Compute",
    "Azure Kubernetes Service": "Compute",
    "Container Registry": "Compute",
    "Storage": "Storage",
    "Azure Managed Grafana": "Analytics",
}
_GROUP_CATEGORIES: dict[Group, str] = {
    "compute": "Compute",
    "people": "Compute",
    "platform": "Compute",
    "storage": "Storage",
    "network": "Networking",
    "monitoring": "Management and Governance",
    "security": "Security",
}


def budget_markdown(budget: Budget) -> str:
    """The budget page as Markdown with GitHub's tables; text of others cannot break out of its cell or become HTML."""
    environment = _environment(html=False)
    return environment.get_template("budget.md.j2").render(page=page_of(budget))


def budget_html(budget: Budget) -> str:
    """The budget page as one HTML file that loads nothing: styles and charts are inside, there is no script."""
    environment = _environment(html=True)
    return environment.get_template("budget.html.j2").render(page=page_of(budget))


def budget_json(budget: Budget) -> str:
    """The budget itself, as `read_budget` reads it back."""
    return budget.model_dump_json(indent=2) + "\n"


@cache
def _environment(*, html: bool) -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("planner.pages"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown"] = markdown_text
    return environment


def markdown_text(text: str) -> str:
    """Text for a line or a table cell of Markdown: shown as written, whatever marks it holds; newlines become spaces.

    Source: CommonMark 0.31 (backslash escapes, entities) and GitHub's tables, where only the pipe ends a cell.
    """
    plain = " ".join(text.split())
    plain = re.sub(r"([\\`*\[\]|~])", r"\\\1", plain)
    plain = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", plain)  # inside a word it marks nothing
    plain = re.sub(r"&(?=#?[A-Za-z0-9]+;)", "&amp;", plain).replace("<", "&lt;")
    plain = re.sub(r"^(?=#{1,6}(?:\s|$)|>|[+-](?:\s|$)|[=-]+$)", r"\\", plain)
    return re.sub(r"^([0-9]+)([.)])(?=\s|$)", r"\1\\\2", plain)


# ------------------------------------------------------------------------------------------------------------------ CSV


def budget_csv(budget: Budget) -> str:
    """One row a line, with the columns of FOCUS 1.2 (its 21 mandatory ones and those that a plan can fill) and own x_.

    BilledCost and EffectiveCost: the amount as the budget prints it, so that their sum is its total. ListCost and
    ContractedCost: unit price x quantity, unrounded; of a commitment at the price on demand, because FOCUS takes
    neither price after a commitment's discount. The period is the calendar month after the budget's day, in UTC.
    Unlike a bill: a commitment is one row, its fee and its use together; an unpriced line has no cost; and what only
    an invoice or a deployment can say is empty (billing account, resource, Azure's SKU price ids).
    Source: https://focus.finops.org/focus-specification/v1-2/
    """
    out = io.StringIO()
    rows = [_focus_row(line, budget) for line in budget.lines]
    writer = csv.DictWriter(out, fieldnames=list(_FOCUS_COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


_FOCUS_COLUMNS = (
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargeFrequency",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "ConsumedQuantity",
    "ConsumedUnit",
    "ContractedCost",
    "ContractedUnitPrice",
    "EffectiveCost",
    "InvoiceIssuerName",
    "ListCost",
    "ListUnitPrice",
    "PricingCategory",
    "PricingQuantity",
    "PricingUnit",
    "ProviderName",
    "PublisherName",
    "RegionId",
    "RegionName",
    "ResourceType",
    "ServiceCategory",
    "ServiceName",
    "SkuId",
    "SkuPriceId",
    "x_Budget",
    "x_Estimate",
    "x_Formula",
    "x_Group",
    "x_HighCost",
    "x_Key",
    "x_LowCost",
    "x_Note",
    "x_PriceAsOf",
    "x_Source",
    "x_Unpriced",
)


def _focus_row(line: BudgetLine, budget: Budget) -> dict[str, str]:
    start, end = _next_month(budget.generated)
    committed = line.priority in COMMITTED
    quantity = round(line.quantity, _QUANTITY_PLACES)
    # an unpriced service has its meter's name where the unit would be
    unit = focus_unit(line.unit) if line.amount is not None or line.sku else ""
    price = _list_price(line, budget)
    cost = line.amount if price is None else price * quantity
    filled = {
        "BilledCost": _decimal(line.amount),
        "BillingCurrency": budget.currency,
        "BillingPeriodStart": start,
        "BillingPeriodEnd": end,
        "ChargeCategory": "Usage",
        "ChargeDescription": _cell(f"{line.label}: {line.basis}" if line.basis else line.label),
        "ChargeFrequency": "Recurring" if committed else "Usage-Based",
        "ChargePeriodStart": start,
        "ChargePeriodEnd": end,
        # what is reserved is not what is used, which a budget line does not say
        "ConsumedQuantity": "" if committed else _decimal(quantity),
        "ConsumedUnit": "" if committed else unit,
        "ContractedCost": _decimal(cost),
        "ContractedUnitPrice": _decimal(price),
        "EffectiveCost": _decimal(line.amount),
        "InvoiceIssuerName": _PROVIDER,
        "ListCost": _decimal(cost),
        "ListUnitPrice": _decimal(price),
        "PricingCategory": _pricing_category(line.priority),
        "PricingQuantity": _decimal(quantity),
        "PricingUnit": unit,
        "ProviderName": _PROVIDER,
        "PublisherName": _PROVIDER,
        "RegionId": _cell(line.region),
        "RegionName": _cell(line.region),
        "ServiceCategory": _SERVICE_CATEGORIES.get(line.service, _GROUP_CATEGORIES[line.group]),
        "ServiceName": _cell(line.service),
        "SkuId": _cell(line.sku),
        "x_Budget": _cell(budget.name),
        "x_Estimate": str(line.estimate).lower(),
        "x_Formula": _cell(line.formula),
        "x_Group": line.group,
        "x_HighCost": _decimal(line.high),
        "x_Key": _cell(line.key),
        "x_LowCost": _decimal(line.low),
        "x_Note": _cell(line.note),
        "x_PriceAsOf": str(line.as_of) if line.as_of else "",
        "x_Source": _cell(line.source),
        "x_Unpriced": str(line.amount is None).lower(),
    }
    return {column: filled.get(column, "") for column in _FOCUS_COLUMNS}


def _next_month(day: date) -> tuple[str, str]:
    """The calendar month after a day, ISO 8601 in UTC, its end exclusive."""
    months = [day.year * 12 + day.month + i for i in (0, 1)]
    start, end = (f"{month // 12:04}-{month % 12 + 1:02}-01T00:00:00Z" for month in months)
    return start, end


def _list_price(line: BudgetLine, budget: Budget) -> Decimal | None:
    """The price of a unit without a commitment's discount, in the budget's currency; None where it is not known."""
    if line.amount is None:
        return None
    price = line.unit_price
    if line.priority in COMMITTED:
        ways = (way for c in budget.commitments if c.sku == line.sku and line.region == budget.region for way in c.ways)
        rate = budget.per_usd or Decimal(1)
        price = next((way.usd_per_hour * rate for way in ways if way.priority == "on-demand"), None)
    return None if price is None else round(price, _PRICE_PLACES)


def _pricing_category(priority: Priority | None) -> str:
    if priority in COMMITTED:
        return "Committed"
    return "Dynamic" if priority == "spot" else "Standard"


def focus_unit(unit: str) -> str:
    """A unit of the price book as FOCUS writes units: `hour` -> Hours, `GB-month` -> GB-Months, `10,000 x` -> 10000 Xs.

    Source: FOCUS 1.2, attribute UnitFormat.
    """
    match = re.fullmatch(r"([0-9][0-9,]*) (.+)", unit)
    count, name = (match[1].replace(",", "") + " ", match[2]) if match else ("", unit)
    parts = [part if any(letter.isupper() for letter in part) else part.capitalize() for part in name.split("-")]
    if parts[-1] != "GB" and not parts[-1].endswith("s"):
        parts[-1] += "s"
    return count + "-".join(parts)


def _decimal(value: Decimal | None) -> str:
    """Without exponent, separators or zeros at the end, as FOCUS asks; empty for what is not known."""
    if value is None:
        return ""
    text = f"{value:f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) or "0"


def _cell(text: str) -> str:
    """Text on one line that a spreadsheet does not take for a formula."""
    plain = " ".join(text.split())
    return f"'{plain}" if plain.startswith(("=", "+", "-", "@")) else plain
