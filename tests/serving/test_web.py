"""The chat page in headless Chromium, against the running server; make test-web runs it."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.serving.conftest import start

pytestmark = pytest.mark.web
# The demo model where make demo has been run (its answers are sentences), else a random one.
DEMO = ROOT / "demo" / "run" / "final"
# Chromium's sandbox refuses to run as root, as in most containers, whose /dev/shm is small too.
BROWSER_FLAGS = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
EVIL = ('Look: <script>document.title = "owned"</script><img src=x onerror="document.title=\'owned\'">\n\n'
        '```js\n<b>code</b>\n```\n\n- **bold** and `<i>`\n- [link](https://example.org/) [bad](javascript:alert(1))\n')
SCRIPT = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def web_server(checkpoint):
    running, _ = start(DEMO if DEMO.is_dir() else checkpoint, "--max_length", 1024, "--max_batch", 2)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.fail("needs Debian's chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=BROWSER_FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def page(browser, web_server):
    with opened(browser, web_server) as made:
        yield made


@contextlib.contextmanager
def opened(browser, server):
    """The page of a server in a context of its own; nothing on it may fail or go elsewhere."""
    context = browser.new_context(locale="en-US")
    made = context.new_page()
    made.set_default_timeout(60_000)
    errors = []
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.on("request",
            lambda request: None if request.url.startswith(server.url) else errors.append(request.url))
    made.goto(f"{server.url}/")
    yield made
    context.close()
    assert errors == [], "scripts failed, or the page went elsewhere"


def ask(page, text):
    page.get_by_label("Your question").fill(text)
    page.keyboard.press("Enter")


def set_field(page, name, value):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label(name).fill(value)
    page.get_by_label(name).press("Tab")
    page.get_by_role("button", name="Settings").click()


def answers(page):
    return page.locator(".message.assistant .text")


def wait_for_end(page, number):
    page.wait_for_function("n => document.querySelectorAll('.message.assistant .tools').length === n", arg=number)


def pretend(page, text, thought=""):
    """Let the server's next answers be ``text``, after a ``thought``."""
    events = [{"choices": [{"index": 0, "delta": {"reasoning_content": piece}, "finish_reason": None}]}
              for piece in re.findall(r"(?s).{1,5}", thought)]
    events += [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
              for piece in re.findall(r"(?s).{1,5}", text)]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))


