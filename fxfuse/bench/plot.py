"""Rows as a plot: a panel for each shape, time against T, both logarithmic; needs matplotlib."""

from pathlib import Path

from fxfuse.bench.rows import Results, Row


def write(found: Results, path: Path) -> None:
    """One line for each opponent, and the time of a copy of as many bytes."""
    from matplotlib.figure import Figure

    shapes: dict[str, list[Row]] = {}
    for row in found.rows:
        shapes.setdefault(f"{row.recipe}: {row.shape}", []).append(row)
    columns = min(3, max(1, len(shapes)))
    lines = -(-len(shapes) // columns) or 1
    figure = Figure(figsize=(5 * columns, 4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for panel, (name, rows) in zip(panels, shapes.items(), strict=False):
        rows = sorted(rows, key=lambda row: row.tokens)
        for opponent in dict.fromkeys(o for row in rows for o in row.figures):
            points = [(row.tokens, us) for row in rows if (us := row.us(opponent)) is not None]
            if points:
                bold = 2.5 if opponent == "fxfuse" else 1.2
                panel.plot(*zip(*points, strict=True), marker="o", label=opponent, linewidth=bold)
        limit = [(row.tokens, row.moved_bytes / found.copy_bytes_per_us) for row in rows]
        panel.plot(*zip(*limit, strict=True), "k--", linewidth=1, label="copy limit")
        panel.set(title=name, xlabel="T", ylabel="µs a call", xscale="log", yscale="log")
        panel.grid(True, which="major", alpha=0.3)
        panel.legend(fontsize="small")
    for panel in list(figure.axes)[len(shapes) :]:
        panel.set_axis_off()
    figure.suptitle(f"{found.device}, torch {found.versions.get('torch', '')}")
    figure.savefig(path, dpi=120)
