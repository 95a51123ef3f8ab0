"""The browser as a process: found, started, and gone without a trace however we end.

We speak to it through two pipes, so there is no port. A shell outlives us, holding the other end of a third pipe: when
that closes, because we are done or dead (kill -9 included), it ends the browser with all its processes and removes the
profile. Boundary: knows nothing of what is said over the pipes (`devtools`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from weakref import WeakSet

from embodied_rft.names import UserError
from embodied_rft.variables import browser

# Debian, Chrome for Testing, Playwright. Only headless shells can draw frame by frame, on our clock.
NAMES = ("chromium-headless-shell", "chrome-headless-shell", "headless_shell")
INSTALL = (
    "apt-get install chromium-headless-shell (Debian), or npx @puppeteer/browsers install chrome-headless-shell and "
    "EMBODIED_RFT_BROWSER=its path"
)
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    # Pages are local files, and nothing else is reached; its sandbox needs rights that containers do not give.
    "--no-sandbox",
    "--disable-gpu",
    # One frame is drawn when we ask for one, and then completely.
    "--enable-begin-frame-control",
    "--run-all-compositor-stages-before-draw",
    "--disable-new-content-rendering-timeout",
    "--disable-threaded-animation",
    "--disable-threaded-scrolling",
    "--disable-checker-imaging",
    "--disable-image-animation-resync",
    "--disable-partial-raster",
    "--allow-pre-commit-input",
    "--disable-skia-runtime-opts",
    "--force-color-profile=srgb",
    "--font-render-hinting=none",
    "--disable-lcd-text",
    "--hide-scrollbars",
    "--block-new-web-contents",
    # Nothing leaves it, of itself or for a page.
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--proxy-server=127.0.0.1:9",
    "--proxy-bypass-list=<-loopback>",
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-domain-reliability",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-extensions",
    "--no-pings",
    "--no-first-run",
    "--no-default-browser-check",
    "--no-service-autorun",
    "--password-store=basic",
    "--use-mock-keychain",
    "--mute-audio",
    "--disable-breakpad",
    "--disable-crash-reporter",
    "--disable-features=Translate,MediaRouter,OptimizationHints,DialMediaRouteProvider,PaintHolding",
    # Small containers have a small /dev/shm.
    "--disable-dev-shm-usage",
)
# $1 is the profile, the rest is the command. 0 and 1 are the browser's pipes, which it looks for at 3 and 4; 2 closes
# with us. The browser has a group of processes of its own, which dies as a whole.
KEEPER = """
profile=$1; shift
exec 3<&0 4>&1 0<&2 1>/dev/null 2>/dev/null
setsid "$@" </dev/null &
browser=$!
exec 3<&- 4>&-
read -r _
kill -9 -- "-$browser"
wait "$browser"
rm -rf -- "$profile"
"""


def find_browser() -> str | None:
    """Where a headless shell is: what EMBODIED_RFT_BROWSER says, or the first of `NAMES` on the path; None: nowhere."""
    if given := browser():
        if not (found := shutil.which(given)):
            raise UserError(f"EMBODIED_RFT_BROWSER is {given!r}, which is no program that can be run")
        return found
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Chromium:
    """A running browser: `reads` is the descriptor that its answers come from, `writes` the one that commands go to."""

    def __init__(self) -> None:
        if (program := find_browser()) is None:
            raise UserError(f"no headless shell of Chromium is installed (looked for {', '.join(NAMES)}): {INSTALL}")
        self.reads = self.writes = self.leash = -1
        _running.add(self)
        self.profile = tempfile.mkdtemp(prefix="embodied-rft-browser-")
        home = {name: self.profile for name in ("HOME", "TMPDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")}
        command = [program, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        theirs_in, self.writes = os.pipe()
        self.reads, theirs_out = os.pipe()
        leash, self.leash = os.pipe()
        try:
            self.keeper = subprocess.Popen(
                ["/bin/sh", "-c", KEEPER, "keeper", self.profile, *command],
                stdin=theirs_in,
                stdout=theirs_out,
                stderr=leash,
                env=os.environ | home | {"LANG": "C.UTF-8", "TZ": "UTC"},
                start_new_session=True,
            )
        except BaseException:
            self._let_go()
            shutil.rmtree(self.profile, ignore_errors=True)
            raise
        finally:
            for theirs in (theirs_in, theirs_out, leash):
                os.close(theirs)

    def close(self) -> None:
        """End it, and wait until nothing of it is left."""
        if self.reads >= 0:
            self._let_go()
            self.keeper.wait()

    def _let_go(self) -> None:
        for mine in (self.reads, self.writes, self.leash):
            os.close(mine)
        self.reads = self.writes = self.leash = -1


_running: WeakSet[Chromium] = WeakSet()


def _forked() -> None:
    """A child of ours does not keep browsers alive."""
    for one in _running:
        if one.reads >= 0:
            one._let_go()


os.register_at_fork(after_in_child=_forked)
