"""The page in a real Chromium: video, drawings on the defect, fallback, stale data, layout."""

import itertools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from needs import need
from playwright.sync_api import Browser, Page, Playwright, sync_playwright
from preview_line import BIT, CORNER, EDGE, HEIGHT, PICTURES, WIDTH, Agent

pytestmark = [pytest.mark.browser, pytest.mark.slow]
CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
LONG = 90_000  # ms, for what takes a moment on a machine that has one
FRAMES = "document.querySelector('video').getVideoPlaybackQuality().totalVideoFrames"


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    need(Path(CHROMIUM).exists(), CHROMIUM)
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="module")
def browsers(playwright: Playwright) -> Iterator[list[Browser]]:
    running: list[Browser] = []
    yield running
    for browser in running:
        browser.close()


@pytest.fixture(scope="module")
def chromium(playwright: Playwright, browsers: list[Browser]) -> Callable[..., Browser]:
    def launch(*flags: str) -> Browser:
        browsers.append(playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *flags]))
        return browsers[-1]

    return launch


@pytest.fixture(scope="module")
def browser(chromium: Callable[..., Browser]) -> Browser:
    return chromium()


@pytest.fixture(autouse=True)
def closed_pages(browsers: list[Browser]) -> Iterator[None]:
    """A test that fails leaves no viewer behind for the next one."""
    yield
    for browser in browsers:
        for context in browser.contexts:
            context.close()


def visit(browser: Browser, agent: Agent, width: int = 1024, height: int = 768, before: str = "") -> Page:
    page = browser.new_page(viewport={"width": width, "height": height})
    if before:
        page.add_init_script(before)
    page.goto(agent.url)
    page.wait_for_selector(".tile", timeout=LONG)
    return page


def until(page: Page, expression: str) -> None:
    """Wait until it is true. (Playwright's own way of waiting needs `eval`, which the page's policy forbids.)"""
    deadline = time.monotonic() + LONG / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(100)


def wait_for_video(page: Page) -> None:
    until(page, f"{FRAMES} > 3 && document.querySelector('.mjpeg').hidden")


@pytest.fixture
def page(browser: Browser, agent: Agent) -> Page:
    return visit(browser, agent)


# For each of so many frames: the number that the picture itself shows, and the number of the drawing over it.
SAMPLES = """async ([count, bit, height]) => {
  const video = document.querySelector('video'), canvas = document.querySelector('.overlay');
  const copy = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const samples = [];
  // Asked for after the page has asked, so the page has drawn when this is called, for the same frame.
  await new Promise((done) => {
    const look = () => {
      copy.canvas.width = video.videoWidth; copy.canvas.height = video.videoHeight;
      copy.drawImage(video, 0, 0);
      let number = 0;
      for (let i = 0; i < 5; i++)
        number |= (copy.getImageData((i + 0.5) * bit, height - bit / 2, 1, 1).data[0] > 128) << i;
      samples.push([number, canvas.dataset.frame, document.querySelector('.score').dataset.frame]);
      samples.length < count ? video.requestVideoFrameCallback(look) : done();
    };
    video.requestVideoFrameCallback(look);
  });
  return samples;
}"""

# Bounding box, in page pixels, of what is drawn in the outline's yellow.
YELLOW = """() => {
  const canvas = document.querySelector('.overlay'), box = canvas.getBoundingClientRect();
  const { data, width } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  let [left, top, right, bottom] = [1e9, 1e9, -1, -1];
  for (let i = 0; i < data.length; i += 4)
    if (data[i] > 240 && data[i + 1] > 200 && data[i + 2] < 110 && data[i + 3] > 200) {
      const x = (i / 4) % width, y = Math.floor(i / 4 / width);
      left = Math.min(left, x); right = Math.max(right, x + 1);
      top = Math.min(top, y); bottom = Math.max(bottom, y + 1);
    }
  const scale = box.width / canvas.width;
  return [left, top, right, bottom].map((value, i) => value * scale + (i % 2 ? box.top : box.left));
}"""


def defect_on_page(page: Page) -> list[float]:
    """Where the square of the test's pictures is on the page: left, top, right, bottom."""
    box: dict[str, float] = page.locator("video").bounding_box() or {}
    scale = min(box["width"] / WIDTH, box["height"] / HEIGHT)
    left = box["x"] + (box["width"] - WIDTH * scale) / 2
    top = box["y"] + (box["height"] - HEIGHT * scale) / 2
    x, y = CORNER
    return [left + x * scale, top + y * scale, left + (x + EDGE) * scale, top + (y + EDGE) * scale]


