"""The configuration files of the test cluster that `slurm_cluster` starts."""

from __future__ import annotations

import getpass
import os
import random
import socket
from collections.abc import Sequence
from pathlib import Path

__all__ = ["NODES", "write"]

NODES = {"h1": "h100", "h2": "h100", "b1": "b300", "b2": "b300"}

SLURM_CONF = """\
ClusterName=test
# Ids that no other cluster of these tests has had: job ids are in the names of files.
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits; below 5 Slurm takes 120 without a word.
AuthInfo=socket={folder}/munge/sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
# Several nodes on one host, without cgroups.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
MpiDefault=none
SwitchType=switch/none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
GresTypes=gpu
# Quick decisions. A launch that fails, as it may on a busy machine, is tried again instead of held for an operator.
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,nohold_on_prolog_fail
KillWait=5
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=10
MinJobAge={min_job_age}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# Without it a preempted job gets no SIGUSR2.
SlurmctldParameters=preempt_send_user_signal
{accounting}
{settings}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 PriorityTier=10 PreemptMode=off
PartitionName=h100 Nodes=h[1-2] MaxTime=INFINITE DefaultTime=10 PriorityTier=10 PreemptMode=off
PartitionName=b300 Nodes=b[1-2] MaxTime=INFINITE DefaultTime=10 PriorityTier=10 PreemptMode=off
PartitionName=scavenge Nodes=ALL MaxTime=INFINITE DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
"""

NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 Boards=1 SocketsPerBoard=2 "
    "CoresPerSocket=8 ThreadsPerCore=1 RealMemory=128000 Feature={kind} Gres=gpu:{kind}:8"
)

GRES_CONF = """\
AutoDetect=off
NodeName=h[1-2] Name=gpu Type=h100 File={folder}/dev/nvidia[0-7]
NodeName=b[1-2] Name=gpu Type=b300 File={folder}/dev/nvidia[0-7]
"""

NO_ACCOUNTING = "AccountingStorageType=accounting_storage/none"

ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={database_port}
AccountingStoragePass={folder}/munge/sock
AccountingStorageTRES=gres/gpu,gres/gpu:h100,gres/gpu:b300
JobAcctGatherFrequency=5"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
DbdHost=localhost
DbdPort={database_port}
SlurmUser={user}
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
PidFile={folder}/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
"""


def write(folder: Path, ports: Sequence[int], accounting: bool, min_job_age: int, settings: Sequence[str] = ()) -> None:
    """Write what the daemons read to `folder`; `ports`: the controller, the two databases, the nodes."""
    for name in ("log", "state", "spool", "dev", "munge", "etc"):
        (folder / name).mkdir()
    for number in range(8):  # any file will do for a GPU
        (folder / f"dev/nvidia{number}").symlink_to("/dev/null")
    controller_port, database_port, sql_port, *node_ports = ports
    host = socket.gethostname().partition(".")[0]
    values = {
        "folder": folder,
        "host": host,
        "user": getpass.getuser(),
        "first_job": random.randrange(1, 50_000_000),
        "min_job_age": min_job_age,
        "settings": "\n".join(settings),
        "controller_port": controller_port,
        "database_port": database_port,
        "sql_port": sql_port,
    }
    nodes = [
        NODE.format(name=name, kind=kind, host=host, port=port)
        for (name, kind), port in zip(NODES.items(), node_ports, strict=True)
    ]
    accounts = ACCOUNTING.format(**values) if accounting else NO_ACCOUNTING
    etc = folder / "etc"
    (etc / "slurm.conf").write_text(SLURM_CONF.format(**values, nodes="\n".join(nodes), accounting=accounts))
    (etc / "gres.conf").write_text(GRES_CONF.format(**values))
    (etc / "plugstack.conf").touch()
    _secret(etc / "slurmdbd.conf", SLURMDBD_CONF.format(**values).encode())
    _secret(folder / "munge/key", os.urandom(1024))


def _secret(file: Path, content: bytes) -> None:
    file.touch(mode=0o600)
    file.write_bytes(content)
