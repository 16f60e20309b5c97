"""The report as a person uses it, in headless Chromium: a quiet console, and slider, sorting and search work."""

import pytest

from tests.chromium import Chromium, find_chromium

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on the PATH")
CARDS = "[...document.querySelectorAll('article:not([hidden])')]"
ARROW_RIGHT, HOME, END = ("ArrowRight", 39), ("Home", 36), ("End", 35)


@pytest.fixture(scope="module")
def browser(straight, tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as browser:
        browser.open(straight / "report.html")
        yield browser
        assert browser.problems == []


def column(browser, table, number):
    return browser.value(
        f"[...document.querySelectorAll('{table} tbody tr')].map(r => r.cells[{number}].dataset.value)"
    )


def test_only_the_file_itself_is_loaded(browser, straight):
    outside = [url for url in browser.requests if not url.startswith("data:")]
    assert outside == [(straight / "report.html").as_uri()]
    assert browser.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_slider_by_keyboard_moves_the_cut(browser):
    cut = "getComputedStyle(document.querySelector('.compare')).getPropertyValue('--cut')"
    assert browser.value(cut) == "50%"
    browser.value("document.querySelector('.compare input').focus()")
    browser.press(*ARROW_RIGHT)
    assert browser.value(cut) == "51%"
    browser.press(*HOME)
    assert browser.value(cut) == "0%"
    clip = "getComputedStyle(document.querySelector('.before')).clipPath"
    assert browser.value(clip).startswith("inset(0px 100% 0px 0px")


def test_slider_by_mouse_moves_the_cut(browser):
    browser.value("document.querySelector('article:nth-child(2)').scrollIntoView()")
    box = browser.value("document.querySelectorAll('.compare')[1].getBoundingClientRect().toJSON()")
    browser.click(box["x"] + 0.75 * box["width"], box["y"] + box["height"] / 2)
    cut = browser.value("document.querySelectorAll('.compare')[1].style.getPropertyValue('--cut')")
    assert 60 <= float(cut.rstrip("%")) <= 90


def test_one_slider_moves_all(browser):
    browser.value("document.querySelector('form [name=all]').focus()")
    browser.press(*HOME)
    cuts = "[...new Set([...document.querySelectorAll('.compare')].map(c => c.style.getPropertyValue('--cut')))]"
    assert browser.value(cuts) == ["100%"]
    browser.press(*END)
    assert browser.value(cuts) == ["0%"]


@pytest.mark.parametrize("key", ["picture", "text", "number"])
def test_pairs_are_sorted(browser, key):
    browser.value(
        f"(s => {{ s.value = '{key}'; s.dispatchEvent(new Event('change')) }})(document.querySelector('[name=order]'))"
    )
    values = [float(value) for value in browser.value(f"{CARDS}.map(card => card.dataset.{key})")]
    assert len(values) == 6 and values == sorted(values, reverse=key != "number")


def test_pairs_are_searched_by_word(browser):
    captions = browser.value(f"{CARDS}.map(card => [...card.querySelectorAll('li')].map(li => li.textContent).join())")
    word = max(captions[0].replace(",", " ").split(), key=lambda w: (captions[0].count(w) > 0) * len(w))
    type_words(browser, word.upper())
    expected = sum(word in text for text in captions)
    assert browser.value(f"{CARDS}.length") == expected
    assert browser.value("document.querySelector('output').textContent") == f"{expected} of 6 pairs"
    type_words(browser, "nothingofthatkind")
    assert browser.value(f"{CARDS}.length") == 0
    type_words(browser, "")
    assert browser.value(f"{CARDS}.length") == 6


def type_words(browser, text):
    browser.value("(i => { i.focus(); i.select() })(document.querySelector('[name=words]'))")
    browser.call("Input.insertText", text=text) if text else browser.press("Backspace", 8)


def test_table_is_sorted_by_keyboard(browser):
    heads = "[...document.querySelectorAll('#table th')]"
    last = browser.value(f"{heads}.length") - 1
    before = column(browser, "#table", last)
    browser.value(f"{heads}[{last}].querySelector('button').focus()")
    for direction in ("descending", "ascending"):
        browser.press("Enter", 13, text="\r")
        assert browser.value(f"{heads}[{last}].getAttribute('aria-sort')") == direction
        values = [float(value) for value in column(browser, "#table", last)]
        assert values == sorted(map(float, before), reverse=direction == "descending")
    assert browser.value(f"{heads}.filter(head => head.getAttribute('aria-sort') !== 'none').length") == 1


def test_search_marks_the_right_picture(browser):
    data = browser.value("JSON.parse(document.getElementById('search-data').textContent)")
    own = next(i for i, ranked in enumerate(data["expert"]) if ranked["rank"] <= 5)
    browser.value("document.querySelector('#search input').focus()")
    browser.call("Input.insertText", text=data["captions"][own])
    sources = "list => [...list.querySelectorAll('img')].map(image => image.src)"
    lists = browser.value(f"[...document.querySelectorAll('.ranked')].map({sources})")
    assert lists == [[data["pictures"][i] for i in data[name][own]["first"]] for name in ("set", "expert")]
    right = browser.value("[...document.querySelectorAll('.ranked:last-child .right img')].map(image => image.src)")
    assert right == [data["pictures"][own]]
    titles = browser.value("[...document.querySelectorAll('#found h3')].map(title => title.textContent)")
    for name, title in zip(("set", "expert"), titles, strict=True):
        assert f"ranks {data[name][own]['rank']} of 8" in title


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_has_no_sideways_scrolling_and_no_jumps(browser, straight, scheme):
    """Also: the scheme changes the paper, every control has a name and every picture keeps its place while loading."""
    browser.open(straight / "report.html", width=360, height=740, scheme=scheme)
    assert browser.value("document.documentElement.scrollWidth") == 360
    shift = """new Promise(done => {
        let sum = 0;
        const observer = new PerformanceObserver(list => list.getEntries().forEach(entry => sum += entry.value));
        observer.observe({ type: "layout-shift", buffered: true });
        setTimeout(() => done(sum), 300);
    })"""
    result = browser.call("Runtime.evaluate", expression=shift, awaitPromise=True, returnByValue=True)
    assert result["result"]["value"] < 0.01
    heights = browser.value("""(input => [...document.querySelectorAll("#captions option")].map(option => {
        input.value = option.value;
        input.dispatchEvent(new Event("input"));
        return document.documentElement.scrollHeight;
    }))(document.querySelector("#search input"))""")
    assert len(set(heights)) == 1
    red = int(browser.value("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0])
    assert (red > 200) == (scheme == "light")
    unnamed = browser.value(
        "[...document.querySelectorAll('input, select, button')].filter(e => !(e.labels?.length || e.ariaLabel || "
        "e.textContent)).length"
    )
    assert unnamed == 0
