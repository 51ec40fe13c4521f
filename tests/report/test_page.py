"""The page of a checkpoint, as data and in a real browser (chromium, headless)."""

import base64
import io
import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import sync_playwright
from scipy.ndimage import gaussian_filter

from icnn_zoo import IrregularConv2d
from icnn_zoo.analysis import heatmap, layer_shapes
from icnn_zoo.cli.programs import zoo_main
from icnn_zoo.report.curves import curve_pictures
from icnn_zoo.report.page import write_page
from icnn_zoo.report.payload import heatmaps_payload, shapes_payload
from icnn_zoo.report.samples import Sample, find_samples
from icnn_zoo.training.network_sources import Source, find_source, load_task
from icnn_zoo.training.run_metrics import read_metrics, thinned
from icnn_zoo.training.task import SegmentationTask

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SCREENS = {"desk": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}


@pytest.fixture(scope="module")
def task(zoo_run):
    task = load_task(zoo_run)
    with torch.no_grad():  # hardly trained: its shapes are moved so that there is something to see
        for shapes in layer_shapes(task.model):
            layer = task.model.get_submodule(shapes.name)
            layer.displacement.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return task


@pytest.fixture(scope="module")
def samples(zoo_run, task):
    return find_samples(find_source(zoo_run), task, number=2)


@pytest.fixture(scope="module")
def page_file(zoo_run, task, samples, tmp_path_factory):
    regular = SegmentationTask(**{**task.hparams, "start": None}).eval()
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page({"irregular": task, "regular": regular}, path, samples, source=find_source(zoo_run))
    return path


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        # A container's root has no sandbox to put the browser in.
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """The page in a window, and all that it complained of or asked for."""

    def __init__(self, browser, path, screen="desk", scheme="light"):
        self.context = browser.new_context(viewport=SCREENS[screen], color_scheme=scheme)
        self.page = self.context.new_page()
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_function("document.querySelector('#heatmap-status').textContent")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def status(self, after=None):
        if after is not None:
            self.page.wait_for_function(
                "text => document.querySelector('#heatmap-status').textContent !== text", arg=after
            )
        return self.page.inner_text("#heatmap-status")

    def pixels(self, selector):
        # Two frames later whatever was planned is drawn.
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        url = self.page.eval_on_selector(selector, "canvas => canvas.toDataURL()")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGBA"), dtype=int)


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_without_complaint_request_or_overflow(browser, page_file, screen, scheme):
    with Opened(browser, page_file, screen, scheme) as opened:
        titles = opened.page.locator("h2").all_inner_texts()
        assert titles[:3] == ["Predictions", "Heatmaps", "Kernel shapes"]
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= SCREENS[screen]["width"]
        background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        lightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
        assert (lightness > 200) == (scheme == "light")
        ratios = opened.page.eval_on_selector_all(
            ".sample img",
            "all => all.map(one => one.clientWidth / one.clientHeight * one.naturalHeight / one.naturalWidth)",
        )
        assert ratios == pytest.approx([1.0] * len(ratios), abs=0.03)
        assert opened.complaints == []
        assert all(url.startswith(("file:", "data:")) for url in opened.requests)


def test_a_click_changes_both_heatmaps_and_says_which_pixel(browser, page_file):
    with Opened(browser, page_file) as opened:
        before, first = opened.status(), opened.pixels('[data-network="0"] canvas')
        box = opened.page.locator('[data-network="1"]').bounding_box()
        opened.page.locator('[data-network="1"]').click(position={"x": 0.2 * box["width"], "y": 0.7 * box["height"]})
        after = opened.status(after=before)
        row, col = map(int, re.match(r"Row (\d+), column (\d+)", after).groups())
        assert (row, col) == pytest.approx((0.7 * 65, 0.2 * 65), abs=65 / 13)
        assert "irregular: " in after
        assert "regular: " in after
        second = opened.pixels('[data-network="0"] canvas')
        assert abs(first - second).max() > 50
        assert opened.complaints == []


def test_arrow_keys_move_the_pixel_by_a_cell_and_stop_at_the_border(browser, page_file):
    with Opened(browser, page_file) as opened:
        field = opened.page.locator('[data-network="0"]')
        field.focus()
        rows = []
        for _ in range(9):
            field.press("ArrowUp")
            opened.page.wait_for_timeout(50)
            rows.append(int(re.match(r"Row (\d+)", opened.status())[1]))
        assert rows[0] > rows[1] > rows[2]
        assert rows[-1] == rows[-2] == 2  # the middle of the first of 13 cells over 65 pixels


