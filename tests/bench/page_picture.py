"""Take a picture of the operators' page of a running agent, as it looks on a panel of 1024 x 768.

python tests/bench/page_picture.py http://127.0.0.1:8080/ docs/page.png [--wait 20] [--width 1024 --height 768]
"""

import argparse
import io

from PIL import Image
from playwright.sync_api import sync_playwright


def main() -> None:
    """Wait until the page shows video and a failed part, then take its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("file")
    parser.add_argument("--wait", type=float, default=20.0, help="seconds of history before the picture is taken")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=768)
    given = parser.parse_args()
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=flags)
        page = browser.new_page(viewport={"width": given.width, "height": given.height})
        page.goto(given.url)
        page.wait_for_selector("#fails button", timeout=300_000)
        page.wait_for_timeout(given.wait * 1000)
        picture = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    # 256 colours: a third of the bytes, and nothing that a reader would miss.
    picture.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT).save(given.file, optimize=True)


if __name__ == "__main__":
    main()
