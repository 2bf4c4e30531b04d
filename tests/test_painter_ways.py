"""The painter in a real browser: each tool without a mouse, zoom, undo and redo, what is left half done."""

import numpy as np
from browser import browser, needs_browser  # noqa: F401
from test_painter import SAVED, SIZE, desk, level, page, polygon, ready, spot, stroke  # noqa: F401

from lagm.labelling.album import read_painted

pytestmark = needs_browser


def go(browser, dx, dy):  # noqa: F811
    """Move the cross with the arrow keys, in tens where it can."""
    for steps, keys in ((dx, ("ArrowLeft", "ArrowRight")), (dy, ("ArrowUp", "ArrowDown"))):
        key, far = keys[steps > 0], abs(steps)
        for _ in range(far // 10): browser.key(key, shift=True)
        for _ in range(far % 10): browser.key(key)


def buttons(browser):  # noqa: F811
    """Whether undo and redo can be pressed."""
    return browser.value("[...document.querySelectorAll('.lagm-painter button')].filter("
                         "b => ['Undo', 'Redo'].includes(b.textContent)).map(b => !b.disabled)")


def test_polygon_lasso_and_fill_without_a_mouse(page):  # noqa: F811
    browser, desk, _ = page  # noqa: F811
    expected = np.full((SIZE, SIZE), 255)  # corners are on centres of pixels: those at the right and below are outside
    browser.key("p"), browser.key("1"), go(browser, -20, -20)  # the cross begins in the middle, at 32.5
    for dx, dy in ((40, 0), (0, 30), (-40, 0)): browser.key(" "), go(browser, dx, dy)
    browser.key(" "), browser.key("Enter"), browser.until(SAVED)
    expected[12:42, 12:52] = 1
    assert (read_painted(desk.album, 0) == expected).all()
    browser.key("l"), browser.key("2"), go(browser, 10, -10)
    for dx, dy in ((10, 0), (0, 5), (-10, 0)): browser.key(" "), go(browser, dx, dy)
    browser.key(" "), browser.key("Enter"), browser.until(SAVED)
    expected[32:37, 22:32] = 2
    assert (read_painted(desk.album, 0) == expected).all()
    browser.key("f"), browser.key("3"), go(browser, 3, -2), browser.key(" "), browser.until(SAVED)
    expected[expected == 2] = 3
    assert (read_painted(desk.album, 0) == expected).all()


def test_a_polygon_closes_where_it_began_or_is_given_up(page):  # noqa: F811
    browser, desk, _ = page  # noqa: F811
    level(browser)
    corners = [(40.125, 40.375), (60.375, 42.625), (50.625, 60.125)]
    browser.key("p"), browser.key("1")
    for corner in corners: browser.click(*spot(browser, *corner))
    browser.key("Escape"), browser.key("Enter")
    assert not (desk.album.folder / "masks").exists()
    for corner in [*corners, corners[0]]: browser.click(*spot(browser, *corner))
    browser.until(SAVED)
    painted = read_painted(desk.album, 0) == 1
    assert (painted == polygon(corners)).all(), np.argwhere(painted != polygon(corners))[:9]


def test_zoom_changes_what_is_seen_and_not_where_one_paints(page):  # noqa: F811
    browser, desk, _ = page  # noqa: F811
    width = "document.querySelector('.lagm-painter canvas').getBoundingClientRect().width"
    before = browser.value(width)
    browser.key("-"), browser.key("-")
    smaller = browser.value(width)
    for _ in range(3): browser.key("+")
    assert smaller < before < browser.value(width)
    browser.key("-"), level(browser)
    browser.key("2"), browser.click(*spot(browser, 30.25, 20.25)), browser.until(SAVED)
    assert ((read_painted(desk.album, 0) == 2) == stroke([(30.25, 20.25)] * 2, 7)).all()


def test_undo_and_redo_are_of_the_picture(page):  # noqa: F811
    browser, desk, _ = page  # noqa: F811
    assert buttons(browser) == [False, False]
    browser.key("1"), browser.click(*spot(browser, 20, 20)), browser.until(SAVED)
    browser.key("PageDown"), ready(browser, "face1")
    assert buttons(browser) == [False, False]
    browser.key("2"), browser.click(*spot(browser, 40, 40)), browser.until(SAVED)
    browser.key("PageUp"), ready(browser, "face0")
    browser.key("z"), browser.until(SAVED)
    assert buttons(browser) == [False, True] and set(np.unique(read_painted(desk.album, 1))) == {2, 255}
    assert not (desk.album.folder / "masks" / "face0.png").exists()
    browser.key("z", control=True, shift=True), browser.until(SAVED)
    assert buttons(browser) == [True, False] and set(np.unique(read_painted(desk.album, 0))) == {1, 255}
    browser.click(*spot(browser, 50, 50)), browser.until(SAVED)
    browser.key("z"), browser.until(SAVED)
    browser.click(*spot(browser, 10, 50)), browser.until(SAVED)  # a new stroke: what was taken back is gone
    assert buttons(browser) == [True, False]


def test_a_stroke_that_is_not_over_is_saved_with_its_picture(page):  # noqa: F811
    browser, desk, _ = page  # noqa: F811
    browser.key("1"), browser.mouse("Moved", *spot(browser, 20, 20), buttons=0)
    browser.mouse("Pressed", *spot(browser, 20, 20)), browser.mouse("Moved", *spot(browser, 30, 20))
    browser.key("PageDown"), ready(browser, "face1"), browser.until(SAVED)
    browser.mouse("Released", *spot(browser, 30, 20), buttons=0)
    assert (read_painted(desk.album, 0) == 1).sum() == stroke([(20, 20), (30, 20)], 7).sum()
    assert not (desk.album.folder / "masks" / "face1.png").exists()


def test_a_stroke_may_leave_the_picture(page):  # noqa: F811
    browser, desk, _ = page  # noqa: F811
    level(browser)
    points = [(60.25, 30.25), (70.25, 30.25), (70.25, 40.25), (60.25, 40.25)]
    browser.key("3"), browser.drag([spot(browser, *p) for p in points]), browser.until(SAVED)
    assert ((read_painted(desk.album, 0) == 3) == stroke(points, 7)).all()
