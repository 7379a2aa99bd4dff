"""The local page: requests, errors, and a real browser."""

import http.client
import io
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import corrzoo
from corrzoo.apps import demo
from corrzoo.types import ZooError

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def parts():
    """A small matcher and a synthetic image."""
    torch.manual_seed(0)
    matcher = corrzoo.create_matcher("Baseline", "timm/test_vit.r160_in1k", "random", stride=8, point_query="features")
    matcher.image_size = 96
    return matcher, demo.synthetic_pair()[0]


@pytest.fixture
def server(parts):
    """A running server with an image and its enlargement."""
    matcher, image = parts
    with demo.Server(matcher, image, image.resize((240, 200))) as running:
        thread = threading.Thread(target=running.serve_forever, args=[0.02])
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ask(server, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    return reply.status, reply.read(), reply.headers


def png(size):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_the_server_is_local_and_matches_in_both_directions(server):
    assert server.server_address[0] == "127.0.0.1"
    w, h = server.images[0].size
    for side, trg in (("src", (240, 200)), ("trg", (w, h))):
        src = (w, h) if side == "src" else (240, 200)
        point = {"side": side, "x": 0.4 * src[0], "y": 0.6 * src[1]}
        status, content, _ = ask(server, "POST", "/match", json.dumps(point))
        answer = json.loads(content)
        assert status == 200
        assert abs(answer["x"] / trg[0] - 0.4) < 0.15 and abs(answer["y"] / trg[1] - 0.6) < 0.15
        heat = np.array(answer["heat"])
        assert heat.shape == (12, 12) and heat.min() == 0 and heat.max() == 1


def test_an_uploaded_image_replaces_one_side(server):
    status, content, _ = ask(server, "POST", "/trg", png((50, 30)))
    assert status == 200 and json.loads(content)["sizes"]["trg"] == [50, 30]
    assert Image.open(io.BytesIO(ask(server, "GET", "/trg?1")[1])).size == (50, 30)
    status, content, _ = ask(server, "POST", "/match", json.dumps({"side": "trg", "x": 60, "y": 3}))
    assert status == 400 and "(60, 3) lies outside the source image of 50x30" in json.loads(content)["error"]


@pytest.mark.parametrize(
    "method, path, body, headers, status",
    [
        ("GET", "/../../etc/passwd", None, {}, 404),
        ("GET", "/%2e%2e/demo.py", None, {}, 404),
        ("GET", "//etc/passwd", None, {}, 404),
        ("GET", "/", None, {"Host": "evil.example"}, 403),
        ("GET", "/state", None, {"Host": "127.0.0.1:1"}, 403),
        ("POST", "/src", b"x", {"Origin": "http://evil.example"}, 403),
        ("POST", "/nothing", b"x", {}, 404),
        ("POST", "/src", b"no image at all", {}, 400),
        ("POST", "/match", b"{", {}, 400),
        ("POST", "/match", b'{"side": "up", "x": 1, "y": 1}', {}, 400),
        ("POST", "/match", b'{"side": "src", "x": NaN, "y": 1}', {}, 400),
        ("POST", "/src", b"", {"Content-Length": str(2**40)}, 413),
        ("POST", "/src", b"", {"Content-Length": "-1"}, 413),
        ("DELETE", "/src", None, {}, 501),
    ],
)
def test_invalid_and_foreign_requests_are_refused(server, method, path, body, headers, status):
    found, content, _ = ask(server, method, path, body, **headers)
    assert found == status
    assert status == 501 or "\n" not in json.loads(content)["error"]
    assert ask(server, "GET", "/state")[0] == 200


def test_the_page_loads_nothing_from_other_sites(server):
    status, content, headers = ask(server, "GET", "/", Host=f"localhost:{server.server_port}")
    assert status == 200 and b"://" not in content
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")


@pytest.mark.parametrize(
    "args, said",
    [
        (["a.png"], "1 images given: expected two"),
        (["--port", "99999"], "--port 99999: expected 0 to 65535"),
        (["a.png", "b.png"], "no image file a.png"),
    ],
)
def test_command_line_errors_are_one_line(args, said):
    with pytest.raises(ZooError, match=said):
        demo.main(args)


@pytest.fixture
def browser(tmp_path):
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver on the PATH")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (extra `dev`)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "window-size=1280,900", f"user-data-dir={tmp_path}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_click_and_keyboard_in_a_real_browser(server, browser, tmp_path):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def said(unlike=""):
        WebDriverWait(browser, 20).until(lambda b: "cycle error" in text() and text() != unlike)
        return text()

    def text():
        return browser.find_element("id", "answer").text

    def red(side):
        """Share of an image that the similarity map colours red, its colour for medium scores."""
        image = browser.find_element("id", side).screenshot_as_png
        r, g, b = np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).astype(int).reshape(-1, 3).T
        return ((r > g + 50) & (r > b + 20)).mean()

    browser.get(server.url)
    WebDriverWait(browser, 20).until(lambda b: "Baseline on" in b.find_element("id", "model").text)
    before = red("trg")
    stage = browser.find_element("id", "src")
    w, h = server.images[0].size
    ActionChains(browser).move_to_element_with_offset(stage, 0, 0).click().perform()  # its middle
    first = said()
    x, y = (float(number) for number in first.split("(")[1].split(")")[0].split(","))
    assert abs(x - w / 2) < 2 and abs(y - h / 2) < 2 and "in the first image matches" in first
    u, v = (float(number) for number in first.split("(")[2].split(")")[0].split(","))
    answer = server.match(0, [x, y])
    assert abs(u - answer["x"]) < 0.5 and abs(v - answer["y"]) < 0.5
    assert red("trg") > before + 0.02
    browser.find_element("id", "heat").click()
    assert red("trg") < before + 0.01

    browser.find_element("id", "trg").send_keys(
        Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.SHIFT + Keys.ARROW_UP, Keys.ENTER
    )
    second = said(unlike=first)
    assert second.startswith(f"({120 - 2 * 240 / 50:.1f}, 99.0) in the second image matches")

    Image.new("RGB", (64, 48), "green").save(tmp_path / "own.png")
    browser.find_element("id", "file-src").send_keys(str(tmp_path / "own.png"))
    WebDriverWait(browser, 20).until(
        lambda b: b.find_element("id", "h-src").text.endswith("64 \N{MULTIPLICATION SIGN} 48")
    )
    Image.new("RGB", (30, 90)).save(tmp_path / "portrait.png")
    browser.find_element("id", "file-trg").send_keys(str(tmp_path / "portrait.png"))
    WebDriverWait(browser, 20).until(lambda b: "30" in b.find_element("id", "h-trg").text)
    assert browser.find_element("id", "trg").size["height"] < 900
    (tmp_path / "text.png").write_text("no image")
    browser.find_element("id", "file-src").send_keys(str(tmp_path / "text.png"))
    WebDriverWait(browser, 20).until(
        lambda b: "that was uploaded (unknown format or empty file)" in b.find_element("id", "error").text
    )
    loud = [entry for entry in browser.get_log("browser") if "400" not in entry["message"]]
    assert not loud, loud