# In the page: an answer of this model may be over before a driver outside finds the button.
PRESS_STOP = """() => {
    const lengths = new Set();
    new MutationObserver((changes, observer) => {
        const text = document.querySelector('.message.assistant .text'), stop = document.getElementById('stop');
        if (text && text.textContent.length) lengths.add(text.textContent.length);
        if (lengths.size >= 3 && stop.offsetParent) {  // it has come in parts, and the button can be seen
            observer.disconnect();
            stop.click();
        }
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


def test_type_stream_stop_and_a_second_turn_that_uses_the_first(page):
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    set_field(page, "Temperature", "1.5")
    set_field(page, "Seed", "3")
    page.evaluate(PRESS_STOP)
    ask(page, "你好")
    page.get_by_text("(stopped)").wait_for()
    stopped = page.evaluate("JSON.parse(localStorage.telechat).messages[1].content")
    page.wait_for_timeout(500)
    assert page.evaluate("JSON.parse(localStorage.telechat).messages[1].content") == stopped, "nothing comes any more"
    set_field(page, "Longest answer", "4")
    ask(page, "第二个问题")
    wait_for_end(page, 2)
    assert [message["content"] for message in bodies[1]["messages"]] == ["你好", stopped, "第二个问题"]
    assert [message["role"] for message in bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert (bodies[1]["temperature"], bodies[1]["seed"], bodies[1]["max_tokens"]) == (1.5, 3, 4)
    before = page.locator("#log").inner_text()
    page.reload()
    assert page.locator("#log").inner_text() == before, "a reload keeps the conversation"
    page.get_by_role("button", name="Clear").click()
    assert answers(page).count() == 0
    page.reload()
    assert answers(page).count() == 0


def test_a_screen_reader_hears_only_what_is_new(page):
    pretend(page, "first answer")
    ask(page, "one")
    wait_for_end(page, 1)
    page.evaluate("""() => { window.heard = []; new MutationObserver(changes => { for (const change of changes)
        for (const node of change.addedNodes) heard.push(node.textContent); }).observe(
        document.getElementById("log"), { childList: true, subtree: true }); }""")
    page.unroute("**/v1/chat/completions")
    pretend(page, "second answer")
    ask(page, "two")
    wait_for_end(page, 2)
    heard = " ".join(page.evaluate("heard"))
    assert "two" in heard and "second answer" in heard and "first answer" not in heard and "one" not in heard
    assert page.locator(".message .text").all_inner_texts() == ["one", "first answer", "two", "second answer"]
    assert page.get_by_role("button", name="Regenerate").count() == 1


def test_regenerate_asks_again_and_copy_copies(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    set_field(page, "Longest answer", "8")
    set_field(page, "Temperature", "1.5")
    ask(page, "hi")
    wait_for_end(page, 1)
    first = page.evaluate("JSON.parse(localStorage.telechat).messages[1].content")
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == first
    page.get_by_role("button", name="Regenerate").click()
    page.wait_for_function("t => JSON.parse(localStorage.telechat).messages[1]?.content.length > 0 "
                           "&& JSON.parse(localStorage.telechat).messages[1].content !== t", arg=first)
    assert page.evaluate("JSON.parse(localStorage.telechat).messages.length") == 2


def test_a_thought_is_folded_away_and_not_sent_back(page):
    pretend(page, "The answer.", thought="Let me see: <b>one</b> and one.")
    ask(page, "1+1?")
    wait_for_end(page, 1)
    thought = page.locator(".message.assistant details.thought")
    assert thought.get_attribute("open") is None and not thought.locator("div").is_visible()
    assert page.locator(".message.assistant .text > p").inner_text() == "The answer."
    thought.locator("summary").click()
    assert thought.locator("div").inner_text() == "Let me see: <b>one</b> and one."
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    ask(page, "And now?")
    wait_for_end(page, 2)
    assert bodies[0]["messages"][1] == {"role": "assistant", "content": "The answer."}


def test_what_a_model_writes_never_runs(page):
    pretend(page, EVIL)
    ask(page, "<script>document.title = 'owned'</script>")
    wait_for_end(page, 1)
    for _ in range(2):
        assert "owned" not in page.title()
        assert page.locator("#log script, #log img, #log b, #log i").count() == 0
        assert page.locator(".message.user .text").inner_text() == "<script>document.title = 'owned'</script>"
        text = answers(page).inner_text()
        assert '<script>document.title = "owned"</script><img src=x' in text and "[bad](javascript:alert(1))" in text
        assert page.locator("#log pre code").inner_text() == "<b>code</b>"
        assert page.locator("#log li").count() == 2 and page.locator("#log strong").inner_text() == "bold"
        assert [link.get_attribute("href") for link in page.locator("#log a").all()] == ["https://example.org/"]
        page.reload()
    policy = page.request.get(page.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]


@pytest.fixture(scope="module")
def script_server(tmp_path_factory):
    """A server of a model that was trained until it answers with a script, and with nothing else."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "lines.jsonl").write_text(json.dumps({"input": "hello", "output": SCRIPT}) + "\n")
    tokenizer = ROOT / "samples" / "tokenizer.model"
    for command in (
            ["preprocess.py", "--input_dataset_file", f"{folder}/lines.jsonl:16", "--output_path", folder / "data",
             "--vocab_file_path", tokenizer, "--max_length", 120],
            ["train.py", "--config", ROOT / "configs" / "demo.yaml", "--train_dataset", folder / "data", "--output_dir",
             folder / "run", "--no-report", f"tokenizer={tokenizer}", "model.hidden_size=64", "model.n_layer=2",
             "model.n_head=4", "model.ffn_hidden_size=128", "sequence_length=120", "batch_size=1", "total_steps=80",
             "warmup_steps=5", "learning_rate=1e-2", "save_steps=80"]):
        result = subprocess.run([sys.executable, str(ROOT / "tools" / command[0]), *map(str, command[1:])],
                                capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    running, _ = start(folder / "run" / "final", "--max_length", 128, "--max_batch", 1)
    yield running
    running.stop()


def test_a_script_that_a_model_really_answers_stays_text(browser, script_server):
    with opened(browser, script_server) as page:
        ask(page, "hello")
        wait_for_end(page, 1)
        assert answers(page).inner_text() == SCRIPT
        assert "owned" not in page.title()
        assert page.locator("#log script, #log img").count() == 0


def test_errors_are_shown_and_the_question_can_be_asked_again(page):
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        status=429, content_type="application/json", body='{"error": {"message": "64 requests are waiting"}}'))
    ask(page, "hi")
    assert page.get_by_role("alert").inner_text() == "64 requests are waiting"
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_role("button", name="Regenerate").click()
    page.get_by_text("connection to the server was lost").first.wait_for()
    page.unroute("**/v1/chat/completions")
    pretend(page, "fine")
    ask(page, "hi again")
    wait_for_end(page, 1)
    assert page.locator(".message").count() == 2 and answers(page).inner_text() == "fine"


def test_chinese_dark_keyboard_and_phone(page):
    page.set_viewport_size({"width": 360, "height": 640})
    page.get_by_role("button", name="中文").press("Enter")
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="浅色 / 深色").press("Space")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != colour
    pretend(page, "很长的一行" * 60 + "\n\n```\n" + "x" * 400 + "\n```")
    page.get_by_label("您的问题").focus()
    page.keyboard.type("第一行")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("第二行")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="重新生成").wait_for()
    assert page.locator(".message.user .text").inner_text() == "第一行\n第二行"
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing sticks out on a phone"
    assert page.get_by_role("log").get_attribute("aria-live") == "polite"
    assert page.get_by_role("status").inner_text() == "回答完毕"
    assert page.evaluate("document.activeElement.id") == "question", "ready for the next question"
    assert page.evaluate("[...document.querySelectorAll('button, input, textarea')]"
                         ".every(part => part.textContent || part.labels?.length)"), "everything has a name"
