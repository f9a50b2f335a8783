"""A run that many things happen to, one after another, and that must end as if nothing had.

What must hold after each life:

    a folder with a checkpoint's name is a whole checkpoint, unless the fault was the damage of it
    its numbers and its state are, byte by byte, those of the same step of a run that nothing happened to
    the newest whole one is never older than before
    a life begins after the newest whole one, and names as damaged those that were, and no others
    it ends as it should: by itself, with the statuses that its fault allows

and at the end the last checkpoint and all losses are those of the undisturbed run.
"""

import hashlib
import json
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite.checkpoint.format import MANIFEST, list_steps, step_folder
from megalite.config.checkpoint import CheckpointConfig
from megalite.config.run import RunConfig
from megalite.config.schedule import ScheduleConfig
from megalite.exit_status import FINISHED, STOPPED, STORAGE
from tests.chaos.faults import ERRORS, Fault
from tests.chaos.life import REFUSED, Life, live, read_losses
from tests.chaos.power import cut_contents, cut_names, spoil
from tests.trainers import Case, run_config

NUM_STEPS = 8
MOST_FAULTS = 5  # of a scenario
CASES = [
    *(Case(zero=zero, **layout) for zero in range(4) for layout in ({"tp": 2}, {"pp": 2}, {"dp": 2})),
    Case(zero=1),
    Case(tp=2, dp=2, zero=2),
    Case(tp=2, pp=2, zero=3),
    Case(pp=2, dp=2, zero=0),
]
CASE_WEIGHTS = [1.0 if case.world_size == 2 else 0.25 for case in CASES]
Digests = dict[str, str]  # of files, by name


class ChaosError(AssertionError):
    """Something was lost, or wrong."""


@dataclass(frozen=True)
class Scenario:
    """What is drawn for a run, before what happens to it."""

    seed: int
    case: Case
    checkpoint: CheckpointConfig

    @property
    def write_seconds(self) -> float:
        """What each write takes at least: on a slow disk training goes on by steps beside a save."""
        return (0.0, 0.002, 0.008)[self.seed % 3]

    @classmethod
    def draw(cls, seed: int, dice: random.Random) -> "Scenario":
        settings = CheckpointConfig(
            asynchronous=dice.random() < 0.5,
            save_every_steps=dice.choice((1, 2)),
            keep_last=dice.choice((1, 2, 3)),
            keep_every_steps=dice.choice((0, 4)),
            on_failure=dice.choice(("continue", "stop")),
        )
        return cls(seed, dice.choices(CASES, CASE_WEIGHTS)[0], settings)

    def in_words(self) -> str:
        settings = self.checkpoint
        manner = "asynchronous" if settings.asynchronous else "at once"
        disk = f"{1000 * self.write_seconds:.0f} ms a write"
        kept = f"every {settings.save_every_steps}, last {settings.keep_last}, {settings.on_failure}"
        return f"{self.case}, {manner}, {disk}, {kept}"


def config_of(case: Case, settings: CheckpointConfig, run_dir: Path) -> RunConfig:
    schedule = ScheduleConfig(num_steps=NUM_STEPS, warmup_steps=2)
    model = case.model.model_copy(update={"num_hidden_layers": 2})
    return run_config(case, output_dir=str(run_dir), checkpoint=settings, schedule=schedule, model=model)


@dataclass
class Undisturbed:
    """Runs that nothing happens to, by layout: what all others are to be equal to."""

    folder: Path
    _known: dict[Case, tuple[dict[int, Digests], list[dict[str, float]]]] = field(default_factory=dict)

    def of(self, case: Case) -> tuple[dict[int, Digests], list[dict[str, float]]]:
        """The digests of each step's checkpoint, and the losses."""
        if case not in self._known:
            base = self.folder / f"undisturbed-{len(self._known)}"
            (base / "life").mkdir(parents=True)
            settings = CheckpointConfig(asynchronous=False, save_every_steps=1, keep_last=0)
            life = live(case, config_of(case, settings, base / "run"), None, base / "life")
            if set(life.statuses) != {FINISHED}:
                raise ChaosError(f"the undisturbed run of {case} ends with {life.statuses}:\n{life.log}")
            root = base / "run/checkpoints"
            digests = {step: content(step_folder(root, step)) for step in list_steps(root)}
            self._known[case] = digests, read_losses(base / "run")
            shutil.rmtree(base)
        return self._known[case]


