"""What a stage writes down while it works: one row per look, as JSON lines and TensorBoard events."""

import json
from collections.abc import Mapping
from pathlib import Path

from async_rlhf.state import write_atomically


class StageBooks:
    """metrics.jsonl and tensorboard/ of a stage; each row has a `step`."""

    def __init__(self, folder: Path) -> None:
        # The small writer of the tensorboard package: it imports no torch.
        from tensorboard.summary import Writer

        self._file = folder / "metrics.jsonl"
        self._events = Writer(str(folder / "tensorboard"))

    def cut_after(self, step: int) -> None:
        """Take back the rows after `step`: those steps are made again."""
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.is_file() else []
        # The last line may be cut by the kill itself.
        rows = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        write_atomically(self._file, "".join(f"{line}\n" for line in rows))

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Append a row."""
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, **row}) + "\n")
        for key, value in row.items():
            if "/" in key:
                self._events.add_scalar(key, value, step)
        self._events.flush()

    def close(self) -> None:
        """Close the event file."""
        self._events.close()
