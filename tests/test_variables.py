"""Environment variables: what nobody knows is refused, wherever one is read."""

import re

import pytest

from embodied_rft import variables
from embodied_rft.names import UserError
from tests.lab import ROOT


@pytest.fixture(autouse=True)
def none_is_set(monkeypatch):
    for name in variables.KNOWN:
        monkeypatch.delenv(name, raising=False)


def test_what_they_say(monkeypatch):
    assert (variables.fused(), variables.timeout(), variables.browser()) == (True, 1800.0, None)
    monkeypatch.setenv(variables.FUSED, "0")
    monkeypatch.setenv(variables.TIMEOUT, "2.5")
    monkeypatch.setenv(variables.BROWSER, "/opt/shell")
    assert (variables.fused(), variables.timeout(), variables.browser()) == (False, 2.5, "/opt/shell")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("EMBODIED_RFT_FUSED", "off", "FUSED is 'off': 0 or 1"),
        ("EMBODIED_RFT_FUSED", "", "FUSED is '': 0 or 1"),
        ("EMBODIED_RFT_TIMEOUT", "soon", "TIMEOUT is 'soon': a number of seconds"),
        ("EMBODIED_RFT_TIMEOUT", "-1", "a number of seconds"),
        ("EMBODIED_RFT_TIMEOUT", "nan", "a number of seconds"),
        ("EMBODIED_RFT_FUSE", "0", "EMBODIED_RFT_FUSE is not known; did you mean 'EMBODIED_RFT_FUSED'?"),
    ],
)
def test_what_nobody_knows_is_refused(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(message)):
        variables.fused(), variables.timeout()


def test_no_other_file_reads_one():
    for folder in ("embodied_rft", "envs", "agents"):
        for path in (ROOT / folder).rglob("*.py"):
            read = re.search(r"environ\W.*EMBODIED_RFT_", path.read_text(encoding="utf-8"))
            assert read is None or path.name == "variables.py", path
