"""`noisepolicy demo`: the page, asked as its users do: by its interface, and in a real browser."""

import base64
import contextlib
import io
import itertools
import json
import subprocess
import time
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

import noisepolicy
from noisepolicy.cli import demo as command
from noisepolicy.cli import main as cli
from noisepolicy.cli import vote
from noisepolicy.evaluation.figures import to_pil
from noisepolicy.policies import SpectralPolicy
from noisepolicy.policies.critic import CriticShape, RewardCritic
from noisepolicy.training.voting import Voting
from noisepolicy.worlds.shapes import held_out_scenes, model_folder

PROMPTS = [scene.caption for scene in held_out_scenes()[:3]]


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    torch.manual_seed(1)
    policy = SpectralPolicy(latent_shape=(8, 8, 8), prompt_shape=(20, 128))
    torch.nn.init.normal_(policy.mean.weight, std=0.1)
    critic = RewardCritic(CriticShape((20, 128), policy.action_shape, True, (2,)), size=3)
    critic.set_scale(0.5, 100.0)
    policy.attach_critic(critic, num_candidates=8)
    policy.save_pretrained(tmp_path_factory.mktemp("policy"))
    return tmp_path_factory.getbasetemp() / "policy0"


@pytest.fixture(scope="module")
def demo(frozen, policy_folder):
    return command.Demo("mine <b>", frozen, str(policy_folder), 2, 1.5, PROMPTS)


@pytest.fixture(scope="module")
def address(demo):
    pytest.importorskip("gradio")
    page = command.make_page(demo)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield url
    page.close()


def pictures(shown):
    """The pictures that HTML holds, and their captions."""
    sources = [part.split('"')[0] for part in shown.split('src="data:image/png;base64,')[1:]]
    captions = [part.split("</figcaption>")[0] for part in shown.split("<figcaption>")[1:]]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources], captions


def test_pictures_and_candidates(address, demo, frozen):
    from gradio_client import Client

    client = Client(address, verbose=False)
    client.predict(PROMPTS[0], 7, 2, api_name="/pictures")
    start = time.perf_counter()
    made, captions = pictures(client.predict(PROMPTS[1], 7, 2, api_name="/pictures"))
    assert time.perf_counter() - start < 2 and captions == ["base model", "policy"]
    latents = demo.policy.latents(frozen, PROMPTS[1], seed=7, num_inference_steps=2)
    image = frozen.generate(latents, frozen.encode([PROMPTS[1]]), num_inference_steps=2, guidance_scale=1.5)[0]
    assert abs(made[1].astype(int) - np.asarray(to_pil(image)).astype(int)).max() <= 1
    made, captions = pictures(client.predict(PROMPTS[1], 7, 2, api_name="/candidates"))
    foreseen = [float(caption.split()[-1]) for caption in captions]
    assert len(made) == 8 and foreseen == sorted(foreseen, reverse=True) and foreseen[0] > foreseen[-1]
    with pytest.raises(Exception, match="the prompt is empty"):
        client.predict(" ", 7, 2, api_name="/pictures")


def test_the_model_makes_the_pictures_of_one_event_at_a_time(address, demo, monkeypatch):
    from gradio_client import Client

    client, inside, most = Client(address, verbose=False), [], []

    def watched(make):
        def call(*arguments):
            inside.append(make)
            time.sleep(0.3)
            most.append(len(inside))
            inside.remove(make)
            return make(*arguments)

        return call

    for name in ("pictures", "candidates"):
        monkeypatch.setattr(demo, name, watched(getattr(demo, name)))
    jobs = [client.submit(PROMPTS[0], 1, 1, api_name=f"/{name}") for name in ("pictures", "candidates")]
    jobs.append(client.submit(1, 1, api_name="/gallery"))
    assert all(job.result(60) for job in jobs)
    assert len(most) == 2 + len(PROMPTS) and max(most) == 1


