"""The rows that show the images of plain rows in another view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from featstore.commands import extract_command
from featstore.errors import NotFoundError
from featstore.views import PLAIN
from heads.selection import Pair, rows_with_taps

if TYPE_CHECKING:
    from featstore.api import FeatureSet

_IN_VIEW = """
select distinct one."row" as "row", other."row" as shown
from samples as one
inner join samples as other using (feature_set, image_key, crop)
where feature_set = $feature_set and one."view" = $plain and other."view" = $view
order by all
"""


def rows_in_view(
    features: FeatureSet, pairs: Sequence[Pair], taps: Sequence[str], view: str, *, instead: str
) -> dict[int, int]:
    """Find the rows that show some plain rows in another view.

    Args:
        features: Feature set.
        pairs: Of plain rows.
        taps: That a row must have, all of them.
        view: Name of the view.
        instead: What to do where nobody can add views: a sentence.

    Returns:
        Row of the view by plain row.

    Raises:
        NotFoundError: One of them has none; the message says how to add them.
    """
    chosen = {"feature_set": features.key, "plain": PLAIN, "view": view}
    has_taps = rows_with_taps(features.store, features, taps)
    shown = {
        line["row"]: line["shown"]
        for line in features.store.sql(_IN_VIEW, chosen).to_pylist()
        if line["shown"] in has_taps
    }
    rows = [pair.row for pair in pairs]  # of a run, perhaps, from before they were moved
    current = features.current_rows(rows).tolist()
    found = {row: shown[now] for row, now in zip(rows, current, strict=True) if now in shown}
    lacking = [pair.path for pair in pairs if pair.row not in found]
    if lacking:
        hint = instead
        if not features.is_foreign:
            command = extract_command(features.folder, taps=taps, views=[view])
            hint = f"Add them: `{command}`."
        raise NotFoundError(
            f"{len(lacking)} of {len(pairs)} images have no stored view {view} with "
            f"{', '.join(taps)}, such as {lacking[0]}. {hint}"
        )
    return found


def in_view(
    features: FeatureSet, pairs: Sequence[Pair], taps: Sequence[str], view: str
) -> tuple[Pair, ...]:
    """Give the pairs of plain rows as another view shows them, in the order of its rows.

    Raises:
        NotFoundError: One of them is not stored in this view; the message says how to add it.
    """
    rows = rows_in_view(features, pairs, taps, view, instead="Measure without --view.")
    shown = [replace(pair, row=rows[pair.row], view=view) for pair in pairs]
    return tuple(sorted(shown, key=lambda pair: pair.key))
