"""Image files and arrays to RGB images, and to uint8 tensors at network size."""

import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from corrzoo.errors import ZooError, one_line
from corrzoo.geometry import Size

ImageSource = str | Path | bytes | Image.Image | Tensor | np.ndarray
"""An image that a user gives, see `as_rgb`."""

FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"}
"""our choice: formats that are read. Pillow has more decoders, which are less tested; for EPS it runs Ghostscript."""

MAX_UPLOAD_PIXELS = 50_000_000
"""our choice: pixels of an image given as bytes. 20 kB of PNG can decode to gigabytes."""


def open_image(path: Path) -> Image.Image:
    """Open an image file of a dataset: its header is read, its pixels are not decoded."""
    try:
        return _open(path, str(path), "fetch it again")
    except FileNotFoundError:
        raise ZooError(f"no image {path}: restore the file, or remove its pairs from the list") from None


def image_size(path: Path) -> tuple[int, int]:
    """(w, h) from the header of an image file."""
    with open_image(path) as image:
        return image.size


def read_rgb(path: Path, size: tuple[int, int]) -> Image.Image:
    """Decode an image file of a dataset to RGB. EXIF orientation is ignored: annotations refer to the stored pixels.

    Raises:
        ZooError: if the file is missing, unreadable or truncated, or its size is not the annotated `size` (w, h).
    """
    with open_image(path) as image:
        if image.size != size:
            (w, h), (W, H) = image.size, size
            raise ZooError(f"the image {path} is {w}x{h}, but annotated as {W}x{H}: fetch the dataset's own copy of it")
        try:
            return image.convert("RGB")
        except Exception as error:  # Pillow's decoders raise nearly anything
            raise ZooError(f"cannot decode the image {path} ({one_line(error)}): fetch it again") from error


def as_rgb(source: ImageSource) -> Image.Image:
    """A user's image in RGB. Transparent pixels are composited on white, as viewers show them.

    Args:
        source: A file path or the bytes of a file, which are rotated as their EXIF orientation says; or pixels: a PIL
            image, a (3, H, W) tensor, or an (H, W, 3) array. Pixels are uint8, or floats from 0 to 1.

    Raises:
        ZooError: if the file is missing or unreadable, the pixels have another shape or type, or bytes decode to more
            than `MAX_UPLOAD_PIXELS`.
    """
    if isinstance(source, Image.Image):
        _check_depth(source, "given")
        return _decode(source, "given", rotate=False)
    if isinstance(source, str | Path) and not os.path.isfile(source):  # False also for names that no file can have
        raise ZooError(f"there is no image file {source}")
    if isinstance(source, bytes | str | Path):
        file, name = (BytesIO(source), "that was uploaded") if isinstance(source, bytes) else (source, str(source))
        with _open(file, name, "save it as PNG or JPEG") as image:
            w, h = image.size
            if isinstance(source, bytes) and w * h > MAX_UPLOAD_PIXELS:
                raise ZooError(f"the image is {w}x{h}: expected at most {MAX_UPLOAD_PIXELS:,} pixels, shrink it")
            return _decode(image, name, rotate=True)
    pixels: Any = source
    if isinstance(source, Tensor) and source.ndim == 3:
        pixels = source.detach().permute(1, 2, 0).cpu()
        pixels = (pixels.float() if pixels.is_floating_point() else pixels).numpy()  # numpy has no bfloat16
    if isinstance(pixels, np.ndarray) and pixels.dtype.kind == "f" and pixels.size:
        low, high = pixels.min(), pixels.max()
        if not 0 <= low <= high <= 1:
            raise ZooError(f"pixels from {low:g} to {high:g}: expected floats from 0 to 1 (not normalised), or uint8")
        pixels = (pixels * 255).round().astype(np.uint8)
    is_image = isinstance(pixels, np.ndarray) and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size
    if not is_image or pixels.dtype != np.uint8:
        found = f"{tuple(source.shape)} {source.dtype}" if hasattr(source, "shape") else type(source).__name__
        wanted = "a path, a PIL image, a (3, H, W) tensor or an (H, W, 3) array of uint8 or of floats from 0 to 1"
        raise ZooError(f"expected {wanted}, got {found}")
    return Image.fromarray(pixels)


def to_tensor(image: Image.Image, size: Size) -> Tensor:
    """Resize an RGB image to `size` (H, W), bilinear and antialiased, and return it as (3, H, W) uint8."""
    resized = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def _open(file: str | Path | BytesIO, name: str, remedy: str) -> Image.Image:
    Image.init()  # registers all formats; some builds of Pillow lack AVIF, JPEG2000 or WEBP
    try:
        image = Image.open(file, formats=sorted(FORMATS & Image.OPEN.keys()))
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = "unknown format or empty file" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise ZooError(f"cannot read the image {name} ({reason}): {remedy}") from error
    _check_depth(image, name)
    return image


def _check_depth(image: Image.Image, name: str) -> None:
    if image.mode in ("I", "F") or ";16" in image.mode:  # conversion to RGB would clip at 255 instead of scaling
        raise ZooError(f"the image {name} has mode {image.mode}, more than 8 bits a channel: convert it to 8-bit RGB")


def _decode(image: Image.Image, name: str, rotate: bool) -> Image.Image:
    try:
        if rotate:
            image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:
        raise ZooError(f"cannot decode the image {name} ({one_line(error)}): save it as PNG or JPEG") from error
