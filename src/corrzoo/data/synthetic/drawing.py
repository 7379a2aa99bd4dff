"""Synthetic objects with joints and ten keypoints each. Instances differ in proportions, pose and colour.

Repeated parts (wheels, hooves, feet) and mirrored parts (both sides of a bottle) have one keypoint each, so that only
their context distinguishes them. All numbers here are our choice, made by eye.
"""

# ruff: noqa: RUF005 - tuples are added to arrays here

from collections.abc import Callable
from colorsys import hsv_to_rgb
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

Points = NDArray[np.float64]
"""(n, 2) points (x, y), y downwards."""
Colour = tuple[int, int, int]
Sketch = tuple[list[tuple[Points, Colour]], list[ArrayLike]]
"""An object in its own frame, facing right: polygons from back to front, and ten keypoints."""

DARK, GLASS, PALE = (45, 42, 48), (176, 212, 226), (244, 240, 228)
HORN, RED, LAMP = (238, 158, 52), (214, 62, 54), (255, 232, 150)
SHARP = 2
"""Factor by which images are drawn larger and then reduced, for antialiasing."""


class View(NamedTuple):
    """An object placed in an image. All coordinates are in pixels of that image."""

    size: tuple[int, int]  # (w, h)
    shapes: list[tuple[Points, Colour]]  # from back to front, without the occluder
    occluder: tuple[Points, Colour] | None
    kps: Points  # (10, 2)
    visible: NDArray[np.bool_]  # (10,) inside the image and not covered by the occluder
    box: Points  # (4,) xyxy, clipped to the image
    mirrored: bool
    yaw: float  # rotation out of the image plane, in degrees
    truncated: bool
    seed: int  # of the background, light and grain


def hue(rng: Generator, saturation: tuple[float, float], value: tuple[float, float]) -> Colour:
    """A random colour with saturation and value in the given ranges."""
    r, g, b = hsv_to_rgb(rng.uniform(), rng.uniform(*saturation), rng.uniform(*value))
    return int(255 * r), int(255 * g), int(255 * b)


def shade(colour: Colour, factor: float) -> Colour:
    """Make a colour darker (factor < 1) or lighter."""
    r, g, b = (min(255, int(c * factor)) for c in colour)
    return r, g, b


def polygon(*corners: ArrayLike) -> Points:
    """(n, 2) corners."""
    return np.array(corners, dtype=np.float64)


def ring(angles: Points) -> Points:
    """(n, 2) points of the unit circle at angles (n,)."""
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


_CIRCLE = ring(np.linspace(0, 2 * np.pi, 20, endpoint=False))
_HALF = ring(np.linspace(-np.pi / 2, np.pi / 2, 7))


def ellipse(centre: Points | tuple[float, float], rx: float, ry: float, tilt: float = 0.0) -> Points:
    """A polygon that approximates an ellipse, rotated by `tilt` radians."""
    return _CIRCLE * (rx, ry) @ _rotation(tilt) + centre


def limb(start: ArrayLike, end: ArrayLike, r: float, s: float) -> Points:
    """A rounded stick from `start`, with radius r, to `end`, with radius s."""
    p, q = polygon(start, end)
    cap = _HALF @ _rotation(np.arctan2(*(q - p)[::-1]))
    return np.concatenate([q + s * cap, p - r * cap])


_T = np.linspace(0, 1, 5, endpoint=False)[:, None] ** np.arange(4)
_CATMULL_ROM = _T @ np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]) / 2  # (5, 4)


def smooth(*corners: ArrayLike) -> Points:
    """A closed Catmull-Rom curve through the corners."""
    p = polygon(*corners)
    near = p[(np.arange(len(p))[:, None] + [-1, 0, 1, 2]) % len(p)]  # (n, 4, 2)
    return (_CATMULL_ROM @ near).reshape(-1, 2)


def step(joint: Points, length: float, angle: float) -> Points:
    """The point at a distance `length` below a joint, rotated around it by `angle` radians."""
    return joint + (length * np.sin(angle), length * np.cos(angle))