def test_a_thumbnail_chooses_the_image(browser, page_file):
    with Opened(browser, page_file) as opened:
        before, first = opened.status(), opened.pixels('[data-network="0"] canvas')
        opened.page.locator("[data-sample]").nth(1).click()
        opened.status(after=before)
        assert abs(first - opened.pixels('[data-network="0"] canvas')).max() > 50
        assert opened.page.locator("[data-sample]").nth(1).get_attribute("aria-pressed") == "true"


def test_shapes_turn_by_drag_and_key_and_follow_the_layer(browser, page_file, task):
    with Opened(browser, page_file) as opened:
        canvas = opened.page.locator("#turn")
        seen = [opened.pixels("#turn")]
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        opened.page.mouse.move(box["x"] + 200, box["y"] + 200)
        opened.page.mouse.down()
        opened.page.mouse.move(box["x"] + 320, box["y"] + 160)
        opened.page.mouse.up()
        seen.append(opened.pixels("#turn"))
        canvas.press("ArrowLeft")
        seen.append(opened.pixels("#turn"))
        opened.page.select_option("#layer", index=1)
        seen.append(opened.pixels("#turn"))
        for one, other in itertools.pairwise(seen):
            assert (one != other).any()
        names = opened.page.locator("#layer option").all_inner_texts()
        assert names == [shapes.name.removeprefix("backbone.") for shapes in layer_shapes(task.model)]
        assert opened.complaints == []


def test_along_the_channels_every_cloud_is_where_its_tap_lies(browser, page_file, task):
    """The center of each color's points on the canvas, against the mean position."""
    shapes = layer_shapes(task.model)[0]
    payload = shapes_payload(shapes)
    with Opened(browser, page_file) as opened:
        opened.page.click('[data-view="flat"]')
        picture = opened.pixels("#turn")
    height, width = picture.shape[:2]
    unit = min(height, width) / 2.5 / payload["reach"]
    for tap in (0, 2, 6, 8):  # corners, far from other clouds
        row, col = shapes.positions[:, tap].mean(axis=0)
        y, x = height / 2 + unit * row, width / 2 + unit * col
        color = np.array([int(payload["colors"][tap][place : place + 2], 16) for place in (1, 3, 5)])
        near = (abs(picture[..., :3] - color).sum(axis=-1) < 60) & (picture[..., 3] > 100)
        rows, cols = near.nonzero()
        assert len(rows) > 20
        assert (rows.mean(), cols.mean()) == pytest.approx((y, x), abs=0.25 * unit)


def test_packed_positions_come_back_to_a_30000th_of_the_farthest(task):
    shapes = layer_shapes(task.model)[0]
    payload = shapes_payload(shapes)
    packed = np.frombuffer(base64.b64decode(payload["positions"]), "<i2").reshape(payload["count"], -1, 2)
    expected = shapes.thinned(payload["count"]).positions
    assert abs(packed * payload["scale"] - expected).max() <= abs(expected).max() / 30_000
    assert payload["total"] == len(shapes.positions)


def test_spreads_are_packed_and_free_taps_have_no_clouds():
    layer = IrregularConv2d(4, 4, (9, 17), groups=4, taps=5, interpolation="triangle", shapes="kernel")
    (shapes,) = layer_shapes(layer)
    payload = shapes_payload(shapes)
    assert (len(payload["colors"]), payload["grid"], payload["ellipses"]) == (5, [[0, 0]], [])
    spreads = np.array(payload["spreads"])
    assert np.allclose(spreads[:, 1:3], shapes.positions.reshape(-1, 2), atol=1e-4)
    assert np.allclose(spreads[:, 3:], 1.0)


