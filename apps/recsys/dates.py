"""One way of writing dates and times that are ids, whatever they come as."""

from __future__ import annotations

import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

DAY, TIME = "YYYY-MM-DD", "YYYY-MM-DDTHH:MM:SS[.ffffff]"
"""Forms: of a column whose times are all midnight, and of any other; in UTC, a fraction without zeros at its end."""
ISO = r"^\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d([.,]\d{1,9})?)?( ?(Z|[+-]\d\d(:?\d\d)?))?)?$"
"""Text that is taken for a date: RFC 3339, its time in part or whole left out. Digits alone could be numbers."""
MIDNIGHT = "T00:00:00"


def is_date(kind: pa.DataType) -> bool:
    """Whether a column of this type holds dates or times with a date."""
    return pa.types.is_timestamp(kind) or pa.types.is_date(kind)


def write_dates(values: pa.Array) -> pa.Array:
    """Dates and times as text in the form TIME; those with a time zone in UTC, those without as they are."""
    text = values.cast(pa.timestamp("us"), safe=False).cast(pa.string())
    return pc.replace_substring(pc.replace_substring_regex(text, r"\.?0*$", ""), " ", "T")


def write_date(value: Any) -> str | None:
    """A date or time, of Python, NumPy, pandas or as ISO text, in the form TIME; None: it is none."""
    text = str(value).strip()
    if not pc.match_substring_regex(pa.scalar(text), ISO).as_py():
        return None
    return _parsed(text)


def _parsed(text: str) -> str | None:
    try:
        moment = datetime.datetime.fromisoformat(text.replace(" Z", "Z").replace(" +", "+").replace(" -", "-"))
        if moment.tzinfo is not None:
            moment = moment.astimezone(datetime.UTC).replace(tzinfo=None)
    except (ValueError, OverflowError):  # the 30th of February, or before the first year in UTC
        return None
    written = moment.isoformat()
    return written.rstrip("0") if "." in written else written


def are_dates(text: pa.Array) -> bool:
    """Whether all of these texts look like dates."""
    return bool(pc.all(pc.match_substring_regex(pc.utf8_trim_whitespace(text), ISO)).as_py())


def canonical(text: pa.Array, form: str) -> pa.Array:
    """ISO text in one form; null where it is no date.

    Args:
        text: without nulls.
        form: DAY or TIME; a time other than midnight is written in full in both.
    """
    trimmed = pc.utf8_trim_whitespace(text)
    looks = pc.match_substring_regex(trimmed, ISO).to_pylist()
    found = [_parsed(one) if like else None for one, like in zip(trimmed.to_pylist(), looks, strict=True)]
    if form == DAY:
        found = [one and one.removesuffix(MIDNIGHT) for one in found]
    return pa.array(found, pa.string())


def form_of(text: pa.Array) -> str | None:
    """The form that fits all of these texts; None: they are not all dates."""
    if not are_dates(text):
        return None
    written = canonical(text, TIME)
    if written.null_count:
        return None
    return DAY if pc.all(pc.ends_with(written, MIDNIGHT)).as_py() else TIME
