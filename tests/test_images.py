"""Image files are read correctly, or refused by name."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from corrzoo import images
from corrzoo.images import as_rgb, image_size, read_rgb, to_tensor
from corrzoo.types import ZooError


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_rgb_pixels_are_unchanged(tmp_path: Path, pixels: np.ndarray) -> None:
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


def test_images_of_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 30), 40000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ZooError, match=r"deep\.png has mode I.*more than 8 bits.*convert"):
        image_size(tmp_path / "deep.png")


def test_the_content_decides_the_format(tmp_path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.jpg", format="PNG")
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "a.jpg", (30, 20))), pixels)


def test_16_bit_colours_are_scaled_to_8_bits(tmp_path: Path, pixels: np.ndarray) -> None:
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


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(50_000, 50_000, bits=8, data=zlib.compress(bytes(99))))
    with pytest.raises(ZooError, match=r"a\.png \(Image size \(2500000000 pixels\) exceeds limit"):
        image_size(tmp_path / "a.png")


def png(w: int, h: int, bits: int, data: bytes) -> bytes:
    """Write a 16-bit RGB image, which PIL cannot."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", w, h, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_exif_orientation_of_dataset_images_is_ignored(tmp_path: Path, pixels: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    assert read_rgb(tmp_path / "a.jpg", (30, 20)).size == (30, 20)


def test_exif_orientation_of_user_files_is_applied(tmp_path: Path, pixels: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown, the stored top row is the right column
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.array_equal(np.asarray(as_rgb(path)), np.rot90(pixels, -1))
    assert np.array_equal(np.asarray(as_rgb(torch.ones(3, 4, 5, dtype=torch.bfloat16))), np.full((4, 5, 3), 255))
    for given in (pixels, Image.open(tmp_path / "a.png"), torch.from_numpy(pixels).permute(2, 0, 1)):
        assert np.array_equal(np.asarray(as_rgb(given)), pixels)


@pytest.mark.parametrize(
    "given, message",
    [
        ("nowhere.png", "there is no image file nowhere.png"),
        ("x" * 5000, "there is no image file xxx"),
        ("a\0b", "there is no image file"),
        (__file__, r"cannot read the image .*test_images.py \(unknown format or empty file\): save it"),
        (b"", r"cannot read the image that was uploaded \(unknown format or empty file\): save it"),
        (np.zeros((3, 4, 5), np.uint8), r"got \(3, 4, 5\) uint8"),
        (torch.zeros(3, 4, 5, dtype=torch.int64), r"got \(3, 4, 5\) torch.int64"),
        (torch.zeros(3, 0, 5, dtype=torch.uint8), r"got \(3, 0, 5\) torch.uint8"),
        (7, "got int"),
    ],
)
def test_invalid_sources_are_one_line_errors(given: object, message: str) -> None:
    with pytest.raises(ZooError, match=message) as error:
        as_rgb(given)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("keep", [0, 10, 0.6])
def test_damaged_files_are_named(tmp_path: Path, pixels: np.ndarray, suffix: str, keep: float) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(pixels).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(ZooError, match=rf"cannot (read|decode) the image .*a\{suffix}.*fetch it again") as error:
        read_rgb(path, (30, 20))
    assert "\n" not in str(error.value)


def test_missing_files_and_wrong_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"no image .*a\.png"):
        read_rgb(tmp_path / "a.png", (30, 20))
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    with pytest.raises(ZooError, match=r"a\.png is 30x20, but annotated as 20x30"):
        read_rgb(tmp_path / "a.png", (20, 30))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("by_path", [True, False])
def test_transparent_pixels_of_user_images_are_white(tmp_path: Path, mode: str, by_path: bool) -> None:
    given = Image.new("RGBA", (4, 2), (10, 10, 10, 0))  # a hidden colour that viewers do not show
    given.paste((200, 200, 200, 255), (0, 0, 1, 2))
    given.putpixel((3, 0), (0, 0, 0, 51))
    if mode == "P":
        given = Image.new("P", (4, 2), 1)
        given.putpalette([0, 0, 0, 10, 10, 10, 200, 200, 200])
        given.paste(2, (0, 0, 1, 2))
        given.putpixel((3, 0), 0)
        given.info["transparency"] = bytes([51, 0, 255])
    elif mode == "LA":
        given = given.convert("LA")
    given.save(tmp_path / "a.png")
    row = np.asarray(as_rgb(tmp_path / "a.png" if by_path else given))[0]
    assert row.tolist() == [[200] * 3, [255] * 3, [255] * 3, [204] * 3]  # 0.8 * 255 + 0.2 * 0


@pytest.mark.parametrize("mode, value", [("I;16", 40000), ("I", 40000), ("F", 0.5)])
def test_pil_images_of_more_than_8_bits_are_refused(mode: str, value: float) -> None:
    with pytest.raises(ZooError, match=f"image given has mode {mode}, more than 8 bits a channel: convert"):
        as_rgb(Image.new(mode, (3, 2), value))


def test_large_uploads_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = png(13_000, 13_000, bits=8, data=zlib.compress(bytes(99)))  # below Pillow's own limit
    with pytest.warns(Image.DecompressionBombWarning):
        with pytest.raises(ZooError, match=r"the image is 13000x13000: expected at most 50,000,000 pixels, shrink it"):
            as_rgb(huge)
    monkeypatch.setattr(images, "MAX_UPLOAD_PIXELS", 20 * 30)
    as_rgb(encoded("PNG", (30, 20)))
    with pytest.raises(ZooError, match="31x20"):
        as_rgb(encoded("PNG", (31, 20)))


def encoded(kind: str, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (10, 200, 30)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["EPS", "DDS", "TGA", "PCX", "ICO", "SGI"])
def test_unlisted_formats_are_not_decoded(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.png").write_bytes(encoded(kind, (30, 20)))
    for read in (as_rgb, image_size):
        with pytest.raises(ZooError, match=r"cannot read the image .*a\.png \(unknown format"):
            read(tmp_path / "a.png")


Image.init()


@pytest.mark.filterwarnings("ignore")  # Pillow warns of the damage
@pytest.mark.parametrize("kind", sorted(images.FORMATS & Image.SAVE.keys()))
def test_listed_formats_are_decoded_and_damage_is_a_one_line_error(kind: str) -> None:
    content = encoded(kind, (30, 20))
    assert np.abs(np.asarray(as_rgb(content)).astype(int) - (10, 200, 30)).max() < 12
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        for at in rng.integers(0, len(content), 4):
            damaged[at] = rng.integers(256)
        try:
            as_rgb(bytes(damaged[: rng.integers(1, len(content) + 1)]))
        except ZooError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 10


def test_a_damaged_pil_image_is_a_one_line_error(tmp_path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    with pytest.raises(ZooError, match="cannot decode the image given"):
        as_rgb(Image.open(tmp_path / "a.png"))