def test_the_video_plays_and_its_pictures_change(page: Page) -> None:
    wait_for_video(page)
    before = page.evaluate(FRAMES)
    samples = page.evaluate(SAMPLES, [8, BIT, HEIGHT])
    assert len({number for number, _, _ in samples}) > 3
    assert page.evaluate(FRAMES) > before
    assert page.evaluate("document.querySelector('video').videoWidth") == WIDTH


def test_the_drawing_lies_on_the_defect_of_its_own_frame(page: Page) -> None:
    wait_for_video(page)
    page.wait_for_selector(".overlay[data-matched=true]", timeout=LONG)
    samples = page.evaluate(SAMPLES, [18, BIT, HEIGHT])
    # A browser that is late shows the next picture already while it calls for this one: then both samples have the
    # same picture, and the second one counts.
    drawn = [
        (number, int(frame) % PICTURES)
        for (number, frame, _), (following, _, _) in itertools.pairwise(samples)
        if frame and number != following
    ]
    assert len(drawn) >= 5
    assert all(number == frame for number, frame in drawn), samples
    assert all(frame == scored for _, frame, scored in samples), "the score is that of the frame, too"
    for found, wanted in zip(page.evaluate(YELLOW), defect_on_page(page), strict=True):
        assert abs(found - wanted) <= 4


def test_nothing_is_drawn_over_a_frame_whose_drawing_is_not_known(browser: Browser, agent: Agent) -> None:
    # Every drawing says that it belongs to another moment, so none can be matched.
    page = visit(
        browser,
        agent,
        before="""
        const add = Object.getOwnPropertyDescriptor(RTCDataChannel.prototype, 'onmessage').set;
        Object.defineProperty(RTCDataChannel.prototype, 'onmessage', { set(take) {
          add.call(this, ({ data }) => {
            const drawing = JSON.parse(data);
            drawing.ts = Math.floor(Math.random() * 2 ** 32);
            window.taken = (window.taken || 0) + 1;
            take({ data: JSON.stringify(drawing) });
          });
        } });""",
    )
    wait_for_video(page)
    until(page, "window.taken > 8")
    assert page.locator(".overlay").get_attribute("data-frame") == ""
    assert page.evaluate(YELLOW)[2] <= page.locator(".overlay").bounding_box()["x"]
    assert page.locator(".score").get_attribute("data-frame") == ""
    assert page.locator(".score .value").inner_text() == "–"


def test_layers_by_key_and_by_touch(page: Page) -> None:
    wait_for_video(page)
    page.wait_for_selector(".overlay[data-matched=true]", timeout=LONG)
    assert page.evaluate(YELLOW)[2] > 0
    page.keyboard.press("o")
    assert page.locator("[data-layer=outlines]").get_attribute("aria-pressed") == "false"
    assert page.evaluate(YELLOW)[2] <= page.locator(".overlay").bounding_box()["x"]
    page.locator("[data-layer=outlines]").click()
    assert page.evaluate(YELLOW)[2] > page.locator(".overlay").bounding_box()["x"]


def test_everything_that_a_key_does_a_finger_does(browser: Browser, agent: Agent) -> None:
    context = browser.new_context(viewport={"width": 1024, "height": 768}, has_touch=True)
    page = context.new_page()
    page.goto(agent.url)
    page.wait_for_selector("#fails button", timeout=LONG)
    for layer, before in (("outlines", "true"), ("boxes", "true"), ("points", "false")):
        button = page.locator(f"[data-layer={layer}]")
        assert button.get_attribute("aria-pressed") == before
        button.tap()
        assert button.get_attribute("aria-pressed") != before
    page.locator("#fails button").nth(1).tap()
    page.wait_for_selector("#detail[open]", timeout=LONG)
    for name in ("Mask", "Marked"):
        tab = page.get_by_role("button", name=name, exact=True)
        tab.tap()
        assert tab.get_attribute("aria-pressed") == "true"
    title = page.locator("#detail-title").inner_text()
    page.get_by_label("Older fail").tap()
    until(page, f"document.getElementById('detail-title').innerText !== {title!r}")
    page.get_by_label("Close", exact=True).tap()
    page.wait_for_selector("#detail:not([open])", state="attached")