# fmt: off
def bird(rng: Generator) -> Sketch:
    """Keypoints: beak, crown, eye, breast, back, shoulder, tips of wing and tail, feet (front, rear)."""
    u, plumage, wing = rng.uniform, hue(rng, (0.4, 0.85), (0.55, 0.95)), hue(rng, (0.3, 0.8), (0.4, 0.8))
    long, deep, r, lift = u(0.42, 0.55), u(0.24, 0.32), u(0.17, 0.22), u(-0.3, 1.5)
    head = x, y = np.array([0.85 * long, -deep - u(0.12, 0.28)])
    beak, eye = head + (r + u(0.12, 0.26), u(-0.02, 0.08)), head + (0.06, -0.04)
    tail, shoulder, span = np.array([-long - u(0.3, 0.55), u(-0.15, 0.25)]), np.array([0.12, -0.1]), u(0.55, 0.8)
    tip = shoulder + span * np.array([-np.cos(lift), 0.25 - np.sin(lift)])
    middle, across = (shoulder + tip) / 2, (tip - shoulder)[::-1] * (-1, 1) / span * u(0.13, 0.2)
    feet = [np.array([x, deep + u(0.18, 0.3)]) for x in (0.17, -0.08)]
    shapes = [
        (polygon((0.1 - long, -0.08), tail - (0, 0.08), tail + (0.05, 0.07), (0.1 - long, 0.1)), wing),
        *((limb((foot[0], deep - 0.05), foot, 0.025, 0.02), HORN) for foot in feet),
        *((limb(foot, foot + (0.1, 0.02), 0.025, 0.015), HORN) for foot in feet),
        (polygon(head + (r - 0.05, -0.08), beak, head + (r - 0.05, 0.09)), HORN),
        (smooth((-long - 0.05, 0.02), (-0.1, -deep), (x - r, y), (x, y - r), (x + r, y), (long, 0), (0.15, deep),
                (-0.25, 0.8 * deep)), plumage),
        (smooth((long - 0.06, -0.02), (0.2, 0.02), (-0.1, 0.55 * deep), (0.15, 0.9 * deep)), shade(plumage, 1.35)),
        (ellipse(eye, 0.05, 0.05), PALE),
        (ellipse(eye, 0.03, 0.03), DARK),
        (smooth(shoulder + (0.08, 0), middle - across, tip, middle + across), wing),
        (smooth(shoulder, middle - across / 3, (tip + middle) / 2, middle + across / 3), shade(wing, 1.3)),
    ]
    return shapes, [beak, (x, y - r), eye, (0.97 * long, 0.02), (-0.1, -deep), shoulder, tip, tail + (0.025, 0), *feet]


def bottle(rng: Generator) -> Sketch:
    """Keypoints, left then right: mouth, foot of the neck, shoulder, upper corner of the label, base."""
    u, glass, paper = rng.uniform, hue(rng, (0.3, 0.8), (0.35, 0.85)), hue(rng, (0.05, 0.5), (0.8, 1))
    tall, wide, thin, cap = u(1.4, 2.1), u(0.22, 0.42), u(0.08, 0.13), hue(rng, (0.4, 0.9), (0.4, 0.9))
    neck, shoulder, bottom = -tall * u(0.62, 0.76), -tall * u(0.42, 0.58), -tall * u(0.08, 0.16)
    top, lip, gleam = shoulder * u(0.7, 0.9), thin + 0.02, rng.choice([-1, 1]) * wide * 0.72  # on either side
    half = [(thin, -tall), (thin, neck), (0.75 * wide, (neck + 2 * shoulder) / 3), (wide, shoulder), (wide, -0.06),
            (wide - 0.05, 0)]
    shapes = [
        (polygon(*half, *((-x, y) for x, y in reversed(half))), glass),
        (limb((gleam, shoulder + 0.1), (gleam, -0.15), 0.03, 0.03), shade(glass, 1.4)),
        (polygon((-wide, top), (wide, top), (wide, bottom), (-wide, bottom)), paper),
        (ellipse((0, (top + bottom) / 2), wide * u(0.3, 0.6), (bottom - top) * u(0.2, 0.35)), cap),
        (polygon((-lip, -tall - 0.03), (lip, -tall - 0.03), (lip, 0.16 - tall), (-lip, 0.16 - tall)), cap),
    ]
    sides = [(thin, -tall), (thin, neck), (wide, shoulder), (wide, top), (wide - 0.025, -0.03)]
    return shapes, [(side * x, y) for x, y in sides for side in (-1, 1)]


