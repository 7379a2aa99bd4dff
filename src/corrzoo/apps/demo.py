"""`corrzoo demo`: a page on this machine. Click a point in one image, see its match and the heat map in the other."""

import io
import json
import threading
import webbrowser
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from PIL import Image

from corrzoo.apps import add_model, matcher_of
from corrzoo.data import create_dataset
from corrzoo.errors import Parser, ZooError
from corrzoo.images import ImageSource, as_rgb
from corrzoo.inference import ImagePair, open_pair
from corrzoo.matcher import Matcher

LIMIT = 32 * 2**20
"""Bytes of an image that may be sent."""
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SIDES = ("src", "trg")


class Server(ThreadingHTTPServer):
    """The demo's pair of images behind an address of this machine alone.

    Args:
        matcher: What matches.
        src: The first image.
        trg: The second.
        port: Where to listen; 0 for any free port.
    """

    daemon_threads = True

    def __init__(self, matcher: Matcher, src: ImageSource, trg: ImageSource, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.matcher, self.images, self.lock = matcher, [as_rgb(src), as_rgb(trg)], threading.Lock()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.server_port}/"

    @cached_property
    def pair(self) -> ImagePair:
        """The features of both images, computed when they are first asked for."""
        return open_pair(self.matcher, self.images[0], self.images[1])

    def state(self) -> dict[str, Any]:
        """What the page shows."""
        options = self.matcher.hparams
        sizes = {side: image.size for side, image in zip(SIDES, self.images, strict=True)}
        return {"model": f"{type(self.matcher).__name__} on {options['backbone']}", "sizes": sizes}

    def replace(self, side: int, content: bytes) -> dict[str, Any]:
        """Another image on one side."""
        image = as_rgb(content)
        with self.lock:
            self.images[side] = image
            self.__dict__.pop("pair", None)
            return self.state()

    def match(self, side: int, point: list[float]) -> dict[str, Any]:
        """A point's match in the other image, how far from the point it is matched back to, and the heat map."""
        with self.lock:
            pair = self.pair if side == 0 else self.pair.swapped()
            found, heat = pair.match_both_ways([point]), pair.heat_map(point)
        x, y = found.trg_points[0].tolist()
        shown = ((heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)).numpy().round(3)
        return {"x": x, "y": y, "round_trip": found.round_trip.item(), "heat": shown.tolist()}


class Handler(BaseHTTPRequestHandler):
    """Four addresses, and nothing that is a path of this machine's disk."""

    server: Server
    timeout = 30
    server_version, sys_version = "corrzoo", ""

    def do_GET(self) -> None:
        """The page, and its images."""
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
            self._fail(404, "there is no such page")

    def do_POST(self) -> None:
        """An image for one side, or a point to match."""
        if not self._is_own():
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LIMIT:
            self.close_connection = True  # what was sent is not read
            return self._fail(413, f"an image may have up to {LIMIT >> 20} MiB")
        content = self.rfile.read(int(length))
        try:
            if self.path in ("/src", "/trg"):
                self._send_json(self.server.replace(SIDES.index(self.path[1:]), content))
            elif self.path == "/match":
                self._send_json(self.server.match(*_asked(content)))
            else:
                self._fail(404, "there is no such page")
        except ZooError as error:
            self._fail(400, str(error))

    def _is_own(self) -> bool:
        """Whether this page asks: other sites' pages reach this port too, by a name that they make point to it."""
        own = {f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in own and (origin is None or origin.removeprefix("http://") in own):
            return True
        self.close_connection = True
        self._fail(403, f"open {self.server.url} itself")
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
        """Nothing: the terminal is for the address."""


def main(args: list[str]) -> None:
    """Run the command."""
    parser = Parser(prog="corrzoo demo", description=__doc__)
    parser.add_argument("images", nargs="*", help="two images; a drawn pair when not given")
    parser.add_argument("--port", type=int, default=0, help="where to listen (any free port)")
    parser.add_argument("--no-browser", action="store_true", help="only say the address")
    add_model(parser)
    said = parser.parse_args(args)
    if len(said.images) not in (0, 2):
        raise ZooError(f"{len(said.images)} image given: expected two, or none for a drawn pair")
    if not 0 <= said.port < 65536:
        raise ZooError(f"--port {said.port}: expected 0 to 65535")
    src, trg = [as_rgb(path) for path in said.images] or drawn_pair()
    with Server(matcher_of(said), src, trg, said.port) as server:
        print(f"{server.state()['model']}: {server.url} (Ctrl+C ends it)", flush=True)
        if not said.no_browser:
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def drawn_pair() -> list[Image.Image]:
    """Two drawn objects of one kind."""
    dataset = create_dataset("synthetic", "", "test", size=480)
    return [dataset.read_image(number) for number in dataset.image_numbers(0)]


def _asked(content: bytes) -> tuple[int, list[float]]:
    try:
        asked = json.loads(content)
        return SIDES.index(asked["side"]), [float(asked["x"]), float(asked["y"])]
    except (ValueError, KeyError, TypeError) as error:
        raise ZooError('expected {"side": "src" or "trg", "x": ..., "y": ...}') from error


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()