def test_a_failed_part_opens_with_pictures_numbers_and_provenance(page: Page) -> None:
    page.wait_for_selector("#fails button", timeout=LONG)
    page.locator("#fails button").nth(1).click()
    page.wait_for_selector("#detail[open]")
    text = page.locator("#detail").inner_text()
    for part in ("FAIL", "Score", "Threshold", "Defect 1", f"{EDGE * EDGE} px", "Recipe", "noop", "Time queue"):
        assert part in text
    loaded = (
        "document.getElementById('detail-picture').complete && document.getElementById('detail-picture').naturalWidth"
    )
    for name in ("Marked", "Picture", "Map", "Mask"):
        page.get_by_role("button", name=name, exact=True).click()
        until(page, f"({loaded}) === {WIDTH}")
    title = page.locator("#detail-title").inner_text()
    page.keyboard.press("ArrowRight")
    until(page, f"document.getElementById('detail-title').innerText !== {title!r}")
    page.keyboard.press("Escape")
    page.wait_for_selector("#detail:not([open])", state="attached")


@pytest.mark.parametrize("how", ["no WebRTC in the browser", "UDP blocked", "connected but no picture"])
def test_mjpeg_where_webrtc_does_not_come_up(chromium: Callable[..., Browser], agent: Agent, how: str) -> None:
    blocked = ["--webrtc-ip-handling-policy=disable_non_proxied_udp"] if how == "UDP blocked" else []
    # When the page asks for WebRTC's first picture, and when it shows MJPEG's first one, by the page's own clock.
    before = """
      addEventListener('DOMContentLoaded', () => new MutationObserver(() => {
        if (document.querySelector('.tile')) window.began ??= performance.now();
        const image = document.querySelector('img.mjpeg');
        if (image) image.addEventListener('load', () => {
          window.shown ??= performance.now(); window.wide ??= image.naturalWidth;
        });
      }).observe(document.body, { childList: true, subtree: true }));"""
    if how == "no WebRTC in the browser":
        before += "delete window.RTCPeerConnection;"
    if how == "connected but no picture":
        before += "HTMLVideoElement.prototype.requestVideoFrameCallback = () => 0;"
    page = visit(chromium(*blocked), agent, before=before)
    until(page, "window.shown > 0")
    assert page.evaluate("window.shown - window.began") < 5000
    # Taken when the picture was there: while the next one is on its way, Chromium tells a width of 0.
    assert page.evaluate("window.wide") == WIDTH
    assert page.locator(".transport").inner_text() == "MJPEG"
    screens = set()
    deadline = time.monotonic() + 30
    while len(screens) < 3 and time.monotonic() < deadline:
        screens.add(page.locator(".screen").screenshot())
    assert len(screens) >= 3


def seconds_until(page: Page, expression: str, began: float) -> float:
    """From `began` (`time.monotonic`) to the moment at which it is true."""
    deadline = began + LONG / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)
    return time.monotonic() - began


def word(page: Page) -> str:
    return str(page.locator(".word").inner_text())


def test_old_data_is_shown_as_old_and_new_data_as_new(browser: Browser, start: Callable[..., Agent]) -> None:
    agent = start().wait_ready()
    page = visit(browser, agent)
    page.wait_for_selector("body:not(.stale):not(.waiting)", timeout=LONG)
    until(page, "document.querySelector('.word').innerText === 'FAIL'")
    began = time.monotonic()
    agent.kill()
    # The page's own limit is two seconds; the rest is for the driver of the browser.
    assert seconds_until(page, "!document.getElementById('alarm').hidden", began) < 2.5
    assert "NO DATA" in page.locator("#alarm").inner_text()
    assert word(page) == "NO DATA"
    assert page.locator(".shape use").get_attribute("href") == "#shape-none"
    assert "stale" in page.locator("#link").inner_text()
    agent.start().wait_ready()
    page.wait_for_selector("body:not(.stale)", timeout=LONG)
    until(page, "document.querySelector('.word').innerText === 'FAIL'")
    assert not page.locator("#alarm").is_visible()


def test_a_lost_camera_takes_the_verdict_from_its_tile(
    browser: Browser, start: Callable[..., Agent], tmp_path: Path
) -> None:
    agent = start().wait_ready()
    page = visit(browser, agent)
    until(page, "document.querySelector('.word').innerText === 'FAIL'")
    assert page.locator(".ago").inner_text() == ""
    began = time.monotonic()
    (tmp_path / "pictures").rename(tmp_path / "away")
    assert seconds_until(page, "document.querySelector('.tile').classList.contains('stale')", began) < 2.5
    assert word(page) == "NO CAMERA"
    assert "has gone" in page.locator(".why").inner_text()
    assert page.locator(".shape use").get_attribute("href") == "#shape-none"
    assert page.evaluate("getComputedStyle(document.querySelector('video')).filter") != "none"
    assert not page.locator("#alarm").is_visible()
    (tmp_path / "away").rename(tmp_path / "pictures")
    page.wait_for_selector(".tile:not(.stale)", timeout=LONG)
    assert word(page) == "FAIL"


