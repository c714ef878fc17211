import os
import pwd
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest


class PostgreSQL:
    """A server of its own in a temporary folder, which can be stopped and started again."""

    def __init__(self, programs: Path, folder: Path):
        self.programs, self.folder, self.databases = programs, folder, 0
        self._run("initdb", "--auth=trust", "--username=depthnet", "--no-sync", f"{folder}/data")

    def _run(self, program: str, *arguments: str) -> None:
        # The server refuses to run as root.
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        command = [*(user if os.geteuid() == 0 else ()), str(self.programs / program), *arguments]
        with open(self.folder / "log", "a") as log:
            subprocess.run(command, check=True, cwd=self.folder, stdout=log, stderr=log, timeout=60)

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses='' -c fsync=off"
        self._run("pg_ctl", "start", "-w", "-D", f"{self.folder}/data", "-o", options)

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "stop", "-w", "-D", f"{self.folder}/data", "-m", mode)

    def database(self) -> str:
        """The URL of a new database."""
        import psycopg

        self.databases += 1
        name = f"study{self.databases}"
        server = {"host": str(self.folder), "user": "depthnet", "dbname": "postgres"}
        with psycopg.connect(**server, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql://depthnet@/{name}?host={self.folder}"


@pytest.fixture(scope="session")
def postgresql_server():
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parts[-2])
    )
    if not found:
        pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
    if find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed (depthnet[postgresql])")
    folder = Path(tempfile.mkdtemp(prefix="depthnet-postgresql-"))  # pytest's are closed to others
    if os.geteuid() == 0:
        owner = pwd.getpwnam("postgres")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
    try:
        server = PostgreSQL(found[-1], folder)
        server.start()
        yield server
        server.stop("immediate")
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def postgresql(postgresql_server):
    """The URL of a database of its own."""
    return postgresql_server.database()
