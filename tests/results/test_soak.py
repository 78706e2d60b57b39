"""The soak benchmark: a slope that is known, and processes that outlive the command."""

import subprocess
import time

import numpy as np
import psutil
import pytest

from benchmarks import soak
from common.errors import UserError
from common.files import read_csv

SCRIPT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open("writing", "w").write(str(child.pid))
os.rename("writing", "child")
time.sleep(600)
"""


def test_growth_is_the_slope_per_hour():
    minutes = np.linspace(10, 60, 100)
    assert soak.growth(minutes, 500 + 0.5 * minutes) == pytest.approx(30.0)


@pytest.mark.slow
def test_what_outlives_the_command_is_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    args = soak.Args(("script.py",), minutes=0.05, warm_up=0.005, interval=0.02, out=tmp_path / "soak.csv")
    popen = subprocess.Popen

    def start(*command):
        process = popen(*command)
        while not (tmp_path / "child").is_file():
            time.sleep(0.01)
        return process

    monkeypatch.setattr(soak.subprocess, "Popen", start)  # the three seconds begin when the child runs
    try:
        rows = soak.main(args)
    finally:
        psutil.Process(int((tmp_path / "child").read_text())).kill()
    assert "exit status -15 after SIGTERM, 1 processes left behind" in capsys.readouterr().out
    assert len(read_csv(tmp_path / "soak.csv")) == len(rows) and (tmp_path / "soak.png").is_file()
    assert rows[-1]["workers"] == 1 and 3 < rows[-1]["process_mb"] < 100


@pytest.mark.slow
def test_a_command_that_ends_too_soon_is_said(tmp_path):
    (tmp_path / "script.py").write_text("raise SystemExit(3)")
    with pytest.raises(UserError, match=r"ended with 3 after .*: give it more steps"):
        soak.main(
            soak.Args(
                (str(tmp_path / "script.py"),), minutes=1.0, warm_up=0.005, interval=0.02, out=tmp_path / "soak.csv"
            )
        )
