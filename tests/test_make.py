"""What `make lab` and `make demo` start, and what the demo answers."""

import http.client
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib import runs


def made(target, args=""):
    """The command of a make target, for the environment that runs the tests."""
    command = [
        "make",
        "-s",
        "-n",
        "-o",
        ".venv/ready",
        target,
        f"BIN={Path(sys.executable).parent}",
        f"ARGS={args}",
    ]
    return subprocess.run(command, cwd=runs.ROOT, check=True, capture_output=True, text=True).stdout


def test_what_make_is_given_as_args_goes_to_jupyter_and_root_is_told_what_it_asks_for():
    command = made("lab", "--port 9999")
    assert command.splitlines()[-1].endswith(" --port 9999")
    hint = command.splitlines()[:-1]
    as_root = "id() { echo 0; }; " + "\n".join(hint)
    said = subprocess.run(["sh", "-c", as_root], capture_output=True, text=True)
    assert "make lab ARGS=--allow-root" in said.stderr and said.returncode == 0
    as_user = "id() { echo 1000; }; " + "\n".join(hint)
    assert subprocess.run(["sh", "-c", as_user], capture_output=True, text=True).stderr == ""
    assert "ARGS=" not in made("lab", "--port 9999 --allow-root")


@pytest.mark.parametrize(
    ("told", "answer"), [("", 403), ("--Voila.tornado_settings=allow_remote_access=1", 302)]
)
def test_the_demo_answers_no_other_host_name_unless_told(told, answer):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = made("demo", f"--no-browser --port={port} {told}")
    server = subprocess.Popen(
        ["sh", "-c", f"exec {command.strip()}"], cwd=runs.ROOT, stderr=subprocess.DEVNULL
    )

    def asked(host):
        connection = http.client.HTTPConnection("localhost", port)
        connection.request("GET", "/nothing", headers={"Host": host})
        return connection.getresponse().status

    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                assert asked("localhost") == 302  # to the front page
                break
            except ConnectionError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
        assert asked("evil.example") == answer
    finally:
        server.terminate()
        server.wait(30)
