"""Makes the pictures of docs/tour.md: runs on built-in drawings, and TensorBoard in a browser.

python docs/tour.py     # about five minutes; needs Chromium, and pip install -e '.[docs,profile]'

Each dashboard of TensorBoard is opened in a headless browser, and must show some words that tell
that it has what a run gives it: the program fails where one is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
SKETCHES = ("--flagfile=recipes/sketches.flags", "--epochs=6")
RUNS = {
    "sketches": ("--histogram_every=20", "--profile_steps=20:30"),
    "no-mirror-images": ("--nohorizontal_flip",),
    "low-rate": ("--head_learning_rate=3e-4", "--backbone_learning_rate=3e-4"),
}
# What each dashboard must show, in any case of letters.
DASHBOARDS = {
    "timeseries": ("accuracy", "evaluation_test", "loss"),
    "custom_scalars": ("learning rate", "gradient norm", "speed"),
    "images": ("confusion_matrix", "sketches/events/evaluation_test"),
    "pr_curves": ("precision_recall", "low-rate/events/evaluation_test"),
    "hparams": ("no-mirror-images", "low-rate", "head_learning_rate"),
    "histograms": ("gradients/head/kernel",),
    "text": ("horizontal_flip", "smallresnet"),
    "profile": ("sketches/events/train", "performance summary"),
}
# Dashboards are built of elements whose content the page's own text leaves out.
VISIBLE_TEXT = """
    const texts = [];
    const visit = (node) => {
        if (node.nodeType === Node.TEXT_NODE) texts.push(node.data);
        if (node.tagName === 'IFRAME' && node.contentDocument) visit(node.contentDocument.body);
        if (node.shadowRoot) visit(node.shadowRoot);
        for (const child of node.childNodes || []) visit(child);
    };
    visit(document.body);
    return texts.join(' ').toLowerCase();
"""


def run(*arguments: str) -> None:
    """Runs one of the project's programs."""
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)


def make_runs(folder: Path) -> None:
    """Trains a few short runs on the built-in drawings and evaluates them."""
    for name, flags in RUNS.items():
        run("run_train.py", *SKETCHES, *flags, f"--ckpt_dir={folder / name}")
    run("run_eval.py", *(f"--ckpt_dir={folder / name}" for name in RUNS))


def few_colours(picture: Image.Image) -> Image.Image:
    """Returns a picture that looks the same and takes less room."""
    return picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)


def take_pictures(folder: Path) -> None:
    """Copies what the programs drew, in as few colours as still look the same."""
    drawn = folder / "sketches" / "pictures"
    for file in [*drawn.glob("*.png"), *(drawn / "test").glob("*.png")]:
        with Image.open(file) as picture:
            few_colours(picture).save(PICTURES / file.name, optimize=True)


@contextlib.contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Serves a folder of runs on a free port; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        f"--logdir={folder.name}",
        f"--port={port}",
    ]
    process = subprocess.Popen(
        command, cwd=folder.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address + "/data/runs", "low-rate/events/evaluation_test")
        yield address
    finally:
        process.terminate()
        process.wait()


def wait_for(address: str, word: str, seconds: float = 120) -> None:
    """Returns when a page has a word in it; raises TimeoutError when it never comes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(address) as page:
            if word in page.read().decode():
                return
        time.sleep(1)
    raise TimeoutError(f"{address} did not show {word!r} in {seconds:.0f} seconds")


def take_screenshots(address: str, profile: Path) -> None:
    """Opens each dashboard, waits until it shows what it must, and keeps what is seen."""
    options = webdriver.ChromeOptions()
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-sync",
        "--hide-scrollbars",
        "--window-size=1700,1100",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    with webdriver.Chrome(options, Service(shutil.which("chromedriver"))) as browser:
        for dashboard, words in DASHBOARDS.items():
            browser.get("about:blank")
            browser.get(f"{address}/#{dashboard}")
            missing = list(words)
            end = time.monotonic() + 60
            while missing and time.monotonic() < end:
                time.sleep(1)
                text = browser.execute_script(VISIBLE_TEXT)
                missing = [word for word in words if word not in text]
            if missing:
                raise TimeoutError(f"TensorBoard's dashboard {dashboard} does not show {missing}")
            time.sleep(4)  # until curves are drawn, which no word tells of
            file = PICTURES / f"tensorboard_{dashboard}.png"
            browser.save_screenshot(str(file))
            with Image.open(file) as picture:
                few_colours(picture).save(file, optimize=True)


def main() -> None:
    """Makes all pictures anew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, help="runs that an earlier call made here")
    arguments = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.runs or Path(temporary) / "runs"
        if not folder.exists():
            make_runs(folder)
        take_pictures(folder)
        with tensorboard(folder) as address:
            take_screenshots(address, Path(temporary) / "browser")


if __name__ == "__main__":
    main()
