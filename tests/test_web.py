"""The page that talks with a GGUF file, in a real browser."""

import functools
import http.server
import re
import shutil
import subprocess
import threading
from pathlib import Path

import chromium
import pytest
from commands import command
from test_gguf import trained_run

from mobilellm_jax.data import chat
from mobilellm_jax.formats import gguf
from mobilellm_jax.runs.directory import TOKENIZER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not chromium.found(), reason=f"Chromium is {chromium.INSTALL}"),
    pytest.mark.skipif(not shutil.which("npm"), reason="npm is not found: apt-get install npm"),
]
WEB = Path(__file__).parents[1] / "docs/web"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A copy of the page with what its package.json names, served; its address and its folder."""
    folder = tmp_path_factory.mktemp("web")
    shutil.copytree(WEB, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node_modules"))
    install = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"npm install: {done.stderr.splitlines()[0]}")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/index.html", folder
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.page(tmp_path_factory.mktemp("chromium") / "files") as page:
        yield page


@pytest.fixture(scope="module")
def run(site, tmp_path_factory):
    """A trained run. Its files are on the site: plain.gguf, and chat.gguf with a template of conversations.

    A model with random weights would not do: its text is no UTF-8, at which wllama fails.
    """
    folder = site[1]
    run, file = trained_run(tmp_path_factory.mktemp("trained"))
    file.rename(folder / "plain.gguf")
    template = run / TOKENIZER / "chat_template.jinja"
    template.write_text(chat.TEMPLATE)
    gguf.export_run(run, folder / "chat.gguf", "f32")
    template.unlink()
    return run


def open_page(browser, address):
    browser.ask("Page.navigate", url=address)
    browser.wait(f"location.href == {address!r} && document.readyState == 'complete'")
    browser.evaluate("window.at = (id) => document.getElementById(id)")


def asked(browser, text, tokens=12):
    """What the page shows for a text: the answer, and the line below it."""
    said = browser.evaluate("document.querySelectorAll('.said').length")
    browser.evaluate(f"at('tokens').value = {tokens}; at('text').value = {text!r}")
    browser.evaluate("at('send').click()")
    browser.wait(f"document.querySelectorAll('.said').length > {said} && !at('send').disabled")
    answer = "[...document.querySelectorAll('.said')].at(-1).textContent"
    return browser.evaluate(answer), browser.evaluate("at('status').textContent")


def generated(run, prompt, tokens):
    """What `generate` prints for a prompt, which it begins with."""
    flags = [f"--workdir={run}", f"--prompt={prompt}", f"--max_new_tokens={tokens}"]
    return command("experiments.generate", *flags).stdout.removesuffix("\n")


def test_a_model_continues_a_text_as_generate_does(site, browser, run):
    open_page(browser, f"{site[0]}?model=plain.gguf")
    browser.wait("!at('send').disabled", 120)
    shape = browser.evaluate("at('model').textContent")
    assert "4 layers of width 64, 512 tokens in the vocabulary, a context of 64" in shape
    answer, speed = asked(browser, "The list of", 20)
    assert f"The list of{answer}" == generated(run, "The list of", 20)
    found = re.fullmatch(r"20 tokens, ([\d.]+) tokens/s; \d+ tokens read, [\d.]+ tokens/s; .*", speed)
    assert found, speed
    assert float(found[1]) > 1


def test_a_model_with_a_template_is_asked_by_it(site, browser, run):
    """What the template makes of a question is a text, and has the same continuation as one."""
    open_page(browser, f"{site[0]}?model=chat.gguf")
    browser.wait("!at('send').disabled", 120)
    assert browser.evaluate("at('model').textContent").endswith("It answers.")
    answer, _ = asked(browser, "What is the list of the other?", 20)
    text = f"<|user|>\nWhat is the list of the other?\n{chat.ASK}"
    assert f"{text}{answer}" == generated(run, text, 20)
    asked(browser, "And then?", 5)
    assert browser.evaluate("document.querySelectorAll('.said').length") == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.gguf", None, "error: none.gguf: 404"),
        ("broken.gguf", b"GGUF", "error: broken.gguf cannot be loaded: "),
        ("other.gguf", b"no model", "error: other.gguf cannot be loaded: "),
    ],
)
def test_what_cannot_be_loaded_is_named(site, browser, name, content, message):
    address, folder = site
    if content:
        (folder / name).write_bytes(content)
    open_page(browser, f"{address}?model={name}")
    browser.wait(f"at('status').textContent.startsWith({message!r})")
    assert browser.evaluate("at('send').disabled && !at('file').disabled")


def test_a_page_without_wllama_says_how_to_get_it(site, browser):
    address, folder = site
    (folder / "alone").mkdir(exist_ok=True)
    shutil.copy(WEB / "index.html", folder / "alone")
    open_page(browser, address.replace("index.html", "alone/index.html"))
    browser.wait("at('status').textContent.includes('npm install')")
    assert browser.evaluate("at('file').disabled")
