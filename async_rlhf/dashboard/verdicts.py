"""The verdict on a run, from what its folder tells."""

from async_rlhf.dashboard.folder import RunFolder


def verdict(run: RunFolder) -> dict[str, object]:
    """`verdict`: one sentence, who holds the run up and what to change; `bottleneck`: which box of the picture that is. Or empty."""
    return {"verdict": "", "bottleneck": ""}
