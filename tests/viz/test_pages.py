"""The pages in a real browser: blocks open, the table is searched and sorted, nothing is fetched."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_surgeries import BROKEN, PATIENTS
from small_networks import Net, image
from torch import nn

import grl_surgery as gs
from grl_surgery.graph_data import ModelGraph
from grl_surgery.points import Edge, GraphNode
from grl_surgery.viz.gradient_colors import GLYPHS
from grl_surgery.viz.html import graph_page
from grl_surgery.viz.report_page import report_page

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

CHROMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROME = next(filter(None, map(shutil.which, CHROMES)), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROME and DRIVER),
    reason="needs Chromium and its driver (Debian: apt install chromium chromium-driver)",
)

Open = Callable[[str], Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROME
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a page; afterwards nothing may have been logged, and nothing but the file been asked for."""
    file = tmp_path / "page.html"
    for log in ("browser", "performance"):
        browser.get_log(log)

    def open_page(text: str) -> Any:
        file.write_text(text, "utf-8")
        browser.get(file.as_uri())
        return browser

    yield open_page
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert {url for url in sent if not url.startswith("data:")} == {file.as_uri()}


def emulate(browser: Any, scheme: str = "light", media: str = "screen") -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


@pytest.fixture(autouse=True)
def as_on_a_screen(browser: Any) -> None:
    emulate(browser)


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def find_all(browser: Any, selector: str) -> list[Any]:
    return [element for element in browser.find_elements("css selector", selector) if element.is_displayed()]


def box(browser: Any, name: str) -> Any:
    """The box of a point, by the beginning of what a screen reader says."""
    return find(browser, f'.box[aria-label^="{name},"]')


@pytest.fixture(scope="module")
def net_page() -> str:
    return graph_page(gs.graph(Net(), None, image()))


@pytest.fixture(scope="module")
def reports() -> dict[str, gs.FlipReport]:
    patient = PATIENTS["small"]
    torch.manual_seed(0)
    network = patient.make()
    images = torch.randn(4, 3, patient.pixels, patient.pixels)
    lost = BROKEN["lost in a trace"].breaks(gs.insert_grl(network, after=patient.after), patient)
    with_head = gs.attach_domain_head(network, after="norm", example_inputs=images)
    return {
        "passing": gs.verify_flip(gs.insert_grl(network, after="stem"), network, images),
        "failing": gs.verify_flip(lost, network, images),
        "mixed": gs.verify_flip(gs.insert_grl(network, edge=("stem", "left")), network, images),
        "heads": gs.verify_flip(with_head, network, images),
    }


# --- blocks --------------------------------------------------------------------------------------------


def test_a_block_opens_and_closes_with_a_click(open_page: Open, net_page: str) -> None:
    browser = open_page(net_page)
    assert not find_all(browser, '[aria-label^="stage1.0,"]')
    before = find(browser, "#picture").size["height"]
    box(browser, "stage1").click()
    assert find_all(browser, '[aria-label^="stage1.0,"]')
    assert box(browser, "stage1").get_attribute("aria-expanded") == "true"
    assert find(browser, "#picture").size["height"] > before
    box(browser, "stage1").find_element("css selector", ".title").click()
    assert not find_all(browser, '[aria-label^="stage1.0,"]')
    assert find(browser, "#picture").size["height"] == before


def test_the_blocks_around_a_reversal_are_open_at_first(open_page: Open) -> None:
    network = Net()
    report = gs.verify_flip(gs.insert_grl(network, before="stage2.0.add"), network, image())
    browser = open_page(report_page([report]))
    opened = [element.get_attribute("aria-label") for element in find_all(browser, ".box.open")]
    assert [label.split(",")[0] for label in opened] == ["stage2", "stage2.0"]
    assert find_all(browser, ".box.reversal")
    assert not _overlaps(browser)


def test_a_click_shows_what_a_box_is(open_page: Open, net_page: str) -> None:
    browser = open_page(net_page)
    box(browser, "stem").click()
    assert find(browser, "#details").text.split() == [
        *("stem", "type", "Conv2d", "output", "2×4×8×8", "parameters", "112", 'after="stem"', "Copy")
    ]


