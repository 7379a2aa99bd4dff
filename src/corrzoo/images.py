"""Image files to uint8 tensors at network size, and a bounded memory of them."""

import struct
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from corrzoo.files import LRU
from corrzoo.geometry import Size
from corrzoo.types import ZooError

ImageSource = str | Path | bytes | Image.Image | Tensor | np.ndarray
"""An image of one's own: see `as_rgb`."""

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What PIL raises for a file that it cannot read, depending on the format."""


def open_image(path: Path, content: bytes | None = None) -> Image.Image:
    """The image file with its header read; its pixels are not decoded yet.

    Args:
        path: The file.
        content: What is in it, where it is not on this disk.

    Raises:
        ZooError: when the file is missing, no image, or has more than 8 bits a channel.
    """
    try:
        image = Image.open(path if content is None else BytesIO(content))
    except FileNotFoundError:
        raise ZooError(f"no image {path}: restore the file, or take its pairs off the list") from None
    except _BROKEN as error:
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise ZooError(f"cannot read the image {path} ({reason}): fetch it again") from error
    if image.mode in ("I", "F") or ";16" in image.mode:  # PIL would clip these at 255, not scale them
        raise ZooError(f"the image {path} has mode {image.mode}, more than 8 bits a channel: convert it to 8-bit RGB")
    return image


def image_size(path: Path) -> tuple[int, int]:
    """(w, h) from the header of an image file."""
    with open_image(path) as image:
        return image.size


def read_rgb(path: Path, size: tuple[int, int]) -> Image.Image:
    """Decode an image file to RGB. An EXIF orientation is left alone: annotations count the stored pixels.

    Args:
        path: The image file.
        size: (w, h) that its annotation says.

    Raises:
        ZooError: when the file is missing, unreadable, truncated, or not of that size.
    """
    with open_image(path) as image:
        if image.size != size:
            (w, h), (W, H) = image.size, size
            raise ZooError(f"the image {path} is {w}x{h}, but annotated as {W}x{H}: fetch the dataset's own copy of it")
        try:
            return image.convert("RGB")
        except _BROKEN as error:
            raise ZooError(f"cannot decode the image {path} ({error}): fetch it again") from error


def as_rgb(source: ImageSource) -> Image.Image:
    """An image of one's own in RGB.

    Args:
        source: A file or its bytes, turned upright as its EXIF orientation says and every viewer shows it; or pixels,
            taken as they stand: a PIL image, a (3, H, W) uint8 tensor, or an (H, W, 3) uint8 array.

    Raises:
        ZooError: when the file is missing, unreadable or no image, and for pixels of another shape or type.
    """
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, str | Path | bytes):
        content = source if isinstance(source, bytes) else None
        path = Path("that was sent" if isinstance(source, bytes) else source)
        if content is None and not path.is_file():
            raise ZooError(f"there is no image file {path}")
        with open_image(path, content) as image:
            try:
                return ImageOps.exif_transpose(image).convert("RGB")
            except _BROKEN as error:
                raise ZooError(f"cannot decode the image {path} ({error}): save it anew, as PNG or JPEG") from error
    pixels = source.permute(1, 2, 0).cpu().numpy() if isinstance(source, Tensor) and source.ndim == 3 else source
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        found = f"{tuple(source.shape)} {source.dtype}" if hasattr(source, "shape") else type(source).__name__
        raise ZooError(f"expected a path, a PIL image, a (3, H, W) uint8 tensor or an (H, W, 3) array, got {found}")
    return Image.fromarray(pixels)


def to_tensor(image: Image.Image, size: Size) -> Tensor:
    """An RGB image resized straight to `size` (H, W), bilinear and antialiased, as (3, H, W) uint8."""
    resized = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


class ImageMemory:
    """Tensors by number; the least recently used are dropped, and each process has its own.

    Args:
        megabytes: Limit in MiB; 0 keeps nothing.
    """

    def __init__(self, megabytes: float) -> None:
        self.megabytes = megabytes
        self._items: LRU[int, Tensor] = LRU(int(megabytes * 2**20), lambda tensor: tensor.nbytes)

    def get(self, number: int, make: Callable[[], Tensor]) -> Tensor:
        """A copy of tensor `number`, which `make` provides if it is not kept."""
        tensor = self._items.get(number)
        if tensor is None:
            self._items.put(number, tensor := make())
        return tensor.clone()

    def __reduce__(self) -> tuple[type["ImageMemory"], tuple[float]]:
        """A worker that is started with a copy of the dataset begins with an empty memory."""
        return ImageMemory, (self.megabytes,)
