"""The operators' page in a real browser: live numbers, a user's revisions, promotion and rollback."""

import dataclasses
import shutil
import time

import numpy as np
import pytest

from tests.evaluation.test_gate import GOOD
from tests.serving.world import COHORTS

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture
def browser():
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1150,1150"):
        options.add_argument(flag)
    browser = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield browser
    browser.quit()


def until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)


@pytest.mark.slow
def test_the_page_shows_and_moves(world, open_server, browser, tmp_path):
    user, rng = "acme/<b>shown</b>", np.random.default_rng(3)
    for _ in range(2):
        world.commit(user, COHORTS[1], rng, promote=False)
    for number in (1, 2):
        manifest = world.manifest(user, number)
        scores = dataclasses.replace(GOOD, digest=manifest.digest, base_digest=world.base.digest)
        world.catalog.record_scores([(manifest, scores)])
    with open_server.client() as client:
        for name in world.users[:8]:
            client.post("/v1/completions", json={"model": name, "prompt": "hello", "max_tokens": 5})
    browser.get(open_server.url)
    find = lambda selector: browser.find_elements("css selector", selector)  # noqa: E731
    until(lambda: find("body[data-live=yes]") and find(".slot.resident"))
    until(lambda: any(box.text not in ("", "0") for box in find("b[data-name=requests]")))
    assert len(find(".map")) == len(COHORTS)

    def promoted():
        return world.catalog.records([user])[0].promoted

    find("#user")[0].send_keys(user)
    find("#find button")[0].click()
    until(lambda: len(find("#history button")) == 2)
    assert not find("#history b")  # the name is text, not markup
    for number in (1, 2):
        find(f"#history button[data-revision='{number}']")[0].click()
        until(lambda number=number: promoted() == number)
        until(lambda number=number: not find(f"#history button[data-revision='{number}']")[0].is_enabled())
    until(lambda: find("#rollback")[0].is_enabled())
    browser.save_screenshot(str(tmp_path / "page.png"))
    find("#rollback")[0].click()
    until(lambda: promoted() == 1)
    assert (tmp_path / "page.png").stat().st_size > 10_000
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [message for message in severe if "favicon" not in message] == []
