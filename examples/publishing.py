"""Push a folder that hfshrink wrote, and load it again by its id, each in a process of its own.

`.venv/bin/python examples/publishing.py runs/quickstart/int8` does it on a Hub of this machine, the one that the tests
push to: no account, no network. `make demo` ends with it. On the real Hub it is `hfshrink push FOLDER NAME`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
LOAD = """
import sys
import hfshrink
model, processor = hfshrink.load(sys.argv[1])
logits = model(**processor(sys.argv[2], return_tensors="pt")).logits
print(f"{sys.argv[2]!r}: {model.config.id2label[int(logits[0].argmax())]}")
"""


def push_and_load(folder, name="demo-int8", text="a moving story, beautifully told"):
    """The commit's address, and what the loaded model says of a text."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        command = [sys.executable, "-m", "hub.server", "--port", "0", "--folder", f"{home}/hub"]
        with subprocess.Popen(command, cwd=TESTS, stdout=subprocess.PIPE, text=True) as server:
            try:
                environment = variables(server.stdout.readline().strip(), home)
                push = ["-m", "hfshrink.cli", "push", str(folder), name, "--license", "apache-2.0"]
                return run(push, environment), run(["-c", LOAD, f"tester/{name}", text], environment)
            finally:
                server.terminate()


def variables(endpoint, home):
    """Those with which a fresh process works on that Hub; its token is known to everybody and opens nothing else."""
    sys.path.append(str(TESTS))
    from hub.accounts import WRITE_TOKEN

    told = {"HF_ENDPOINT": endpoint, "HF_TOKEN": WRITE_TOKEN, "HF_HOME": f"{home}/cache", "HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **told, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}


def run(arguments, environment):
    """What a fresh Python printed last."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False, timeout=600
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return done.stdout.strip().splitlines()[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/quickstart/int8"))
    options = parser.parse_args()
    address, answer = push_and_load(options.folder)
    print(f"pushed: {address}\nloaded in a fresh process: {answer}")


if __name__ == "__main__":
    main()
