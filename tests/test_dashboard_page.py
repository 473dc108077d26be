"""The dashboard in a browser: what a person sees of runs, and does with hands, keys or a phone."""

import contextlib
import json
import math
import os
import re
import sys
from subprocess import PIPE, Popen

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("playwright", reason="needs playwright")

from playwright.sync_api import expect

from tests.browser import axe_violations, overflow
from tests.dashboard_runs import add, lines, make_run, rows
from tests.serving import until
from tinygpt.runs.lock import FolderLock
from tinygpt.server.dashboard import watch
from tinygpt.server.dashboard.board import Board, make_app
from tinygpt.server.dashboard.curves import POINTS
from tinygpt.server.dashboard.watch import Watch
from tinygpt.server.http.listening import url
from tinygpt.server.http.thread import ServerThread, listen_nearby

KEY = "a-key-for-the-tests"
HOSTILE = '<img src=x onerror="alert(1)"></script>'


@contextlib.contextmanager
def serving(*places, port=0, steering=None):
    """The link to a dashboard, key and all."""
    board = Board(Watch(places), KEY, steering)
    with listen_nearby("127.0.0.1", port) as listener, ServerThread(make_app(board), listener):
        yield f"{url(listener, '127.0.0.1')}/#key={KEY}"


def port_of(link):
    return int(re.search(r":(\d+)/", link)[1])


@pytest.fixture
def runs(tmp_path):
    """A folder with two runs, and the address of its dashboard."""
    make_run(tmp_path / "first", 400, planned=1000)
    make_run(tmp_path / "second", 300, planned=1000, seed=1, rate=3e-3)
    with serving(tmp_path) as address:
        yield tmp_path, address


def ready(page):
    page.wait_for_selector("html[data-ready]")
    return page


def picture(page, chart):
    """What a chart shows now, once it is drawn."""
    page.evaluate(
        "() => new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)))"
    )
    return page.evaluate(f"() => document.querySelector('#{chart} > canvas').toDataURL()")


def figure(page, name):
    named = page.locator("#figures div").filter(has=page.get_by_text(name, exact=True))
    return named.locator("b")


def card(page, name):
    return page.locator("#runs li", has_text=name)


def slider(page, chart, what):
    return page.locator(f"#{chart} > canvas").get_attribute(f"aria-{what}")


def test_rows_that_are_written_move_the_curves(runs, open_page):
    folder, address = runs
    page = ready(open_page(address))
    card(page, "first").locator("button").click()
    expect(figure(page, "Step")).to_have_text("400")
    before = picture(page, "loss")
    add(folder / "first", lines(rows(401, 450)))
    expect(figure(page, "Step")).to_have_text("450")
    assert picture(page, "loss") != before
    expect(page.locator("#link")).to_have_text("live")
    held = FolderLock(folder / "first")
    held.acquire()
    expect(page.locator("#state")).to_have_text("training")
    expect(page.locator("#save")).to_be_visible()
    held.release()
    expect(page.locator("#state")).to_have_text("stopped")
    expect(page.locator("#save")).to_be_hidden()


def test_rows_that_disappear_when_a_run_is_resumed_are_taken_back(runs, open_page):
    folder, address = runs
    page = ready(open_page(address))
    card(page, "first").locator("button").click()
    expect(figure(page, "Step")).to_have_text("400")
    (folder / "first" / "metrics.jsonl").write_text(lines([*rows(1, 200), *rows(201, 260, seed=5)]))
    expect(figure(page, "Step")).to_have_text("260")
    page.locator("#loss > canvas").press("End")
    assert slider(page, "loss", "valuemax") == "300"  # that of the other run
    card(page, "second").locator("input").uncheck()
    until(lambda: picture(page, "loss") and slider(page, "loss", "valuemax") == "260")
    add(folder / "first", lines(rows(261, 270)))
    until(lambda: picture(page, "loss") and slider(page, "loss", "valuemax") == "270")


def test_a_page_comes_back_after_the_server_has(tmp_path, open_page):
    folder = make_run(tmp_path / "run", 100, planned=1000)
    with serving(folder) as address:
        page = ready(open_page(address))
        expect(page.locator("#link")).to_have_text("live")
    expect(page.locator("#link")).to_contain_text("connection lost")
    add(folder, lines(rows(101, 150)))
    with serving(folder, port=port_of(address)) as again:
        assert again == address
        expect(page.locator("#link")).to_have_text("live", timeout=30_000)
        expect(figure(page, "Step")).to_have_text("150")


