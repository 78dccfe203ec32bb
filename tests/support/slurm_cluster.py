"""A real Slurm on this machine, for tests: own munged, slurmctld and one slurmd per virtual node; no root, no systemd.

    munged ─ slurmctld ─┬─ slurmd h1, h2   feature h100, gres gpu:h100:8
                        └─ slurmd b1, b2   feature b300, gres gpu:b300:8
    mariadbd ─ slurmdbd    only with accounting, for sacct

    partitions   main (all nodes), h100, b300; scavenge (all nodes; preempted by the others, requeued)

All files, sockets and ports are its own. A keeper process stops every daemon when `stop` is called, and as well when
the process that started them dies of whatever cause.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.support import slurm_conf, slurm_keeper
from tests.support.waiting import wait_for

__all__ = ["Cluster", "missing_programs"]

NODES = list(slurm_conf.NODES)
START = 120  # seconds for a daemon to answer, on a machine that starts several clusters at once
MUNGE = {"key-file": "key", "socket": "sock", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "seed"}
GRANT = "grant all on slurm_acct.* to 'slurm'@'{host}' identified by 'slurm';"


def missing_programs(accounting: bool = False) -> list[str]:
    """What has to be installed before a cluster can start."""
    needed = ["munged", "munge", "slurmctld", "slurmd", "sbatch", "srun"]
    needed += ["slurmdbd", "sacct", "mariadbd", "mariadb", "mariadb-install-db"] if accounting else []
    return [program for program in needed if not shutil.which(program, path=_path())]


class Cluster:
    """A context manager: Slurm runs while it is open.

    `environment` is what a command needs to speak to it. `min_job_age` is how many seconds the controller remembers
    an ended job; `settings` are more lines of slurm.conf. `fail`, `kill_slurmd` and `kill_controller` break things;
    `start_slurmd` and `start_controller` mend them.
    """

    def __init__(self, accounting: bool = False, min_job_age: int = 300, settings: Sequence[str] = ()) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir=_memory()))
        self.folder.chmod(0o755)
        self.accounting = accounting
        self.ports = _free_ports(3 + len(NODES))
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(self.folder / "etc/slurm.conf")}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        slurm_conf.write(self.folder, self.ports, accounting, min_job_age, settings)

    def __enter__(self) -> Cluster:
        keeper = [sys.executable, slurm_keeper.__file__, str(self.folder)]
        self.keeper = subprocess.Popen(
            keeper, env=self.environment, stdin=subprocess.PIPE, start_new_session=True, cwd="/"
        )
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def run(self, *command: str, timeout: float = 30.0) -> str:
        """What `command` prints; raises when it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip()

    def succeeds(self, *command: str) -> bool:
        try:
            self.run(*command)
        except (RuntimeError, subprocess.TimeoutExpired):
            return False
        return True

    def fail(self, node: str) -> None:
        """Take the power from `node`: its slurmd, its steps and all their processes are killed."""
        self.kill_slurmd(node)
        slurm_keeper.power_off(self.folder / f"log/slurmd-{node}.log")

    def kill_slurmd(self, node: str) -> None:
        """Kill the daemon of `node` alone; what runs there runs on."""
        self._kill(f"slurmd-{node}")

    def start_slurmd(self, node: str) -> None:
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        self._spawn(f"slurmd-{node}", "slurmd", "-D", "-N", node)

    def kill_controller(self) -> None:
        self._kill("slurmctld")

    def start_controller(self) -> None:
        """Start the controller and wait until it answers; it goes on from the state that it had saved."""
        self._spawn("slurmctld", "slurmctld", "-D")
        wait_for(lambda: self.succeeds("scontrol", "ping"), START, "slurmctld to answer")

    def stop(self) -> None:
        """End every job and daemon and remove all files."""
        assert self.keeper.stdin
        self.keeper.stdin.close()
        self.keeper.wait(60)
        for daemon in self.daemons.values():
            daemon.wait(10)

    def _start(self) -> None:
        slurm_keeper.name_nodes(self.folder, NODES)
        munge = self.folder / "munge"
        files = [f"--{name}={munge / file}" for name, file in MUNGE.items()]
        self._spawn("munged", "munged", "-F", "--num-threads=4", *files)
        wait_for(lambda: self.succeeds("munge", "-S", f"{munge}/sock", "-n"), START, "munged to answer")
        if self.accounting:
            self._start_accounting()
        self.start_controller()
        for node in NODES:
            self.start_slurmd(node)
        wait_for(lambda: self._idle() == len(NODES), START, "all nodes to be idle")

    def _start_accounting(self) -> None:
        data, sock = self.folder / "sql", self.folder / "sql.sock"
        # Nobody needs this database after a power cut.
        options = [f"--datadir={data}", "--innodb-flush-method=nosync", "--innodb-log-file-size=16M"]
        options.append(f"--user={getpass.getuser()}")
        install = ["mariadb-install-db", "--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"]
        self.run(*install, *options, timeout=120)
        where = [f"--socket={sock}", f"--port={self.ports[2]}", "--bind-address=127.0.0.1", f"--pid-file={data}/pid"]
        small = ["--innodb-buffer-pool-size=64M", "--performance-schema=0", "--innodb-lock-wait-timeout=900"]
        self._spawn("mariadbd", "mariadbd", "--no-defaults", *options, *where, *small)
        client = ["mariadb", "--no-defaults", "-S", str(sock), "-u", "root", "-e"]
        wait_for(lambda: self.succeeds(*client, "select 1"), START, "mariadbd to answer")
        grants = " ".join(GRANT.format(host=host) for host in ("localhost", "127.0.0.1"))
        self.run(*client, f"create database slurm_acct; {grants}")
        self._spawn("slurmdbd", "slurmdbd", "-D")
        wait_for(lambda: self.succeeds("sacctmgr", "-n", "list", "cluster"), START, "slurmdbd to answer")

    def _idle(self) -> int:
        return len(set(self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").split()))

    def _spawn(self, name: str, *command: str) -> None:
        """Start a daemon in a session of its own, which the keeper will end."""
        with open(self.folder / "log" / f"{name}.out", "ab") as out:
            daemon = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        slurm_keeper.note(self.folder, name, daemon.pid)
        self.daemons[name] = daemon

    def _kill(self, name: str) -> None:
        self.daemons[name].kill()
        self.daemons[name].wait()


def _memory() -> str | None:
    """Where files are in memory, if there is room: a database on a disk takes twenty seconds to start."""
    shm = "/dev/shm"
    return shm if os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > 1 << 30 else None


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel gives to clients and the ranks meet at."""
    found: list[int] = []
    for port in random.sample(range(11000, 19000), 200):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found[:count]
