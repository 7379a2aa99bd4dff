"""`corrzoo demo`: a local page. Click a point in one image, see its match and similarity map in the other."""

import io
import json
import re
import sys
import threading
import webbrowser
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from PIL import Image, ImageOps

from corrzoo.apps import add_model, matcher_of
from corrzoo.data import create_dataset
from corrzoo.errors import Parser, ZooError
from corrzoo.images import ImageSource, as_rgb
from corrzoo.inference import ImagePair, open_pair
from corrzoo.matcher import Matcher

LIMIT = 32 * 2**20
"""Largest size of an uploaded image in bytes."""
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SIDES = ("src", "trg")
JPEG_SIDE = 16384
"""our choice: longest side of an image on the page. JPEG and browsers have limits."""


class Server(ThreadingHTTPServer):
    """Server of the demo page, reachable from this machine only. Port 0 is any free one."""

    daemon_threads = True

    def __init__(self, matcher: Matcher, src: ImageSource, trg: ImageSource, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.matcher, self.images, self.lock = matcher, [as_rgb(src), as_rgb(trg)], threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print errors, except that the browser has closed a connection."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://127.0.0.1:{self.server_port}/"

    @cached_property
    def pair(self) -> ImagePair:
        """Features of both images, computed at the first query."""
        return open_pair(self.matcher, self.images[0], self.images[1])

    def state(self) -> dict[str, Any]:
        """Name of the model and sizes of the images, for the page."""
        sizes = {side: image.size for side, image in zip(SIDES, self.images, strict=True)}
        return {"model": self.matcher.title, "sizes": sizes}

    def replace(self, side: int, content: bytes) -> dict[str, Any]:
        """Replace the image of one side, and return the new state."""
        with self.lock:  # one at a time: a small file can decode to half a gigabyte
            self.images[side] = as_rgb(content)
            self.__dict__.pop("pair", None)
            return self.state()

    def match(self, side: int, point: list[float]) -> dict[str, Any]:
        """Match a point of one side: match (x, y), cycle error, and similarity map scaled to [0, 1]."""
        with self.lock:
            pair = self.pair if side == 0 else self.pair.swapped()
            found, heat = pair.match_both_ways([point]), pair.heat_map(point)
        x, y = found.trg_points[0].tolist()
        scaled = ((heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)).numpy().round(3)
        return {"x": x, "y": y, "cycle_error": found.cycle_error.item(), "heat": scaled.tolist()}


class Handler(BaseHTTPRequestHandler):
    """Requests of the page. No request is read as a path on this machine's disk."""

    server: Server
    timeout = 30
    server_version, sys_version = "corrzoo", ""

    def do_GET(self) -> None:
        """Send the page, its state or an image."""
        path = self.path.partition("?")[0]
        if not self._is_own():
            return
        if path == "/":
            self._send(files("corrzoo.apps").joinpath("demo.html").read_bytes(), "text/html; charset=utf-8")
        elif path == "/state":
            self._send_json(self.server.state())
        elif path in ("/src", "/trg"):
            self._send(_jpeg(self.server.images[SIDES.index(path[1:])]), "image/jpeg")
        else:
            self._fail(404, "no such page")

    def do_POST(self) -> None:
        """Take an image for one side, or match a point."""
        if not self._is_own():
            return
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > LIMIT:
            self.close_connection = True  # the body is not read
            return self._fail(413, f"the file is larger than {LIMIT >> 20} MiB: choose a smaller image")
        content = self.rfile.read(int(length))
        try:
            if self.path in ("/src", "/trg"):
                self._send_json(self.server.replace(SIDES.index(self.path[1:]), content))
            elif self.path == "/match":
                self._send_json(self.server.match(*_read_query(content)))
            else:
                self._fail(404, "no such page")
        except ZooError as error:
            self._fail(400, str(error))

    def _is_own(self) -> bool:
        """Whether the request comes from this page. Pages of other sites can reach this port, too (DNS rebinding)."""
        own = {f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in own and (origin is None or origin.removeprefix("http://") in own):
            return True
        self.close_connection = True
        self._fail(403, f"request from another page: open {self.server.url}")
        return False

    def _send_json(self, content: dict[str, Any], status: int = 200) -> None:
        self._send(json.dumps(content).encode(), "application/json", status)

    def _fail(self, status: int, message: str) -> None:
        self._send_json({"error": message}, status)

    def _send(self, content: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Content-Security-Policy": POLICY}
        for name, value in (headers | {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: the terminal shows the address."""


def main(args: list[str]) -> None:
    """Run the command."""
    parser = Parser(prog="corrzoo demo", description=__doc__)
    parser.add_argument("images", nargs="*", help="two images (a synthetic pair if not given)")
    parser.add_argument("--port", type=int, default=0, help="port of the page (any free one)")
    parser.add_argument("--no-browser", action="store_true", help="print the address, but open no browser")
    add_model(parser)
    options = parser.parse_args(args)
    if len(options.images) not in (0, 2):
        raise ZooError(f"{len(options.images)} images given: expected two, or none for a synthetic pair")
    if not 0 <= options.port < 65536:
        raise ZooError(f"--port {options.port}: expected 0 to 65535")
    src, trg = [as_rgb(path) for path in options.images] or synthetic_pair()
    with Server(matcher_of(options), src, trg, options.port) as server:
        print(f"{server.state()['model']}: {server.url} (Ctrl+C to stop)", flush=True)
        if not options.no_browser:
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def synthetic_pair() -> list[Image.Image]:
    """Render two objects of one category."""
    dataset = create_dataset("synthetic", "", "test", size=480)
    return [dataset.read_image(number) for number in dataset.image_numbers(0)]


def _read_query(content: bytes) -> tuple[int, list[float]]:
    try:
        query = json.loads(content)
        return SIDES.index(query["side"]), [float(query["x"]), float(query["y"])]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ZooError('expected {"side": "src" or "trg", "x": ..., "y": ...}') from error


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    if max(image.size) > JPEG_SIDE:
        image = ImageOps.contain(image, (JPEG_SIDE, JPEG_SIDE))
    image.save(file, "JPEG", quality=92)
    return file.getvalue()