def test_a_line_that_stands_still_says_how_old_its_last_verdict_is(
    browser: Browser, start: Callable[..., Agent]
) -> None:
    agent = start("cameras.top.loop=false").wait_ready()
    page = visit(browser, agent)
    until(page, "document.querySelector('.tile').dataset.seq > 0")
    until(page, "parseInt(document.querySelector('.ago').innerText) >= 3")
    assert word(page) == "FAIL"
    assert page.locator(".ago").inner_text().endswith("s ago")
    assert page.evaluate("parseFloat(getComputedStyle(document.querySelector('.ago')).fontSize)") >= 20
    # Its picture is the last part's; were it another one's, as where a camera gave none, it would say so.
    wait_for_video(page)
    until(page, "tiles.get('top').video.shown !== null")
    label = """(seq) => {
      const tile = tiles.get('top');
      tile.video.shown = { ...tile.video.shown, seq: seq ?? tile.video.shown.seq };
      tile.age(false);
      return tile.find('.of').textContent;
    }"""
    assert page.evaluate(label, None) == ""
    assert page.evaluate(label, 7) == "picture of no. 7"


def test_many_cameras_without_webrtc_come_back_by_themselves(
    browser: Browser, start: Callable[..., Agent], tmp_path: Path
) -> None:
    agent = start()
    agent.kill()
    line = (tmp_path / "line.toml").read_text().replace("fps = 10", "fps = 2")
    camera, rest = line.split("[publish]")
    names = ["top", "a", "b", "c", "d", "e", "f"]
    (tmp_path / "line.toml").write_text("".join(camera.replace('"top"', f'"{n}"') for n in names) + "[publish]" + rest)
    agent.start().wait_ready()
    page = visit(browser, agent, before="delete window.RTCPeerConnection")
    playing = "[...document.querySelectorAll('.mjpeg')].filter((image) => image.naturalWidth > 0).length"
    until(page, f"{playing} === 4")
    assert agent.metric("flawline_preview_viewers") == 4
    assert "4 videos at most" in page.locator("#camera-f .transport").inner_text()
    page.evaluate("window.same = true")
    agent.kill()
    page.wait_for_selector("body.stale", timeout=LONG)
    agent.start().wait_ready()
    page.wait_for_selector("body:not(.stale)", timeout=LONG)
    page.wait_for_timeout(4000)
    assert not page.locator("body.stale").count(), "live values have their connection"
    assert page.evaluate("window.same"), "the same cameras: nothing to load anew"
    assert agent.metric("flawline_preview_viewers") == 4
    # With one camera renamed the page has its tile, and none of the one that is gone.
    agent.kill()
    (tmp_path / "line.toml").write_text((tmp_path / "line.toml").read_text().replace('"f"', '"g"'))
    agent.start().wait_ready()
    page.wait_for_selector("#camera-g", timeout=LONG)
    assert page.locator(".tile").count() == len(names)
    assert not page.locator("#camera-f").count()
    page.evaluate("window.loaded = true")
    page.wait_for_timeout(2000)
    assert page.evaluate("window.loaded"), "once is enough"


