"""The leaderboard's page as a reader has it: opened from a file, in a real browser."""

import json
import shutil
from pathlib import Path

import pytest

from corrzoo.leaderboard import main

ROOT = Path(__file__).resolve().parents[2]
HEADS = ("Baseline", "ACTR", "ViTSC", "GSF", "LPMFlow")


def results():
    """A study of every head on two backbones, three seeds each, and one ablation with one seed."""
    for h, head in enumerate(HEADS):
        for b, backbone in enumerate(("resnet18", "dinov2_s14")):
            for seed in range(3):
                yield result(
                    head, backbone, 40 + 9 * h + 4 * b + seed, seed, ms=5.0 * (h + 1) + b, params=10 ** (4 + h // 2)
                )
    yield result("ACTR", "resnet18", 41.0, 0, label="actr_no_source_pe", ms=9.0, params=10_000)


def result(head, backbone, pck, seed, ms, params, label="", dataset="cub"):
    def row(shift):
        return {f"pck@{a:g}/image": (pck + shift) * a * 10 for a in (0.05, 0.1)}

    difficulty = {"0": row(6.0), "1": row(0.0), "2": row(-7.0)}
    return {
        **{"label": label, "head": head, "backbone": backbone, "dataset": dataset, "split": "test", "pairs": 400},
        **{
            "protocol": "default:bbox",
            "alphas": [0.05, 0.1],
            "seed": seed,
            "checkpoint": "best.ckpt",
            "resolution": 128,
        },
        **{"trained": {"dataset": dataset, "seed": seed}, "versions": {"corrzoo": "0.1.0"}, "options": {}},
        **{"ms_per_pair": ms, "peak_memory_mb": 800.0 + ms, "params_head": params, "params_backbone": 11_000_000},
        "pck": {"pck@0.05": pck / 2, "pck@0.1": float(pck)},
        "breakdown": {"category": {c: row(i - 2) for i, c in enumerate(("fish", "bird", "car", "house"))}}
        | {"viewpoint": difficulty, "geometry": {"ambiguous": row(-9.0), "other": row(3.0)}, "occlusion": {}},
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a made-up study, a synthetic one, and the repository's own results."""
    folder = tmp_path_factory.mktemp("leaderboard")
    for study in ("study", "toy"):
        (folder / study).mkdir()
    for i, content in enumerate(results()):
        (folder / "study" / f"{i}.json").write_text(json.dumps(content))
    toy = result("ACTR", "resnet18", 41.0, 0, ms=9.0, params=10_000, label="toy_row", dataset="synthetic")
    (folder / "toy" / "0.json").write_text(json.dumps(toy))
    main(
        [
            str(folder / "study"),
            str(folder / "toy"),
            str(ROOT / "benchmarks" / "results" / "pfwillow"),
            f"--out={folder}",
        ]
    )
    return folder / "leaderboard.html"


@pytest.fixture(scope="module")
def browser():
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver on the PATH")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (extra `dev`)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,2600"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def opened(browser, page):
    """The page just opened; afterwards, nothing may have been complained of in the console."""
    browser.get(page.as_uri())
    yield browser
    assert browser.get_log("browser") == []


STUDY = 2
"""The place of the made-up study on the page."""


def column(browser, title, section=STUDY):
    """The visible cells of a ranking's column."""
    return browser.execute_script(
        """
        const table = document.querySelectorAll("main section")[arguments[1]].querySelector("table");
        const place = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent === arguments[0]);
        const rows = [...table.querySelectorAll("tbody tr:not(.group)")].filter(row => !row.hidden);
        return rows.map(row => row.cells[place].textContent);
        """,
        title,
        section,
    )


def button(browser, title, section=STUDY):
    found = browser.find_elements("css selector", "main section")[section].find_elements("css selector", "thead button")
    return next(one for one in found if one.text == title)


def sorted_by(browser, section=STUDY):
    """Columns of a ranking that say that they sort it, and how."""
    heads = browser.find_elements("css selector", "main section")[section].find_elements(
        "css selector", "th[aria-sort]"
    )
    return {th.text: th.get_attribute("aria-sort") for th in heads if th.get_attribute("aria-sort") != "none"}


def sections(browser):
    """Title of each visible ranking, with its details."""
    found = browser.find_elements("css selector", "section")
    return [section.find_element("css selector", "h2").text for section in found if section.is_displayed()]


def test_published_spair_71k_comes_first_then_measured_rankings_then_the_others(opened):
    assert sections(opened) == [
        "SPair-71k published test split threshold bbox",
        "PF-WILLOW measured, study pfwillow test split 900 pairs protocol default:bbox-kp "
        "supervision: training-free (zero-shot) 320 px seeds: 1 device: cpu",
        "CUB-200-2011 measured, study study test split 400 pairs protocol default:bbox trained on CUB-200-2011 128 px",
        "PF-PASCAL published test split threshold img",
        "PF-WILLOW published test split threshold bbox",
        "PF-WILLOW published test split threshold bbox-kp",
        "synthetic pairs measured, study toy test split 400 pairs protocol default:bbox",
    ]


def test_the_contents_link_every_ranking_by_dataset(opened):
    items = opened.find_elements("css selector", "nav li")
    assert [item.text.splitlines()[0] for item in items] == [
        *("SPair-71k", "PF-WILLOW", "CUB-200-2011", "PF-PASCAL", "synthetic pairs")
    ]
    assert items[1].text.splitlines()[1:] == [
        "measured, study pfwillow, threshold bbox-kp: 10 rows",
        "published, threshold bbox: 19 rows",
        "published, threshold bbox-kp: 19 rows",
    ]
    links = opened.find_elements("css selector", "nav a")
    assert [link.get_attribute("href").split("#")[1] for link in links] == ["r0", "r1", "r4", "r5", "r2", "r3", "r6"]


COVERED = """
const heading = document.querySelectorAll("main section")[arguments[0]].querySelector("h2").getBoundingClientRect();
return heading.top < document.querySelector(".filters").getBoundingClientRect().bottom || heading.bottom > innerHeight;
"""


def test_a_link_of_the_contents_shows_the_heading_of_its_ranking(opened):
    """The filters stay at the top of the window and must not cover it."""
    opened.find_elements("css selector", "nav a")[4].click()
    assert opened.current_url.endswith("#r2")
    wait_until(opened, lambda _: opened.execute_script("return scrollY > 100"))
    assert not opened.execute_script(COVERED, 2)


def test_synthetic_rankings_are_folded_until_a_link_or_a_filter_opens_them(opened, page):
    def shown():
        return opened.execute_script("return [...document.querySelectorAll('.ranking')].map(ranking => ranking.open)")

    assert shown() == [True] * 6 + [False]
    opened.find_elements("css selector", "nav a")[-1].click()
    wait_until(opened, lambda _: shown() == [True] * 7)
    opened.get("about:blank")
    opened.get(page.as_uri())
    assert shown()[-1] is False
    opened.find_element("id", "word").send_keys("toy_row")
    assert shown()[-1] is True and column(opened, "variant", 6) == ["toy_row"]


def test_a_ranking_is_grouped_by_supervision(opened):
    section = opened.find_elements("css selector", "main section")[STUDY]
    assert [head.text for head in section.find_elements("css selector", ".group")] == [
        "supervision: keypoints",
        "supervision: weak",
    ]
    assert column(opened, "#") == [*map(str, range(1, 10)), "1", "2"]
    assert column(opened, "supervision") == ["keypoints"] * 9 + ["weak"] * 2
    assert column(opened, "method")[-2:] == ["GSF"] * 2
    opened.find_element("css selector", "#head option[value=ACTR]").click()
    assert [head.is_displayed() for head in section.find_elements("css selector", ".group")] == [True, False]


def test_groups_are_sorted_by_mouse_and_by_keyboard(opened):
    from selenium.webdriver.common.keys import Keys

    assert sorted_by(opened) == {"#": "ascending"}
    button(opened, "ms / pair").click()
    assert sorted_by(opened) == {"ms / pair": "descending"}
    assert [float(ms) for ms in column(opened, "ms / pair")] == [26, 25, 16, 15, 11, 10, 9, 6, 5, 21, 20]
    button(opened, "ms / pair").send_keys(Keys.ENTER)
    assert sorted_by(opened) == {"ms / pair": "ascending"} and column(opened, "ms / pair")[0] == "5.0"
    button(opened, "method").send_keys(Keys.SPACE)
    assert sorted_by(opened) == {"method": "ascending"} and column(opened, "method")[:3] == ["ACTR"] * 3
    assert "Sorted by method, ascending" in opened.find_element("css selector", "[role=status]").text
    assert sorted_by(opened, 0) == {"#": "ascending"}  # the other rankings stay as they were


def test_empty_cells_come_last_either_way(opened):
    for _ in range(2):
        button(opened, "published @0.01", 0).click()
        cells = column(opened, "published @0.01", 0)
        assert "" in cells and cells == sorted(cells, key=lambda cell: cell == "")


def test_filters(opened):
    def choose(name, value):
        opened.find_element("css selector", f"#{name} option[value='{value}']").click()

    everything = opened.find_element("id", "shown").text
    choose("dataset", "CUB-200-2011")
    assert [title.split()[0] for title in sections(opened)] == ["CUB-200-2011"]
    choose("backbone", "resnet18")
    assert len(column(opened, "method")) == 6
    choose("head", "ACTR")
    assert column(opened, "variant") == ["", "actr_no_source_pe"] and opened.find_element(
        "id", "shown"
    ).text.startswith("2 of")
    opened.find_element("id", "word").send_keys("source_pe")
    assert column(opened, "variant") == ["actr_no_source_pe"]
    opened.find_element("id", "word").clear()
    for name in ("head", "backbone", "dataset"):
        choose(name, "")
    opened.find_element("id", "word").send_keys("x\b")
    assert opened.find_element("id", "shown").text == everything
    choose("protocol", "published:bbox-kp")
    assert sections(opened) == ["PF-WILLOW published test split threshold bbox-kp"]


def test_plots_follow_ticked_rows_and_have_their_numbers_in_a_table(opened):
    def figures():
        section = opened.find_elements("css selector", "main section")[STUDY]
        return {
            f.find_element("css selector", "figcaption").text: f
            for f in section.find_elements("css selector", "figure")
        }

    assert not figures()
    unfold_plots(opened, STUDY)
    titles = ["PCK @0.1 by category", "PCK @0.1 by viewpoint, geometry", "PCK @0.1 against cost (ms / pair)"]
    assert list(figures()) == titles
    levels = figures()[titles[1]].find_elements("css selector", "svg[role=img] > text.name")
    assert [level.text for level in levels] == [
        *("viewpoint easy", "viewpoint medium", "viewpoint hard", "geometry ambiguous", "geometry other")
    ]
    bars = figures()[titles[0]]
    assert (
        len(bars.find_elements("css selector", "svg[role=img] rect")) == 4 * 4
    )  # the best rows of four methods are ticked at first
    assert bars.find_element("css selector", "svg[role=img]").get_attribute("aria-label")
    opened.find_elements("css selector", "main section")[STUDY].find_elements("css selector", "tbody input")[0].click()
    bars = figures()[titles[0]]
    assert len(bars.find_elements("css selector", "svg[role=img] rect")) == 3 * 4
    bars.find_element("css selector", "summary").click()
    cells = [td.text for td in bars.find_elements("css selector", "tbody tr:first-child td")]
    assert cells == ["61.0", "52.0", "43.0"]  # fish, two below the mean over three seeds, of the other methods' best
    points = figures()[titles[2]].find_elements("css selector", "svg[role=img] > path")
    assert len(points) == 11
    opened.find_element("css selector", "#cost option[value=params_head]").click()
    opened.find_element("css selector", "#measure option[value='PCK @0.05']").click()
    assert list(figures())[2] == "PCK @0.05 against cost (head params (M))"


def wait_until(browser, condition):
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, 20).until(condition)


def unfold_plots(browser, section):
    found = browser.find_elements("css selector", "main section")[section]
    summary = found.find_element("css selector", ".plots > summary")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", summary)
    summary.click()
    wait_until(browser, lambda _: found.find_elements("css selector", "figure"))  # `toggle` is an asynchronous event


OVERLAPPING = """
const ticks = [...document.querySelectorAll("figure svg[role=img] > text[text-anchor=middle]:not(.name)")];
const ends = ticks.map(tick => tick.getBoundingClientRect()).sort((a, b) => a.left - b.left);
return [ticks.length, ends.filter((end, i) => i && end.left < ends[i - 1].right).length];
"""


def test_axis_ticks_do_not_overlap(browser, tmp_path):
    """A Baseline has one parameter and another head ten millions."""
    for params in (1, 10_000_000):
        content = result("Baseline", "resnet18", 50.0, 0, ms=4.0 + params / 1e6, params=params, label=str(params))
        (tmp_path / f"{params}.json").write_text(json.dumps(content))
    main([str(tmp_path), "--papers=", f"--out={tmp_path}"])
    browser.get((tmp_path / "leaderboard.html").as_uri())
    unfold_plots(browser, 0)
    browser.find_element("css selector", "#cost option[value=params_head]").click()
    count, overlapping = browser.execute_script(OVERLAPPING)
    assert count > 3 and not overlapping


UNNAMED = """
const all = what => [...document.querySelectorAll(what)], none = (e, what) => !e.getAttribute(what);
const tables = "main .ranking > .scroll";
return {
  controls: all("select, input").filter(e => !e.labels.length && none(e, "aria-label")).length,
  tables: all(`${tables} > table`).filter(e => none(e, "aria-labelledby")).length,
  heads: all(`${tables} thead th`).filter(e => e.scope !== "col").length,
  rows: all(`${tables} tbody tr:not(.group)`).filter(e => !e.querySelector("th[scope=row]")).length,
  groups: all(`${tables} tbody tr.group`).filter(e => !e.querySelector("th[scope=rowgroup]")).length,
  links: all("nav a").filter(e => !document.querySelector(e.hash)).length,
  pictures: all("figure > .scroll > svg").filter(e => e.role !== "img" || none(e, "aria-label")).length,
  outside: all("[src], link[rel=stylesheet]").length,
};
"""
COLOURS = """
const of = (what, kind) => getComputedStyle(document.querySelector(what))[kind].match(/[\\d.]+/g).map(Number);
return [of("section", "backgroundColor"), ...arguments[0].map(what => of(what, "color"))];
"""


def luminance(rgb):
    """WCAG's relative luminance of a colour of 0 to 255."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (value / 255 for value in rgb)]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_page_is_accessible_to_screen_readers(opened):
    """Every control has a label, every table real heads of rows and columns, every picture words instead."""
    unfold_plots(opened, STUDY)
    assert set(opened.execute_script(UNNAMED).values()) == {0}
    assert opened.execute_script("return document.documentElement.lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_schemes_have_enough_contrast(opened, scheme, tmp_path):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    unfold_plots(opened, STUDY)
    texts = ["h2", "h2 span", "tbody td", "tbody th", "thead button", ".group th", ".legend li", ".plots > summary"]
    card, *inks = map(luminance, opened.execute_script(COLOURS, texts))
    assert (card > 0.5) == (scheme == "light")
    for text, ink in zip(texts, inks, strict=True):
        assert (max(ink, card) + 0.05) / (min(ink, card) + 0.05) >= 4.5, f"{text} is too pale to be read"
    assert opened.save_screenshot(str(tmp_path / f"{scheme}.png"))
    assert (tmp_path / f"{scheme}.png").stat().st_size > 50_000
