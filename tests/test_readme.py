"""The README says what the code does."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_table_of_methods_is_the_generated_one():
    tool = runpy.run_path(str(ROOT / "launch" / "methods_table.py"))
    assert tool["written"](README) == README, "python launch/methods_table.py writes it"


def test_the_page_of_comparison_is_the_generated_one():
    tool = runpy.run_path(str(ROOT / "launch" / "comparison.py"))
    assert tool["page"]() == (ROOT / "docs" / "comparison.md").read_text(), "python launch/comparison.py writes it"


def test_its_pictures_exist():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path
