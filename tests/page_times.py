"""How soon a page of `attend` is ready and answers: `python tests/page_times.py PAGE.html ...`, with '.[browser]'.

Times from an event to the end of the frame that it changed, in milliseconds; a frame alone takes 16.7.
"""

import os
import shutil
import sys
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

ANSWER = """async (kind) => {
  const matrix = document.getElementById("matrix"), times = [];
  matrix.scrollIntoView();
  matrix.focus();
  const box = matrix.getBoundingClientRect();
  for (let i = 0; i < 40; i++) {
    const from = performance.now(), [x, y] = [0.1 + 0.01 * i, 0.5 + 0.012 * i];
    const at = { clientX: box.left + box.width * x, clientY: box.top + box.height * y };
    matrix.dispatchEvent(kind === "pointer"
      ? new PointerEvent("pointermove", { ...at, pointerType: "mouse", bubbles: true })
      : new KeyboardEvent("keydown", { key: i % 2 ? "ArrowUp" : "ArrowLeft", bubbles: true }));
    await new Promise((done) => requestAnimationFrame(() => {
      const channel = new MessageChannel();
      channel.port1.onmessage = done;
      channel.port2.postMessage(0);
    }));
    times.push(performance.now() - from);
  }
  times.sort((a, b) => a - b);
  return `median ${times[20].toFixed(0)}, of 40 the third longest ${times[37].toFixed(0)}`;
}"""


def main(pages: list[str]) -> None:
    with sync_playwright() as playwright:
        chromium = os.environ.get("BROWSER") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for path in pages:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            began = time.monotonic()
            page.goto(Path(path).resolve().as_uri())
            page.wait_for_selector("html[data-ready]", state="attached")
            ready = time.monotonic() - began
            page.wait_for_timeout(1000)
            pointer, keys = (page.evaluate(ANSWER, kind) for kind in ("pointer", "keys"))
            print(f"{path}: ready after {ready:.1f} s; pointer: {pointer}; arrow keys: {keys}")


if __name__ == "__main__":
    main(sys.argv[1:])