def test_what_a_box_says_to_type_is_what_surgery_takes(open_page: Open, net_page: str) -> None:
    browser, network = open_page(net_page), Net()
    find(browser, "#open-all").click()
    names = browser.execute_script("""
        const said = [];
        for (const box of document.querySelectorAll('.box[role]')) {
          box.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
          const code = document.querySelector("#details .call code");
          if (code) said.push(code.textContent);
        }
        return said;""")
    assert 'after="stage2.0.add"' in names
    tried = 0
    for said in names:
        try:
            gs.insert_grl(network, **eval(f"dict({said})"))
        except gs.PointNotFoundError as error:
            pytest.fail(f"{said}: {error}")
        except gs.SurgeryError:  # a value without a gradient, or one that nobody uses, has this name as well
            continue
        tried += 1
    assert tried > 10


def test_the_copy_button_copies_the_argument(open_page: Open, net_page: str) -> None:
    browser = open_page(net_page)
    box(browser, "stem").click()
    browser.execute_script("""
        window.copied = [];
        Object.defineProperty(navigator, "clipboard", { value: {
          writeText: (text) => { window.copied.push(text); return Promise.resolve(); } } });""")
    button = find(browser, "#details .call button")
    button.click()
    assert browser.execute_script("return window.copied") == ['after="stem"']
    assert button.text == "Copied"


def test_the_panel_is_there_only_while_it_says_something(open_page: Open, net_page: str) -> None:
    browser = open_page(net_page)
    width = find(browser, "#canvas").size["width"]
    assert not find_all(browser, "#details")
    box(browser, "stem").click()
    assert find_all(browser, "#details")
    assert find(browser, "#canvas").size["width"] == width  # what is pointed at does not move
    find(browser, "#canvas").click()  # its middle, where no box is, lets go
    browser.execute_script(
        "document.querySelector('#picture').dispatchEvent(new Event('click', {bubbles: true}))"
    )
    assert not find_all(browser, "#details")


def test_enter_in_the_search_goes_from_hit_to_hit_in_the_picture(open_page: Open, net_page: str) -> None:
    browser = open_page(net_page)
    search = find(browser, "#search")
    search.send_keys("stage2 conv2d")
    chosen = []
    for _ in range(3):
        search.send_keys(webdriver.Keys.ENTER)
        chosen.append(find(browser, ".box.chosen").get_attribute("aria-label").split(",")[0])
    assert chosen == ["stage2.0.conv", "stage2.1.conv", "stage2.0.conv"]
    assert browser.switch_to.active_element == search


def test_the_keyboard_alone_is_enough(open_page: Open, net_page: str) -> None:
    browser = open_page(net_page)
    keys = webdriver.Keys

    def press(*pressed: str) -> str:
        webdriver.ActionChains(browser).send_keys(*pressed).perform()
        return str(browser.switch_to.active_element.get_attribute("aria-label")).split(",")[0]

    find(browser, "#fit").send_keys(keys.TAB)
    assert press(keys.ARROW_DOWN) == "stem"
    assert press(keys.END) == "output"
    assert press(keys.HOME) == "x"
    assert press(keys.ARROW_DOWN, keys.ARROW_DOWN, keys.ARROW_DOWN) == "stage1"
    assert press(keys.ARROW_RIGHT, keys.ARROW_RIGHT) == "stage1.0"
    assert press(keys.ENTER, keys.ARROW_DOWN) == "stage1.0.conv"
    assert press(keys.ARROW_LEFT) == "stage1.0"
    assert press(keys.ARROW_LEFT, keys.ARROW_LEFT) == "stage1"
    assert press(keys.ENTER, keys.ARROW_DOWN) == "stage2"
    press("/", "conv")
    assert find(browser, "#search").get_attribute("value") == "conv"