def test_a_server_that_goes_while_the_page_asks_is_a_connection_that_was_lost(runs, open_page):
    folder, address = runs
    page = ready(open_page(address))
    card(page, "first").locator("button").click()
    expect(page.locator("#link")).to_have_text("live")
    page.route("**/curves*", lambda route: route.abort())
    (folder / "first" / "metrics.jsonl").write_text(lines(rows(1, 260, seed=5)))
    expect(page.locator("#link")).to_contain_text("connection lost")
    page.unroute("**/curves*")
    page.locator("#loss > canvas").press("End")
    card(page, "second").locator("input").uncheck()
    until(lambda: picture(page, "loss") and slider(page, "loss", "valuemax") == "260")
    expect(page.locator("#link")).to_have_text("live")


def test_a_run_chosen_while_the_server_is_gone_comes_when_it_is_back(tmp_path, open_page):
    for i in range(11):
        make_run(tmp_path / f"run-{i}", 50 + i, planned=1000, seed=i)
    held = FolderLock(tmp_path / "run-3")
    held.acquire()
    with serving(tmp_path) as address:
        page = ready(open_page(address))
        expect(page.locator("#link")).to_have_text("live")
        expect(page.locator("#sample")).to_have_text("text of step 50")
        expect(page.locator("#name")).to_have_text("run-3")
        expect(page.locator("#save")).to_be_enabled()
        expect(page.locator("#away")).to_be_hidden()
    expect(page.locator("#away")).to_contain_text("tinygpt dashboard")
    for button in ("#save", "#stop"):  # nobody is there to be asked
        expect(page.locator(button)).to_be_disabled()
    assert axe_violations(page) == []
    late = page.locator("#runs li:has(input:not(:checked))")
    name = late.locator("button").inner_text()
    late.locator("button").click()
    expect(page.locator("#name")).to_have_text(name)
    expect(page.locator("#told")).to_contain_text("cannot be reached")
    expect(page.locator("#sample")).to_contain_text("No sample")  # not those of another run
    with serving(tmp_path, port=port_of(address)):
        expect(page.locator("#link")).to_have_text("live", timeout=30_000)
        expect(page.locator("#sample")).to_have_text("text of step 50")
        expect(page.locator("#away")).to_be_hidden()
        expect(page.locator("#told")).to_be_empty()
        page.locator("#loss > canvas").press("End")
        assert slider(page, "loss", "valuemax") == "60"
    held.release()


def test_a_page_whose_first_question_stays_unanswered_asks_again(runs, open_page):
    page = open_page(f"{runs[1]}/page/shared/icon.svg")
    page.route("**/dashboard/runs", lambda route: route.abort())
    page.goto(runs[1])
    expect(page.locator("#error")).to_contain_text("cannot be reached")
    page.unroute("**/dashboard/runs")
    ready(page)
    expect(page.locator("#error")).to_be_hidden()
    expect(page.locator("#link")).to_have_text("live")


def test_after_sleep_the_page_asks_for_what_it_has_missed(runs, open_page):
    page = ready(open_page(runs[1]))
    expect(page.locator("#link")).to_have_text("live")
    with page.expect_request("**/dashboard/events") as asked:
        page.evaluate(
            """() => {
                const now = Date.now;
                Date.now = () => now() + 3_600_000;
                document.dispatchEvent(new Event("visibilitychange"));
                Date.now = now;
            }"""
        )
    assert re.fullmatch(r"([0-9a-f]{12}:\d+:[0-9a-f]{8},?)+", asked.value.headers["last-event-id"])
    expect(page.locator("#link")).to_have_text("live")


def test_the_film_is_scrubbed_and_played(runs, open_page):
    page = ready(open_page(runs[1]))
    card(page, "first").locator("button").click()
    expect(page.locator("#sample")).to_have_text("text of step 400")
    page.locator("#slider").press("Home")
    expect(page.locator("#sample")).to_have_text("text of step 50")
    expect(page.locator("#frame")).to_have_text("step 50 · sample 1 of 8")
    page.locator("#slider").press("ArrowRight")
    expect(page.locator("#sample")).to_have_text("text of step 100")
    page.locator("#play").click()
    expect(page.locator("#play")).to_have_text("Pause")
    expect(page.locator("#sample")).to_have_text("text of step 400", timeout=20_000)
    expect(page.locator("#play")).to_have_text("Play")


