"""What a figure is, as a table on the terminal and as JSON."""

import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ("RESULTS", "Figure", "Progress", "short")

RESULTS = Path(__file__).with_name("results")


@dataclasses.dataclass(frozen=True)
class Spread:
    """Some samples of one quantity."""

    samples: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def __str__(self) -> str:
        low, high = (short(bound(self.samples)) for bound in (min, max))
        return f"{short(self.median):>8}  ({low} to {high})"

    def as_json(self) -> dict[str, object]:
        bounds = {"median": self.median, "min": min(self.samples), "max": max(self.samples)}
        return {**{name: _rounded(value) for name, value in bounds.items()}, "runs": len(self.samples)}


@dataclasses.dataclass(frozen=True)
class Row:
    label: str
    spread: Spread


@dataclasses.dataclass(frozen=True)
class Ratio:
    label: str
    spread: Spread
    target: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.spread.median >= self.target if self.at_least else self.spread.median <= self.target


@dataclasses.dataclass
class Figure:
    """What one benchmark found. All rows have the same unit, unless their label ends with another one."""

    name: str
    title: str
    unit: str
    note: str = ""
    rows: list[Row] = dataclasses.field(default_factory=list)
    ratios: list[Ratio] = dataclasses.field(default_factory=list)

    def add(self, label: str, samples: Sequence[float]) -> None:
        self.rows.append(Row(label, Spread(list(samples))))

    def add_all(self, by_label: Mapping[str, Sequence[float]], what: str = "") -> None:
        """A row for each; `what` is behind the labels."""
        for label, samples in by_label.items():
            self.add(label + what, samples)

    def compare(
        self,
        label: str,
        samples: Sequence[float],
        reference: Sequence[float],
        target: float,
        *,
        at_least: bool = False,
    ) -> None:
        """A ratio that should be at most `target`, or at least. Run by run: what disturbs one disturbs both."""
        ratios = [sample / other for sample, other in zip(samples, reference, strict=True)]
        self.ratios.append(Ratio(label, Spread(ratios), target, at_least))

    def table(self) -> str:
        width = max(len(each.label) for each in (*self.rows, *self.ratios))
        lines = [f"{self.name}: {self.title}", f"  {self.unit}"]
        lines += [f"    {row.label:<{width}}  {row.spread}" for row in self.rows]
        for ratio in self.ratios:
            target = f"{'at least' if ratio.at_least else 'at most'} {ratio.target:g}"
            met = "" if ratio.met else ", MISSED"
            lines.append(f"    {ratio.label:<{width}}  {ratio.spread}  target: {target}{met}")
        if self.note:
            lines.append(f"    ({self.note})")
        return "\n".join(lines)

    def write(self, description: dict[str, object]) -> None:
        RESULTS.mkdir(exist_ok=True)
        content = {
            "name": self.name,
            "title": self.title,
            "unit": self.unit,
            "rows": [{"label": row.label, **row.spread.as_json()} for row in self.rows],
            "ratios": [
                {
                    "label": ratio.label,
                    **ratio.spread.as_json(),
                    "target": ratio.target,
                    "target_is": "at least" if ratio.at_least else "at most",
                }
                for ratio in self.ratios
            ],
            "note": self.note,
            **description,
        }
        (RESULTS / f"{self.name}.json").write_text(json.dumps(content, indent=2) + "\n")


class Progress:
    """One line on standard error that tells what is being done."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self._terminal:
            sys.stderr.write(f"\r\033[K{text}")
            sys.stderr.flush()

    def clear(self) -> None:
        self("")


def short(value: float) -> str:
    """Three significant digits, in full."""
    return f"{_rounded(value, 3):,.{max(0, 2 - _magnitude(value))}f}"


def _rounded(value: float, digits: int = 4) -> float:
    return round(value, digits - 1 - _magnitude(value))


def _magnitude(value: float) -> int:
    """The exponent of its power of ten."""
    return int(f"{value:e}".partition("e")[2])