def test_opened_boxes_never_overlap_and_stay_in_their_frames(open_page: Open) -> None:
    class Tangle(nn.Module):
        """Blocks side by side, one in another, and shortcuts past them."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = Net(), Net(), Net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = self.a(x), self.b(x)
            return self.c(x + a.mean() * b.mean()) + a + b

    browser = open_page(graph_page(gs.graph(Tangle(), None, image())))
    names = ["c", "a", "a.stage1", "a.stage1.0", "b", "b.stage2", "c.stage2", "c.stage2.1"]
    for name in names:  # one by one, so that every step is laid out from the one before
        browser.execute_script(
            "arguments[0].dispatchEvent(new Event('click', {bubbles: true}))", box(browser, name)
        )
        assert not _overlaps(browser), f"after {name} was opened"
    assert len(find_all(browser, '[aria-expanded="true"]')) == len(names)
    find(browser, "#open-all").click()
    assert not _overlaps(browser)


def _overlaps(browser: Any) -> list[str]:
    """Names of boxes that lie on each other, and of those that leave the frame around them."""
    rows = browser.execute_script(
        """
        const area = (element) => { const r = element.getBoundingClientRect();
            return [r.left, r.top, r.right, r.bottom]; };
        const shape = (box) => box.querySelector(box.classList.contains("open")
            ? ":scope > .opened > .frame" : ":scope > .shape, :scope > .closed > .shape");
        const shown = [...document.querySelectorAll(".box[role]")].filter((box) => box.checkVisibility());
        return shown.map((box) => {
            const outer = box.parentElement.closest(".box");
            return [box.getAttribute("aria-label"), area(shape(box)), outer ? outer.id : "",
                    outer ? area(shape(outer)) : null];
        });"""
    )
    found = []
    for (one, a, inside, _), (other, b, also_inside, _) in itertools.combinations(rows, 2):
        if (
            inside == also_inside
            and min(a[2], b[2]) > max(a[0], b[0]) + 1
            and min(a[3], b[3]) > max(a[1], b[1]) + 1
        ):
            found.append(f"{one} and {other}")
    for name, (left, top, right, bottom), _, frame in rows:
        if frame and not (frame[0] <= left and frame[1] <= top and right <= frame[2] and bottom <= frame[3]):
            found.append(f"{name} leaves its frame")
    return found


def test_every_text_fits_into_its_box(open_page: Open) -> None:
    nodes = [GraphNode("x", "placeholder", "placeholder", (2, 3, 224, 224))]
    for place, name in enumerate(
        ["W" * 30, "a_module_with_a_very_long_name_that_is_shortened", "層層層層層", "i"]
    ):
        nodes += [
            GraphNode(f"{name}{place}", "call_module", "AClassWithALongName", (2, 1024, 7, 7), 10**9),
            GraphNode(f"{name}{place}.add", "call_function", "add", (2, 1024, 7, 7)),
            GraphNode(f"grl_{name}{place}", "call_module", "GradientReversal", (2,), 0, "reversal", 0.125),
            GraphNode(f"head_{name}{place}", "call_module", "DomainHead", (2, 2), 7, "head"),
        ]
    edges = tuple(Edge(one.name, other.name) for one, other in itertools.pairwise(nodes))
    browser = open_page(graph_page(ModelGraph("Net", tuple(nodes), edges)))
    too_wide = browser.execute_script(
        """return [...document.querySelectorAll(".box[role]")].flatMap((box) => {
            const shape = box.querySelector(".shape").getBoundingClientRect();
            return [...box.querySelectorAll("text")].map((text) => text.getBoundingClientRect())
                .filter((text) => text.left < shape.left + 1 || text.right > shape.right - 1)
                .map((text) => box.textContent);
        });"""
    )
    assert too_wide == []


# --- the table -----------------------------------------------------------------------------------------


def cells(browser: Any, column: int) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll('#rows tbody tr')].filter((row) => !row.hidden)"
        f".map((row) => row.cells[{column}].textContent)"
    )


def test_the_table_is_searched_by_words(open_page: Open, net_page: str) -> None:
    browser = open_page(net_page)
    total = len(cells(browser, 0))
    find(browser, "#search").send_keys("stage2 CONV2D")
    assert cells(browser, 0) == ["stage2.0.conv", "stage2.1.conv"]
    assert (
        find(browser, "#found").text == f"2 of {total}, {total - 2} left out, 2 in the picture (Enter: next)"
    )
    assert len(find_all(browser, ".holds-hit")) == 1
    find(browser, "#search").send_keys(webdriver.Keys.ESCAPE)
    assert len(cells(browser, 0)) == total
    find(browser, "#search").send_keys("nothing has this name")
    assert cells(browser, 0) == []


def test_the_table_is_sorted_by_numbers_and_by_names(open_page: Open, net_page: str) -> None:
    browser = open_page(net_page)
    parameters, points = find_all(browser, "#rows th button")[3], find_all(browser, "#rows th button")[0]
    parameters.click()
    numbers = [int(cell.replace(",", "") or 0) for cell in cells(browser, 3)]
    assert numbers == sorted(numbers)
    parameters.click()
    assert [int(cell.replace(",", "") or 0) for cell in cells(browser, 3)] == sorted(numbers, reverse=True)
    assert find_all(browser, "#rows th")[3].get_attribute("aria-sort") == "descending"
    points.click()
    assert cells(browser, 0)[:2] == ["fc", "mean"]
    assert cells(browser, 0) == sorted(cells(browser, 0))


def test_a_row_leads_to_its_box_through_all_blocks_around_it(open_page: Open, net_page: str) -> None:
    browser = open_page(net_page)
    next(link for link in find_all(browser, "#rows a") if link.text == "stage2.1.norm").click()
    focused = browser.switch_to.active_element
    assert focused.get_attribute("aria-label").startswith("stage2.1.norm,")
    area, canvas = focused.rect, find(browser, "#canvas").rect
    assert canvas["y"] <= area["y"] <= area["y"] + area["height"] <= canvas["y"] + canvas["height"]


# --- reports -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "status", "stem", "left"),
    [
        ("passing", "OK", "flipped", "unchanged"),
        ("failing", "FAILED", "wrong", "unchanged"),
        ("mixed", "OK", "mixed", "unchanged"),
    ],
)
def test_a_report_begins_with_the_verdict_and_colours_by_what_was_measured(
    open_page: Open, reports: dict[str, gs.FlipReport], name: str, status: str, stem: str, left: str
) -> None:
    browser = open_page(report_page([reports[name]]))
    assert find(browser, ".verdict").text == f"{status} {reports[name].verdict}"
    assert browser.title == f"Small: {status}"
    assert box(browser, "stem").get_attribute("data-kind") == stem
    assert box(browser, "left").get_attribute("data-kind") == left
    assert GLYPHS[stem] in box(browser, "stem").text
    (reversal,) = find_all(browser, ".box.reversal")
    assert (reversal.get_attribute("data-kind") == "wrong") == (status == "FAILED")


def test_a_box_shows_the_predicted_and_the_measured_factor(
    open_page: Open, reports: dict[str, gs.FlipReport]
) -> None:
    browser = open_page(report_page([reports["failing"]]))
    box(browser, "conv").click()
    terms, values = (find_all(browser, f"#details {part}") for part in ("dt", "dd"))
    facts = {term.text: value.text for term, value in zip(terms, values, strict=True)}
    assert facts["predicted"] == "flipped (2 parameters)"
    assert facts["measured"] == "wrong (2 parameters)"
    assert facts["gradient ×"] == "wrong: its gradient is not reversed"


def test_each_objective_has_colours_of_its_own(open_page: Open, reports: dict[str, gs.FlipReport]) -> None:
    browser = open_page(report_page([reports["heads"]]))
    kinds = {}
    for option in find_all(browser, "#view option"):
        option.click()
        kinds[option.text] = [
            box(browser, name).get_attribute("data-kind") for name in ("stem", "fc", "domain")
        ]
    assert kinds == {
        "loss of the output": ["unchanged", "unchanged", "unreached"],
        "loss of domain": ["flipped", "unreached", "unchanged"],
    }
    assert len(find_all(browser, ".box.head")) == 1


def test_the_report_of_two_modes_is_one_page(open_page: Open) -> None:
    network = Net()
    spliced = gs.insert_grl(network, after="stage1")
    both = [gs.verify_flip(spliced, network, image(), mode=mode) for mode in ("train", "eval")]
    browser = open_page(report_page(both))
    assert [line.text.split(":")[0] for line in find_all(browser, ".verdict")] == [
        "OK In train mode",
        "OK In eval mode",
    ]
    assert [option.text for option in find_all(browser, "#view option")] == ["train mode", "eval mode"]


def test_a_report_without_a_graph_still_has_its_table(
    open_page: Open, reports: dict[str, gs.FlipReport]
) -> None:
    plain = gs.FlipReport(reports["mixed"].parameters, reports["mixed"].reversals, True, "train")
    browser = open_page(report_page([plain]))
    assert not find_all(browser, "#picture")
    find(browser, "#search").send_keys("fc.weight")
    assert cells(browser, 0) == ["fc.weight"]


# --- what comes from a model ---------------------------------------------------------------------------


def test_no_name_becomes_markup_or_runs(open_page: Open) -> None:
    evil = (
        "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script>'&amp;"
    )
    nodes = (
        GraphNode("x", "placeholder", "placeholder", (1,)),
        GraphNode(evil, "call_module", evil, (1,), 3),
        GraphNode("output", "output", "output"),
    )
    graph = ModelGraph(evil, nodes, (Edge("x", evil, "0"), Edge(evil, "output", "0")), ())
    browser = open_page(graph_page(graph))
    find_all(browser, "#rows a")[1].click()
    assert find(browser, "#details h3").text == evil
    assert find(browser, "h1").text == evil
    assert browser.title == evil
    assert not browser.find_elements("css selector", "img")


def test_no_sentence_of_a_report_becomes_markup(open_page: Open) -> None:
    evil = "<b id=owned>&amp;</b>"
    flip = gs.ParameterFlip(evil, (1,), evil, "wrong", False, evil, evil)
    report = gs.FlipReport(
        (flip,), (gs.ReversalFlip(evil, evil, 1.0, False, evil),), False, evil, (evil,), evil
    )
    browser = open_page(report_page([report]))
    assert not browser.find_elements("css selector", "#owned")
    assert find(browser, "h1").text == evil
    assert cells(browser, 0) == [evil]


# --- how it looks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_readable_on_what_is_behind_it(
    open_page: Open, reports: dict[str, gs.FlipReport], scheme: str
) -> None:
    for name in ("failing", "mixed", "heads"):
        browser = open_page(report_page([reports[name]]))
        emulate(browser, scheme)
        pairs = browser.execute_script(
            """
            const style = (element) => getComputedStyle(element);
            const behind = (element) => style(element).backgroundColor === "rgba(0, 0, 0, 0)"
                ? behind(element.parentElement) : style(element).backgroundColor;
            const texts = document.querySelectorAll("h1, h2, p, li, td, th, b, a, strong, output, .sign");
            const pairs = [...texts].map((text) => [text.textContent, style(text).color, behind(text)]);
            for (const box of document.querySelectorAll(".box[role]")) {
                const part = box.querySelector(":scope > .closed") || box;
                const shape = part.querySelector(":scope > .shape");
                const words = part.querySelectorAll(":scope > text, :scope > g:not(.mark) > text");
                for (const text of words) pairs.push([text.textContent, style(text).fill, style(shape).fill]);
                for (const text of part.querySelectorAll(":scope > .mark text, :scope .detail")) {
                    const band = box.dataset.measured === undefined || !text.closest(".mark")
                        ? null : text.parentElement.querySelector("rect");
                    if (style(text).display !== "none" && text.textContent) {
                        pairs.push([text.textContent, style(text).fill, style(band || shape).fill]);
                    }
                }
            }
            return pairs;"""
        )
        weak = {pair for pair in map(tuple, pairs) if contrast(*pair[1:]) < 4.5}
        assert weak == set()
        assert len(pairs) > 50


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two opaque colours, after WCAG 2.2."""

    def luminance(color: str) -> float:
        parts = [float(part) / 255 for part in color.strip("rgb()").split(",")]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted(map(luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_no_two_kinds_share_a_sign() -> None:
    assert len(set(GLYPHS.values())) == len(GLYPHS)


def test_printed_it_has_no_buttons_and_no_scroll_bars(
    open_page: Open, reports: dict[str, gs.FlipReport]
) -> None:
    browser = open_page(report_page([reports["mixed"]]))
    emulate(browser, media="print")
    assert not find_all(browser, "#open-all, #search, #details")
    for selector in ("#canvas", ".scroll"):
        sizes = browser.execute_script(
            "const e = document.querySelector(arguments[0]);"
            "return [e.scrollHeight - e.clientHeight, getComputedStyle(e).overflow]",
            selector,
        )
        assert sizes == [0, "visible"]
    assert len(browser.print_page()) > 10_000


def test_on_a_phone_nothing_but_a_table_or_a_picture_scrolls_sideways(
    open_page: Open, browser: Any, reports: dict[str, gs.FlipReport]
) -> None:
    report = replace(
        reports["heads"],
        reversals=tuple(
            replace(r, name=f"a_head_with_a_long_name.{r.name}") for r in reports["heads"].reversals
        ),
    )
    phone = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        open_page(report_page([report]))
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_thousand_parameters_open_in_under_a_second(open_page: Open) -> None:
    network = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(500)))
    report = gs.verify_flip(gs.insert_grl(network, after="250"), network, torch.randn(2, 4))
    assert len(report.parameters) == 1000
    text = report_page([report])
    seconds = []
    for _ in range(2):
        browser = open_page("<title>blank</title>")
        # Seconds of work and not of the clock: others may use this machine as well.
        browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        open_page(text)
        metrics = {
            item["name"]: item["value"]
            for item in browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        }
        browser.execute_cdp_cmd("Performance.disable", {})
        seconds.append(metrics["TaskDuration"])
    assert len(cells(browser, 0)) == 1000
    assert min(seconds) < 1, seconds
