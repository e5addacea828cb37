"""`planner scale` as people meet it: the terminal at two widths, JSON, the page, the pictures, exit codes."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from functools import cache
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import golden
import pytest
from loads import planned, table

from planner.pages.speed import page_of, scale_html, scale_markdown, scale_svg
from planner.pages.svg import WIDE, text_width
from planner.scale import ScaleAnswer, read_measured
from planner.scale.replica import milliseconds, rate_figure

RUNS = """sku,tp,rate,ttft_ms,tpot_ms,output_tok_s,weights
NC24ads_A100_v4,1,2,100,20,400,bf16
NC24ads_A100_v4,1,6,150,25,1200,bf16
NC24ads_A100_v4,1,10,300,40,2000,bf16
NC40ads_H100_v5,1,2,60,9,400,<b>fp8</b>
NC40ads_H100_v5,1,30,200,24,6000,<b>fp8</b>
"""
SIZES = ["NC8as_T4_v3", "NV36ads_A10_v5", "NC24ads_A100_v4", "NC96ads_A100_v4", "NC40ads_H100_v5", "NC80adis_H100_v5"]
LOAD = ("scale", "--model", "qwen3-8b", "--input", "500", "--output", "200")
ARGV = (*LOAD, "--rps", "20", "--ttft-p95", "800ms", "--tpot-p95", "50ms", "--prices", "2026-11")
MODELLED = (*ARGV, "--sku", "NC24ads_A100_v4", "--sku", "NC40ads_H100_v5")


def measured(folder: Path) -> tuple[str, ...]:
    return (*ARGV, "--measured", table(folder, RUNS))


@cache
def drawn() -> ScaleAnswer:
    return planned(rps=40, drawn=True, sku=SIZES)


@cache
def nothing() -> ScaleAnswer:
    return planned(rps=40, ttft_p95="1ms", sku=["NC24ads_A100_v4"], drawn=True)


# ------------------------------------------------------------------------------------------------------------ terminal


@pytest.mark.parametrize("columns", [80, 160])
@pytest.mark.parametrize("more", [(), ("--explain",), ("--spot", "--region", "any"), ("--spare", "1"), ("--simulate",)])
def test_no_line_is_wider_than_the_terminal_and_no_figure_is_cut(columns: int, more: tuple[str, ...]) -> None:
    outcome = golden.run((*MODELLED, *more), columns)
    assert outcome.exit_code == 0
    lines = outcome.stdout.splitlines()
    assert [line for line in lines if len(line) > columns] == []
    assert "…" not in outcome.stdout
    first = next(line for line in lines if line.lstrip().startswith("NC"))
    assert re.search(r"\d \(\d[\d.,]*( to [\d.,]+)?\)", first)  # a latency with its range, whole
    assert re.search(r"\d+x1 TP1", first)


@pytest.mark.parametrize(
    "limits",
    [
        ("--ttft-p95", "3s", "--tpot-p95", "90ms"),
        ("--latency", "30s"),
        ("--ttft-p95", "3s", "--tpot-p95", "90ms", "--latency", "30s"),
    ],
)
@pytest.mark.parametrize("load", ["30", "3000"])
def test_headings_and_money_are_whole_in_80_columns(load: str, limits: tuple[str, ...]) -> None:
    argv = (*LOAD, "--rps", load, *limits, "--prices", "2026-11", "--sku", "NC40ads_H100_v5", "--sku", "NC64as_T4_v3")
    outcome = golden.run((*argv, "--explain"), 80)
    assert outcome.exit_code == 0
    head, _, body = outcome.stdout.partition("Choices")[2].partition("─")
    assert head.count("p95") == len(limits) / 2
    assert re.search("size +weights +replicas", head)
    assert re.search(r"\$ a *\n.* month *\n", head)
    rows = [line.split() for line in body.splitlines() if re.search(r"x\d TP\d", line)]
    assert ["NC40ads_H100_v5", "fp8,", "fp8", "KV"] in [row[:4] for row in rows]
    assert all(re.fullmatch(r"\d{1,3}(,\d{3})*", row[-1]) for row in rows)
    prices = [int(row[-1].replace(",", "")) for row in rows]
    assert prices == sorted(prices)


def test_the_table_says_what_was_measured(tmp_path: Path) -> None:
    # A100: TTFT is kept everywhere and TPOT too, so 10 a second: 2 machines. H100: 30 a second: 1 machine at 20 a
    # second, 60 + 140 x 18 / 28 = 150 ms and 9 + 15 x 18 / 28 = 18.6 ms
    outcome = golden.run(measured(tmp_path), 80)
    assert outcome.exit_code == 0
    rows = {line.split()[0]: line.split() for line in outcome.stdout.splitlines() if re.search("TP1", line)}
    assert rows["NC40ads_H100_v5"][:5] == ["NC40ads_H100_v5", "<b>fp8</b>", "1x1", "TP1", "150"]
    assert rows["NC40ads_H100_v5"][5] == "19"
    assert rows["NC24ads_A100_v4"][:5] == ["NC24ads_A100_v4", "bf16", "2x1", "TP1", "300"]
    assert rows["NC24ads_A100_v4"][-1] == "5,402"
    assert "by your measurements" in outcome.stdout
    assert "N+1 (--spare 1)" in outcome.stdout


def test_every_figure_is_explained_on_demand(tmp_path: Path) -> None:
    outcome = golden.run((*measured(tmp_path), "--explain"), 160)
    assert "replicas: 20 / 10 requests a second within the limits, up to whole machines of 1 = 2" in outcome.stdout
    assert "$/M out = machines x $ an hour / (requests a second x output tokens x 3600) x 10^6." in outcome.stdout
    assert "on demand: $7.4000 an hour, $5,402.00 a month, $0.5139 a million output tokens" in outcome.stdout


def test_a_size_that_only_its_range_speaks_against_is_hinted_at() -> None:
    # between the expected and the high end of what the cheaper size does alone
    sizes = ["NC24ads_A100_v4", "NC40ads_H100_v5"]
    seen = planned(rps=1, sku=sizes, explain=True, quantization="auto").choices
    first = next(choice for choice in seen if choice.sku.endswith("A100_v4")).performance.tpot_p95_s
    assert first is not None
    limit = f"{1000 * (first.expected + first.high) / 2:.2f}ms"
    argv = (*LOAD, "--rps", "1", "--tpot-p95", limit, "--ttft-p95", "9s", "-q", "auto", "--sku", sizes[0])
    outcome = golden.run((*argv, "--sku", sizes[1], "--prices", "2026-11"), 160)
    assert outcome.exit_code == 0
    assert "Only the high end of its range speaks against NC24ads_A100_v4: --at-expected" in outcome.stdout
    bold = golden.run((*argv, "--sku", sizes[1], "--prices", "2026-11", "--at-expected"), 160)
    assert "--at-expected" not in bold.stdout
    assert "NC24ads_A100_v4" in bold.stdout


def test_nothing_that_keeps_the_limits_is_exit_code_1_with_what_would() -> None:
    outcome = golden.run((*LOAD, "--rps", "5", "--ttft-p95", "1ms", "--sku", "NC24ads_A100_v4"), 80)
    assert outcome.exit_code == 1
    assert "Nearest: NC24ads_A100_v4 (" in outcome.stdout
    assert re.search(r"It would do with --ttft-p95 \d+ms", outcome.stdout)
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize(
    "argv",
    [
        (*LOAD, "--rps", "0", "--ttft-p95", "1s"),
        (*LOAD, "--rps", "5", "--qps", "5", "--ttft-p95", "1s"),
        (*LOAD, "--rps", "5"),
        (*LOAD, "--rps", "5", "--ttft-p95", "1s", "--region", "atlantis"),
        (*LOAD, "--rps", "5", "--ttft-p95", "1s", "--measured", "/nowhere.csv"),
        (*LOAD, "--rps", "5", "--ttft-p95", "1s", "--sku", "NC24ads_A100_v4", "-o", "page.pdf"),
        (*LOAD, "--rps", "5", "--ttft-p95", "1s", "--sku", "NC24ads_A100_v4", "-o", "/dev/null/page.html"),
        (*LOAD, "--rps", "5", "--ttft-p95", "1s", "--daily", "/nowhere.csv"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_sentence(argv: tuple[str, ...]) -> None:
    outcome = golden.run((*argv, "--prices", "2026-11"), 80)
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    said = [line for line in outcome.stderr.splitlines() if "days old" not in line]
    assert len(said) == 1
    assert said[0].startswith("planner: ")


def test_json_is_the_answer_and_nothing_else(tmp_path: Path) -> None:
    outcome = golden.run((*measured(tmp_path), "--json"), 80)
    answer = ScaleAnswer.model_validate_json(outcome.stdout)
    raw = json.loads(outcome.stdout)
    assert raw["schema_version"] == "tonnage.scale/1"
    assert list(raw) == [
        "schema_version", "model", "rate_per_s", "input_tokens", "output_tokens", "context", "slo", "at", "priority",
        "regions", "choices", "cheaper", "rejected", "nearest", "nearest_flags", "machines", "day", "day_source",
        "price_source", "features", "notes",
    ]  # fmt: skip
    assert list(raw["choices"][0]) == [
        "sku", "gpu", "gpus_per_machine", "tensor_parallel_size", "weights", "kv_cache_dtype", "replicas", "machines",
        "spare", "replicas_per_machine", "largest_per_s", "saturation_per_s", "performance", "region", "money", "band",
        "extrapolated", "arguments", "sweep", "one_less",
    ]  # fmt: skip
    assert raw["choices"][0]["money"][0]["usd_per_month"] == str(answer.choices[0].money[0].usd_per_month)


def test_explain_says_what_each_feature_of_the_engine_would_buy() -> None:
    load = ("scale", "--model", "qwen3-8b", "--rps", "5", "--input", "500", "--output", "200", "--tpot-p95", "60ms")
    sizes = ("--sku", "NC24ads_A100_v4", "-q", "16-bit")
    text = golden.run((*load, *sizes, "--explain"), 120).stdout
    assert "What it would buy on NC24ads_A100_v4" in text
    for name in ("prefix caching", "speculative decoding", "LoRA adapters", "fp8 weights", "awq weights"):
        assert name in text
    found = ScaleAnswer.model_validate_json(golden.run((*load, *sizes, "--explain", "--json"), 80).stdout)
    gains = {feature.name: feature for feature in found.features}
    assert gains["speculative decoding"].alone > gains["speculative decoding"].saturated
    assert gains["awq weights"].alone > 1 > gains["awq weights"].saturated
    assert gains["prefix caching"].saturated > 1
    assert ScaleAnswer.model_validate_json(golden.run((*load, *sizes, "--json"), 80).stdout).features == ()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.00412, "4.12 ms"),
        (0.05, "50 ms"),
        (0.0994, "99.4 ms"),
        (0.412, "412 ms"),
        (1.9, "1,900 ms"),
        (12.5, "12.5 s"),
    ],
)
def test_latencies_have_three_figures(seconds: float, words: str) -> None:
    assert milliseconds(seconds) == words


def test_rates_have_no_exponent() -> None:
    assert [rate_figure(rate) for rate in (0.0123, 9.876, 99.9, 1234.5, 50000)] == [
        "0.0123", "9.88", "99.9", "1,234", "50,000",
    ]  # fmt: skip
    assert milliseconds(float("inf")) == "without end"


# ------------------------------------------------------------------------------------------------------ page, pictures


class Label(NamedTuple):
    """A text of a picture: how wide it may be drawn, and where."""

    text: str
    left: float
    right: float
    top: float
    bottom: float


def labels(svg: str) -> list[Label]:
    """The texts of a chart with the boxes that they may fill (svg.text_width is an upper bound)."""
    found = []
    for element in ET.fromstring(svg).iter():
        if element.tag.rpartition("}")[2] != "text":
            continue
        size = {"axis": 12.0, "tag-text": 11.0}.get(element.get("class", ""), 13.0)
        text = element.text or ""
        width, x, y = text_width(text, size), float(element.get("x", 0)), float(element.get("y", 0))
        left = x - {"end": width, "middle": width / 2}.get(element.get("text-anchor", ""), 0)
        found.append(Label(text, left, left + width, y - 0.72 * size, y + 0.1 * size))
    return found


def pictures() -> list[tuple[str, str]]:
    blocks = [b for section in page_of(drawn()).sections for b in section.blocks if b.type == "figure"]
    assert len(blocks) == 2
    return [(f"{i}-{side}", getattr(block, side)) for i, block in enumerate(blocks) for side in ("wide", "narrow")]


def test_no_two_labels_of_a_chart_overlap_and_none_leaves_it() -> None:
    for name, svg in pictures():
        found = labels(svg)
        assert len(found) > 8
        size = re.search(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', svg)
        assert size is not None
        for label in found:
            assert label.left >= -2, (name, label)
            assert label.right <= float(size[1]) + 2, (name, label)
            assert label.top >= 0, (name, label)
            assert label.bottom <= float(size[2]), (name, label)
        for a, b in combinations(found, 2):
            apart = a.right <= b.left or b.right <= a.left or a.bottom <= b.top or b.bottom <= a.top
            assert apart, (name, a, b)


def test_the_front_is_marked_and_each_of_its_machines_named() -> None:
    front = [m for m in drawn().machines if m.pareto]
    wide = dict(pictures())["1-wide"]
    texts = [label.text for label in labels(wide)]
    for number, machine in enumerate(sorted(front, key=lambda m: m.requests_per_s), start=1):
        assert texts.count(str(number)) >= 2  # at the point and in the key
        assert any(text.startswith(machine.sku.removeprefix("Standard_")) for text in texts)


def test_a_picture_stands_alone() -> None:
    text = scale_svg(drawn())
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert float(root.get("width", 0)) >= WIDE
    assert "<style>" in text
    assert not re.search(r"(href|src|url\()", text)
    assert "nothing to draw" in scale_svg(nothing())


class _Tags(HTMLParser):
    """Which tags are open, and that each is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("made", [drawn, nothing])
