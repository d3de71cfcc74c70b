"""When to make a checkpoint, and how: begun between two updates, written beside the next one, committed after it."""

import time
from dataclasses import dataclass
from pathlib import Path

from actors.learner_crew import LearnerCrew, Saving
from actors.replay_queue import Kept
from actors.supervision import Member
from async_rlhf.checkpoints import COMMIT, commit, discard, folder_of, prune
from async_rlhf.config import Config
from async_rlhf.journal import Mark
from async_rlhf.state import TrainingState


@dataclass(frozen=True, kw_only=True)
class _Begun:
    folder: Path
    saving: Saving
    mark: Mark
    state: TrainingState


class Checkpointer:
    """Makes the checkpoints of one run."""

    def __init__(self, run_folder: Path, config: Config, learner: LearnerCrew, queue: Member) -> None:
        self._run_folder = run_folder
        self._settings = config.checkpoint
        self._call_s = config.timeouts.call_s
        self._learner = learner
        self._queue = queue
        self._begun: _Begun | None = None
        self._last_s = time.monotonic()
        self.committed: int | None = None
        """Version of the last one that this driver committed."""

    async def between_updates(self, state: TrainingState) -> None:
        """The moment between two updates: commit what was begun, begin what is due.

        Raises:
            LearnerLostError: a rank died meanwhile. RunError: the files cannot be written.
        """
        await self.finish()
        by_count = self._settings.every_updates and state.version % self._settings.every_updates == 0
        by_time = self._settings.every_minutes and time.monotonic() - self._last_s >= 60 * self._settings.every_minutes
        if by_count or by_time:
            await self._begin(state)
            if not self._settings.asynchronous:
                await self.finish()

    async def make(self, state: TrainingState) -> None:
        """One now, to the end; nothing if this version has one already."""
        await self.finish()
        await self._begin(state)
        await self.finish()

    async def finish(self) -> None:
        """Commit what was begun, and let go of what no longer needs to be kept."""
        begun = self._begun
        if begun is None:
            return
        files = await begun.saving()
        self._begun = None
        commit(begun.folder, begun.state, begun.mark, files)
        self.committed = begun.state.version
        oldest = prune(self._run_folder, self._settings.keep_last)
        await self._queue.call("note", Kept(version=oldest), timeout_s=10 * self._call_s)

    def abandon(self) -> None:
        """The learner that was writing one is gone."""
        begun, self._begun = self._begun, None
        if begun is not None:
            discard(begun.folder)

    async def _begin(self, state: TrainingState) -> None:
        folder = folder_of(self._run_folder, state.version)
        if (folder / COMMIT).is_file():
            return
        mark: Mark = await self._queue.call("checkpoint", timeout_s=self._call_s)
        discard(folder)
        folder.mkdir(parents=True)
        self._last_s = time.monotonic()
        saving = await self._learner.save(folder, state.version)
        self._begun = _Begun(folder=folder, saving=saving, mark=mark, state=state)
