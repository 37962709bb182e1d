"""Logs that are published in two halves, users' features and impressions: joined once, kept as Parquet."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int

from apps.progress import track
from apps.recsys.tables import CHUNK

ALI_CCP_FIELDS = (
    *("101", "121", "122", "124", "125", "126", "127", "128", "129"),  # of users
    *("205", "206", "207", "216", "508", "509", "702", "853", "301"),  # of items, of both together, and the place
)
"""Fields with one value a row; those with several are left out, as the literature does."""
ALIEXPRESS_USER, ALIEXPRESS_ITEM = (*range(1, 8), 31, 32), (18, 33, 34, 35, 39, 40, 41)
"""Columns that are categories; the first column names the search, the last one of items is the label."""


def ali_ccp(skeleton: Path, common: Path, target: Path) -> Path:
    """Ali-CCP: impressions (id, click, purchase, key, count, features) with the common features of their key.

    Features are written as field, id and value, with the characters 2 and 3 between them and 1 between features.

    Args:
        skeleton: file of impressions.
        common: file of common features (key, count, features).
        target: folder to write.
    """
    keys, values = [], []
    for part in track(_parts(common, [0, 2]), f"reading {common.name}"):
        keys.append(part[0].astype(str).to_numpy(object))
        values.append(_fields(part[2]))
    index = pd.Index(np.concatenate(keys), dtype=object)
    shared = np.concatenate(values)

    def frames() -> Iterator[pd.DataFrame]:
        for part in track(_parts(skeleton, [1, 2, 3, 5]), f"joining {skeleton.name}"):
            own, row = _fields(part[5]), index.get_indexer(pd.Index(part[3].astype(str), dtype=object))
            own = np.where((own < 0) & (row >= 0)[:, None], shared[row], own)
            frame = pd.DataFrame(own, columns=list(ALI_CCP_FIELDS), dtype="Int64").mask(own < 0)
            frame.insert(0, "click", part[1].to_numpy(np.int8))
            frame.insert(1, "purchase", part[2].to_numpy(np.int8))
            yield frame

    return write(frames(), target)


def _parts(file: Path, columns: list[int]) -> Iterable[pd.DataFrame]:
    return pd.read_csv(file, header=None, usecols=columns, chunksize=CHUNK)


def _fields(features: pd.Series) -> Int[np.ndarray, "n F"]:
    """Ids by field; -1 where a row has none, the first of several."""
    lists = pc.split_pattern(pa.array(features.astype(object), pa.string()), "\x01")
    row, parts = pc.list_parent_indices(lists).to_numpy(), pc.list_flatten(lists)
    found = pc.extract_regex(parts, f"^(?P<field>{'|'.join(ALI_CCP_FIELDS)})\x02(?P<id>[0-9]{{1,18}})")
    there = found.is_valid()
    field = pc.index_in(pc.struct_field(found, "field"), pa.array(ALI_CCP_FIELDS)).filter(there).to_numpy()
    ids = pc.struct_field(found, "id").filter(there).cast(pa.int64()).to_numpy()
    row = row[there.to_numpy(zero_copy_only=False)]
    table = np.full((len(features), len(ALI_CCP_FIELDS)), -1)
    table[row[::-1], field[::-1]] = ids[::-1]
    return table


def aliexpress(users: Path, items: Path, target: Path) -> Path:
    """AliExpress: items of search pages (search, 47 features, label) with the features of the page (search, 32).

    The label is 0, 1 for a click, or 2 for a click and a purchase.

    Args:
        users: file of search pages.
        items: file of items.
        target: folder to write.
    """
    pages = pd.read_csv(users, header=None).drop_duplicates(0)
    index = pd.Index(pages[0])
    kinds = [(pages, ALIEXPRESS_USER, range(1, 33)), (None, ALIEXPRESS_ITEM, range(1, 48))]

    def frames() -> Iterator[pd.DataFrame]:
        for part in track(pd.read_csv(items, header=None, chunksize=CHUNK), f"joining {items.name}"):
            row = index.get_indexer(part[0])
            part, row = part[row >= 0].reset_index(drop=True), row[row >= 0]
            halves = [(part if half is None else half.iloc[row].reset_index(drop=True), *rest) for half, *rest in kinds]
            sparse = [half[i] for half, categories, _ in halves for i in categories]
            dense = [half[i] for half, categories, every in halves for i in every if i not in categories]
            columns = {"search_id": part[0]}
            columns |= {f"categorical_{i}": column for i, column in enumerate(sparse, 1)}
            columns |= {f"numerical_{i}": column for i, column in enumerate(dense, 1)}
            label = part[48].to_numpy()
            yield pd.DataFrame(
                columns | {"click": (label >= 1).astype(np.int8), "conversion": (label == 2).astype(np.int8)}
            )

    return write(frames(), target)


def write(frames: Iterable[pd.DataFrame], target: Path) -> Path:
    """Write frames as a folder with one Parquet file that appears when it is whole, a row group per frame."""
    work = target.with_name(f".{target.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    writer = None
    for frame in frames:
        table = pa.Table.from_pandas(frame, preserve_index=False, schema=writer.schema if writer else None)
        writer = writer or pq.ParquetWriter(work / "log.parquet", table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
    os.replace(work, target)
    return target
