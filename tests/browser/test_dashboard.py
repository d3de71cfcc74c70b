"""The dashboard in a real browser, which may talk to this machine alone."""

import contextlib
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from async_rlhf.dashboard.catalogue import name_of
from tests.support.command import CHECKOUT, command, environment
from tests.support.dashboard_runs import HOSTILE, LONG, WrittenRun
from tests.support.programs import program

ARGUMENTS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
ARGUMENTS = (*ARGUMENTS, "--disable-component-update", "--disable-sync")
LOCAL = re.compile(r"(http://(127\.0\.0\.1|localhost):\d+/.*|data:.*)")
WAIT_MS = 30_000
"""The machine may be busy: what is waited for usually takes a second or two."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program("chromium"), args=[*ARGUMENTS])
        yield started
        started.close()


@dataclass
class Watched:
    """A page, and what it did that it must not do."""

    page: Page
    errors: list[str] = field(default_factory=list)

    def console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def request(self, request: Request) -> None:
        if not LOCAL.fullmatch(request.url):
            self.errors.append(f"went to {request.url}")


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    expect.set_options(timeout=WAIT_MS)
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    made = Watched(context.new_page())
    made.page.set_default_timeout(WAIT_MS)
    made.page.on("console", made.console)
    made.page.on("pageerror", lambda error: made.errors.append(str(error)))
    made.page.on("request", made.request)
    yield made
    context.close()
    assert made.errors == []


@contextlib.contextmanager
def dashboard(*words: str, folder: Path = CHECKOUT) -> Iterator[str]:
    """The command as a user starts it; gives the address, and ends it as Ctrl-C does."""
    process = subprocess.Popen(
        command("dashboard", *words), cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert address, line + process.stdout.read()
        yield address[0]
    finally:
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert (process.returncode, rest) == (0, "")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, WrittenRun]:
    """Several runs, the newest of them living."""
    root = tmp_path_factory.mktemp("work") / "runs"
    made = {
        name: WrittenRun(root / name, *settings)
        for name, settings in (("done", ["algorithm.name=rloo"]), ("odd <b>&amp;", []), ("live", []))
    }
    made["done"].update(100)
    made["done"].evaluate(0, 0.4)
    made["done"].evaluate(100, 0.8)
    made["done"].write_samples("63+11=", "74")
    made["done"].finish()
    odd = made["odd <b>&amp;"]
    odd.update(30)
    odd.write_samples(HOSTILE, LONG + HOSTILE)
    odd.write_incident({"event": "lost", "name": HOSTILE, "time": 1.8e9, "cause": HOSTILE + LONG})
    odd.write_state("failed", actors={HOSTILE: HOSTILE})
    (odd.folder / "summary.json").write_text(
        '{"exit": "failed", "error": "</script><script>window.hacked=1</script>", "dropped": {"<i>": 2}}'
    )
    return made


@pytest.fixture(scope="module")
def address(runs: dict[str, WrittenRun]) -> Iterator[str]:
    """The dashboard started where ./runs are."""
    with dashboard(folder=runs["live"].folder.parents[1]) as started:
        yield started


def route(address: str, run: WrittenRun) -> str:
    return f"{address}#run={name_of(run.folder)}"


def facts(page: Page) -> Any:
    return expect(page.locator("#facts"))


def expect_drawn(page: Page, num_points: int) -> None:
    """Wait for the curve of the reward; the facts change first, and the curve when its own rows have come."""
    points = re.compile(rf"^M[\d. -]+(L[\d. -]+){{{num_points - 1}}}$")
    expect(page.locator("#curve-reward path.bold")).to_have_attribute("d", points)


def test_the_newest_living_run_is_followed_and_its_numbers_move(runs: dict[str, WrittenRun], address: str, watched: Watched) -> None:
    page, live = watched.page, runs["live"]
    live.update(10)
    page.goto(address)
    facts(page).to_contain_text("update 10 of 100")
    expect(page.locator("h1")).to_have_text("live")
    expect(page.locator(".badge")).to_have_text("training")
    expect_drawn(page, 10)
    tokens = page.locator(".flow").text_content() or ""
    assert "2,000" in tokens and "tokens/s" in tokens and "tickets/s" in tokens

    stop, seen = threading.Event(), threading.Event()

    def drive() -> None:
        while live.version < 60 and not stop.wait(0.05):
            if live.version == 50:
                seen.wait()
            live.update(2)

    driver = threading.Thread(target=drive)
    driver.start()
    try:
        facts(page).to_contain_text(re.compile(r"update [2-5]\d of 100"))
        expect_drawn(page, 50)
        seen.set()
        facts(page).to_contain_text("update 60 of 100")
    finally:
        stop.set()
        seen.set()
        driver.join()
    expect(page.locator("#verdict")).not_to_be_empty()


def test_rows_that_a_restarted_learner_takes_back_leave_the_page(runs: dict[str, WrittenRun], address: str, watched: Watched) -> None:
    page, live = watched.page, runs["live"]
    if live.version < 30:
        live.update(30 - live.version)
    page.goto(route(address, live))
    facts(page).to_contain_text(f"update {live.version} of 100")
    expect_drawn(page, live.version)

    lines = (live.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (live.folder / "new").write_text("".join(lines[:12]))
    (live.folder / "new").replace(live.folder / "metrics.jsonl")
    live.version = 12
    live.write_state()
    facts(page).to_contain_text("update 12 of 100")
    expect_drawn(page, 12)
    live.update(1)

    facts(page).to_contain_text("update 13 of 100")
    expect_drawn(page, 13)
    figure = page.locator("#curve-reward")
    figure.locator("svg").focus()
    page.keyboard.press("ArrowLeft")
    expect(figure.locator(".tip")).to_contain_text("version 13")


def test_a_finished_run_shows_its_result_its_curves_and_values_under_the_pointer(
    runs: dict[str, WrittenRun], address: str, watched: Watched
) -> None:
    page = watched.page
    page.goto(route(address, runs["done"]))

    expect(page.locator(".badge")).to_have_text("finished")
    expect(page.locator(".tile").first).to_contain_text("0.400 \u2192 0.800")
    expect(page.locator("#drops")).to_contain_text("tied")
    for name in ("reward", "kl", "staleness", "throughput", "idle", "evaluated-score"):
        expect(page.locator(f"#curve-{name} path.line").first).to_have_attribute("d", re.compile(r"^M[\d.]+ [\d.]+L"))
    assert {"score per completion", "policy version (updates)"} <= {*page.locator("#curve-reward text").all_text_contents()}
    page.locator("#curve-staleness svg").hover(position={"x": 200, "y": 80})
    expect(page.locator("#curve-staleness .tip")).to_contain_text(re.compile(r"version \d+maximum 1mean 0\.\d+"))
    expect(page.locator("#samples")).to_contain_text("63+11=")


def test_what_a_model_a_folder_or_an_error_says_stays_text(runs: dict[str, WrittenRun], address: str, watched: Watched) -> None:
    page = watched.page
    page.goto(route(address, runs["odd <b>&amp;"]))

    expect(page.locator("h1")).to_have_text("odd <b>&amp;")
    expect(page.locator("p.error")).to_have_text("</script><script>window.hacked=1</script>")
    expect(page.locator("#samples")).to_contain_text("<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>")
    expect(page.locator("#samples")).to_contain_text("[U+202E]gnp.exe")
    expect(page.locator("#crew")).to_contain_text("<img src=x")
    expect(page.locator("#drops")).to_contain_text("<i>")
    assert page.evaluate("[window.hacked === undefined, document.images.length, document.scripts.length]") == [True, 0, 1]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_runs_are_listed_newest_first_chosen_and_compared(runs: dict[str, WrittenRun], address: str, watched: Watched) -> None:
    page = watched.page
    page.goto(f"{address}#runs")
    expect(page.locator("tbody tr")).to_have_count(3)
    assert page.locator("tbody a").all_inner_texts() == ["live", "odd <b>&amp;", "done"]
    expect(page.get_by_role("button", name="Compare")).to_be_disabled()

    page.get_by_label("compare live").check()
    page.get_by_label("compare done").check()
    page.get_by_role("button", name="Compare").click()

    expect(page.locator("#settings")).to_contain_text("algorithm.name")
    expect(page.locator("#settings")).to_contain_text("rloo")
    expect(page.locator("#results")).to_contain_text("0.800 (0.750 to 0.850)")
    expect(page.locator("#curve-reward path.bold")).to_have_count(2)
    expect(page.locator("#curve-reward .legend bdi")).to_have_text(["live", "done"])


@pytest.mark.parametrize("width", [320, 375, 800])
def test_a_narrow_window_shows_everything_without_scrolling_sideways(
    width: int, runs: dict[str, WrittenRun], address: str, watched: Watched
) -> None:
    page = watched.page
    page.set_viewport_size({"width": width, "height": 800})
    for place in (route(address, runs["done"]), route(address, runs["odd <b>&amp;"]), f"{address}#runs"):
        page.goto(place)
        page.reload()
        expect(page.locator("h1, tbody a").first).to_be_visible()
        expect(page.locator("#pulse")).to_contain_text("updated")
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_another_host_name_that_leads_here_is_refused(address: str, browser: Browser) -> None:
    """As after DNS rebinding: the browser believes that evil.example is this machine."""
    port = address.rpartition(":")[2]
    with contextlib.closing(browser.new_context()) as context:
        page = context.new_page()
        answer = page.request.get(address, headers={"Host": f"evil.example:{port}"})
        assert (answer.status, "this machine" in answer.text() or "localhost" in answer.text()) == (403, True)


def test_a_dashboard_that_ended_is_told_and_found_again(runs: dict[str, WrittenRun], browser: Browser) -> None:
    context = browser.new_context()
    page = context.new_page()
    with dashboard(str(runs["done"].folder)) as here:
        page.goto(here)
        expect(page.locator(".badge")).to_have_text("finished", timeout=WAIT_MS)
        expect(page.locator("#pulse")).to_contain_text("updated", timeout=WAIT_MS)
    expect(page.locator("#pulse")).to_contain_text("no answer", timeout=WAIT_MS)
    expect(page.locator("h1")).to_have_text("done")
    with dashboard(str(runs["done"].folder), "--port", here.rstrip("/").rpartition(":")[2]):
        expect(page.locator("#pulse")).to_contain_text("updated", timeout=WAIT_MS)
    context.close()


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_real_run_is_followed_from_its_start_to_its_end(tmp_path: Path, watched: Watched) -> None:
    page, run = watched.page, tmp_path / "runs" / "real"
    words = ["train", "conf/quickstart.yaml", f"run.dir={run}", "updates=20", "evaluation.num_prompts=50"]
    with (tmp_path / "log").open("w") as log:
        training = subprocess.Popen(command(*words), cwd=CHECKOUT, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        try:
            with dashboard(folder=tmp_path) as here:
                page.goto(here)
                expect(page.locator("h1")).to_have_text("real", timeout=240_000)
                expect(page.locator("#facts")).to_contain_text(re.compile(r"update [1-9]\d* of 20"), timeout=240_000)
                expect(page.locator("#samples")).to_contain_text("sampled by version", timeout=240_000)
                expect(page.locator(".badge")).to_have_text("finished", timeout=240_000)
                expect(page.locator(".tile").first).to_contain_text("\u2192")
            assert training.wait(timeout=120) == 0, (tmp_path / "log").read_text()
        finally:
            training.terminate()
            training.wait(timeout=120)
