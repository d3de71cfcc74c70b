"""A replay held against the run: the first number that is not the same, and how far apart the two get."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DIGEST = "weights digest"


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One number that did not come out the same."""

    update: int
    name: str
    """A metric's key, or DIGEST."""
    then: float | None
    """In the run; None: it has none."""
    now: float | None

    @property
    def relative(self) -> float:
        """Relative to the larger of the two; 1 where only one of them is there."""
        if self.then is None or self.now is None:
            return 1.0
        return abs(self.then - self.now) / max(abs(self.then), abs(self.now))

    def __str__(self) -> str:
        then, now = ("none" if value is None else repr(value) for value in (self.then, self.now))
        if self.name == DIGEST:
            return f"{self.name} {then} in the run, {now} now"
        return f"{self.name} {then} in the run, {now} now (relative difference {self.relative:.2g})"


class Comparison:
    """Takes the updates of a replay in order."""

    def __init__(self, rows: Mapping[int, Mapping[str, float]], digests: Mapping[int, int], num_updates: int) -> None:
        """
        Args:
            rows: of metrics.jsonl, by update. digests: of the run's weights, as far as they are known, by update.
            num_updates: how many the replay has.
        """
        self._rows = rows
        self._digests = digests
        self._num_updates = num_updates
        self._num_compared = 0
        self._num_digests = 0
        self._largest: dict[str, float] = {}
        self.differences: list[Difference] = []

    def add(self, update: int, metrics: Mapping[str, float], digest: int | None) -> str:
        """Compare one update; returns what to say of it."""
        if update not in self._rows:
            return "(the run has no metrics of it)"
        self._num_compared += 1
        row = self._rows[update]
        pairs: list[tuple[str, float | None, float | None]] = [(name, row.get(name), now) for name, now in metrics.items()]
        if digest is not None and update in self._digests:
            self._num_digests += 1
            pairs.append((DIGEST, self._digests[update], digest))
        for name, then, _ in pairs:
            self._largest[name] = max(self._largest.get(name, 0.0), abs(then or 0.0))
        found = [Difference(update=update, name=name, then=then, now=now) for name, then, now in pairs if not _same(then, now)]
        self.differences += found
        return f"({len(found)} numbers differ)" if found else "(bit-equal)"

    def verdict(self) -> Sequence[str]:
        """What came of it, in lines."""
        without = self._num_updates - self._num_compared
        lines = [f"{without} of {self._num_updates} updates could not be compared: the run has no metrics of them"] if without else []
        digests = f"{self._num_digests} of them with the weights' digest, as far as the journal has it"
        if not self.differences:
            return [*lines, f"all {self._num_compared} updates compared are bit-equal to the run ({digests})"]
        first = self.differences[0].update
        updates = len({difference.update for difference in self.differences})
        lines.append(f"{updates} of {self._num_compared} updates compared differ from the run ({digests}); first update {first + 1}:")
        lines += [f"  {difference}" for difference in self.differences if difference.update == first]
        return [*lines, *self._largest_differences()]

    def _largest_differences(self) -> list[str]:
        """Each number's largest difference, as a share of its largest value in the run: a single value may be next to 0."""
        worst: dict[str, tuple[float, int]] = {}
        for found in self.differences:
            if found.name != DIGEST and found.then is not None and found.now is not None and self._largest[found.name] > 0:
                share = abs(found.then - found.now) / self._largest[found.name]
                worst[found.name] = max(worst.get(found.name, (0.0, 0)), (share, found.update))
        shares = sorted(worst.items(), key=lambda item: item[1], reverse=True)
        lines = [f"  {name} {share:.2g} (update {update + 1})" for name, (share, update) in shares]
        return ["largest difference of each number in any update, relative to its largest value in the run:", *lines] if lines else []


def _same(then: float | None, now: float | None) -> bool:
    """Bit for bit, but for the many ways to be no number."""
    return then == now or (then is not None and now is not None and then != then and now != now)
