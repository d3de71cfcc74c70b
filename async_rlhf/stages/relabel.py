"""A preference set labelled anew: both completions of each row are scored, and the better one by score becomes the chosen one."""

# pyright: reportMissingTypeStubs=false
# (datasets and pyarrow ship partial types.)

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, cast

from async_rlhf.config.prompts import SourceConfig
from async_rlhf.config.schema import Config
from async_rlhf.errors import ConfigError, StageStopped
from async_rlhf.intervals import wilson_interval
from async_rlhf.sources import load_rows
from async_rlhf.stages.folder import StageFolder, TargetTakenError, working
from async_rlhf.stages.gold import Gold, open_gold
from async_rlhf.stages.messages import StageProgress, StageResult, StageWatch
from async_rlhf.stages.pairs import Pair, pair_of
from async_rlhf.stages.rows import Row, RowCount, Text, check_count, fingerprint, usable
from async_rlhf.stages.trainer import quiet_libraries

ADDED = ("score_chosen", "score_rejected", "margin")
"""Columns that every row gets, in place of any of the same name."""
COUNTS = b"async_rlhf.relabel"
"""Key, in a part's metadata, of how far the work had come with it."""


@dataclass(kw_only=True)
class RelabelCounts:
    """What came of all rows so far; part of each part file."""

    read: int = 0
    """Pairs, of which there may be fewer than rows."""
    agreed: int = 0
    """Pairs whose order stayed."""
    flipped: int = 0
    tied: int = 0
    """Pairs with equal scores."""
    margin_sum: float = 0.0
    """Of all pairs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRow:
    """A row, and the pair that it is."""

    pair: Pair
    row: Row
    source: SourceConfig


def check_relabel(config: Config, target: Path) -> None:
    """Raise ConfigError unless there is something to label, by something, and a place for the result."""
    _check_target(target)
    if not sources_of(config):
        raise ConfigError("relabel needs a preference set; give relabel.sources.NAME.path, or reward_model.sources.NAME.path")


def sources_of(config: Config) -> Mapping[str, SourceConfig]:
    """The sets that are labelled."""
    return config.relabel.sources or config.reward_model.sources


def relabel(config: Config, target: Path, watch: StageWatch) -> StageResult:
    """Score all pairs of `relabel.sources` by `reward` and write them into `target`, a Parquet file, all or nothing.

    Raises:
        ConfigError: the file exists, or settings or rows cannot work. RewardError: a pair cannot be scored. StageStopped: `watch` asked
            for it.
    """
    check_relabel(config, target)
    with working(target, _settings(config), watch, _check_target) as work, quiet_libraries():
        return _Relabelling(config, work, watch).run()


class _Relabelling:
    """The pass over all rows, part by part."""

    def __init__(self, config: Config, work: StageFolder, watch: StageWatch) -> None:
        self._config, self._work, self._watch = config, work, watch
        self._began = time.monotonic()
        self._counts = _counts_of(parts(work)[-1]) if parts(work) else RelabelCounts()

    def run(self) -> StageResult:
        """Label what is not labelled yet, and put the parts together."""
        if self._counts.read:
            self._watch.note(f"going on from pair {self._counts.read}: {self._work.work}")
        gold = open_gold(self._config)
        bad = [RowCount(key=f"relabel.sources.{name}") for name in sources_of(self._config)]
        pairs, labelled, unwritten = self._pairs(bad), list[Row](), 0
        try:
            while batch := list(islice(pairs, self._config.relabel.batch_size)):
                labelled += self._label(gold, batch)
                unwritten += len(batch)
                self._counts.read += len(batch)
                stopping = self._watch.stopping()
                if stopping or unwritten >= self._config.relabel.rows_per_part:
                    _write_part(self._work, labelled, self._counts)
                    labelled, unwritten = [], 0
                if stopping:
                    raise StageStopped(f"stopped after {self._counts.read} pairs; the same command goes on from there")
        finally:
            gold.close()
        for count in bad:
            check_count("relabel", count, self._config.relabel.max_bad_share)
            if count.num_bad:
                self._watch.note(count.describe())
        if unwritten:
            _write_part(self._work, labelled, self._counts)
        return self._finish(sum(count.num_bad for count in bad))

    def _pairs(self, counts: Sequence[RowCount]) -> Iterator[PairRow]:
        """All usable rows that are not labelled yet."""

        def convert(source: SourceConfig, row: Row) -> PairRow:
            return PairRow(pair=pair_of(source, row), row=row, source=source)

        def all_pairs() -> Iterator[PairRow]:
            for count, (name, source) in zip(counts, sources_of(self._config).items(), strict=True):
                yield from usable(cast("Any", load_rows(name, source, "relabel.sources")), source, count, convert)

        return islice(all_pairs(), self._counts.read, None)

    def _label(self, gold: Gold, batch: Sequence[PairRow]) -> list[Row]:
        prompts = [gold.prompt_of(one.pair, one.row, one.source) for one in batch]
        completions = [_text(side) for one in batch for side in (one.pair.chosen, one.pair.rejected)]
        scores = gold.score([prompt for prompt in prompts for _ in range(2)], completions).reshape(-1, 2)
        rows = [self._order(one, *map(float, both)) for one, both in zip(batch, scores, strict=True)]
        counts = self._counts
        decided = counts.agreed + counts.flipped
        text = f"agreement {counts.agreed / decided:.3f}, {counts.tied} ties" if decided else f"{counts.tied} ties"
        elapsed_s = time.monotonic() - self._began
        self._watch.on_progress(StageProgress(step=decided + counts.tied, max_steps=0, measured=text, looked=True, elapsed_s=elapsed_s))
        return [row for row in rows if row is not None]

    def _order(self, one: PairRow, chosen: float, rejected: float) -> Row | None:
        """The row with the better completion chosen; None: a tie that is dropped."""
        kept = {name: value for name, value in one.row.items() if name not in ADDED}
        self._counts.margin_sum += abs(chosen - rejected)
        if chosen == rejected:
            self._counts.tied += 1
            if self._config.relabel.ties == "drop":
                return None
        elif chosen > rejected:
            self._counts.agreed += 1
        else:
            self._counts.flipped += 1
            better, worse = one.source.chosen_column, one.source.rejected_column
            kept[better], kept[worse] = one.row[worse], one.row[better]
        best, worst = max(chosen, rejected), min(chosen, rejected)
        return {**kept, "score_chosen": best, "score_rejected": worst, "margin": best - worst}

    def _finish(self, num_bad: int) -> StageResult:
        counts, target = self._counts, self._work.target
        num_rows = _put_together(self._work)
        self._work.discard()
        decided = counts.agreed + counts.flipped
        if not decided:
            return StageResult(target=target, lines=(f"preferences: {target} ({num_rows} rows)", f"all {counts.tied} pairs are ties"))
        low, high = wilson_interval(counts.agreed, decided)
        lines = (
            f"preferences: {target} ({num_rows} rows, {time.monotonic() - self._began:.0f} s)",
            f"agreement with the old labels {counts.agreed / decided:.3f} ({low:.3f} to {high:.3f}) of {decided} pairs; {counts.flipped} "
            f"turned round, {counts.tied} ties {'left out' if self._config.relabel.ties == 'drop' else 'kept'}, {num_bad} rows no pairs; "
            f"mean margin {counts.margin_sum / (decided + counts.tied):.3f}",
        )
        return StageResult(target=target, lines=lines)


def parts(work: StageFolder) -> list[Path]:
    """The finished parts, in order."""
    return sorted(work.made.glob("part-*.parquet"))


def _write_part(work: StageFolder, rows: Sequence[Row], counts: RelabelCounts) -> None:
    """All or nothing; also a part without rows, which says how far the work has come."""
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_pylist(list(rows))
    table = table.replace_schema_metadata({COUNTS: json.dumps(asdict(counts)).encode()})
    file = work.made / f"part-{len(parts(work)):05d}.parquet"
    half = file.with_suffix(".half")
    parquet.write_table(table, half)
    os.replace(half, file)


def _counts_of(part: Path) -> RelabelCounts:
    from pyarrow import parquet

    found = json.loads(parquet.read_schema(part).metadata[COUNTS])
    return RelabelCounts(**{item.name: found[item.name] for item in fields(RelabelCounts)})


def _put_together(work: StageFolder) -> int:
    """The target, from its parts; returns its rows. Where parts differ in their columns, it has all of them."""
    import pyarrow as pa
    from pyarrow import parquet

    files, half, num_rows = parts(work), work.work / "half", 0
    schemas = [schema.remove_metadata() for file in files if len(schema := parquet.read_schema(file))]
    schema = pa.unify_schemas(schemas, promote_options="permissive") if schemas else pa.schema([])
    with parquet.ParquetWriter(half, schema) as writer:
        for file in files:
            table = parquet.read_table(file)
            if len(table):
                writer.write_table(pa.concat_tables([schema.empty_table(), table.replace_schema_metadata()], promote_options="permissive"))
            num_rows += len(table)
    os.replace(half, work.target)
    return num_rows


def _text(completion: Text) -> str:
    return completion if isinstance(completion, str) else "\n".join(message["content"] for message in completion)


def _check_target(target: Path) -> None:
    if target.suffix != ".parquet":
        raise ConfigError(f"--out must be a .parquet file, got {target}")
    if target.exists():
        raise TargetTakenError(f"{target} exists already; delete it or name another file")


def _settings(config: Config) -> dict[str, Any]:
    """All settings that decide the labels, and the state of the files that they name."""
    own = asdict(config.relabel)
    for name in ("num_cpus", "num_gpus", "batch_size"):
        del own[name]
    files = {name: [asdict(source), *fingerprint(source.path)] for name, source in sources_of(config).items()}
    parts = config.reward.parts.items()
    models = {name: fingerprint(part.path) for name, part in parts if part.path}
    functions = {path: fingerprint(path.rpartition(":")[0]) for path in [config.reward.function, *(part.function for _, part in parts)]}
    rubrics = {name: fingerprint(part.judge.rubric) for name, part in parts if part.judge.rubric}
    return {
        "relabel": own,
        "reward": asdict(config.reward),
        "sources": files,
        "models": models,
        "functions": functions,
        "rubrics": rubrics,
        "task": asdict(config.task),
        "policy": [config.model.path, *fingerprint(config.model.path)],
        "system": config.prompts.system,
    }