def car(rng: Generator) -> Sketch:
    """Keypoints: wheels (rear, front), head and tail light, foot and top of windscreen, of rear window, bumpers."""
    u, paint = rng.uniform, hue(rng, (0.4, 0.85), (0.6, 0.95))
    r, belt, tyre, rim = u(0.16, 0.22), -u(0.4, 0.5), shade(DARK, u(0.7, 1.2)), hue(rng, (0.0, 0.15), (0.65, 0.95))
    a, b, c, d = u(0.3, 0.5), u(0.02, 0.18), -u(0.3, 0.5), -u(0.6, 0.9)  # along the cabin, from front to rear
    roof, sill, pillar = belt - u(0.22, 0.36), -0.75 * r, (b + c) / 2
    lamp, tail = (0.92, belt + 0.16), (-0.95, belt + 0.14)
    low, high, wheels = belt - 0.01, roof + 0.06, [(-u(0.52, 0.66), -r), (u(0.54, 0.66), -r)]
    shapes = [
        (polygon((d, belt + 0.04), (c, roof), (b, roof), (a, belt + 0.04)), paint),
        (smooth((-0.98, sill), (-1, belt + 0.12), (-0.95, belt), (d, low), (a, belt), (0.9, belt + 0.07), (1, -0.3),
                (0.98, sill), (0, sill + 0.02)), paint),
        (polygon((d + 0.12, low), (c + 0.03, high), (pillar - 0.03, high), (pillar - 0.03, low)), GLASS),
        (polygon((pillar + 0.03, low), (pillar + 0.03, high), (b - 0.02, high), (a - 0.1, low)), GLASS),
        (polygon((-0.93, sill), (-0.9, sill - 0.07), (0.9, sill - 0.07), (0.93, sill)), shade(paint, 0.7)),
        (limb((pillar + 0.08, belt + 0.09), (pillar + 0.16, belt + 0.09), 0.015, 0.015), shade(paint, 0.5)),
        (ellipse(lamp, 0.06, 0.05), LAMP),
        (ellipse(tail, 0.04, 0.07), RED),
        *((ellipse(wheel, 1.2 * r, 1.2 * r), shade(paint, 0.45)) for wheel in wheels),
        *((ellipse(wheel, r, r), tyre) for wheel in wheels),
        *((ellipse(wheel, r / 2, r / 2), rim) for wheel in wheels),
    ]
    return shapes, [*wheels, lamp, tail, (a, belt), (b, roof), (d, belt), (c, roof), (0.98, sill), (-0.98, sill)]