def test_a_page_whose_token_does_not_count_any_more_says_so(
    browser: Browser, start: Callable[..., Agent], tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("a-token-of-more-than-16-characters")
    agent = start(f"preview.token_file={tmp_path / 'token'}").wait_ready()
    page = browser.new_page()
    page.goto(f"{agent.url}/?token=a-token-of-more-than-16-characters")
    page.wait_for_selector(".tile", timeout=LONG)
    until(page, "document.querySelector('.word').innerText === 'FAIL'")
    agent.kill()
    page.wait_for_selector("body.stale", timeout=LONG)
    assert "token" not in page.locator("#alarm").inner_text()
    (tmp_path / "token").write_text("another-token-of-more-than-16-characters")
    agent.start().wait_ready()
    until(page, "document.getElementById('alarm').innerText.includes('a token is needed')")


@pytest.mark.parametrize("transport", ["WebRTC", "MJPEG"])
def test_a_video_that_stands_still_is_marked_and_asked_for_again(
    browser: Browser, agent: Agent, transport: str
) -> None:
    before = "" if transport == "WebRTC" else "delete window.RTCPeerConnection"
    # The viewer's own end: WebRTC is deleted from outside, MJPEG is held up on its way.
    before += """;
      const get = window.fetch;
      window.fetch = async (...what) => {
        const answer = await get(...what);
        if (String(what[0]).includes('whep') && answer.status === 201) window.session = answer.headers.get('Location');
        if (!String(what[0]).includes('mjpeg')) return answer;
        const reader = answer.body.getReader();
        const held = () => new Promise((_, fail) => what[1].signal.addEventListener('abort', fail));
        const read = () => window.held ? held() : reader.read();
        return { ok: answer.ok, body: { getReader: () => ({ read }) } };
      };"""
    page = visit(browser, agent, before=before)
    playing = "!document.querySelector('.mjpeg').hidden && document.querySelector('.mjpeg').naturalWidth > 0"
    if transport == "WebRTC":
        wait_for_video(page)
    else:
        until(page, playing)
    cut = "fetch(window.session, { method: 'DELETE' })" if transport == "WebRTC" else "window.held = true"
    took = page.evaluate(f"""async () => {{
      await ({cut});
      const began = performance.now(), screen = document.querySelector('.screen');
      while (!screen.classList.contains('frozen')) await new Promise((done) => setTimeout(done, 20));
      return performance.now() - began;
    }}""")
    assert took < 2500
    assert page.locator(".transport").inner_text() == "NO VIDEO"
    assert not page.locator("body.stale").count()
    page.evaluate("window.held = false")
    page.wait_for_selector(".screen:not(.frozen)", timeout=LONG)


def test_eight_pages_at_once_and_one_encoder(browser: Browser, agent: Agent) -> None:
    pages = [visit(browser, agent, 640, 480) for _ in range(8)]
    deadline = time.monotonic() + 120
    # A page that goes from MJPEG to WebRTC has both for a moment.
    while agent.metric("flawline_preview_viewers") != 8 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert time.monotonic() < deadline
    for page in pages:
        until(
            page,
            "document.querySelector('video').videoWidth || document.querySelector('.mjpeg').naturalWidth",
        )
    encoded, verdicts = (agent.metric(f"flawline_{name}_total") for name in ("preview_frames_encoded", "verdicts"))
    time.sleep(3)
    more = agent.metric("flawline_preview_frames_encoded_total") - encoded
    assert 0 < more <= 1.5 * (agent.metric("flawline_verdicts_total") - verdicts) + 10
    for page in pages:
        page.close()
    while agent.metric("flawline_preview_viewers") and time.monotonic() < deadline + 60:
        time.sleep(0.5)
    assert agent.metric("flawline_preview_viewers") == 0


def test_fits_a_panel_and_a_phone(browser: Browser, agent: Agent) -> None:
    measure = """() => [document.documentElement.scrollWidth, document.documentElement.scrollHeight,
      parseFloat(getComputedStyle(document.querySelector('.word')).fontSize),
      Math.min(...[...document.querySelectorAll('button')].filter((b) => b.offsetHeight).map((b) => b.offsetHeight))]"""
    for width, height, least in ((1024, 768, 64), (390, 844, 40)):
        page = visit(browser, agent, width, height)
        page.wait_for_selector("#fails button", timeout=LONG)
        wide, high, word, button = page.evaluate(measure)
        assert wide <= width
        assert height >= high or width < 700
        assert word >= least
        assert button >= 44
        page.close()


def test_nothing_is_loaded_from_elsewhere_and_nothing_complains(browser: Browser, agent: Agent) -> None:
    page = browser.new_page()
    asked: list[str] = []
    complaints: list[Any] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: complaints.append(error))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(agent.url)
    page.wait_for_selector("#fails button", timeout=LONG)
    page.locator("#fails button").first.click()
    page.wait_for_selector("#detail[open]", timeout=LONG)
    page.close()
    ours = re.compile(r"/|/events|/top/whep(/[\w-]+)?|/top/mjpeg\?burn=1|/fails/\d+(/\w+\.(jpg|png))?")
    loaded = [url.removeprefix(agent.url) for url in asked if not url.startswith(("data:", "blob:"))]
    assert {"/", "/events", "/top/whep"} <= set(loaded)
    assert all(ours.fullmatch(path) for path in loaded), loaded
    assert not complaints


def test_code_that_is_not_the_pages_own_does_not_run(page: Page) -> None:
    page.evaluate("""() => {
      document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.foreign = 1' }));
      document.body.insertAdjacentHTML('beforeend', '<img src="/nothing" onerror="window.foreign = 2">');
    }""")
    page.wait_for_timeout(500)
    assert page.evaluate("window.foreign") is None
