"""The digest of a weights version."""

import zlib
from dataclasses import replace

from async_rlhf.types import TensorSpec, WeightsManifest

TENSORS = tuple(TensorSpec(name=name, shape=(2,), dtype="float32", checksum=checksum) for name, checksum in (("a", 7), ("b", 8)))
MANIFEST = WeightsManifest(version=3, tensors=TENSORS, canary_ids=(1, 2), canary_logprobs=(-1.0,))


def test_the_digest_is_the_chained_crc_of_names_and_checksums() -> None:
    assert MANIFEST.digest == zlib.crc32(b"a 7\nb 8\n")


def test_the_digest_depends_on_each_name_each_checksum_and_the_order_and_not_on_the_version() -> None:
    renamed, changed = replace(TENSORS[0], name="c"), replace(TENSORS[1], checksum=9)
    others = [(renamed, TENSORS[1]), (TENSORS[0], changed), TENSORS[::-1], TENSORS[:1]]

    assert replace(MANIFEST, version=4).digest == MANIFEST.digest
    assert len({MANIFEST.digest, *(replace(MANIFEST, tensors=tensors).digest for tensors in others)}) == 5
