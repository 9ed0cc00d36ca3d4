"""A virtual environment of its own for a package that the project's has not; the project's packages are seen in it."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from common import ROOT


def enter(package):
    """Start this script again in runs/venvs/<package>, made if it is not there; do nothing where it runs there."""
    folder = ROOT / "runs" / "venvs" / package
    if Path(sys.prefix).resolve() == folder.resolve():
        return
    python, made = folder / "bin" / "python", folder / "made"
    if not made.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        project = sysconfig.get_path("purelib")
        own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        # not a plain path: the project's own .pth files count too
        (own / "project.pth").write_text(f"import site; site.addsitedir({project!r})\n")
        pip = [str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), package]
        subprocess.run(pip, check=True)
        made.write_text("")
    os.execv(python, [str(python), "-W", "ignore", *sys.argv])
