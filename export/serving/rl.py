"""Acts by an exported policy, with onnxruntime and NumPy alone.

    python rl.py policy.onnx [observations.npy]    # a batch of stacked observations; random ones without a file
    python rl.py policy.onnx [history.npz]         # of an agent that learns in context: state, action, reward

Prints an action per row, numbers in [-1, 1].
"""

import sys

import numpy as np
import onnxruntime

TYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}


def draw(one, rng) -> np.ndarray:
    """Something random in the shape of an input; sizes that vary are 1."""
    shape, dtype = [size if isinstance(size, int) else 1 for size in one.shape], TYPES[one.type]
    values = rng.integers(0, 256, shape) if dtype == np.uint8 else rng.standard_normal(shape)
    return values.astype(dtype)


session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
inputs = session.get_inputs()
if len(sys.argv) < 3:
    rng = np.random.default_rng()
    given = {one.name: draw(one, rng) for one in inputs}
elif len(inputs) == 1:
    given = {inputs[0].name: np.load(sys.argv[2]).astype(TYPES[inputs[0].type])}
else:
    saved = np.load(sys.argv[2])
    given = {one.name: saved[one.name].astype(TYPES[one.type]) for one in inputs}
for action in session.run(None, given)[0]:
    print(action.tolist())
