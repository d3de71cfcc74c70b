"""The staleness contract as arithmetic: who may sample what, and which batch may be formed.

Terms. B = batch_groups, eta = max_staleness, U = batches decided so far. Update u consumes batch u and turns version u
into version u + 1. A group sampled by a generator whose installed version was v has the deadline d = v + eta: it may be
trained by update d at the latest, because the staleness of its tokens at update u is at most u - v.

Bound: 0 <= u - version <= eta for every trained token.

Proof. Let R_d be the number of live groups (ticketed, not yet in a batch) with a deadline <= d.

    Invariant:  R_d <= (d - U + 1) * B  for every d >= U,  and  R_{U-1} = 0.

1. A grant at installed version v gives deadline d = v + eta and requires admitted < (d + 1) * B, where
   admitted = B * U + live. Hence live < (d - U + 1) * B before, and R_D <= live <= (d - U + 1) * B <= (D - U + 1) * B for
   every D >= d after; for D < d the grant does not count. The invariant holds.
2. A void or a raised deadline only lowers some R_d. A lowered deadline (a reissue to an older generator) is granted only if
   the raised R_D stay inside the invariant. It holds.
3. A decision takes B finished groups as batch U, the earliest deadlines first, and only if afterwards, for every d >= U,
   at most (d - U) * B live groups due by d remain. That is the invariant with U + 1 in place of U; d = U says that nothing
   due now is left behind, so R_U = 0. It holds.
4. Waiting never paints into a corner: once all B live groups of earliest deadline are finished, taking them leaves
   R_d <= max(0, R_d - B) <= (d - U) * B. And one earliest-deadline pick is optimal for all d at once (an exchange argument:
   swapping a later deadline in never lowers any R_d), so testing that pick alone decides whether any B will do.

R_{U-1} = 0 says that no live group is ever overdue, so every group of batch U has U <= deadline = v + eta. QED.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from async_rlhf.errors import StalenessError


@dataclass(frozen=True, kw_only=True, slots=True)
class StalenessRule:
    """The bound of one run; see the module's text for the terms and the proof."""

    batch_groups: int
    """B, groups per batch."""
    max_staleness: int
    """eta, updates."""

    def deadline(self, version: int) -> int:
        """The last update that may train what `version` samples now."""
        return version + self.max_staleness

    def num_grantable(self, *, installed_version: int, decided: int, live: int) -> int:
        """Groups that a generator with `installed_version` may start now; possibly fewer than it asks for.

        Raises:
            StalenessError: the version does not exist yet.
        """
        if installed_version > decided:
            raise StalenessError(
                f"a generator cannot hold version {installed_version}: only {decided} batches are decided, so version "
                f"{decided} is the newest; this is a bug in the weight broadcast"
            )
        admitted = self.batch_groups * decided + live
        return max(0, (self.deadline(installed_version) + 1) * self.batch_groups - admitted)

    def may_reissue(self, *, new_deadline: int, old_deadline: int, decided: int, live_deadlines: Mapping[int, int]) -> bool:
        """Whether a lost ticket may go out again with `new_deadline` without breaking the invariant.

        A later deadline always may. An earlier one only if each R_D from there up to the old deadline has room for it.

        Args:
            live_deadlines: deadline -> live groups.
        """
        if new_deadline >= old_deadline:
            return True
        if new_deadline < decided:
            return False
        due = _numbers_due(live_deadlines, range(new_deadline, old_deadline))
        return all(number + 1 <= (day - decided + 1) * self.batch_groups for day, number in due)

    def may_decide(self, *, decided: int, left_deadlines: Mapping[int, int]) -> bool:
        """Whether batch `decided` may be formed when live groups with `left_deadlines` (deadline -> groups) stay behind."""
        due = _numbers_due(left_deadlines, (day for day, groups in left_deadlines.items() if groups))
        return all(number <= (day - decided) * self.batch_groups for day, number in due)

    def holds(self, *, update: int, version: int) -> bool:
        """The bound itself, for one token."""
        return 0 <= update - version <= self.max_staleness


def _numbers_due(deadlines: Mapping[int, int], days: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Each day, and how many groups are due by it."""
    for day in days:
        yield day, sum(groups for deadline, groups in deadlines.items() if deadline <= day)
