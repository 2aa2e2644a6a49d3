"""A SLURM cluster of one machine without GPUs: sbatch, srun, squeue, sacct and scontrol as scripts in a folder.

`srun` starts SLURM_NTASKS_PER_NODE local tasks with the variables of real ones, passes SIGUSR1 and SIGTERM on, and
returns the highest exit code, 128 and the signal for a task that was killed.
"""

import os
import socket
import sys
from pathlib import Path

SRUN = """#!{python}
import os, signal, subprocess, sys
arguments = sys.argv[1:]
output = None
while arguments[0].startswith("-"):
    option = arguments.pop(0)
    if option == "--output":
        output = arguments.pop(0).replace("%j", os.environ["SLURM_JOB_ID"])
number = int(os.environ["SLURM_NTASKS_PER_NODE"])
tasks = []
for rank in range(number):
    place = {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "SLURM_NTASKS": str(number)}}
    log = open(output.replace("%t", str(rank)), "a") if output else None
    tasks.append(subprocess.Popen(arguments, env=os.environ | place, stdout=log, stderr=log))
for signum in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(signum, lambda number, frame: [task.send_signal(number) for task in tasks])
sys.exit(max(128 - code if code < 0 else code for code in [task.wait() for task in tasks]))
"""
SBATCH = """#!/bin/bash
echo "sbatch $*" >> {folder}/calls
cp "${{@: -1}}" {folder}/batch.sh
(sleep 2; env SLURM_JOB_ID=4242 SLURM_NNODES=1 SLURM_JOB_NUM_NODES=1 \
 SLURM_NTASKS_PER_NODE=$(sed -n 's/#SBATCH --ntasks-per-node=//p' "${{@: -1}}") \
 bash {folder}/batch.sh > {folder}/batch.log 2>&1; echo "$?" > {folder}/ended) > /dev/null 2>&1 &
echo "Submitted batch job 4242"
"""
SACCT = """#!/bin/bash
echo "JobID|State|NodeList"
echo "4242|$([ -f {folder}/ended ] && echo COMPLETED || echo RUNNING)|localhost"
"""
SQUEUE = """#!/bin/bash
cat {folder}/state 2>/dev/null || echo RUNNING
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> {folder}/calls
"""


class Cluster:
    """Its commands lie in `folder`; `environment` has them on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        texts = {"srun": SRUN, "sbatch": SBATCH, "sacct": SACCT, "squeue": SQUEUE, "scontrol": SCONTROL}
        for name, text in texts.items():
            (folder / name).write_text(text.format(python=sys.executable, folder=folder))
            (folder / name).chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "BLIP2TRAIN"))}
        own = {"PATH": f"{self.folder}:{os.environ['PATH']}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return outside | own | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []
