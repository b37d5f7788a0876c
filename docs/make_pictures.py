"""Draw the pictures in docs/pictures: three networks, and a passing, a failing and a mixed proof.

    python docs/make_pictures.py [FOLDER]

Needs timm, selenium, Chromium and its driver (Debian: apt install chromium chromium-driver).
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from selenium import webdriver
from torch import nn

import grl_surgery as gs

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from broken_surgeries import BROKEN, PATIENTS  # noqa: E402

# For each network the blocks to open, and how much of the page to show.
NETWORKS: dict[str, tuple[list[str], int]] = {
    "resnet50": (["layer2", "layer2.0"], 1500),
    "swin_tiny_patch4_window7_224": (["layers.0.blocks.0", "layers.0.blocks.0.attn"], 2100),
    "densenet121": (["features.denseblock1", "features.denseblock1.denselayer2"], 1650),
}


def main(folder: Path) -> None:
    """Write every picture into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    browser = start_browser()
    try:
        with tempfile.TemporaryDirectory() as pages:
            page = Path(pages, "page.html")
            for name, (blocks, height) in NETWORKS.items():
                gs.graph(timm.create_model(name)).to_html(page)
                shoot(browser, page, folder / f"{name.split('_patch')[0]}.png", height, blocks)
            for name, report in reports().items():
                report.to_html(page)
                shoot(browser, page, folder / f"report_{name}.png", 1210)
                if name == "heads":
                    shoot(browser, page, folder / f"report_{name}_dark.png", 1210, scheme="dark", view=1)
    finally:
        browser.quit()


def reports() -> dict[str, gs.FlipReport]:
    """A proof of each sort."""
    patient = PATIENTS["resnet18"]
    torch.manual_seed(0)
    network = patient.make()
    images = torch.randn(4, 3, patient.pixels, patient.pixels)

    def proof(spliced: nn.Module) -> gs.FlipReport:
        return gs.verify_flip(spliced, network, images)

    lost = BROKEN["lost in a trace"].breaks(gs.insert_grl(network, after=patient.after), patient)
    return {
        "passing": proof(gs.insert_grl(network, after="layer3")),
        "failing": proof(lost),
        "mixed": proof(gs.insert_grl(network, edge=("layer1", "layer2.0.conv1"))),
        "heads": proof(gs.attach_domain_head(network, after="global_pool", example_inputs=images)),
    }


def start_browser() -> Any:
    """A browser without a window."""
    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def shoot(
    browser: Any,
    page: Path,
    picture: Path,
    height: int,
    blocks: list[str] | None = None,
    scheme: str = "light",
    view: int = 0,
) -> None:
    """Open a page, open blocks and choose a view as a reader would, and write what is on the screen."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.set_window_size(1100, height)
    browser.get(page.as_uri())
    browser.execute_script(OPEN, blocks or [], view)
    browser.execute_script("scrollTo(0, 0)")
    screen = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    screen.quantize(96, dither=Image.Dither.NONE).save(picture, optimize=True)
    print(f"{picture.name}: {picture.stat().st_size:,} bytes")


# The graph takes the room that the page has, as it does when it is printed.
OPEN = """
const [blocks, view] = arguments;
document.getElementById("canvas").style.maxHeight = "none";
document.querySelector("aside").style.display = "none";
for (const name of blocks) {
  const link = [...document.querySelectorAll("#rows a")].find((link) => link.textContent === name);
  link.click();
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true }));
}
if (document.activeElement) document.activeElement.blur();
for (const box of document.querySelectorAll(".chosen")) box.classList.remove("chosen");
const select = document.getElementById("view");
document.getElementById("fit").click();
if (select) { select.value = view; select.dispatchEvent(new Event("change")); }
"""


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "pictures")
