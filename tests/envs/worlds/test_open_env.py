"""A client of OpenEnv against a server of the package itself, in a process of its own, and against servers that lie."""

import json
import threading
import warnings
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import gymnasium
import numpy as np
import pytest

import embodied_rft.envs  # noqa: F401
from embodied_rft import Infrastructure
from embodied_rft.names import UserError
from embodied_rft.pools.pool import make_pool
from embodied_rft.seeding import evaluation_seed
from embodied_rft.testing.check_env import check_env
from tests.lab.open_env import Server

ID = "embodied_rft/OpenEnv-v0"
pytest.importorskip("websockets")


@pytest.fixture(scope="module", params=["text"])
def server(request):
    pytest.importorskip("openenv.core.env_server", reason="no server without openenv-core and fastmcp")
    made = Server(request.param).start()
    yield made
    made.stop()


def open_env(server, **options):
    return gymnasium.make(ID, url=server.url, **options).unwrapped


def right(env):
    """Guesses until it is right: the answers, and the last one."""
    for number in range(10):
        told = env.step(str(number))
        if told[2]:
            return number, told
    raise AssertionError("no number was right")


def test_an_episode_over_the_wire(server):
    env = open_env(server, message="reply", success="solved", render_mode="ansi")
    observation, _ = env.reset(seed=3)
    assert observation["message"] == "An action is a text: a number from 0 to 9.\n\nguess, you"
    first, (observation, reward, terminated, truncated, info) = right(env)
    assert observation["message"] == env.render() == "right" and (reward, terminated, truncated) == (1.0, True, False)
    assert info == {"invalid/moves": 0.0, "is_success": 1.0} and env.state()["step_count"] == first + 1
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step("3")
    env.reset(seed=3)
    assert right(env)[0] == first  # the seed went to the server
    assert env.reset(options={"who": "friend"})[0]["message"].endswith("guess, friend")
    late = open_env(server, length=2)
    late.reset(seed=0)
    ends = [late.step("x")[2:4] for _ in range(2)]
    assert ends == [(False, False), (False, True)]
    for one in (env, late):
        one.close()


def test_the_checker_and_the_pools_take_it(server):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*nothing can be held out")  # random texts learn nothing of a number
        check_env(open_env(server, message="reply"))
    pool = make_pool(ID, 2, options={"url": server.url, "success": "solved"}, kind="sync", purpose="evaluation")
    try:
        seen = pool.reset(np.array([evaluation_seed(0), evaluation_seed(1)]))
        assert json.loads(seen["message"][0].split("\n\n")[1]) == {"reply": "guess, you", "solved": False}
        told = pool.step(["0", "raise"])
        assert told.valid.tolist() == [True, False] and pool.incidents.counts["infrastructure/execution_error"] == 1
    finally:
        pool.close()


def test_refused_actions_are_turns_and_errors_of_the_server_are_not(server):
    env = open_env(server, refused=-0.5, timeout=1.0)
    env.reset(seed=0)
    observation, reward, terminated, _, info = env.step("9" * 41)
    assert "word: String should have at most 40 characters" in observation["message"]
    assert (reward, terminated, info["invalid/moves"]) == (-0.5, False, 1.0)
    for word, reason in (("raise", "execution_error"), ("hang", "timeout")):
        env.reset(seed=0)
        with pytest.raises(Infrastructure) as error:
            env.step(word)
        assert error.value.reason == reason
        with pytest.raises(gymnasium.error.ResetNeeded):  # the episode is lost
            env.step("0")
    env.reset(seed=0)
    env.close()


def test_a_server_that_dies_and_comes_back():
    pytest.importorskip("openenv.core.env_server", reason="no server without openenv-core and fastmcp")
    server = Server("json").start()
    env = open_env(server, message="reply", timeout=20.0)
    try:
        assert env.reset(seed=0)[0]["message"].startswith(
            'An action is a JSON object. Its fields: "word": a number from 0 to 9; "stake": what is at stake.'
        )
        refused = (("7", "no JSON object"), ("{", "not JSON"), ('{"word": "1"}', "stake: Field required"))
        for count, (said, why) in enumerate(refused, 1):
            observation, *_, info = env.step(said)
            assert why in observation["message"] and info["invalid/moves"] == count
        with pytest.raises(Infrastructure) as error:
            env.step('{"word": "crash", "stake": 1}')
        assert error.value.reason == "dead_server"
        server.process.wait()
        with pytest.raises(Infrastructure) as error:
            env.reset(seed=0)
        assert error.value.reason == "no_server"
        server.start()
        env.reset(seed=0)
        server.stop()
        server.start()  # between two episodes: the broken connection is made anew
        env.reset(seed=0)
        assert env.step('{"word": "x", "stake": 2}')[0]["message"] == "not x"
    finally:
        env.close()
        server.stop()


class Liar(BaseHTTPRequestHandler):
    """Says something else than a schema."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.said)

    def log_message(self, *arguments):
        pass


@contextmanager
def lying(said):
    made = HTTPServer(("127.0.0.1", 0), Liar)
    made.said = said
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize(
    "said", [b"", b"[]", b'{"action": 3}', b'{"action": {"properties": [1]}}', b"\xff\xfe", b"[" * 9999]
)
def test_schemas_that_are_none(said):
    with lying(said) as url, pytest.raises(Infrastructure) as error:
        gymnasium.make(ID, url=url).reset(seed=0)
    assert error.value.reason == "bad_answer"


@pytest.mark.parametrize("said", [
    "[]", "{", '{"type": "observation"}', '{"type": "observation", "data": 3}', '{"type": "x", "data": {}}',
    '{"type": "observation", "data": {"observation": "text"}}', "[" * 9999,
    '{"type": "observation", "data": {"observation": {}, "reward": NaN}}',
    '{"type": "observation", "data": {"observation": {}, "done": "yes"}}',
    '{"type": "observation", "data": {"observation": {}, "reward": "1"}}',
])  # fmt: skip
def test_answers_that_are_none(said):
    from websockets.sync.server import serve

    def answer(link):
        link.recv()
        link.send(said)

    with serve(answer, "127.0.0.1", 0) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        env = gymnasium.make(ID, url=f"ws://127.0.0.1:{made.socket.getsockname()[1]}", action="word").unwrapped
        env.rules = "An action is a text."  # as if the schema had been told
        with pytest.raises(Infrastructure) as error:
            env.reset(seed=0)
        assert error.value.reason == "bad_answer" and env.link is None
        made.shutdown()


def test_options_that_are_none(server):
    for url in ("127.0.0.1:8000", "ftp://host", "http://"):
        with pytest.raises(UserError, match="expected one like http"):
            gymnasium.make(ID, url=url)
    with pytest.raises(UserError, match="timeout 0"):
        gymnasium.make(ID, url=server.url, timeout=0)
    with pytest.raises(UserError, match="has no field 'wrd'; it has word"):
        open_env(server, action="wrd").reset(seed=0)
    with pytest.raises(Infrastructure, match="no field 'replay'"):
        open_env(server, message="replay").reset(seed=0)
