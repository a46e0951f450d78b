"""`bench/results/chart.svg`: a panel of bars for each figure that has results."""

import json
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

from bench.report import RESULTS, short

__all__ = ("write",)

COLUMNS = 3
PANEL_WIDTH, PANEL_HEIGHT, MARGIN = 300, 106, 20
LABEL_WIDTH, VALUE_WIDTH, BAR_HEIGHT, BAR_STEP = 84, 52, 12, 19
BARS_TOP = 46  # below title and unit

# The card has a background of its own, so that it can be read on any page.
STYLE = """
    text { font: 11px system-ui, sans-serif; fill: #57606a }
    .card { fill: #ffffff; stroke: #d0d7de }
    .title { font-size: 12px; font-weight: 600; fill: #1f2328 }
    .tollerchat { fill: #0969da } .other { fill: #afb8c1 }
    .spread { stroke: #1f2328; stroke-opacity: .55 }
    .value { fill: #1f2328 }
    @media (prefers-color-scheme: dark) {
        text { fill: #9198a1 }
        .card { fill: #0d1117; stroke: #3d444d }
        .title, .value { fill: #f0f6fc }
        .tollerchat { fill: #4493f8 } .other { fill: #59636e }
        .spread { stroke: #f0f6fc }
    }"""


class Panel(NamedTuple):
    figure: str
    title: str
    unit: str
    rows: Sequence[tuple[str, str]]  # label in the results, label in the chart


def _subjects(*others: str, suffix: str = "") -> list[tuple[str, str]]:
    return [(name + suffix, name) for name in (*others, "tollerchat", "obvious")]


PANELS = (
    Panel("fanout", "One sender to 200 clients", "µs of CPU per delivery", _subjects("send(2) loop")),
    Panel("crowd", "64 senders in a room of 500", "µs of CPU per delivery", _subjects("send(2) loop")),
    Panel("stored", "100 senders in 50 rooms", "messages stored a second (more is better)", _subjects()),
    Panel(
        "latency", "50 messages a second to 200", "ms to delivery, 99th percentile", _subjects(suffix=", p99")
    ),
    Panel("lone", "One lone message", "ms from send to ack", _subjects("bare INSERT")),
    Panel("join", "Join with 50 messages of history", "ms of CPU", _subjects()),
    Panel("storm", "5,000 clients reconnect at once", "ms of CPU per client", _subjects()),
    Panel("idle", "10,000 idle connections", "KiB per connection", _subjects()),
    Panel(
        "growth",
        "Larger rooms",
        "µs of CPU per delivery",
        [(f"room of {size}", f"{size} clients") for size in ("100", "1,000", "10,000")],
    ),
)


def write() -> None:
    """Draw what there are results of."""
    cards = [(panel, rows) for panel in PANELS if (rows := _rows(panel))]
    lines = -(-len(cards) // COLUMNS)
    width = COLUMNS * (PANEL_WIDTH + MARGIN) + MARGIN
    height = lines * (PANEL_HEIGHT + MARGIN) + MARGIN
    body = []
    for n, (panel, rows) in enumerate(cards):
        x = MARGIN + n % COLUMNS * (PANEL_WIDTH + MARGIN)
        y = MARGIN + n // COLUMNS * (PANEL_HEIGHT + MARGIN)
        body += [f'<g transform="translate({x} {y})">', *_draw(panel, rows), "</g>"]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "chart.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img">\n'
        f"<title>Benchmarks of tollerchat</title>\n<style>{STYLE}\n</style>\n"
        f'<rect class="card" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="6"/>\n'
        + "\n".join(body)
        + "\n</svg>\n",
        encoding="utf-8",
    )


def _rows(panel: Panel) -> list[tuple[str, dict[str, Any]]]:
    path = RESULTS / f"{panel.figure}.json"
    if not path.exists():
        return []
    found = {row["label"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    return [(shown, found[label]) for label, shown in panel.rows if label in found]


def _draw(panel: Panel, rows: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    yield f'<text class="title" y="14">{escape(panel.title)}</text>'
    yield f'<text y="30">{escape(panel.unit)}</text>'
    room = PANEL_WIDTH - LABEL_WIDTH - VALUE_WIDTH
    scale = room / max(row["max"] for _, row in rows)
    for n, (label, row) in enumerate(rows):
        y = BARS_TOP + n * BAR_STEP
        middle, baseline = y + BAR_HEIGHT / 2, y + BAR_HEIGHT - 2
        low, value, high = (LABEL_WIDTH + row[name] * scale for name in ("min", "median", "max"))
        kind = "other" if label in ("obvious", "send(2) loop", "bare INSERT") else "tollerchat"
        yield f'<text y="{baseline}">{escape(label)}</text>'
        yield (
            f'<rect class="{kind}" x="{LABEL_WIDTH}" y="{y}" width="{max(1, value - LABEL_WIDTH):.1f}" '
            f'height="{BAR_HEIGHT}" rx="2"/>'
        )
        yield f'<path class="spread" d="M{low:.1f} {middle}H{high:.1f}"/>'
        yield f'<text class="value" x="{max(value, high) + 6:.1f}" y="{baseline}">{short(row["median"])}</text>'