def content(checkpoint: Path) -> Digests:
    """Digests of what must not depend on what happened: tensors and state."""
    return {
        name: digest for name, digest in all_files(checkpoint).items() if name.startswith(("rank-", "state"))
    }


def all_files(checkpoint: Path) -> Digests:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.iterdir()}


def is_whole(checkpoint: Path) -> bool:
    """Whether all files are there that the manifest lists, and as it says."""
    files = all_files(checkpoint)
    if files.pop(MANIFEST, None) is None:
        return False
    try:
        listed = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
    except ValueError:
        return False
    return files == {name: entry["sha256"] for name, entry in listed.items()}


class Play:
    """A scenario as it goes on. `rows` are the faults that came, for the table."""

    def __init__(
        self, scenario: Scenario, dice: random.Random, undisturbed: Undisturbed, folder: Path
    ) -> None:
        self.scenario, self._dice, self._folder = scenario, dice, folder
        self.run = config_of(scenario.case, scenario.checkpoint, folder / "run")
        self.root = folder / "run/checkpoints"
        self._checkpoints, self._losses = undisturbed.of(scenario.case)
        self._spoilt: dict[int, Digests] = {}  # step -> its files since then
        self._num_lives = 0
        self.rows: list[dict[str, Any]] = []

    def play(self, most_faults: int) -> None:
        """All of it. Raises ChaosError."""
        for _ in range(most_faults):
            self.happen(Fault.draw(self._dice, self.scenario.case.world_size))
        while not self._is_complete():
            self.happen(None)
        self._check_end()

    def happen(self, fault: Fault | None) -> None:
        """A life with this fault, or without one; or damage after a life. Raises ChaosError."""
        if fault is not None and fault.damage:
            self._damage(fault)
        elif not self._is_complete():
            self._live(fault)

    def _is_complete(self) -> bool:
        return NUM_STEPS in self.whole()

    def whole(self) -> list[int]:
        """The steps whose checkpoints were not spoilt."""
        return [step for step in list_steps(self.root) if step not in self._spoilt]

    def _damage(self, fault: Fault) -> None:
        """Spoil a file of the newest whole checkpoint."""
        whole = self.whole()
        if not whole or fault.damage is None:
            return
        files = sorted(step_folder(self.root, whole[-1]).iterdir())
        file = files[int(fault.which * len(files))]
        if spoil(file, fault.damage, fault.place):
            self._spoilt[whole[-1]] = all_files(file.parent)
            self._note(fault, f"step {whole[-1]}, {file.name}")

    def _live(self, fault: Fault | None) -> None:
        expected = max(self.whole(), default=0)
        beside = self._folder / f"life-{self._num_lives}"
        self._num_lives += 1
        beside.mkdir()
        if fault is None and self._num_lives > 4 * MOST_FAULTS:
            raise ChaosError("the run comes to no end")
        life = live(self.scenario.case, self.run, fault, beside, self.scenario.write_seconds)
        if (beside / "hung").exists():
            raise ChaosError(f"a life hung:\n{life.log}")
        if self._spoilt and not self.whole():
            self._move_away(life)
            return
        missed = (
            fault is not None and fault.is_death and set(life.statuses) == {FINISHED}
        )  # it had just ended
        if life.has_met and fault is not None and not missed:
            self._note(fault, f"after step {life.resumed_from}, ends {life.statuses}")
            if fault.kind == "power cut":
                self._cut_power(beside)
        self._check_life(life, fault, expected)
        shutil.rmtree(beside)

    def _cut_power(self, beside: Path) -> None:
        journals = sorted(beside.glob("journal-*"))
        cut_contents(self.root, journals, self._dice.choice(("truncated", "zeros", "empty")))
        if self._dice.random() < 0.5:
            cut_names(journals)

    def _move_away(self, life: Life) -> None:
        """Where all that there is was damaged, the run must not begin anew by itself."""
        died = any(status is None or status < 0 for status in life.statuses)
        if not died and set(life.statuses) != {REFUSED}:
            raise ChaosError(f"nothing whole is left, and the run ends with {life.statuses}:\n{life.log}")
        if not died and "move them away to start from the beginning" not in life.log:
            raise ChaosError(f"nothing whole is left, and is not told:\n{life.log}")
        if not died:
            for step in self._spoilt:
                shutil.rmtree(step_folder(self.root, step))
            self._spoilt.clear()

    def _check_life(self, life: Life, fault: Fault | None, expected: int) -> None:
        where = f"{life.statuses}:\n{life.log}"
        self._check_statuses(life, fault)
        if life.resumed_from not in (expected, None):
            raise ChaosError(f"begins after step {life.resumed_from} where {expected} is the newest, {where}")
        named = {int(name.removeprefix("step-")) for name in life.skipped}
        newer = {step for step in self._spoilt if step > expected}
        if life.resumed_from is not None and named != newer:
            raise ChaosError(f"names {named} as damaged where {newer} are, {where}")
        if life.resumed_from is not None:
            self._check_folders()
        if max(self.whole(), default=0) < expected:
            raise ChaosError(f"{self.whole()} are left where step {expected} had been whole, {where}")

    def _check_folders(self) -> None:
        """Each is whole and as in the undisturbed run, but for those that are as they were spoilt."""
        for step in list_steps(self.root):
            folder = step_folder(self.root, step)
            if all_files(folder) == self._spoilt.get(step):
                continue
            self._spoilt.pop(step, None)
            if not is_whole(folder) or content(folder) != self._checkpoints[step]:
                raise ChaosError(f"step {step} has other numbers than the undisturbed run, or is not whole")
        there = set(list_steps(self.root))
        self._spoilt = {step: files for step, files in self._spoilt.items() if step in there}

    def _check_statuses(self, life: Life, fault: Fault | None) -> None:
        if fault is None or not life.has_met:
            allowed = {FINISHED}
        elif fault.kind == "signal":
            allowed = {FINISHED, STOPPED}
        elif fault.kind in ERRORS:
            allowed = {FINISHED, STORAGE}
        else:
            return  # a death
        if len(set(life.statuses)) != 1 or not set(life.statuses) <= allowed:
            kind = fault.kind if fault else "no fault"
            raise ChaosError(f"{kind}: ends with {life.statuses}, not one of {allowed}:\n{life.log}")

    def _check_end(self) -> None:
        if read_losses(self._folder / "run") != self._losses:
            raise ChaosError(f"other losses: {read_losses(self._folder / 'run')} are not {self._losses}")
        if content(step_folder(self.root, NUM_STEPS)) != self._checkpoints[NUM_STEPS]:
            raise ChaosError("the last checkpoint has other numbers than the undisturbed run's")

    def _note(self, fault: Fault, what: str) -> None:
        self.rows.append({"kind": fault.kind, "fault": fault.in_words(), "what": what})


def play(seed: int, undisturbed: Undisturbed, folder: Path, most_faults: int) -> tuple[Play, str | None]:
    """What happened to the run of a seed, and what was wrong. folder: a new one; it stays if anything was."""
    dice = random.Random(seed)
    scenario = Scenario.draw(seed, dice)
    folder.mkdir(parents=True)
    played = Play(scenario, dice, undisturbed, folder)
    try:
        played.play(most_faults)
    except ChaosError as error:
        return played, str(error)
    shutil.rmtree(folder)
    return played, None
