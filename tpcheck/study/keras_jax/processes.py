"""JAX in processes of its own: how many devices it simulates is settled when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

__all__ = ["on_devices"]

SECONDS = 1800  # for a job that hangs


def on_devices(devices: int, job: str, **arguments: Any) -> Any:
    """The JSON that `job`, "module.function" of this package, returns on `devices` simulated CPU devices.

    Raises:
        RuntimeError: the job failed; its last lines.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "KERAS_BACKEND": "jax",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    command = [sys.executable, "-m", "tpcheck.study.keras_jax", job]
    done = subprocess.run(
        command, input=json.dumps(arguments), env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    if done.returncode:
        raise RuntimeError(f"{job} on {devices} devices failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)
