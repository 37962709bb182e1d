"""Scores raw rows by an exported ranking model, with onnxruntime and NumPy alone.

    python recsys.py model.onnx rows.csv     # or rows.json, a list of objects

Prints a line per row: the probability of every task. What a column is called, and what stands for a missing or an
unreadable value, is in the file itself. Dates must be written as its metadata says.
"""

import csv
import json
import re
import sys

import numpy as np
import onnxruntime


def single(value, about):
    """An id or a number as the file takes it."""
    value = about["missing"] if value in (None, "") else value
    if about["type"] == "int64":
        return int(value) if str(value).lstrip("+-").isdigit() else about["unknown"]
    return float(value) if about["type"] == "float" else str(value)


def column(rows, about):
    """A feature of all rows; sequences oldest value first, padded on the right."""
    dtype = {"float": np.float32, "int64": np.int64, "string": object}[about["type"]]
    values = [row.get(about["column"]) for row in rows]
    if len(about["shape"]) == 1:
        return np.array([single(value, about) for value in values], dtype)
    padded = np.full((len(rows), about["shape"][1]), about["missing"], dtype)
    for row, value in zip(padded, values, strict=True):
        printed = isinstance(value, str) and value[:1] == "["  # a list as Python, JSON or NumPy print it
        several = re.findall(r"[^][\s,'\"]+", value) if printed else value or []
        several = several.split(about["separator"]) if isinstance(several, str) else several
        latest = [single(one, about) for one in several if one not in (None, "")][-len(row) :]
        row[: len(latest)] = latest
    return padded


session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
metadata = session.get_modelmeta().custom_metadata_map
inputs, tasks = json.loads(metadata["inputs"]), json.loads(metadata["outputs"])
with open(sys.argv[2], newline="") as file:
    rows = json.load(file) if sys.argv[2].endswith(".json") else list(csv.DictReader(file))
for scores in session.run(["probabilities"], {about["name"]: column(rows, about) for about in inputs})[0]:
    print(json.dumps(dict(zip(tasks, scores.tolist(), strict=True))))
