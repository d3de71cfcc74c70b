"""Apply a page of docs/ to a copy of the code: its files as they stand, its diffs as far as their context still matches."""

import re
import shutil
from pathlib import Path

from tests.support.command import CHECKOUT

COPIED = ("async_rlhf", "actors", "learners", "conf", "tests", "pyproject.toml")
FILE = re.compile(r"^`([\w/.]+)`\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DIFF = re.compile(r"^```diff\n--- a/(\S+)\n\+\+\+ b/\S+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def apply_page(page: Path, copy: Path) -> Path:
    """A copy of the checkout with what the page says; returns it.

    Raises:
        AssertionError: a diff's context is not (or not once) in its file.
    """
    for name in COPIED:
        source = CHECKOUT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    text = page.read_text(encoding="utf-8")
    for name, content in FILE.findall(text):
        assert not (copy / name).exists(), f"{page.name} makes {name}, which exists"
        (copy / name).write_text(content, encoding="utf-8")
    for name, hunks in DIFF.findall(text):
        (copy / name).write_text(_patched((copy / name).read_text(encoding="utf-8"), hunks, name), encoding="utf-8")
    return copy


def _patched(text: str, hunks: str, name: str) -> str:
    for hunk in hunks.split("@@\n")[1:]:
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(before) == 1, f"the page's context is not exactly once in {name}:\n{before}"
        text = text.replace(before, after)
    return text
