"""Forecasts a column of a CSV file by exported forecasters, with onnxruntime and NumPy alone.

    python timeseries.py model.onnx sales.csv units             # as far as the file was made for
    python timeseries.py model.step.onnx sales.csv units 500    # Time-MoE, step by step over any horizon

Prints a point a line, with the bounds of the central 80% where the file keeps calibrated intervals. As in training,
series are standardised first, by all that is known of them; forecasts start after the last value.
"""

import csv
import json
import sys

import numpy as np
import onnxruntime


def whole(session, y, notes):
    """Points and bounds from one pass."""
    context = np.full((1, int(notes["context"])), np.nan, np.float32)
    context[0, -len(y) :] = y
    points = session.run(["forecast"], {"context": context})[0][0]
    spread = json.loads(notes["intervals"])["deviations"][::2] if "intervals" in notes else []
    return [points, *(points + np.array(row) * np.nanstd(y) for row in spread)]


def generated(session, y, notes, horizon):
    """Points from many steps, each by the largest head that fits, over the keys and values of those before."""
    y = y[np.flatnonzero(np.isnan(np.append(np.nan, y)))[-1] :]  # what comes after the last gap
    mean, std = (y.mean(), y.std() or 1) if notes["normalize"] == "instance" else (0, 1)
    layers, _, heads, _, width = session.get_inputs()[1].shape
    keys = values = np.zeros((layers, 1, heads, 0, width), np.float32)
    points, sizes, found = ((y - mean) / std)[None].astype(np.float32), json.loads(notes["heads"]), []
    while len(found) < horizon:
        said, keys, values = session.run(None, {"points": points, "keys": keys, "values": values})
        size = max(size for size in sizes if size <= horizon - len(found))
        points = said[:, sum(sizes[: sizes.index(size)]) :][:, :size]
        found += [*points[0]]
    return [np.array(found) * std + mean]


model, path, column, *horizon = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
notes = session.get_modelmeta().custom_metadata_map
with open(path, newline="") as file:
    y = np.array([float(row[column] or "nan") for row in csv.DictReader(file)])
mean, std = (np.nanmean(y), np.nanstd(y) or 1) if notes["scale"] == "standard" else (0, 1)
known = ((y - mean) / std)[: np.flatnonzero(np.isfinite(y))[-1] + 1][-int(notes["context"]) :]
columns = generated(session, known, notes, int(horizon[0])) if horizon else whole(session, known, notes)
for row in np.stack(columns, 1) * std + mean:
    print(*(f"{value:.6g}" for value in row))