class Browser:
    """Chromium without a window, driven by its DevTools protocol."""

    def __init__(self, path, url, width, folder):
        from websockets.sync.client import connect

        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-port=0",
            f"--user-data-dir={folder}",
        ]
        self._process = subprocess.Popen(
            [path, *flags, f"--window-size={width},900", url], stderr=subprocess.PIPE, text=True
        )
        port = next(line for line in self._process.stderr if "DevTools listening" in line).split(":")[-1].split("/")[0]
        pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        page = next(page for page in pages if page["type"] == "page")
        self._stack = contextlib.ExitStack()
        self._socket = self._stack.enter_context(connect(page["webSocketDebuggerUrl"], max_size=None))
        self._numbers = itertools.count(1)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)

    def call(self, method, **params):
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (answer := json.loads(self._socket.recv(60))).get("id") != number:
            pass
        return answer["result"]

    def value(self, script):
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait(self, script):
        for _ in range(240):
            if (value := self.value(script)) not in (None, False, 0, ""):
                return value
            time.sleep(0.25)
        raise TimeoutError(script)

    def close(self):
        self._stack.close()
        self._process.terminate()
        self._process.wait(30)


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("width", [1300, 400])
def test_the_page_in_a_browser(address, browser, width, tmp_path):
    pytest.importorskip("websockets")
    page = Browser(browser, f"{address}?seed=5&steps=1", width, tmp_path)
    try:
        # It begins with a picture of a held-out prompt, by the address.
        page.wait("document.querySelectorAll('.pictures img').length == 2")
        assert page.value("document.querySelector('textarea').value") == PROMPTS[0]
        page.value("before = document.querySelector('.pictures img').src")
        page.value("document.querySelector('textarea').focus(); document.querySelector('textarea').select()")
        page.call("Input.insertText", text=PROMPTS[2])
        for kind in ("keyDown", "keyUp"):
            page.call(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
            )
        page.wait("document.querySelector('.pictures img').src != before")
        page.value("before = document.querySelector('.pictures img').src")
        page.value(
            f"[...document.querySelectorAll('button')].find(b => b.innerText.startsWith('{PROMPTS[1][:30]}')).click()"
        )
        page.wait("document.querySelector('.pictures img').src != before")
        page.value("[...document.querySelectorAll('button')].find(b => b.innerText == 'Show candidates').click()")
        page.wait("document.querySelectorAll('.pictures img').length == 10")
        # The gallery's pictures are made once it is opened, one pair after another.
        page.value("[...document.querySelectorAll('button')].find(b => b.innerText.includes('Gallery')).click()")
        page.wait("document.querySelectorAll('.gallery .pictures img').length == 6")
        assert page.value("document.querySelectorAll('.pictures img').length") == 16
        left = page.value(
            "[...document.querySelectorAll('.gallery .pictures')].map(p => p.getBoundingClientRect().left)"
        )
        assert len(set(left)) == (1 if width < 600 else 3), "pairs are below each other on a phone, else side by side"
        widths = page.value("[...document.querySelectorAll('.pictures img')].map(image => image.clientWidth)")
        assert min(widths) > 90 and page.value("document.documentElement.scrollWidth") <= width
        assert page.value("document.querySelector('h2 b')") is None, "names are text"
        page.value("[...document.querySelectorAll('button')].find(b => b.innerText.includes('Gallery')).click()")
        page.wait("document.querySelectorAll('.pictures img').length == 10")
        png = base64.b64decode(page.call("Page.captureScreenshot")["data"])
        (tmp_path / "page.png").write_bytes(png)
        assert len(np.unique(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3), axis=0)) > 200
    finally:
        page.close()


def test_the_gallery_shows_the_held_out_prompts_of_the_run(tmp_path, monkeypatch, capsys):
    prompts = [scene.caption for scene in held_out_scenes()[:5]]
    settings = {"num_iterations": 1, "batch_size": 4, "critic_warmup": 4, "critic_updates": 1, "eval_num_prompts": 1}
    run = noisepolicy.Run("shapes", reward="red", prompts=prompts, output_dir=tmp_path / "run", **settings)
    assert len(list(run)) == 1 and len(run.held_out_prompts) == 1
    served = []
    monkeypatch.setattr(command, "make_page", lambda demo: served.append(list(demo.examples)) or _Page())
    path = tmp_path / "run" / "config.yaml"
    config = path.read_text()
    secret = tmp_path / "secret"
    secret.write_text("my secret\n")
    # A run may come from anybody, and the page may be public.
    for source in (str(secret), str(tmp_path / "nowhere.txt"), "hf:nobody/nothing"):
        path.write_text(config.replace("eval_prompts: []", f"eval_prompts: [{json.dumps(source)}]"))
        assert source in path.read_text()
        assert cli.main(["demo", str(tmp_path / "run")]) == 0
        warning = f"warning: the page has no held-out prompts: {source} is not in the run folder"
        assert warning in capsys.readouterr().err
    path.write_text(config.replace("eval_prompts: []", f"eval_prompts: [{json.dumps(prompts[1])}]"))
    assert cli.main(["demo", str(tmp_path / "run")]) == 0
    path.write_text(config)
    assert cli.main(["demo", str(tmp_path / "run")]) == 0
    assert served == [[], [], [], [prompts[1]], list(run.held_out_prompts)]


def test_what_the_command_loads(policy_folder, tmp_path, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(command, "make_page", lambda demo: served.append(demo) or _Page())
    assert cli.main(["demo", str(policy_folder), "--model", "shapes", "--steps", "3", "--guidance-scale", "2"]) == 0
    [demo] = served
    assert demo.model.latent_shape == (8, 8, 8) and demo.policy.critic is not None
    assert (demo.num_inference_steps, demo.guidance_scale) == (3, 2.0)
    for arguments, message in (
        ([str(policy_folder)], "a policy alone needs its model, --model"),
        ([str(policy_folder), "--model", str(model_folder()), "--steps", "0"], "--steps must be 1 or more"),
    ):
        assert cli.main(["demo", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["sing"]) == 2 and "unknown command 'sing'" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0 and "reward-server" in capsys.readouterr().out


class _Page:
    def queue(self, **options):
        pass

    def launch(self, **options):
        pass


@pytest.mark.slow
@pytest.mark.browser
def test_votes_by_click_and_key(demo, browser, tmp_path):
    pytest.importorskip("gradio")
    pytest.importorskip("websockets")
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0}
    voting = Voting(demo.model, PROMPTS[0], tmp_path / "votes", **settings)
    site = vote.make_page(voting)
    _, url, _ = site.launch(prevent_thread_lock=True, quiet=True)
    page = Browser(browser, url, 400, tmp_path / "profile")

    def counted(number):
        page.wait(f"document.body.innerText.includes('after {number} votes')")

    try:
        counted(0)
        first = voting.pair
        page.value("document.getElementById('right').click()")
        counted(1)
        assert voting.votes == [(first[1], first[0])]
        second = voting.pair
        page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft", code="ArrowLeft")
        page.call("Input.dispatchKeyEvent", type="keyUp", key="ArrowLeft", code="ArrowLeft")
        counted(2)
        assert voting.votes[1] == second
        page.value("document.getElementById('undo').click()")
        counted(1)
        assert Voting(demo.model, PROMPTS[0], tmp_path / "votes", **settings).votes == voting.votes
        assert page.value("document.documentElement.scrollWidth") <= 400
    finally:
        page.close()
        site.close()
