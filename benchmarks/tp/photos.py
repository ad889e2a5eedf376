"""Real photographs as requests, and what a vision-language model's processor does to them.

The photographs are the two that scikit-learn ships, or a directory of the user's. A request holds pieces of
them: cut, mirrored and enlarged to a phone camera's resolution by a seeded generator, and compressed again.
Materializing follows Qwen2-VL's processor: patches of 14 pixels, two frames deep, merged 2 × 2.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import Image

PATCH, MERGE, DEPTH, CHANNELS = 14, 2, 2, 3
FACTOR = PATCH * MERGE
PATCH_FLOATS = CHANNELS * DEPTH * PATCH * PATCH
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
FRAME_SIZE = (560, 392)  # width and height of a video frame after resizing, pixels
CAMERA_SIZE = (576, 384)  # and before

Grid = tuple[int, int, int]  # patches in time, down and across


class Size(NamedTuple):
    """Ranges from which a request is drawn."""

    images: tuple[int, int]
    megapixels: tuple[float, float]
    max_tokens: tuple[int, int]  # merged patches that the processor leaves of an image, at most


SIZES = {
    "small": Size((1, 1), (0.3, 1.0), (150, 300)),
    "medium": Size((1, 1), (2.0, 4.0), (400, 800)),
    "large": Size((1, 2), (4.0, 8.0), (800, 1280)),
}
NewArray = Callable[[tuple[int, ...], DTypeLike], NDArray[Any]]


def load(directory: str | None) -> list[Image.Image]:
    """The photographs of `directory`, or those of scikit-learn; RGB."""
    if directory is None:
        spec = importlib.util.find_spec("sklearn")  # found, not imported: that would take a second
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError("find photographs: scikit-learn is not installed; give --images DIR")
        paths = sorted((Path(spec.submodule_search_locations[0]) / "datasets" / "images").glob("*.jpg"))
    else:
        suffixes = {".jpg", ".jpeg", ".png", ".webp"}
        paths = sorted(p for p in Path(directory).iterdir() if p.suffix.lower() in suffixes)
    if not paths:
        raise FileNotFoundError(f"find photographs: none in {directory or 'scikit-learn'}")
    return [Image.open(path).convert("RGB") for path in paths]


def image_request(sources: Sequence[Image.Image], seed: Sequence[int], size: str = "large") -> dict[str, Any]:
    """One or two photographs (large: of 4 to 8 megapixels), as an API receives them: base64 of a JPEG."""
    rng = np.random.default_rng(seed)
    ranges = SIZES[size]
    images = []
    for _ in range(int(rng.integers(*ranges.images, endpoint=True))):
        piece = _piece(sources, rng)
        megapixels = rng.uniform(*ranges.megapixels)
        scale = math.sqrt(megapixels * 1e6 / (piece.width * piece.height))
        enlarged = (round(piece.width * scale), round(piece.height * scale))
        encoded = base64.b64encode(_jpeg(piece.resize(enlarged, Image.Resampling.BICUBIC)))
        max_tokens = int(rng.integers(*ranges.max_tokens, endpoint=True))
        images.append({"base64": encoded, "max_pixels": max_tokens * FACTOR * FACTOR})
    return {"images": images}


def video_request(sources: Sequence[Image.Image], seed: Sequence[int]) -> dict[str, Any]:
    """Two clips; in each the camera pans over one photograph, JPEG by JPEG."""
    rng = np.random.default_rng(seed)
    clips = []
    for _ in range(2):
        count = 2 * int(rng.integers(10, 29))
        width, height = CAMERA_SIZE
        piece = _piece(sources, rng).resize((width + 2 * count, height + count), Image.Resampling.BICUBIC)
        boxes = [(2 * i, i, 2 * i + width, i + height) for i in range(count)]
        clips.append({"frames": [_jpeg(piece.crop(box)) for box in boxes], "fps": 2.0})
    return {"clips": clips}


def image_patches(encoded: bytes, max_pixels: int, new: NewArray) -> tuple[NDArray[Any], Grid]:
    """Patches of one image, float32 (patches, 1176), written into `new`'s array by the last step."""
    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    width, height = _fit(image.width, image.height, max_pixels)
    pixels = _normalize(image.resize((width, height), Image.Resampling.BICUBIC))
    out, grid = _new_patches(1, width, height, new)
    _patchify(out, 0, np.broadcast_to(pixels, (DEPTH, *pixels.shape)))  # a still image: the same frame twice
    return out, grid


def clip_patches(frames: Sequence[bytes], new: NewArray) -> tuple[NDArray[Any], Grid]:
    """Patches of one clip, float32 (patches, 1176), two frames at a time."""
    width, height = FRAME_SIZE
    out, grid = _new_patches(len(frames) // DEPTH, width, height, new)
    pair = np.empty((DEPTH, CHANNELS, height, width), np.float32)
    for i, frame in enumerate(frames):
        image = Image.open(io.BytesIO(frame)).convert("RGB")
        _normalize(image.resize(FRAME_SIZE, Image.Resampling.BICUBIC), pair[i % DEPTH])
        if i % DEPTH == DEPTH - 1:
            _patchify(out, i // DEPTH, pair)
    return out, grid


def _piece(sources: Sequence[Image.Image], rng: np.random.Generator) -> Image.Image:
    """A part of one of the photographs, perhaps mirrored."""
    source = sources[int(rng.integers(len(sources)))]
    width, height = (round(side * rng.uniform(0.7, 1.0)) for side in source.size)
    left, top = int(rng.integers(source.width - width + 1)), int(rng.integers(source.height - height + 1))
    piece = source.crop((left, top, left + width, top + height))
    return piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else piece


def _jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88)
    return out.getvalue()


def _fit(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """The largest size of about this shape that has at most `max_pixels` and whole merged patches."""
    scale = min(1.0, math.sqrt(max_pixels / (width * height)))
    fitted = (max(FACTOR, math.floor(side * scale / FACTOR) * FACTOR) for side in (width, height))
    return next(fitted), next(fitted)


def _normalize(image: Image.Image, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Pixels rescaled and normalized, float32 (channel, row, column)."""
    levels = np.asarray(image)
    if out is None:
        out = np.empty((CHANNELS, *levels.shape[:2]), np.float32)
    for channel in range(CHANNELS):
        plane = out[channel]
        np.multiply(levels[..., channel], np.float32(1 / (255 * STD[channel])), out=plane)
        np.subtract(plane, MEAN[channel] / STD[channel], out=plane)
    return out


def _new_patches(times: int, width: int, height: int, new: NewArray) -> tuple[NDArray[Any], Grid]:
    grid = (times, height // PATCH, width // PATCH)
    return new((math.prod(grid), PATCH_FLOATS), np.float32), grid


def _patchify(out: NDArray[Any], time: int, frames: NDArray[np.float32]) -> None:
    """Cuts `frames` (2, channel, row, column) into the patches at `time` of `out`: one transposing copy."""
    _, _, height, width = frames.shape
    down, across = height // FACTOR, width // FACTOR
    source = frames.reshape(DEPTH, CHANNELS, down, MERGE, PATCH, across, MERGE, PATCH)
    count = down * across * MERGE * MERGE
    target = out[time * count : (time + 1) * count]
    target = target.reshape(down, across, MERGE, MERGE, CHANNELS, DEPTH, PATCH, PATCH)
    np.copyto(target, source.transpose(2, 5, 3, 6, 1, 0, 4, 7))
