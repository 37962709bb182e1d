"""Classifies images by an exported classifier, with onnxruntime and NumPy alone.

    python vision.py model.onnx image.npy ...     # bytes [height, width, channels], or [height, width] for grey ones

Prints a line per image: its class and how sure the model is. Images of another size are resampled to the nearest pixel.
"""

import json
import sys

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
channels, height, width = session.get_inputs()[0].shape[1:]


def read(path):
    """A file as the model takes it: [channels, height, width], pixels in [0, 1]."""
    pixels = np.atleast_3d(np.load(path))
    rows = np.arange(height) * pixels.shape[0] // height
    columns = np.arange(width) * pixels.shape[1] // width
    pixels = pixels[rows][:, columns].astype(np.float32) / 255
    return np.broadcast_to(pixels, (height, width, channels)).transpose(2, 0, 1)


scores = session.run(None, {session.get_inputs()[0].name: np.stack([read(path) for path in sys.argv[2:]])})[0]
shares = np.exp(scores - scores.max(1, keepdims=True))
shares /= shares.sum(1, keepdims=True)
for path, row in zip(sys.argv[2:], shares, strict=True):
    print(f"{path}\t{classes[row.argmax()]}\t{row.max():.4f}")
