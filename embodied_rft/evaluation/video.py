"""Frames to a small film that every browser plays: H.264 in MP4, or an animated GIF where that codec is missing."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np

from embodied_rft.names import UserError


def write_video(path: str | Path, frames: np.ndarray, *, fps: int = 25) -> Path:
    """Write frames as a film; returns where it lies (the suffix becomes .gif if MP4 cannot be made).

    Args:
        path: of the .mp4; written atomically.
        frames: [T, H, W, 3] uint8, T >= 1. An odd height or width loses its last line: the codec halves both.
        fps: frames per second.

    Raises:
        ValueError: frames of another shape or dtype.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise UserError(f"a video needs frames [T, H, W, 3] uint8, T >= 1; got {frames.dtype} {list(frames.shape)}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        return _write_gif(path, frames, fps)
    temporary = path.with_name(f".{path.name}")
    try:
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container:
            height, width = (size // 2 * 2 for size in frames.shape[1:3])
            stream = container.add_stream("libx264", rate=fps, options={"crf": "23", "preset": "fast"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for image in frames[:, :height, :width]:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return temporary.replace(path)
    except (FFmpegError, ValueError):  # a build of FFmpeg without this encoder
        return _write_gif(path, frames, fps)
    finally:
        temporary.unlink(missing_ok=True)


def _write_gif(path: Path, frames: np.ndarray, fps: int) -> Path:
    from PIL import Image

    path = path.with_suffix(".gif")
    images = [Image.fromarray(image) for image in frames]
    temporary = path.with_name(f".{path.name}")
    images[0].save(temporary, format="GIF", save_all=True, append_images=images[1:], duration=1000 // fps, loop=0)
    return temporary.replace(path)


def data_url(path: str | Path) -> str:
    """The file as a `data:` URL, to be embedded in a page."""
    kind = {".mp4": "video/mp4", ".gif": "image/gif"}[Path(path).suffix]
    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
