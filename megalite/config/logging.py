"""Section `logging`: what is measured and shown."""

from pydantic import Field

from megalite.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


class LoggingConfig(Section):
    """What is measured and shown while the run goes on."""

    log_every_steps: PositiveInt = Field(1, description="Steps between lines of progress.")
    validate_every_steps: NonNegativeInt = Field(50, description="Steps between validations; 0 means never.")
    validation_steps: PositiveInt = Field(
        4, description="Length of one validation, in batches of the size of an optimizer step."
    )
    evaluate_every_steps: NonNegativeInt = Field(
        0,
        description="Steps between evaluations on `evaluate_tasks`, the last step's included; 0 means never.",
    )
    evaluate_tasks: list[str] = Field(
        [], description="Tasks, groups or tags of lm-evaluation-harness; they need data.tokenizer."
    )
    evaluate_task_folder: str | None = Field(None, description="Folder with task files of your own.")
    evaluate_fewshot: NonNegativeInt | None = Field(
        None, description="Solved examples in each prompt; null means each task's own number."
    )
    evaluate_limit: PositiveInt | None = Field(
        None, description="Examples of each task that are used, the first ones; null means all."
    )
    timeline_at_step: NonNegativeInt = Field(
        0,
        description="Step whose timeline each rank records to RUN_DIR/timeline-rankR.json, for "
        "`tools/plot_timeline.py`; 0 means none.",
    )
    tensorboard: bool = Field(True, description="Whether to write TensorBoard files.")
    progress_bar: bool = Field(True, description="Whether to draw a progress bar.")
    peak_tflops_per_device: PositiveFloat | None = Field(
        None,
        description="Peak speed of one device, in TFLOP/s, for the utilisation (MFU); null means that of "
        "a known GPU, or measured on a CPU.",
    )