def test_runs_are_compared_with_the_settings_that_differ(runs, open_page):
    page = ready(open_page(runs[1]))
    table = page.locator("#settings")
    expect(table.locator("thead th")).to_have_count(3)
    found = [row.inner_text().split() for row in table.locator("tbody tr").all()]
    assert sorted(row[0] for row in found) == ["train.learning_rate", "train.seed"]
    assert {"0.001", "0.003"} == set(next(row[1:] for row in found if "rate" in row[0]))
    page.locator("#same").check()
    expect(table.locator("tbody tr")).to_have_count(6)
    before = picture(page, "loss")
    card(page, "second").locator("input").uncheck()
    expect(table.locator("thead th")).to_have_count(2)
    assert picture(page, "loss") != before


def test_log_and_smooth_change_the_picture_and_are_kept(runs, open_page):
    page = ready(open_page(runs[1]))
    seen = {picture(page, "loss")}
    for switch in ("log", "smooth"):
        page.locator(f"#{switch}").click()
        seen.add(picture(page, "loss"))
    assert len(seen) == 3
    page.reload()
    ready(page)
    expect(page.locator("#log")).to_be_checked()
    expect(page.locator("#smooth")).not_to_be_checked()


def test_what_is_chosen_stands_in_the_address_and_a_link_shows_the_same(tmp_path, open_page):
    for name, seed in (("first", 0), ("second", 1)):
        folder = make_run(tmp_path / name, 400, planned=1000, seed=seed)
        settings = (folder / "config.toml").read_text()
        (folder / "config.toml").write_text(
            settings.replace("[train]", "block_size = 8\n[train]\nbatch_size = 4")
        )
        number = {"run": "0123456789abcdef", "bytes_per_token": 0.5 / math.log(2)}
        (folder / "run.json").write_text(json.dumps(number))
    with serving(tmp_path) as address:
        page = ready(open_page(address))
        seen = {picture(page, "loss")}
        page.locator("#x").select_option("tokens")
        page.locator("#loss > canvas").press("End")
        until(lambda: picture(page, "loss") and slider(page, "loss", "valuemax") == "12800")
        page.locator("#x").select_option("time")
        page.locator("#loss > canvas").press("End")
        until(lambda: picture(page, "loss") and slider(page, "loss", "valuemax") == "40")
        assert slider(page, "loss", "valuetext").startswith("40s, ")
        seen.add(picture(page, "loss"))
        loss = float(figure(page, "Best validation").inner_text())
        page.locator("#unit").select_option("bits")
        expect(figure(page, "Best validation")).to_have_text(f"{2 * loss:.4f}")
        card(page, "first").locator("button").click()
        card(page, "second").locator("input").uncheck()
        page.locator("#loss > canvas").press("+")
        expect(page.locator("#whole")).to_be_visible()
        seen.add(picture(page, "loss"))
        assert len(seen) == 3 and KEY not in page.url
        again = ready(open_page(f"{page.url}#key={KEY}"))
        expect(again.locator("#name")).to_have_text("first")
        expect(again.locator("#runs input:checked")).to_have_count(1)
        expect(again.locator("#x")).to_have_value("time")
        expect(again.locator("#unit")).to_have_value("bits")
        expect(again.locator("#whole")).to_be_visible()
        for chart in ("valuemin", "valuemax"):
            picture(again, "loss")
            assert slider(again, "loss", chart) == slider(page, "loss", chart)


def test_one_value_far_from_the_others_leaves_the_axis_alone_until_it_is_asked_for(
    tmp_path, open_page
):
    folder = make_run(tmp_path / "run", 400)
    found = [*rows(1, 400)]
    found[200]["train_loss"] = 900.0
    (folder / "metrics.jsonl").write_text(lines(found))
    with serving(tmp_path) as address:
        page = ready(open_page(address))
        found[200]["train_loss"] = 90_000.0
        cut = picture(page, "loss")
        page.locator("#outliers").check()
        assert picture(page, "loss") != cut
        page.locator("#outliers").uncheck()
        assert picture(page, "loss") == cut


