"""Rows as a table on the terminal: by rich where it is installed, else aligned text."""

import importlib.util
from collections.abc import Sequence

from fxfuse.bench.rows import Figure, Results, Row


def text(number: float | None, spec: str = ".2f") -> str:
    return "" if number is None else format(number, spec)


def line(row: Row, copy_speed: float) -> dict[str, str]:
    """The cells of one row by heading."""
    told = row.derived(copy_speed)
    cells = {"shape": row.shape, "T": str(row.tokens), "MB": f"{row.moved_bytes / 1e6:.2f}"}
    cells |= {name: _time(figure) for name, figure in row.figures.items()}
    own = row.figures.get("fxfuse")
    if own and own.us:
        cells["p20-p80"] = f"{own.us.p20:.2f}-{own.us.p80:.2f}"
    cells["copy"] = text(row.copy_us)
    cells["/default"] = text(told["against_default"])
    cells["/best"] = text(told["against_best"])
    cells["% copy"] = text(told["of_copy"] and 100 * told["of_copy"], ".0f")
    marginals = {n: f.marginal.median for n, f in row.figures.items() if f.marginal}
    cells["marginal"] = ", ".join(f"{name} {us:.2f}" for name, us in marginals.items())
    if told["carried_scaled_us"]:
        met = {True: " pass", False: " FAIL", None: ""}[told["carried_met"]]
        cells["SGLang, carried over"] = f"{told['carried_scaled_us']:.2f}{met}"
    cells["note"] = _note(row)
    return cells


def _time(figure: Figure) -> str:
    if figure.wrong:
        return "wrong" if figure.error is not None else "failed"
    return text(figure.us.median) if figure.us else ""


def _note(row: Row) -> str:
    notes = [f"{name}: {figure.wrong}" for name, figure in row.figures.items() if figure.wrong]
    fusion = row.fusion
    if fusion:
        by = ", ".join(fusion.providers) or "nobody"
        notes += [f"by {by}" if fusion.whole else f"NOT WHOLE: {fusion.stages} by {by}"]
    return "; ".join(notes)


def table(lines: Sequence[dict[str, str]], title: str) -> None:
    """Print lines that share headings; a heading that is empty everywhere is left out."""
    headings = dict.fromkeys(h for cells in lines for h in cells)
    shown = [h for h in headings if any(cells.get(h) for cells in lines)]
    rows = [[cells.get(h, "") for h in shown] for cells in lines]
    if importlib.util.find_spec("rich") is not None:
        _rich(shown, rows, title)
        return
    widths = [max(len(r[i]) for r in [shown, *rows]) for i in range(len(shown))]
    print(title)
    for cells in [shown, *rows]:
        print("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip())


def _rich(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for heading in headings:
        words = heading in ("shape", "note")
        made.add_column(heading, justify="left" if words else "right", overflow="fold")
    for cells in rows:
        made.add_row(*cells)
    console = Console()
    # A log has no width: nothing is folded there.
    wide = console if console.is_terminal else Console(width=240)
    wide.print(made, markup=False)


def results(found: Results) -> None:
    """All rows, then errors and geometric means."""
    speed = found.copy_bytes_per_us
    table([line(row, speed) for row in found.rows], f"{head(found)}; µs a call, medians")
    errors = [
        {"shape": r.shape, "T": str(r.tokens), "eager": f"{r.eager_error:.2e}"}
        | {name: text(f.error, ".2e") for name, f in r.figures.items()}
        for r in found.rows
    ]
    table(errors, "relative error against float64")
    for name, mean in found.means().items():
        print(f"geometric mean {name.replace('_', ' ')}: {mean:.2f}")


def head(found: Results) -> str:
    """Where the figures come from, in a line."""
    told = [found.device, *(f"{name} {version}" for name, version in found.versions.items())]
    told.append(f"copy {found.copy_bytes_per_us / 1e6:.3g} TB/s")
    if found.smallest_kernel_us is not None:
        told.append(f"smallest kernel {found.smallest_kernel_us:.2f} µs")
    return ", ".join(told)
