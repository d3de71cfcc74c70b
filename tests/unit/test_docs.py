"""Links in the documentation lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """What headings of a page are called in its address: lower case, hyphens for spaces, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_local_link_leads_to_a_file_and_to_a_heading_of_it(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if not target.startswith("http")]
    for target in targets:
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}: no such heading; it has {sorted(anchors(file))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_described_command_line_holds_a_token(page: Path) -> None:
    assert re.findall(r"-H +[\"']Authorization.*", page.read_text(encoding="utf-8")) == [], "ps shows it to everybody; see curl -H @-"


def test_the_check_sees_links() -> None:
    assert len(LINK.findall(PAGES[0].read_text(encoding="utf-8"))) > 20
