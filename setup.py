"""Packaging of tpcheck: ranges only, so that it installs into an existing environment without touching its torch.

The exact versions that CI and the README install are in constraints.txt; tool settings in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    name="tpcheck",
    version="0.1.0",
    description="Megatron training that gives the same bits at every tensor-parallel size, and the proof of it",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["patches", "patches.*", "tpcheck", "tpcheck.*", "slurm", "slurm.*"]),
    package_data={"slurm": ["clusters/*.yaml", "sweeps/*.yaml", "*.sbatch", "*.sh", "README.md"]},
    python_requires=">=3.10,<3.14",
    install_requires=[
        "blake3>=1.0",
        "click>=8.1",
        "matplotlib>=3.7",
        "megatron-core>=0.14",
        "numpy>=1.26",
        "packaging>=23.0",
        "psutil>=5.9",  # megatron-core's checkpoint writer imports it without declaring it
        "pydantic>=2.5",
        "pyyaml>=6.0",
        "rich>=13.0",
        "safetensors>=0.4",
        "submitit>=1.5",
        "torch>=2.6",
    ],
    extras_require={
        "studies": [
            "deepspeed>=0.19",
            'jax>=0.10; python_version >= "3.11"',
            'keras>=3.15; python_version >= "3.11"',
            "transformers>=5",
        ],
        "te": ["transformer-engine[pytorch]>=2.9"],
        "dev": [
            "coverage>=7.10",
            "einops>=0.8",  # this and onnxscript: what Transformer Engine's Python code imports
            "hypothesis>=6.100",
            "mypy>=1.10",
            "onnxscript>=0.3",
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
            "types-PyYAML>=6.0",
        ],
    },
    entry_points={"console_scripts": ["tpcheck=tpcheck.cli:main"]},
)
