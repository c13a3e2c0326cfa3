"""The report: medians, spread, and ratios to the floors of the same rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.case import HISTORY, Sample, joined

Spread = dict[str, float]
"""`median`, `min` and `max`."""
COMPARED = ("seconds", "_per_s", ".total", "us_per_part", "us_per_record")


def summary(samples: Mapping[str, Sequence[Sample]], against: Mapping[str, str]) -> dict[str, Any]:
    """Sum up samples by side: the spread of each figure, and of each ratio to the side it is held against.

    Ratios are of one round each: both were measured within minutes.
    """
    figures = {
        side: {name: _spread([one[name] for one in rounds if name in one]) for name in _names(rounds)}
        for side, rounds in samples.items()
    }
    ratios = {
        side: {
            name: _spread([one[name] / other[name] for one, other in pairs])
            for name in filter(_comparable, _names(samples[side]))
            if (pairs := [(a, b) for a, b in zip(samples[side], samples[floor], strict=False) if _both(a, b, name)])
        }
        for side, floor in against.items()
        if side in samples and floor in samples
    }
    return {"figures": figures, "ratios": ratios}


def _comparable(name: str) -> bool:
    """Tell whether a ratio says something: of speeds, durations, and of CPU as a whole."""
    return name.endswith(COMPARED)


def _names(rounds: Sequence[Sample]) -> list[str]:
    return list(dict.fromkeys(name for one in rounds for name in one))


def _both(one: Sample, other: Sample, name: str) -> bool:
    return name in one and bool(other.get(name))


def _spread(values: Sequence[float]) -> Spread:
    return {"median": median(values), "min": min(values), "max": max(values)}


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print one case: a row for each figure, a column for each side, ratios beside them."""
    console.print()
    console.print(f"[bold]{result['case']}[/bold]  {result['about']}")
    if result["error"]:
        console.print(f"[red]failed:[/red] {result['error']}", highlight=False, markup=True)
    figures: dict[str, dict[str, Spread]] = result["figures"]
    if not figures:
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("figure: median (min-max)", no_wrap=True)
    for side in figures:
        table.add_column(side, justify="right")
    for side, floor in result["against"].items():
        if side in result["ratios"]:
            table.add_column(f"{side}\n/ {floor}", justify="right")
    group = ""
    names = list(dict.fromkeys(name for spreads in figures.values() for name in spreads))
    groups = list(dict.fromkeys(map(_group, names)))
    for name in sorted(names, key=lambda name: groups.index(_group(name))):
        if _group(name) != group:
            group = _group(name)
            table.add_section()
        cells = [_text(spreads.get(name)) for spreads in figures.values()]
        ratios = [_ratio(found.get(name)) for found in result["ratios"].values()]
        if any(cells):
            table.add_row(name, *cells, *ratios)
    console.print(table)
    loads = result["load_average"]
    loaded = f", load average {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    rounds = max(len(found) for found in result["samples"].values())
    console.print(f"[dim]{rounds} rounds in {result['minutes']} minutes{loaded}[/dim]")
    if result["identity"]["checked"] and result["complete"]:
        console.print(
            f"history checked: {_looked_at(result['samples'])}, no violation; its figures compare with no others"
        )


def _looked_at(samples: Mapping[str, Sequence[Sample]]) -> str:
    """Add up what was checked in all rounds of all sides."""
    counts = joined(one for rounds in samples.values() for one in rounds)
    return ", ".join(f"{n:,} {name.removeprefix(HISTORY)}" for name, n in counts.items() if name.startswith(HISTORY))


def _group(name: str) -> str:
    return name.partition(".")[0]


def _text(spread: Spread | None) -> str:
    if spread is None:
        return ""
    if spread["min"] == spread["max"]:
        return _number(spread["median"])
    return f"{_number(spread['median'])} ({_number(spread['min'])}-{_number(spread['max'])})"


def _ratio(spread: Spread | None) -> str:
    if spread is None:
        return ""
    low, high = spread["min"], spread["max"]
    return f"{spread['median']:.3g}x" + (f" ({low:.3g}-{high:.3g})" if low != high else "")


def _number(value: float) -> str:
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