def test_curves_are_saved_as_a_table_and_as_a_picture(tmp_path, open_page):
    for name, steps in (("first", 400), ("second", 300)):
        folder = make_run(tmp_path / name, steps)
        (folder / "run.json").write_text('{"run": "0123456789abcdef", "bytes_per_token": 0.5}')
    with serving(tmp_path) as address:
        page = ready(open_page(address))
        with page.expect_download() as table:
            page.locator("#csv").click()
        with page.expect_download() as drawn:
            page.locator("#png").click()
    head, *found = table.value.path().read_text().splitlines()
    assert head.startswith("run,step,train_loss,")
    assert head.endswith(",val_loss,train_bits_per_byte,val_bits_per_byte")
    assert table.value.suggested_filename == "curves.csv" and len(found) == 700 + 14
    wanted = next(rows(1, 1, 0))
    [first] = [row.split(",") for row in found if row.startswith('"first",1,')]
    assert float(first[2]) == pytest.approx(wanted["train_loss"], rel=1e-5)
    assert float(first[-2]) == pytest.approx(2 * float(first[2]) / math.log(2), rel=1e-12)
    evaluated = found[-1].split(",")
    assert float(evaluated[-1]) == pytest.approx(2 * float(evaluated[-3]) / math.log(2), rel=1e-12)
    assert drawn.value.path().read_bytes().startswith(b"\x89PNG")


def test_seven_figures_stand_in_one_row(runs, open_page):
    page = ready(open_page(runs[1], viewport={"width": 1280, "height": 800}))
    tops = page.evaluate(
        "() => [...document.querySelectorAll('#figures > div')].map((e) => e.offsetTop)"
    )
    assert len(tops) == 7 and len(set(tops)) == 1


def test_dragging_looks_closer_with_finer_points_and_a_double_click_goes_back(tmp_path, open_page):
    make_run(tmp_path / "long", 5000, every=500)
    with serving(tmp_path) as address:
        page = ready(open_page(address))
        canvas = page.locator("#loss > canvas")
        box = canvas.bounding_box()
        y = box["y"] + 60
        page.mouse.move(box["x"] + box["width"] * 0.5, y)
        expect(page.locator("#loss .tip")).to_contain_text("training")
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.6, y, steps=3)
        with page.expect_response(re.compile("curves.from=")) as answer:
            page.mouse.up()
        assert answer.value.json()["stride"] == 1
        until(lambda: picture(page, "loss") and int(slider(page, "loss", "valuemax")) < 3500)
        low, high = (int(slider(page, chart, "valuemin")) for chart in ("loss", "lr"))
        assert low == high > 1500  # all charts show the same steps
        canvas.dblclick(position={"x": 200, "y": 60})
        until(lambda: picture(page, "loss") and int(slider(page, "loss", "valuemax")) > 4900)


def test_what_the_page_says_is_so(tmp_path, open_page):
    """Each text at a moment at which it was wrong once."""
    make_run(tmp_path / "run", 400)
    make_run(tmp_path / "empty", 0, planned=100)
    make_run(tmp_path / "long", 5000, every=500)
    (tmp_path / "empty" / "config.toml").write_text("[")
    with serving(tmp_path) as address:
        page = ready(open_page(address))
        card(page, "run").locator("button").click()
        for name in ("long", "empty"):
            card(page, name).locator("input").uncheck()
        canvas, tip = page.locator("#loss > canvas"), page.locator("#loss .tip")
        keys = page.locator("#keys > span")  # each with a piece of its line
        expect(page.locator("#keys > span > svg")).to_have_count(4)
        page.locator("#smooth").uncheck()
        canvas.press("Home")
        for _ in range(86):  # a hundredth of 399 steps at a time, from the first on
            canvas.press("ArrowRight")
        expect(tip.locator("b")).to_have_text("step 344")
        expect(tip).to_contain_text("validation (step 350)")  # not of the step above it
        told = slider(page, "loss", "valuetext")
        assert re.fullmatch(r"step 344, training [\d.]+, validation \(step 350\) [\d.]+", told)
        page.locator("#smooth").check()
        expect(keys).to_have_text(["training, smoothed", "as measured", "validation", "best"])
        canvas.press("Home")
        expect(tip).to_contain_text("training, smoothed")
        page.locator("#smooth").uncheck()
        expect(keys).to_have_text(["training", "validation", "best"])
        card(page, "run").locator("input").uncheck()
        card(page, "long").locator("button").click()
        canvas.press("Home")
        expect(tip.locator("b")).to_contain_text("around step")  # a mean of several
        expect(page.locator("#keys")).to_contain_text("from the lowest to the highest step")
        page.locator("#layers > canvas").press("End")
        expect(page.locator("#layers .tip b")).to_contain_text("around step")
        card(page, "empty").locator("button").click()
        expect(page.locator("#layers-hint")).to_have_text("They come with the first step.")
        expect(page.locator("#sample")).to_have_text("No sample was written.")
        expect(card(page, "empty")).to_contain_text("nobody trains it now")
        expect(page.locator("#same-label")).to_be_visible()
        page.locator("#same").check()
        expect(page.locator("#settings-title")).to_have_text("Settings")


