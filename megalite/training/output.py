"""The folder of a run, and what it says about the run itself."""

import json
from pathlib import Path
from tempfile import TemporaryFile

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.load import dump_run
from megalite.config.run import RunConfig
from megalite.error import UserError
from megalite.files import write_text


class OutputError(UserError):
    """The run's folder cannot be used."""


def make_folder(output_dir: str) -> Path:
    """The run's folder, made if need be. Raises OutputError when nothing can be written there."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        reason = f"output_dir {output_dir} cannot be written: {error.strerror}"
        raise OutputError(f"{reason}: choose another folder with output_dir=...") from None


def write_configs(run: RunConfig, deepspeed: DeepSpeedConfig) -> None:
    """Write config.yaml, with every default, and deepspeed.json; each is complete or as it was before."""
    texts = {"config.yaml": dump_run(run), "deepspeed.json": json.dumps(deepspeed.raw, indent=2) + "\n"}
    for name, text in texts.items():
        write_text(Path(run.output_dir, name), text)
