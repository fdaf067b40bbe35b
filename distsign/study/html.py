"""One HTML file with everything in it: tables, pictures, and what repeats the study. It opens without a network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from string import Template

from distsign.study.formats import FRONT, TIMES_ON_LINKS, table_of
from distsign.study.plan import Study
from distsign.study.summary import Summary

__all__ = ["render"]

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; }
tr.front td { background: #f1f7ee; }
.note { background: #fff4d6; border-left: 4px solid #c98a1b; padding: .4rem .8rem; margin: .5rem 0; }
.failed { background: #fdebec; border-left-color: #d1495b; }
img { max-width: 100%; display: block; margin: 1rem 0; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 13px; }
.small { color: #666; font-size: 13px; }
</style>
</head>
<body>
<h1>$title</h1>
$about
$notes
$groups
<h2>How to read this</h2>
<p>Means over seeds, ± half the width of the 95 % confidence interval (Student's t). Bytes are those that a rank sent
and received in the whole run, mean over the ranks. Rows marked $front are the Pareto front: no other row is as good
for as few bytes. $times</p>
<h2>What repeats it</h2>
<p class="small">$provenance</p>
<pre>distsign study $file</pre>
<pre>$study</pre>
</body>
</html>
""")


def render(study: Study, summary: Summary, pictures: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """Return the report.

    Args:
        study: with its text.
        summary: its rows.
        pictures: of each task and setting: what is drawn, and the SVG.
    """
    provenance = [
        f"Code: {', '.join(summary.versions) or 'none'}.",
        f"Machine: {'; '.join(summary.machines) or 'none'}.",
    ]
    provenance.append(f"{summary.num_cells - summary.num_missing - len(summary.failed)} of {summary.num_cells} cells.")
    return _PAGE.substitute(
        title=escape(study.name),
        about=f"<p>{escape(study.about)}</p>" if study.about else "",
        notes="\n".join(_notes(summary)),
        groups="\n".join(_group(study, name, summary, pictures.get(name, ())) for name in summary.groups()),
        front=FRONT,
        times=TIMES_ON_LINKS,
        provenance=escape(" ".join(provenance)),
        file=escape(study.path.name),
        study=escape(study.text),
    )


def _notes(summary: Summary) -> list[str]:
    notes = [f'<p class="note">{escape(note)}</p>' for note in summary.notes]
    if summary.num_missing:
        notes.append(f'<p class="note">{summary.num_missing} of {summary.num_cells} cells have not been run yet.</p>')
    for cell, error in summary.failed:
        notes.append(f'<div class="note failed">failed: {escape(cell.label)}<pre>{escape(error)}</pre></div>')
    return notes


def _group(study: Study, name: str, summary: Summary, pictures: Sequence[tuple[str, str]]) -> str:
    rows = summary.groups()[name]
    size = "" if rows[0].num_parameters is None else f"{rows[0].num_parameters:,} parameters, "
    head, *lines = table_of(study, rows)
    cells = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for row, line in zip(rows, lines, strict=True):
        kind = ' class="front"' if row.is_on_front else ""
        cells.append(f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>")
    return "\n".join(
        [
            f"<h2>{escape(name)}</h2>",
            f'<p class="small">{size}{rows[0].num_steps:,} steps</p>',
            '<div class="table"><table>',
            *cells,
            "</table></div>",
            *(_image(what, svg) for what, svg in pictures),
        ]
    )


def _image(what: str, svg: str) -> str:
    # As a picture of its own, since the parts of several SVGs in one page would share their names.
    data = base64.b64encode(svg.encode()).decode()
    return f'<img alt="{escape(what)}" src="data:image/svg+xml;base64,{data}">'
