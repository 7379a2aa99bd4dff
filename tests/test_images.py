"""Image files: read right, or refused by name."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from corrzoo.images import ImageMemory, as_rgb, image_size, read_rgb, to_tensor
from corrzoo.types import ZooError


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_rgb_is_read_as_it_is(tmp_path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert image_size(tmp_path / "a.png") == (30, 20)
    tensor = to_tensor(read_rgb(tmp_path / "a.png", (30, 20)), (20, 30))
    assert tensor.dtype == torch.uint8 and tensor.is_contiguous()
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), pixels)


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((16, 16, 3), dtype=np.uint8)
    stripes[:, ::2] = 200
    small = to_tensor(Image.fromarray(stripes), (4, 4))
    assert (small.int() - 100).abs().max() <= 15  # plain bilinear sampling would return stripes of 0 and 200


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    colour = (204, 51, 102) if mode in ("P", "RGBA", "CMYK") else (255, 255, 255)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (30, 20), colour).convert(mode).save(path)
    image = read_rgb(path, (30, 20))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - colour).max() <= 4


def test_deep_images_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 30), 40000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ZooError, match=r"deep\.png has mode I.*more than 8 bits.*convert"):
        image_size(tmp_path / "deep.png")


def test_a_png_in_disguise_is_read_as_what_it_is(tmp_path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.jpg", format="PNG")
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "a.jpg", (30, 20))), pixels)


def test_sixteen_bits_a_colour_are_scaled_to_eight(tmp_path: Path, pixels: np.ndarray) -> None:
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in pixels)
    (tmp_path / "a.png").write_bytes(png(30, 20, bits=16, data=zlib.compress(rows)))
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "a.png", (30, 20))), pixels)


def test_one_pixel_fills_the_network_image(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "a.png")
    assert (to_tensor(read_rgb(tmp_path / "a.png", (1, 1)), (4, 6)).permute(1, 2, 0) == torch.tensor([9, 8, 7])).all()


def test_thirty_megapixels_are_read(tmp_path: Path) -> None:
    image = Image.new("L", (6000, 5000), 50)
    image.paste(200, (3000, 0, 6000, 5000))
    image.save(tmp_path / "a.png")
    small = to_tensor(read_rgb(tmp_path / "a.png", (6000, 5000)), (10, 12))
    assert (small[..., :5] == 50).all() and (small[..., 7:] == 200).all()


def test_a_bomb_of_an_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(50_000, 50_000, bits=8, data=zlib.compress(bytes(99))))
    with pytest.raises(ZooError, match=r"a\.png \(Image size \(2500000000 pixels\) exceeds limit"):
        image_size(tmp_path / "a.png")


def png(w: int, h: int, bits: int, data: bytes) -> bytes:
    """An RGB image, which PIL itself does not write with 16 bits."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", w, h, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_orientation_is_ignored(tmp_path: Path, pixels: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    assert read_rgb(tmp_path / "a.jpg", (30, 20)).size == (30, 20)


def test_ones_own_image_is_turned_upright_and_pixels_stand_as_they_are(tmp_path: Path, pixels: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown, the stored top row is the right column
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.array_equal(np.asarray(as_rgb(path)), np.rot90(pixels, -1))
    for given in (pixels, Image.open(tmp_path / "a.png"), torch.from_numpy(pixels).permute(2, 0, 1)):
        assert np.array_equal(np.asarray(as_rgb(given)), pixels)


@pytest.mark.parametrize(
    "given, said",
    [
        ("nowhere.png", "there is no image file nowhere.png"),
        (__file__, "cannot read the image .*test_images.py"),
        (np.zeros((3, 4, 5), np.uint8), r"got \(3, 4, 5\) uint8"),
        (torch.zeros(3, 4, 5), r"got \(3, 4, 5\) torch.float32"),
        (7, "got int"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(given: object, said: str) -> None:
    with pytest.raises(ZooError, match=said) as error:
        as_rgb(given)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("keep", [0, 10, 0.6])
def test_broken_files_are_named(tmp_path: Path, pixels: np.ndarray, suffix: str, keep: float) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(pixels).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(ZooError, match=rf"cannot (read|decode) the image .*a\{suffix}.*fetch it again") as error:
        read_rgb(path, (30, 20))
    assert "\n" not in str(error.value)


def test_missing_and_wrong_size(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"no image .*a\.png"):
        read_rgb(tmp_path / "a.png", (30, 20))
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    with pytest.raises(ZooError, match=r"a\.png is 30x20, but annotated as 20x30"):
        read_rgb(tmp_path / "a.png", (20, 30))


def test_memory_is_bounded_and_drops_the_oldest() -> None:
    made: list[int] = []

    def get(memory: ImageMemory, number: int) -> torch.Tensor:
        def make() -> torch.Tensor:
            made.append(number)
            return torch.full((2**19,), number, dtype=torch.uint8)  # half a MiB

        return memory.get(number, make)

    memory = ImageMemory(1)
    for number in (0, 1, 0, 2, 0, 1):  # 2 drops 1, not 0, which was asked for last
        assert (get(memory, number) == number).all()
        assert memory._items.used <= memory._items.max_bytes
    assert made == [0, 1, 2, 1]
    get(memory, 1).zero_()
    assert (get(memory, 1) == 1).all()
    made.clear()
    for _ in range(2):
        get(ImageMemory(0), 5)
    assert made == [5, 5]
