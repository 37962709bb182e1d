"""Draws paths of a column of a CSV file by an exported Moirai-MoE, with onnxruntime and NumPy alone.

    python timeseries_paths.py model.onnx sales.csv units [paths]

Prints median, 10% and 90% quantile of every point of the horizon. The file says how each point of the next patch is
distributed; what is drawn of it is known when the patch after is asked for. Covariates are taken as unknown.
"""

import csv
import sys

import numpy as np
import onnxruntime


def draw(p, rng):
    """A value from each mixture `[..., 12]`, whose parameters the metadata name in this order."""
    student = p[..., 5] + p[..., 6] * rng.standard_t(p[..., 4])
    narrow = p[..., 7] + float(notes["fixed_scale"]) * rng.standard_normal(p.shape[:-1])
    counts = rng.poisson(np.minimum(rng.gamma(p[..., 8]) * np.exp(p[..., 9]), limit))
    skewed = np.exp(p[..., 10] + p[..., 11] * rng.standard_normal(p.shape[:-1]))
    chosen = rng.random(p.shape[:-1])[..., None] < p[..., :4].cumsum(-1)  # the first that is true
    each = np.stack([student, narrow, counts, skewed], -1)
    return np.take_along_axis(each, chosen.argmax(-1)[..., None], -1)[..., 0].clip(-limit, limit)


model, path, column, *paths = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
notes, rng = session.get_modelmeta().custom_metadata_map, np.random.default_rng(0)
limit, patch, horizon = (int(float(notes[name])) for name in ("max_sample", "patch_size", "horizon"))
with open(path, newline="") as file:
    y = np.array([float(row[column] or "nan") for row in csv.DictReader(file)])
mean, std = (np.nanmean(y), np.nanstd(y) or 1) if notes["scale"] == "standard" else (0, 1)
known = ((y - mean) / std)[: np.flatnonzero(np.isfinite(y))[-1] + 1][-int(notes["context"]) :]
count = int(paths[0]) if paths else 100
feed = {one.name: np.full((count, *one.shape[1:]), np.nan, np.float32) for one in session.get_inputs()}
feed["context"][:, -len(known) :] = known
for start in range(0, horizon, patch):
    parameters, location, deviation = session.run(None, feed)
    patches = draw(parameters[:, start : start + patch].astype(float), rng) * deviation + location
    feed["future"][:, start : start + patch] = patches
for row in np.quantile(feed["future"], (0.5, 0.1, 0.9), axis=0).T * std + mean:
    print(*(f"{value:.6g}" for value in row))
