import itertools
import sys
import time
from pathlib import Path

import pytest

from api.embedded import Embedded, devices_of, worker_env
from api.lock import DataDirBusy, only_server
from tests.api.conftest import KEY, make_settings
from tests.conftest import wait_for


def worker(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def test_every_gpu_is_a_device_numbered_from_zero(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    assert devices_of(settings, dev=tmp_path) == ("cpu",)
    for name in ("nvidia3", "nvidia7", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()

    assert devices_of(settings, dev=tmp_path) == ("cuda:0", "cuda:1")
    asked = make_settings(tmp_path, devices=("cpu", "cuda:1"))
    assert devices_of(asked, dev=tmp_path) == ("cpu", "cuda:1")


def test_workers_get_every_setting_but_neither_key_nor_address(tmp_path: Path) -> None:
    secrets = {"api_key": KEY, "key_secret": "s" * 32, "metrics_key": "m" * 16}
    settings = make_settings(
        tmp_path, host="0.0.0.0", attempts={"worker_lost": 7}, devices=["cpu"], **secrets
    )

    env = worker_env(settings, threads=3)

    told = {name: value for name, value in env.items() if name.startswith("STILL_")}
    assert told["STILL_DATA_DIR"] == str(tmp_path)
    assert told["STILL_ATTEMPTS"] == '{"worker_lost": 7}'
    assert told["STILL_LEASE"] == "PT20S"
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "3"
    assert not [secret for secret in secrets.values() if secret in str(env)]
    assert not {"STILL_HOST", "STILL_PORT", "STILL_API_KEY", "STILL_DEVICES"} & told.keys()
    assert "PATH" in env


def test_dead_worker_is_started_again_ever_more_slowly(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"import time; open({str(log)!r}, 'a').write(f'{{time.time()}}\\n')"
    crew = Embedded([worker(code)], {})

    crew.start()
    wait_for(lambda: len(lines(log)) >= 4)
    crew.stop()

    born = [float(line) for line in lines(log)]
    waits = [after - before for before, after in itertools.pairwise(born)]
    assert waits[0] >= 0.2
    assert waits[1] >= 0.4
    assert waits[2] >= 0.8


def test_stop_closes_stdin_and_waits(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"import sys; f = open({str(log)!r}, 'a', buffering=1); f.write('up\\n'); "
    crew = Embedded([worker(code + "sys.stdin.read(); f.write('down\\n')")] * 2, {})
    crew.start()
    wait_for(lambda: lines(log) == ["up", "up"])

    crew.stop()

    assert lines(log) == ["up", "up", "down", "down"]


def test_worker_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    crew = Embedded([worker(f"import time; open({str(log)!r}, 'w').close(); time.sleep(600)")], {})
    crew.start()
    wait_for(log.exists)

    began = time.monotonic()
    crew.stop(limit_s=0.3)

    assert time.monotonic() - began < 10


def test_worker_that_cannot_start_does_not_end_the_server() -> None:
    crew = Embedded([["/nothing/here"]], {})

    crew.start()
    time.sleep(0.05)
    crew.stop()


def test_one_server_per_data_folder(tmp_path: Path) -> None:
    with only_server(tmp_path):
        second = only_server(tmp_path)
        with pytest.raises(DataDirBusy, match="another server"):
            second.__enter__()
    with only_server(tmp_path):
        pass