def test_the_page_is_whole_and_loads_nothing(made: object) -> None:
    assert callable(made)
    text = scale_html(made())
    parser = _Tags()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    assert "script" not in parser.seen
    assert not re.search(r"https?://(?!www\.w3\.org)[^\s]*\.(js|css|png)", text)
    assert "default-src 'none'" in text


def test_words_of_a_file_stay_words(tmp_path: Path) -> None:
    runs = read_measured(table(tmp_path, RUNS), 200)
    made = planned(rps=20, runs=runs, drawn=True)
    assert "<b>fp8</b>" not in scale_html(made)
    assert "&lt;b&gt;fp8&lt;/b&gt;" in scale_html(made)
    assert "&lt;b>fp8&lt;/b>" in scale_markdown(made)
    ET.fromstring(scale_svg(made))


@pytest.mark.parametrize("ending", ["html", "svg", "md", "json"])
def test_files_are_written_whole(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"page.{ending}"
    outcome = golden.run((*measured(tmp_path), "-o", str(path)), 80)
    assert outcome.exit_code == 0
    assert outcome.stdout == ""
    assert f"wrote {path}: 2 choices" in outcome.stderr
    text = path.read_text(encoding="utf-8")
    assert "NC40ads_H100_v5" in text
    if ending == "json":
        assert ScaleAnswer.model_validate_json(text).choices