def horse(rng: Generator) -> Sketch:
    """Keypoints: nose, ear, withers, root and tip of the tail, hooves (front near, far; hind near, far), chest."""
    u, coat = rng.uniform, hue(rng, (0.25, 0.6), (0.5, 0.95))
    mane, leg, long, thick, nod = shade(coat, u(0.35, 0.6)), u(0.26, 0.36), u(0.46, 0.6), u(0.055, 0.075), u(-0.25, 0.5)
    back = -2 * leg - u(0.3, 0.38)
    neck, root = np.array([long - 0.1, back + 0.08]), np.array([-long, back + 0.08])
    poll = step(neck, u(0.4, 0.55), np.pi - 0.5 - nod / 2)
    nose = step(poll, u(0.24, 0.32), 0.9 - nod)
    bend = step(root, u(0.2, 0.3), -u(0.2, 1.2))
    tip = step(bend, u(0.25, 0.35), u(-0.5, 0.2))
    legs, feet, hooves = [], [], []
    for k, x in enumerate((long - 0.13, long - 0.26, 0.12 - long, 0.26 - long)):
        swing, tone = u(-0.35, 0.35), shade(coat, 0.75 if k % 2 else 1)  # the far legs are darker
        hip = np.array([x, back + 0.26])
        knee = step(hip, leg + 0.02, swing)
        hoof = step(knee, leg, swing + u(-0.45, 0.05) * (1 if k > 1 else 0.4))
        legs.append([(limb(hip, knee, 1.6 * thick, thick), tone), (limb(knee, hoof, thick, 0.7 * thick), tone)])
        feet.append((ellipse(hoof, thick, 0.7 * thick), DARK))
        hooves.append(hoof)
    spots = [(u(0.15 - long, long - 0.2), back + u(0.1, 0.24)) for _ in range(rng.integers(4))]
    shapes = [
        (limb(root, bend, 0.05, 0.06), mane), (limb(bend, tip, 0.06, 0.02), mane),
        *legs[1], *legs[3], *feet[1::2],
        (limb(neck - (0.1, 0.05), poll - (0.05, 0), 0.09, 0.07), mane),
        *legs[0], *legs[2],
        (smooth((-long, back + 0.12), (0.12 - long, back), (0, back + 0.03), (long - 0.15, back), (long, back + 0.16),
                (long - 0.12, back + 0.34), (0, back + 0.36), (0.1 - long, back + 0.33)), coat),
        (limb(neck, poll, 0.17, 0.1), coat), (limb(poll, nose, 0.1, 0.06), coat),
        *feet[::2],
        *((ellipse(spot, u(0.05, 0.12), u(0.04, 0.08), u(0, 3)), shade(coat, u(0.6, 1.4))) for spot in spots),
        (polygon(poll + (-0.07, 0.02), poll + (-0.02, -0.18), poll + (0.06, -0.02)), mane),
        (ellipse(nose + (0.01, 0.02), 0.05, 0.045), shade(coat, 0.6)),
        (ellipse(0.7 * poll + 0.3 * nose + (0.01, -0.04), 0.02, 0.02), DARK),
    ]
    ear, withers, chest = poll + (-0.02, -0.17), (long - 0.2, back + 0.01), (long - 0.01, back + 0.2)
    return shapes, [nose, ear, withers, root, tip, *hooves, chest]
# fmt: on


OBJECTS: dict[str, Callable[[Generator], Sketch]] = {"bird": bird, "bottle": bottle, "car": car, "horse": horse}
"""Objects by the names of SPair-71k's categories."""


def view(category: str, side: int, rng: Generator) -> View:
    """A random object in an image of about side x side pixels, with at least 7 visible keypoints.

    It has 0.45 to 1 of the size that fits, is rotated by up to 20 degrees in the plane and 45 out of it, mirrored with
    p = 0.3, partly occluded with p = 0.3, and cut by the border with p = 0.15.
    """
    while True:
        placed = _place(category, side, rng)
        if placed.visible.sum() >= 7:  # so any two views share at least 4 of the 10 keypoints
            return placed


def _place(category: str, side: int, rng: Generator) -> View:
    u = rng.uniform
    sketch, keypoints = OBJECTS[category](rng)
    aspect = np.exp(u(-0.2, 0.2))
    size = np.round(side * u(0.85, 1.25) * np.array([aspect, 1 / aspect]))
    points = np.concatenate([*(points for points, _ in sketch), polygon(*keypoints)])
    low, high = points.min(0), points.max(0)
    points = (points - (low + high) / 2) / (np.max(high - low) / 2)
    # A rotation out of the plane makes an object narrower, and larger at the nearer end. A bottle leans back instead of
    # turning, and is never mirrored: one would look the same.
    along, across = (1, 0) if category == "bottle" else (0, 1)
    yaw, turn, mirrored = u(-45, 45), np.radians(u(-20, 20)), category != "bottle" and u() < 0.3
    points[:, across] *= 1 + 0.3 * np.sin(np.radians(yaw)) * points[:, along]
    points[:, along] *= np.cos(np.radians(yaw))
    points = points * (-1 if mirrored else 1, 1) @ _rotation(turn)
    low, high = points.min(0), points.max(0)
    scale = u(0.45, 1) * 0.97 * np.min(size / (high - low))
    extent = scale * (high - low)
    corner = u(0, 1, 2) * (size - extent)
    if truncated := u() < 0.15:
        axis, out = rng.integers(2), u(0.12, 0.3)
        corner[axis] = rng.choice([-out * extent[axis], size[axis] - (1 - out) * extent[axis]])
    points = (points - low) * scale + corner
    *shapes, kps = np.split(points, np.cumsum([len(points) for points, _ in sketch]))
    visible = np.all((kps >= 0) & (kps <= size), axis=1)
    occluder = None
    if u() < 0.3:
        half, axes = extent.max() * u([0.06, 0.15], [0.14, 0.4]), _rotation(u(0, np.pi))
        centre = kps[rng.integers(10)] + u(-0.5, 0.5, 2) * half[0]
        visible &= np.any(np.abs((kps - centre) @ axes.T) > half, axis=1)
        occluder = half * polygon((-1, -1), (1, -1), (1, 1), (-1, 1)) @ axes + centre, hue(rng, (0.1, 0.7), (0.3, 0.9))
    return View(
        size=(int(size[0]), int(size[1])),
        shapes=[(shape, colour) for shape, (_, colour) in zip(shapes, sketch, strict=True)],
        occluder=occluder,
        kps=kps,
        visible=visible,
        box=np.clip([*corner, *corner + extent], 0, np.tile(size, 2)),
        mirrored=mirrored,
        yaw=yaw,
        truncated=truncated,
        seed=int(rng.integers(2**32)),
    )