def test_an_odd_run_says_what_is_odd_and_others_do_not(tmp_path, open_page):
    make_run(tmp_path / "good", 60)
    odd = make_run(tmp_path / os.fsdecode(b"caf\xe9"), 60, planned=100)
    (odd / "config.toml").write_text("[")
    with serving(tmp_path) as address:
        page = ready(open_page(address, viewport={"width": 360, "height": 800}))
        card(page, r"caf\xe9").locator("button").click()
        expect(page.locator("#name")).to_have_text(r"caf\xe9")
        expect(page.locator("#odd")).to_contain_text("config.toml: Its settings cannot be read")
        expect(page.locator("#odd li")).to_have_count(2)
        expect(card(page, r"caf\xe9").locator(".odd")).to_have_text("odd")
        assert axe_violations(page) == [] and overflow(page) == 0
        card(page, "good").locator("button").click()
        expect(page.locator("#odd")).to_be_hidden()
        expect(card(page, "good").locator(".odd")).to_be_hidden()


def test_everything_can_be_done_by_keyboard(runs, open_page):
    page = ready(open_page(runs[1]))
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        place = "e => (e.closest('[id]') ?? e).id"
        reached.add(page.evaluate(f"() => ({place})(document.activeElement)"))
    wanted = {
        "runs",
        "log",
        "smooth",
        "loss",
        "grad_norm",
        "lr",
        "memory",
        "layers",
        "slider",
        "sample",
    }
    assert wanted | {"play", "settings", "same"} <= reached
    canvas = page.locator("#loss > canvas")
    canvas.focus()
    canvas.press("Home")
    picture(page, "loss")
    assert slider(page, "loss", "valuenow") == "1"
    for _ in range(3):
        canvas.press("ArrowRight")
    picture(page, "loss")
    assert re.match(r"step 13, .*training, smoothed \d", slider(page, "loss", "valuetext"))
    expect(page.locator("#loss .tip")).to_be_visible()
    canvas.press("+")
    expect(page.locator("#whole")).to_be_visible()
    canvas.press("Escape")
    expect(page.locator("#whole")).to_be_hidden()
    strip = page.locator("#layers > canvas")
    strip.focus()
    strip.press("ArrowDown")
    picture(page, "layers")
    assert re.search(r"step [\d,]+, wpe 0\.\d+", slider(page, "layers", "valuetext"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_is_in_the_way_of_anybody(runs, open_page, scheme, width):
    viewport = {"width": width, "height": 800}
    page = ready(open_page(runs[1], color_scheme=scheme, viewport=viewport))
    assert axe_violations(page) == []
    assert overflow(page) == 0
    color = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", color))) < 200) == (scheme == "dark")
    hint = page.locator("#layers-hint")  # in the dark, what is large is bright
    expect(hint).to_contain_text("as on the scale")
    expect(hint).not_to_contain_text("darker")


def test_what_runs_hold_is_shown_as_text(tmp_path, open_page):
    name = HOSTILE.replace("/", ":")  # no name of a folder has a slash
    folder = make_run(tmp_path / name, 100, prompt=HOSTILE)
    bad = next(rows(101, 101)) | {"skipped": HOSTILE, "grad_norms": {HOSTILE: 1.0}}
    add(folder, lines([bad]))
    with serving(tmp_path) as address:
        page = ready(open_page(address))
        expect(page.locator("#name")).to_have_text(name)
        expect(page.locator("#sample")).to_have_text(f"{HOSTILE}text of step 100")
        assert json.dumps(HOSTILE) in page.locator("#settings").inner_text()
        page.locator("#loss > canvas").press("End")
        expect(page.locator("#loss .tip")).to_contain_text(HOSTILE)
        page.locator("#layers > canvas").press("End")
        picture(page, "layers")
        page.locator("#layers > canvas").press("ArrowUp")
        assert page.locator("main img").count() == 0


def test_the_buttons_need_the_key_and_do_as_they_say(tmp_path, open_page):
    heard = []

    class Asked:
        def save(self):
            heard.append("save")

        def stop(self):
            heard.append("stop")

    folder = make_run(tmp_path / "run", 100, planned=1000)
    held = FolderLock(folder)
    held.acquire()
    with serving(folder, steering={folder: Asked()}) as address:
        page = open_page(address.partition("#")[0])
        page.locator("#key").fill("wrong")
        page.get_by_role("button", name="Continue").click()
        expect(page.locator("dialog:has(#key)")).to_contain_text("not the right one")
        page.locator("#key").fill(KEY)
        page.get_by_role("button", name="Continue").click()
        ready(page).locator("#save").click()
        expect(page.locator("#told")).to_contain_text("A checkpoint comes")
        page.locator("#stop").click()
        assert axe_violations(page) == []
        page.keyboard.press("Escape")
        page.locator("#stop").click()
        page.get_by_role("button", name="Let it go on").click()
        assert heard == ["save"]
        page.locator("#stop").click()
        page.get_by_role("button", name="Stop it").click()
        expect(page.locator("#told")).to_contain_text("It stops")
        assert heard == ["save", "stop"]
        other = ready(open_page(address))
        other.locator("#save").click()
        expect(other.locator("#told")).to_contain_text("A checkpoint comes")
        assert KEY not in other.url
    held.release()


def test_a_new_link_in_the_same_tab_brings_its_key(runs, open_page):
    """As after a restart of the dashboard, whose key is then another one."""
    _, address = runs
    page = open_page(address.replace(KEY, "that-of-yesterday"))
    expect(page.locator("dialog:has(#key)")).to_contain_text("not the right one")
    page.goto(address)  # only what stands behind the # is another
    ready(page)
    expect(page.locator("dialog")).to_have_count(page.locator("dialog:not([open])").count())
    assert KEY not in page.url


def test_a_page_opened_before_any_run_fills_by_itself(tmp_path, open_page, monkeypatch):
    with serving(tmp_path) as address:
        page = open_page(address)
        expect(page.locator("#empty")).to_contain_text("tinygpt train")
        assert axe_violations(page) == []
        make_run(tmp_path / "new", 30, planned=100, every=10)
        expect(page.locator("#name")).to_have_text("new")
        expect(page.locator("#empty")).to_be_hidden()
        expect(page.locator("#sample")).to_have_text("text of step 30")


def test_ten_long_runs_are_sent_in_few_points(tmp_path, open_page, monkeypatch):
    monkeypatch.setattr(watch, "READING", 60.0)
    for i in range(10):
        make_run(tmp_path / f"run-{i}", 10_000, seed=i, every=500)
    answers = []
    with serving(tmp_path) as address:
        page = open_page(address.replace("#", "page/shared/icon.svg#"))
        page.on("response", lambda r: "curves" in r.url and answers.append(r.json()))
        page.goto(address)
        ready(page)
        until(lambda: page.locator("#runs input:checked").count() == 10)
        expect(page.locator("#settings thead th")).to_have_count(11)
    assert len(answers) == 10
    for answer in answers:
        assert answer["rows"] == 10_000 and 256 < len(answer["x"]) <= POINTS
        assert len(json.dumps(answer)) < 120_000


def test_a_real_training_is_watched_and_stopped(tmp_path, open_page):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200)
    words = ["train", tmp_path / "text.txt", "--out", tmp_path / "run", "--dashboard"]
    words += ["--dashboard-port", "0", "--tokenizer", "char", "--train.max-iters", "1000000"]
    words += ["--model.n-layer", "1", "--model.n-embd", "16", "--model.n-head", "2"]
    words += ["--model.block-size", "8", "--train.batch-size", "2", "--train.eval-iters", "1"]
    words += ["--train.eval-interval", "50"]
    command = [sys.executable, "-m", "tinygpt", *map(str, words)]
    with Popen(command, stderr=PIPE, text=True, env=dict(os.environ)) as process:
        try:
            said = iter(process.stderr.readline, "")
            address = next(m[1] for m in (re.search("dashboard: (http.*)", s) for s in said) if m)
            page = open_page(address)
            expect(page.locator("#state")).to_have_text("training", timeout=60_000)
            until(lambda: re.match(r"[\d,]{2,}", figure(page, "Step").inner_text()))
            before, step = picture(page, "loss"), figure(page, "Step").inner_text()
            expect(figure(page, "Step")).not_to_have_text(step)
            assert picture(page, "loss") != before
            page.locator("#stop").click()
            page.get_by_role("button", name="Stop it").click()
            rest = process.stderr.read()
            assert process.wait(60) == 0 and "all of it kept" in rest
            expect(page.locator("#link")).to_contain_text("connection lost")
        finally:
            process.kill()
