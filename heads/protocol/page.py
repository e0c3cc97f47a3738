"""A protocol as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template

from heads.identity_images import MEAN
from heads.page import PAGE
from heads.protocol import tables
from heads.protocol.design import ALL
from heads.protocol.drawings import (
    Bar,
    Dot,
    intervals_chart,
    legend,
    pareto_chart,
    plane_chart,
    shots_chart,
)
from heads.protocol.findings import (
    Findings,
    distance_correlation,
    gains_by_distance,
    statements,
)
from heads.protocol.pareto import Point, frontier
from heads.protocol.plan import MAIN, TOKEN
from heads.protocol.results import DECODER, pareto_points


@dataclass(frozen=True, kw_only=True, slots=True)
class PosePicture:
    """One test instance, as several ways to adapt see it."""

    caption: str
    panels: tuple[tuple[str, bytes], ...]  # name and JPEG


def page_html(
    findings: Findings, *, run_id: str, day: str, command: str, pictures: Sequence[PosePicture] = ()
) -> str:
    """Put the page together.

    Args:
        findings: What was found.
        run_id: Of the protocol.
        day: When it was begun, in words.
        command: What makes such a protocol.
        pictures: Instances, drawn.
    """
    parts = [
        _said(findings),
        _pareto(findings),
        _ways(findings),
        _identities(findings),
        _variants(findings),
        _gallery(pictures),
        _heads(findings),
        _provenance(findings, run_id, command),
    ]
    template = Template(files("heads").joinpath(PAGE).read_text(encoding="utf-8"))
    names = findings.identities
    few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return template.substitute(
        title=escape(f"{run_id}: identities held out"),
        over=escape(f"protocol identity · {day}"),
        heading=escape(f"Adapting to {few}"),
        lead=escape(_lead(findings)),
        score=_score(findings),
        facts=_facts(findings),
        sections="\n".join(part for part in parts if part),
    )


def _lead(findings: Findings) -> str:
    about = findings.about
    named = ", ".join(about.get("taps", ()))
    taps = f" ({named})" if named else ""
    backbone = (about.get("backbone") or {}).get("name", "a backbone")
    return (
        f"Stored features of {backbone}{taps}, which stay as they are. Heads learned from other "
        f"identities; a support of some images of each held-out one changes a token, a part of the "
        f"head or all of it; a test half of its images, always the same, measures what that gives."
    )


def _score(findings: Findings) -> str:
    found = findings.summary(MAIN, TOKEN, MEAN, findings.headline)
    if found is None:
        return ""
    text = f"{found.n_better} of {len(found.identities)}"
    return (
        '<div class="score"><span>better with the token alone</span>'
        f"<b>{text}</b><span>{escape(str(findings.headline))} images; "
        "95 % interval above zero</span></div>"
    )


def _facts(findings: Findings) -> str:
    plan = findings.plan
    token, decoder = (
        findings.summary(MAIN, mode, MEAN, findings.headline) for mode in (TOKEN, DECODER)
    )
    found = {
        "Numbers of a token": "-" if token is None else f"{token.parameters:,}",
        "Numbers of the decoder": "-" if decoder is None else f"{decoder.parameters:,}",
        "Seeds": str(plan.n_seeds),
        "Images learned from": ", ".join(map(str, plan.shots)),
        "Steps": str(plan.steps),
        "Learning rates tried": str(len(plan.lr_factors)),
    }
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in found.items()
    )


def _said(findings: Findings) -> str:
    said = "".join(f"<li>{escape(text)}</li>" for text in statements(findings))
    return f'<h2>What was found</h2><ul class="said">{said}</ul>'


def _pareto(findings: Findings) -> str:
    charts = []
    most = [ALL] if ALL in findings.plan.shots and findings.headline != ALL else []
    for shots in (findings.headline, *most):
        points = pareto_points(findings.summaries, shots)
        if len(points) < 2:
            continue
        chart = pareto_chart(
            [_dot(point) for point in points],
            [_dot(point) for point in frontier(points)],
            title=f"RMSE over trained parameters, {shots} images",
            y_label="RMSE ↓",
        )
        charts.append(f"<div><h3>{escape(str(shots))} images</h3>{chart}</div>")
    if not charts:
        return ""
    return _section("Parameters against error", charts, _PARETO_NOTE) + tables.pareto_table(
        findings
    )


_PARETO_NOTE = (
    "RMSE in shares of the crop, averaged over identities and seeds. The line joins what nothing "
    "beats in both. A token that is saved as int8 takes a quarter of the bytes."
)


def _dot(point: Point) -> Dot:
    return Dot(name=point.name, x=point.parameters, y=point.rmse)


def _ways(findings: Findings) -> str:
    places = list(findings.plan.shots)
    modes = list(dict.fromkeys((TOKEN, *findings.plan.modes)))
    charts = []
    for title, value in (("RMSE ↓", "rmse"), ("PCK@0.05 ↑", "pck")):
        series = {}
        for mode in modes:
            found = [
                findings.summary(MAIN, mode if shots != 0 else TOKEN, MEAN, shots)
                for shots in places
            ]
            series[mode] = [
                math.nan if s is None else s.rmse if value == "rmse" else s.pck["pck@0.05"]
                for s in found
            ]
        chart = shots_chart(series, [str(s) for s in places], title=title, y_label=title)
        charts.append(f"<div>{chart}{legend(modes)}</div>")
    return _section("Ways to adapt", charts, "") + tables.ways_table(findings) + _WAYS_NOTE


_WAYS_NOTE = (
    '<p class="note">Averages over the identities that have so many images. Reduction: of the RMSE '
    "of the mean token, with which a head that learns with a margin does worse on purpose. Better "
    "/ worse: identities whose 95 % interval of that reduction lies above / below zero. 0.05: PCK "
    "within 0.05 of the crop's diagonal, of its side (u), of the longer side of the animal's box. "
    "Ratios: over fine-tuning the decoder on the same images; ties: an RMSE at most 15 % above it. "
    "Jittered: the test half in crops around worse boxes, distances in shares of these crops.</p>"
)


def _identities(findings: Findings) -> str:
    charts = [each for each in (_intervals(findings), _distance(findings)) if each]
    if not charts:
        return ""
    title = f"Token only, {findings.headline} images, identity by identity"
    notes = "".join(f"<li>{escape(note)}</li>" for note in findings.notes)
    return (
        _section(title, charts, "")
        + tables.reductions_table(findings)
        + _IDENTITIES_NOTE
        + tables.decoder_table(findings)
        + f'<details><summary>How the intervals were made</summary><ul class="note">{notes}</ul>'
        "</details>"
    )


_IDENTITIES_NOTE = (
    '<p class="note">Reduction: of the RMSE over all keypoints, averaged over seeds; of an '
    "instance: of the RMSE of each instance alone, averaged. Part of its gain: what the token "
    "takes off the RMSE over what fine-tuning takes off; without bounds where fine-tuning may gain "
    "nothing. Cosine: of mean L2-normalised features of identities.</p>"
)


def _intervals(findings: Findings) -> str:
    bars = []
    for identity in findings.identities:
        line = findings.line(identity, TOKEN, findings.headline)
        if line is not None and line.against_base is not None:
            found = line.against_base.reduction
            bars.append(Bar(name=identity, value=found.value, low=found.low, high=found.high))
    if not bars:
        return ""
    chart = intervals_chart(
        sorted(bars, key=lambda bar: -bar.value),
        title="RMSE reduction of each identity",
        x_label="RMSE of the mean token less that of the adapted one",
    )
    return f"<div><h3>RMSE reduction</h3>{chart}</div>"


def _distance(findings: Findings) -> str:
    pairs = gains_by_distance(findings)
    if len(pairs) < 2:
        return ""
    dots = []
    for distance, line in pairs:
        assert line.against_base is not None
        gain = line.against_base.relative
        low, high = (None if each is None else 100 * each for each in (gain.low, gain.high))
        dots.append(
            Dot(name=line.identity, x=distance.distance, y=100 * gain.value, low=low, high=high)
        )
    chart = plane_chart(
        dots,
        title="Gain over distance",
        x_label="1 - largest cosine to a training identity",
        y_label="RMSE reduction, %",
    )
    rho = distance_correlation(findings)
    text = "" if math.isnan(rho) else f" (Spearman's correlation {rho:.2f})"
    return f"<div><h3>Gain against distance{text}</h3>{chart}</div>"


def _variants(findings: Findings) -> str:
    parts = ""
    if findings.plan.variants:
        parts += f"<h2>Other heads</h2>{tables.variants_table(findings)}"
    if len(dict.fromkeys((MEAN, *findings.plan.inits))) > 1:
        parts += f"<h2>Where the token begins</h2>{tables.inits_table(findings)}"
        parts += '<p class="note">RMSE, averaged over identities and seeds.</p>'
    return parts


def _gallery(pictures: Sequence[PosePicture]) -> str:
    shown = []
    for one in pictures:
        panels = "".join(
            f'<figure><img alt="{escape(name)}" src="data:image/jpeg;base64,'
            f'{base64.b64encode(data).decode()}"><figcaption>{escape(name)}</figcaption></figure>'
            for name, data in one.panels
        )
        shown.append(f'<p class="note">{escape(one.caption)}</p><div class="strip">{panels}</div>')
    return f"<h2>Poses</h2>{''.join(shown)}" if shown else ""


def _heads(findings: Findings) -> str:
    splits = sorted({head.split for head in findings.heads if head.split})
    where = f" on their {' and '.join(splits)} images" if splits else ""
    return (
        f"<h2>Trained heads</h2>{tables.heads_table(findings)}"
        f'<p class="note">Metrics of the identities that they learned from{where}, with their own '
        "tokens: within-species accuracy.</p>"
        f"<details><summary>Learning rates and times</summary>{tables.rates_table(findings)}"
        "</details>"
    )


def _provenance(findings: Findings, run_id: str, command: str) -> str:
    left = "".join(f"<li>{escape(text)}</li>" for text in findings.messages)
    about = {
        "protocol": run_id,
        **{name: value for name, value in findings.about.items() if isinstance(value, str)},
    }
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in about.items()
    )
    more = f'<h3>Left out</h3><ul class="note">{left}</ul>' if left else ""
    return (
        f'<h2>Provenance</h2><pre>{escape(command)}</pre><table class="keys">{rows}</table>{more}'
    )


def _section(title: str, charts: Sequence[str], note: str) -> str:
    shown = "".join(charts)
    small = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<h2>{escape(title)}</h2><div class="pair">{shown}</div>{small}'