def render(placed: View) -> Image.Image:
    """Render the RGB image: clutter, the object with dark outlines, the occluder, light and grain."""
    rng = np.random.default_rng(placed.seed)
    w, h = placed.size
    image = _background(w, h, rng)
    draw, width = ImageDraw.Draw(image), max(2, round(0.02 * SHARP * min(w, h)))
    # Neighbours of one colour share their outline, so that limbs look joined to the body.
    for colour, group in groupby([*placed.shapes, *filter(None, [placed.occluder])], key=itemgetter(1)):
        outlines = [(SHARP * points).ravel().tolist() for points, _ in group]
        for outline in outlines:
            draw.line([*outline, *outline[:4]], shade(colour, 0.5), width)
        for outline in outlines:
            draw.polygon(outline, colour)
    light = np.linspace(rng.uniform(0.7, 1.2), rng.uniform(0.7, 1.2), w, dtype=np.float32)[:, None]
    grain = np.frombuffer(rng.bytes(w * h), np.int8).reshape(h, w, 1) * np.float32(rng.uniform(0.02, 0.1))
    pixels = np.asarray(image.reduce(SHARP)) * light + grain
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _background(w: int, h: int, rng: Generator) -> Image.Image:
    """Clouds of one colour, with p = 0.5 over a ground, and random shapes; SHARP times as large."""
    W, H, n = SHARP * w, SHARP * h, int(rng.integers(3, 9))
    clouds = np.array(hue(rng, (0.05, 0.35), (0.6, 0.95))) + rng.normal(0, rng.uniform(5, 25), (n, n, 1))
    clouds = np.clip(clouds + rng.normal(0, rng.uniform(3, 12), (n, n, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(clouds).resize((40, 40), Image.Resampling.BICUBIC).resize((W, H), Image.Resampling.BILINEAR)
    draw, side = ImageDraw.Draw(image), min(W, H)
    if rng.uniform() < 0.5:
        left, right = H * rng.uniform(0.55, 0.85) + side * rng.uniform(-0.05, 0.05, 2)
        draw.polygon([0, left, W, right, W, H, 0, H], hue(rng, (0.1, 0.45), (0.4, 0.85)))
    for _ in range(rng.integers(3, 10)):
        rx, ry = rng.uniform(0.03, 0.14, 2) * side
        shape = ellipse(rng.uniform(0, [W, H]), rx, ry, rng.uniform(0, 3))
        corners = shape[:: rng.choice([1, 5, 7])]  # an ellipse, a square or a triangle
        draw.polygon(corners.ravel().tolist(), hue(rng, (0.05, 0.5), (0.45, 0.95)))
    return image


def _rotation(angle: float) -> Points:
    """Rotation matrix for rows of points: `points @ _rotation(angle)`."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, s], [-s, c]])
