"""Servers of OpenEnv in processes of their own, see `open_env_server`."""

import atexit
import functools
import importlib.util
import socket
import subprocess
import sys
import time

HERE = all(importlib.util.find_spec(name) for name in ("openenv", "fastmcp", "websockets"))  # what a server needs


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """The process, which can be killed and started again."""

    def __init__(self, form):
        self.form, self.port, self.process = form, free_port(), None
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self):
        self.process = subprocess.Popen([sys.executable, "-m", "tests.lab.open_env_server", str(self.port), self.form])
        for _ in range(600):
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}")
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            time.sleep(0.1)
        raise RuntimeError("the server does not start")

    def stop(self):
        self.process.kill()
        self.process.wait()


@functools.cache
def shared(form):
    """One that lives as long as this process."""
    made = Server(form).start()
    atexit.register(made.stop)
    return made
