"""The tables of a protocol's page, as HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from heads.identity_images import MEAN
from heads.protocol.cells import READINGS
from heads.protocol.findings import Findings
from heads.protocol.pareto import frontier
from heads.protocol.plan import BASELINES, BEST, MAIN, NEAREST, SHARED, TOKEN
from heads.protocol.results import DECODER, Line, Summary, pareto_points
from heads.protocol.statistics import Estimate

_LESS, _MORE = "↓", "↑"


def html_table(titles: Sequence[str], rows: Sequence[Sequence[Any]], *, n_words: int = 1) -> str:
    """Write a table, the first `n_words` columns being words and the others numbers.

    Where the first column changes after it stood in several rows, a line parts them.

    Args:
        titles: Of the columns.
        rows: Cells as text, or as (class, text).
        n_words: Columns that are aligned to the left.
    """
    head = "".join(
        f"<th{_number_class(n >= n_words)}>{escape(title)}</th>" for n, title in enumerate(titles)
    )
    has_parts = len({row[0] for row in rows}) < len(rows)
    body = ""
    for above, row in zip([None, *rows], rows, strict=False):
        mark = ' class="part"' if has_parts and above and above[0] != row[0] else ""
        body += f"<tr{mark}>{''.join(_cell(c, n >= n_words) for n, c in enumerate(row))}</tr>"
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def ways_table(findings: Findings) -> str:
    """Compare all ways to adapt the main variant, averaged over identities."""
    inits = (MEAN, *BASELINES)
    chosen = [
        each for each in findings.summaries if each.way.variant == MAIN and each.way.init in inits
    ]
    titles = (
        "trained", "images", "numbers", f"RMSE {_LESS}", "reduction", "better / worse / of",
        "than nearest",
        *(f"{reading.removeprefix('pck@')} {_MORE}" for reading in READINGS),
        f"OKS-AP {_MORE}", "RMSE ratio", "PCK ratio", "ties",
    )  # fmt: skip
    rows = [_way_row(each) for each in chosen]
    if findings.jitters:
        titles = (*titles, f"jittered: RMSE {_LESS}", f"0.05 {_MORE}")
        rows = [[*row, *_jittered(each)] for row, each in zip(rows, chosen, strict=True)]
    return html_table(titles, rows, n_words=2)


def _jittered(one: Summary) -> list[str]:
    found = one.jittered or {}
    return [number(found.get("rmse"), 4), number(found.get(READINGS[0]))]


def _way_row(one: Summary) -> list[Any]:
    is_base = one.way.shots == 0 and one.way.init == MEAN
    is_alone = one.way.shots == 0 or one.way.mode == DECODER
    count = len(one.identities)
    dash = "-"
    return [
        _BASELINES[one.way.init] if one.way.shots == 0 else one.way.mode,
        str(one.way.shots),
        f"{one.parameters:,}",
        number(one.rmse, 4),
        dash if is_base else percent(one.relative),
        dash if is_base else _counts(one.n_better, one.n_worse, count),
        dash
        if one.way.init == NEAREST
        else _counts(one.n_better_nearest, one.n_worse_nearest, count),
        *(number(one.pck[reading]) for reading in READINGS),
        number(one.oks_ap),
        dash if is_alone else number(one.ratio, 2),
        dash if is_alone else number(one.pck_recovery, 2),
        dash if is_alone else f"{one.n_ties} of {count}",
    ]


_BASELINES = {
    MEAN: "mean token",
    SHARED: "shared token",
    NEAREST: "nearest token",
    BEST: "best trained token",
}


def _counts(n_better: int, n_worse: int, n: int) -> Any:
    style = "good" if n_better > n_worse else "bad" if n_worse > n_better else ""
    return style, f"{n_better} / {n_worse} / {n}"


def pareto_table(findings: Findings) -> str:
    """List what every mode trains and reaches with the headline's images."""
    points = pareto_points(findings.summaries, findings.headline)
    best = frontier(points)
    rows = [
        [
            point.name,
            f"{point.parameters:,}",
            f"{4 * point.parameters:,}",
            number(point.rmse, 4),
            ("good", "yes") if point in best else "no",
        ]
        for point in sorted(points, key=lambda each: (each.parameters, each.rmse))
    ]
    titles = ("what is trained", "numbers", "bytes as float32", "RMSE", "on the frontier")
    return html_table(titles, rows)


def reductions_table(findings: Findings) -> str:
    """Tell of every identity what the token takes off its error, with the headline's images."""
    titles = (
        "identity", "RMSE, mean", "token", "reduction [95 %]", "share, % [95 %]",
        "of an instance [95 %]", "PCK, mean", "token", "gain [95 %]",
    )  # fmt: skip
    rows = [_reduction_row(findings, identity) for identity in findings.identities]
    return html_table(titles, [row for row in rows if row])


def _reduction_row(findings: Findings, identity: str) -> list[Any]:
    line = findings.line(identity, TOKEN, findings.headline)
    if line is None or line.against_base is None or line.pck_gain is None:
        return []
    found = line.against_base
    share = Estimate(
        value=100 * found.relative.value,
        low=None if found.relative.low is None else 100 * found.relative.low,
        high=None if found.relative.high is None else 100 * found.relative.high,
    )
    return [
        identity,
        number(found.base_rmse, 4),
        number(found.rmse, 4),
        estimate(found.reduction, 4),
        estimate(share, 1),
        estimate(found.mean_reduction, 4),
        number(_pck(findings.line(identity, TOKEN, 0))),
        number(_pck(line)),
        estimate(line.pck_gain, 3),
    ]


