"""Episodes as moving pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from apps.errors import UserError
from moecore.files import atomic_path, write_atomic

Picture = UInt8[np.ndarray, "H W 3"]


def write_video(path: str | Path, frames: Sequence[Picture], fps: int = 20) -> Path:
    """Write .gif, or .mp4 if imageio-ffmpeg is installed.

    Raises:
        UserError: no pictures; .mp4 without the library.
    """
    path = Path(path)
    if not frames:
        raise UserError(f"video={str(path)!r}: the environment gave no pictures")
    if path.suffix == ".gif":
        return write_atomic(path, gif(frames, fps))
    try:
        import imageio_ffmpeg
    except ImportError:
        ask = ".mp4 needs imageio-ffmpeg (pip install imageio-ffmpeg); or take .gif"
        raise UserError(f"video={str(path)!r}: {ask}") from None
    height, width = (size - size % 2 for size in frames[0].shape[:2])  # the codec takes even sizes alone
    with atomic_path(path) as temporary:
        file = temporary.with_suffix(".mp4")
        writer = imageio_ffmpeg.write_frames(str(file), (width, height), fps=fps, macro_block_size=2)
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame[:height, :width]))
        writer.close()
        file.replace(temporary)
    return path


def gif(frames: Sequence[Picture], fps: int = 20, colors: int = 64) -> bytes:
    """An endless GIF."""
    images = [Image.fromarray(frame).quantize(colors) for frame in frames]
    data = io.BytesIO()
    images[0].save(data, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return data.getvalue()
