"""A generator whose weights come straight from the learner's rank 0, through a group of processes of their own."""

import time
from dataclasses import replace
from typing import cast

from actors.canary import check_manifest
from actors.generator import ROUNDS_OF_PROOF, Generator
from async_rlhf.protocols import ReceivingEngine
from async_rlhf.types import InstallReport, Meeting, WeightsManifest, WeightsVersion


class ReceivingGenerator(Generator):
    """First meet(), then for each version prepare() and receive(); after an error in any of them it must not be used again."""

    _met = False
    _prepared: WeightsManifest | None = None

    def meet(self, meeting: Meeting) -> None:
        """Join the group of the learner that is there now; the engine pauses for it.

        Raises:
            TransferError: nobody came.
        """
        self._loop.call(lambda engine: cast(ReceivingEngine, engine).meet(meeting)).result()
        self._met = True

    def prepare(self, announced: WeightsVersion) -> int:
        """Check what will be sent, before anything is: names, shapes and types. Returns how often it has to be sent.

        Args:
            announced: the version's manifest, without its tensors.
        Raises:
            WeightsError: it does not fit the model; the engine is as it was.
        """
        if self._config.weights.verify:
            check_manifest(announced.manifest, self._expected_shapes)
        self._prepared = announced.manifest
        return ROUNDS_OF_PROOF if self._config.weights.verify and self._tolerance is None else 1

    def receive(self) -> InstallReport:
        """Take in what was prepared while the learner sends it, between two tokens, and verify it; see Generator.install.

        Raises:
            TransferError: it did not arrive. WeightsError: a canary that does not sing.
        """
        manifest = self._prepared
        assert self._met and manifest is not None, "meet() and prepare() come before receive()"
        started = time.perf_counter()
        report = self._loop.call(
            lambda engine: self._load(engine, manifest, lambda noise: cast(ReceivingEngine, engine).receive(manifest, noise))
        ).result()
        return replace(report, install_s=time.perf_counter() - started)
