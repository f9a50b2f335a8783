"""How a launched job ends, for scripts to act on: docs/slurm.md says what each asks for."""

FINISHED = 0  # the run has taken its last step, and saved it
FAILED = 1  # a rank died, or met a mistake of ours: the traceback or the line above says which
MISTAKE = 2  # in a configuration, or in data: the same command will end the same way
STORAGE = 74  # a checkpoint could not be written
STOPPED = 75  # asked to stop, and saved: the same command continues
HANG = 76  # a rank made no progress: the line names it, and RUN_DIR/stacks shows where every rank was
NODE = 77  # a node failed the preflight: another may do
NO_PROGRESS = 93  # started too often from the same step (stop.after_starts)
