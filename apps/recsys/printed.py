"""Lists that were printed into text files: by JSON, Python or NumPy."""

from __future__ import annotations

import ast
import re

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from apps.errors import UserError

SEPARATORS = ("|", ",", ";")
"""What stands between values of lists that are written as text."""
ENOUGH = 20
"""Rows from which on a separator that is nowhere is a mistake."""
LISTED = r"(?s)^\s*(\[[^\[\]]*\]|\([^()]*\)|\[\s*['\"].*['\"]\s*\])\s*$"
"""A list or tuple; its values may hold brackets if they are quoted."""
TOKEN = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|,|[^\s,'"]+|['"]""", re.DOTALL)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
NUMBERS = r"^[+-]?\d+\.?\d*(\s+[+-]?\d+\.?\d*)*$"
BLANK = ("None", "null", "nan", "NaN", "<NA>")
BETWEEN = "\x1f"
"""Between the values that are found: the unit separator of ASCII."""
ELLIPSIS = "..."


def are_printed(text: pa.Array) -> bool:
    """Whether all of these texts are printed lists."""
    return len(text) > 0 and bool(pc.all(pc.match_substring_regex(text, LISTED)).as_py())


def split_lists(text: pa.Array, separator: str, column: pd.Series) -> pa.Array:
    """Lists of text: of the values between separators, or of printed lists.

    Args:
        text: values of the column.
        separator: between values that are not in brackets; in those of printed lists there may be commas too.
        column: where the text is from, for the error.

    Raises:
        UserError: a list with spaces between its values, as NumPy prints it, whose values cannot be told apart; text
            with another separator.
    """
    printed = pc.match_substring_regex(text, LISTED)
    if not pc.any(printed).as_py():
        _expect_separator(text, separator, column)
        return _trimmed(pc.split_pattern(text, separator))
    apart = pc.match_substring(text, separator)
    comma = pc.match_substring(text, ",")
    inside = pc.if_else(printed, pc.utf8_trim(text, "[]() \t\r\n"), text)
    otherwise = pc.and_(pc.or_(comma, pc.match_substring_regex(inside, r"\s")), pc.invert(apart))
    slow = pc.and_(printed, pc.or_(pc.match_substring_regex(text, "['\"]"), otherwise)).fill_null(False)
    numbers = pc.and_(slow, pc.match_substring_regex(inside, NUMBERS)).fill_null(False)
    slow = pc.and_(slow, pc.invert(numbers))
    parts = pc.replace_substring(inside, separator, BETWEEN)
    if pc.any(numbers).as_py():
        whole = pc.replace_substring_regex(inside, r"\.0*(\s|$)", r"\1")  # NumPy prints 1.0 as 1.
        parts = pc.if_else(numbers, pc.replace_substring_regex(whole, r"\s+", BETWEEN), parts)
    if not pc.any(slow).as_py():
        return _trimmed(pc.split_pattern(parts, BETWEEN))
    alone = bool(pc.any(pc.or_(apart, comma)).as_py())  # other rows show what stands between values
    joined = []
    for i in pc.indices_nonzero(slow).to_pylist():
        values = _values(text[i].as_py(), alone)
        if values is None:
            shown = " ".join(text[i].as_py().split())[:60]
            raise UserError(
                f"column {column.name!r}, row {column.index[i]}: {shown!r} is a printed list whose values cannot be "
                "told apart; write Parquet, or text with a separator between values"
            )
        joined.append(BETWEEN.join(values))
    return _trimmed(pc.split_pattern(pc.replace_with_mask(parts, slow, pa.array(joined, parts.type)), BETWEEN))


def _expect_separator(text: pa.Array, separator: str, column: pd.Series) -> None:
    """Raise if the separator is nowhere in the column and another in most of its rows."""
    if len(text) < ENOUGH or pc.any(pc.match_substring(text, separator)).as_py():
        return
    for other in SEPARATORS:
        if other != separator and (pc.sum(pc.match_substring(text, other)).as_py() or 0) > len(text) / 2:
            raise UserError(
                f"column {column.name!r}: no {separator!r} in any row and {other!r} in most; the schema's separator is "
                f"{separator!r}: write values with that, or lists in Parquet, or train with separator: {other!r}"
            )


def _trimmed(lists: pa.Array) -> pa.Array:
    """Without spaces and pairs of quotes around values; empty text where there is nothing."""
    values = pc.utf8_trim(lists.flatten(), " \t\r\n")
    values = pc.replace_substring_regex(values, r"(?s)^'(.*)'$|^\"(.*)\"$", r"\1\2")
    lengths = pc.list_value_length(lists).fill_null(0)
    ends = pc.cumulative_sum(lengths.cast(pa.int32()))
    return pa.ListArray.from_arrays(pa.concat_arrays([pa.array([0], pa.int32()), ends]), values)


def _values(text: str, alone: bool) -> list[str] | None:
    """Values of a printed list; None: they cannot be told apart.

    Args:
        text: with brackets.
        alone: words without quotes or commas are one value.
    """
    tokens = TOKEN.findall(text.strip()[1:-1])
    groups: list[list[str]] = [[]]
    for token in tokens:
        if token == ",":
            groups.append([])
        else:
            groups[-1].append(token)
    if not groups[-1]:  # nothing at all, or a comma at the end
        groups.pop()
    if len(groups) == 1 and "," not in tokens and len(tokens) > 1:  # spaces between values
        if ELLIPSIS in tokens:
            return None
        if all(_is_quoted(token) or token in BLANK for token in tokens) or all(map(_is_number, tokens)):
            groups = [[token] for token in tokens]
        elif not alone:
            return None
    if any(len(group) > 1 and any(map(_is_quoted, group)) for group in groups):
        return None
    return [_value(group[0]) if len(group) == 1 else " ".join(group) for group in groups]


def _is_quoted(token: str) -> bool:
    return token[0] in "'\""


def _is_number(token: str) -> bool:
    return token in BLANK or NUMBER.fullmatch(token) is not None


def _value(token: str) -> str:
    if _is_quoted(token) and len(token) > 1:
        return str(ast.literal_eval(token)) if "\\" in token or "\n" in token else token[1:-1]
    return "" if token in BLANK else re.sub(r"^(\d+)\.0*$", r"\1", token)