def test_tiles_are_the_heatmaps_of_the_classes_predicted_there(task, samples):
    image = samples[0].image[:, :49]  # not square
    payload = heatmaps_payload({"net": task}, image)
    network = payload["networks"][0]
    cells, tile = (len(payload["rows"]), len(payload["cols"])), payload["tile"]
    assert cells == (13, round(13 * 49 / 65))
    atlas = np.asarray(Image.open(io.BytesIO(base64.b64decode(network["atlas"].partition(",")[2]))).convert("L"))
    assert atlas.shape == (cells[0] * tile[0], cells[1] * tile[1])
    row, col = 4, 6
    number = row * cells[1] + col
    pixel = (payload["rows"][row], payload["cols"][col])
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)
    values = heatmap(task, tensor, [pixel], [network["classes"][number]])[0].numpy()
    drawn = (atlas[row * tile[0] : (row + 1) * tile[0], col * tile[1] : (col + 1) * tile[1]] / 255.0) ** 2
    small = np.asarray(Image.fromarray(values).resize((tile[1], tile[0]), Image.Resampling.BOX))
    blurred = [gaussian_filter(picture, 2) for picture in (drawn, small)]  # tiles are blurred and compressed
    assert np.corrcoef(blurred[0].ravel(), blurred[1].ravel())[0, 1] > 0.97
    with torch.no_grad():
        scores = task.model.upsample(task(tensor[None].float()), image.shape[:2])
    assert network["classes"][number] == int(scores[0, :, pixel[0], pixel[1]].argmax())


def test_names_cannot_leave_their_place_in_the_page(zoo_run, task, samples, tmp_path):
    odd = SegmentationTask(
        **{**task.hparams, "class_names": ["</script><b>", *map(str, range(len(task.class_names) - 1))]}
    )
    path = tmp_path / "page.html"
    write_page({"<i>": odd.eval()}, path, [Sample("<u>&", samples[0].image)], source=Source("<h1>", file=None))
    text = path.read_text(encoding="utf-8")
    assert not re.search("<b>|<i>|<u>|<h1><h1>", text)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["classes"][0] == "</script><b>"


def test_a_zoo_checkpoint_has_its_card_and_curves_on_the_page(zoo_folder, zoo_run, tmp_path, monkeypatch):
    monkeypatch.setenv("ICNN_ZOO_REGISTRY", str(zoo_folder))
    path = tmp_path / "page.html"
    zoo_main(["shapes", "test_resnet.shapes", "--html", str(path)])
    text = path.read_text(encoding="utf-8")
    source = find_source("test_resnet.shapes")
    card = source.card()
    for known in (
        card.description,
        card.weights.sha256,
        card.dataset.attribution,
        "<h2>Card</h2>",
        "<h2>Training</h2>",
    ):
        assert known in text
    step = card.training.steps
    logged = read_metrics(zoo_run / "metrics.csv", step)
    assert source.metrics()["val/mIoU"] == logged["val/mIoU"]


def test_a_regular_network_has_a_page_without_shapes(zoo_run, task, samples, tmp_path):
    regular = SegmentationTask(**{**task.hparams, "start": None}).eval()
    path = tmp_path / "page.html"
    write_page({"regular": regular}, path, samples[:1], source=find_source(zoo_run))
    assert 'id="turn"' not in path.read_text(encoding="utf-8")


def test_bad_input_leaves_no_page(zoo_run, task, samples, tmp_path):
    source = find_source(zoo_run)
    with pytest.raises(ValueError, match="at least one image"):
        write_page({"net": task}, tmp_path / "page.html", [], source=source)
    with pytest.raises(ValueError, match=r"must end in \.html"):
        write_page({"net": task}, tmp_path / "page.png", samples, source=source)
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_page({"net": task}, tmp_path / "none" / "page.html", samples, source=source)
    assert not list(tmp_path.iterdir())


def test_curves_keep_first_and_last_and_no_later_step(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("step,loss,val\n0,3,\n1,2,\n,9,\n2,nan,\n3,1,5\n4,0.5,\n")
    assert read_metrics(file) == {"loss": [(0, 3.0), (1, 2.0), (3, 1.0), (4, 0.5)], "val": [(3, 5.0)]}
    assert read_metrics(file, 3)["loss"] == [(0, 3.0), (1, 2.0), (3, 1.0)]
    series = [(step, 0.0) for step in range(101)]
    assert [step for step, _ in thinned(series, 5)] == [0, 25, 50, 75, 100]


@pytest.mark.parametrize("values", [(1e30, -1e30), (5e-324, 0.0), (0.5, 0.5)])
def test_curves_of_any_size_are_drawn(values):
    (figure,) = curve_pictures({"train/loss": list(enumerate(values))})
    assert figure["ticks"]
