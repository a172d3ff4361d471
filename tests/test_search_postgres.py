"""Many workers on one PostgreSQL, which each test starts for itself; one is killed, and the database restarted."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cheap import KEY, Cheap, cheap_plan, kill, start
from pelton.search.study import Study

pytest.importorskip("psycopg", reason="needs a driver: pip install 'psycopg[binary]'")


def _programs() -> Path | None:
    """Where PostgreSQL's server is: on the path, or where Debian keeps it."""
    places = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    found = shutil.which("initdb")
    places += [Path(found).resolve().parent] if found else []
    return next((place for place in places if (place / "initdb").is_file() and (place / "pg_ctl").is_file()), None)


@dataclass(frozen=True)
class Server:
    """A PostgreSQL on loopback, whose data is deleted afterwards."""

    programs: Path
    folder: Path
    port: int
    user: str | None

    def run(self, program: str, *arguments: str) -> None:
        """Runs one of its programs, which refuse to be run by root."""
        command = [str(self.programs / program), *arguments]
        with (self.folder / "output").open("ab") as output:
            subprocess.run(command, user=self.user, check=True, cwd=self.folder, stdout=output, stderr=output)

    def begin(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder} -c fsync=off -c max_connections=50"
        self.run("pg_ctl", "-D", f"{self.folder}/data", "-l", f"{self.folder}/log", "-w", "-o", options, "start")

    def end(self) -> None:
        """Ends it as a crash does."""
        self.run("pg_ctl", "-D", f"{self.folder}/data", "-m", "immediate", "-w", "stop")

    @property
    def url(self) -> str:
        return f"postgresql://pelton@127.0.0.1:{self.port}/postgres"


@pytest.fixture
def server() -> Iterator[Server]:
    programs = _programs()
    if programs is None:
        pytest.skip("needs PostgreSQL's server: apt-get install postgresql")
    user = "postgres" if os.geteuid() == 0 else None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="pelton-pg-") as name:  # pytest's folders are closed to other users
        folder = Path(name)
        if user is not None:
            try:
                shutil.chown(folder, user)
            except LookupError:
                pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        server = Server(programs, folder, port, user)
        server.run("initdb", "-D", f"{folder}/data", "-U", "pelton", "-A", "trust", "--no-sync", "-E", "UTF8")
        server.begin()
        try:
            yield server
        finally:
            server.end()


def _lines(log: Path) -> list[tuple[int, int]]:
    """The trials that began, each with its process."""
    return [(int(trial), int(process)) for trial, process in (line.split() for line in log.read_text().splitlines())]


def _wait_for(count: int, log: Path) -> None:
    until = time.monotonic() + 120
    while len(_lines(log)) < count:
        assert time.monotonic() < until, f"{len(_lines(log))} of {count} trials began"
        time.sleep(0.02)


@pytest.mark.slow
def test_four_workers_one_killed_and_the_database_restarted(server: Server, tmp_path: Path) -> None:
    wanted, log = 40, tmp_path / "log"
    log.touch()
    study = Study.start(tmp_path / "study", cheap_plan(), storage=server.url)
    objective = Cheap(0.4, str(log))
    workers = [start(str(study.folder), wanted, objective, grace=6) for _ in range(4)]

    _wait_for(8, log)
    assert len({process for _, process in _lines(log)}) == 4
    victim = workers[0]
    began = len([1 for _, process in _lines(log) if process == victim.pid])
    while len([1 for _, process in _lines(log) if process == victim.pid]) == began:
        time.sleep(0.005)
    kill(victim)
    lost = [trial for trial, process in _lines(log) if process == victim.pid][-1]

    _wait_for(16, log)
    server.end()
    time.sleep(1.0)
    server.begin()
    for worker in workers[1:]:
        worker.join(120)
        assert worker.exitcode == 0

    trials = study.trials()
    assert len(trials) == wanted
    assert [(one.root, one.reason) for one in trials if one.state not in ("finished", "stopped")] == []
    of = {try_.number: one for one in trials for try_ in one.tries}
    assert len(of[lost].tries) > 1
    assert of[lost].tries[0].params.get(KEY, of[lost].last.params[KEY]) == of[lost].last.params[KEY]
    with study.as_optuna() as storage:
        counted = [trial.number for trial in storage.trials if trial.state.name in ("COMPLETE", "PRUNED")]
    assert sorted(counted) == sorted(one.last.number for one in trials)


def test_workers_that_begin_together_make_one_study(server: Server, tmp_path: Path) -> None:
    study = Study(tmp_path, "together", cheap_plan(), server.url)
    study._write()
    workers = [start(str(tmp_path), 6, Cheap(0.0)) for _ in range(4)]
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert len(study.trials()) == 6