def decoder_table(findings: Findings) -> str:
    """Compare the token with fine-tuning, identity by identity, beside how far each one lies."""
    titles = (
        "identity", "nearest in training", "cosine", "1 - cosine", "decoder RMSE",
        "RMSE: token / decoder [95 %]", "tie", "decoder PCK@0.05", "PCK: token / decoder",
        "part of its gain [95 %]",
    )  # fmt: skip
    rows = [_decoder_row(findings, identity) for identity in findings.identities]
    return html_table(titles, [row for row in rows if row], n_words=2)


def _decoder_row(findings: Findings, identity: str) -> list[Any]:
    line = findings.line(identity, TOKEN, findings.headline)
    best = findings.line(identity, DECODER, findings.headline)
    near = next((each for each in findings.distances if each.identity == identity), None)
    if line is None or best is None or line.against_decoder is None:
        return []
    is_tie = line.against_decoder.is_tie
    return [
        identity,
        "-" if near is None else near.nearest,
        number(None if near is None else near.cosine),
        number(None if near is None else near.distance),
        number(best.rmse, 4),
        estimate(line.against_decoder.ratio, 2)[1],
        ("good", "yes") if is_tie else "no",
        number(_pck(best)),
        number(line.pck_recovery, 2),
        "-" if line.recovery is None else estimate(line.recovery, 2)[1],
    ]


def _pck(line: Line | None) -> float | None:
    return None if line is None or line.pck is None else line.pck[READINGS[0]]


def inits_table(findings: Findings) -> str:
    """Compare where the token begins, for every variant."""
    shots = list(findings.plan.shots)
    rows = []
    for variant in findings.plan.all_variants:
        for init in dict.fromkeys((MEAN, *findings.plan.inits)):
            found = [findings.summary(variant, TOKEN, init, each) for each in shots]
            rows.append([variant, init, *(number(s.rmse if s else None, 4) for s in found)])
    titles = ("head", "token begins", *(f"{each} images" for each in shots))
    return html_table(titles, rows, n_words=2)


def variants_table(findings: Findings) -> str:
    """Compare the heads: what the token moves, and what adapting it gains."""
    rows = []
    for variant, options in findings.plan.all_variants.items():
        heads = [head for head in findings.heads if head.variant == variant]
        stds = [head.token_std for head in heads if head.token_std is not None]
        base = findings.summary(variant, TOKEN, MEAN, 0)
        found = findings.summary(variant, TOKEN, MEAN, findings.headline)
        rows.append([
            variant,
            ", ".join(f"{name}={value}" for name, value in options.items()) or "as asked for",
            number(sum(stds) / len(stds) if stds else None, 5),
            number(base.rmse if base else None, 4),
            number(found.rmse if found else None, 4),
            percent(found.relative) if found else "-",
            _counts(found.n_better, found.n_worse, len(found.identities)) if found else "-",
        ])  # fmt: skip
    titles = (
        "head", "options", "std over random tokens", "mean token RMSE", "token RMSE", "reduction",
        "better / worse / of",
    )  # fmt: skip
    return html_table(titles, rows, n_words=2)


def heads_table(findings: Findings) -> str:
    """List the trained heads with what they reach on the identities that they learned from."""
    names = ("rmse", *READINGS, "oks_ap")
    rows = [
        [
            head.run_id,
            head.variant,
            ", ".join(findings.plan.folds[head.fold]),
            head.validation,
            str(len(head.training)),
            f"{head.parameters:,}",
            *(number(head.metrics.get(name)) for name in names),
        ]
        for head in findings.heads
    ]
    titles = (
        "run",
        "head",
        "held out",
        "rates chosen on",
        "training identities",
        "parameters",
        *names,
    )
    return html_table(titles, rows, n_words=4)


def rates_table(findings: Findings) -> str:
    """List the learning rates that were chosen, and how long adapting took."""
    rows = []
    for way in dict.fromkeys(line.way for line in findings.lines if line.way.is_trained):
        own = [line for line in findings.lines if line.way == way and line.error is None]
        if own:
            rates = sorted({line.lr for line in own if line.lr is not None})
            seconds = sum(line.seconds for line in own) / sum(line.n_seeds for line in own)
            words = [way.variant, way.mode, way.init, str(way.shots)]
            rows.append([*words, ", ".join(f"{rate:g}" for rate in rates), number(seconds, 2)])
    titles = ("head", "what is trained", "begins", "images", "learning rate", "seconds each")
    return html_table(titles, rows, n_words=4)


def estimate(one: Estimate, digits: int) -> tuple[str, str]:
    """Write a number with its bounds, and the class that its sign gives it."""
    style = {1: "good", -1: "bad", 0: ""}[one.sign]
    if one.low is None or one.high is None:
        return style, number(one.value, digits)
    bounds = f"{number(one.low, digits)}, {number(one.high, digits)}"
    return style, f"{number(one.value, digits)} [{bounds}]"


def number(value: float | None, digits: int = 3) -> str:
    """Write a number, or a dash."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def percent(share: float) -> str:
    """Write a share in percent, or a dash."""
    return "-" if not math.isfinite(share) else f"{100 * share:.1f} %"


def _number_class(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _cell(cell: Any, is_number: bool) -> str:
    style, text = cell if isinstance(cell, tuple) else ("", cell)
    classes = " ".join(filter(None, ["number" if is_number else "", style]))
    mark = f' class="{classes}"' if classes else ""
    return f"<td{mark}>{escape(str(text))}</td>"
