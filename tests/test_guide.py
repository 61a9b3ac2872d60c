"""What the documents lead to is there: files, recipes, and the flags of the commands to copy."""

from __future__ import annotations

import re

import pytest
from commands import LAUNCH, launched

from mbridge_prune import config
from mbridge_prune.distill.settings import Settings as Distillation

ROOT = LAUNCH.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
GUIDE = (ROOT / "docs" / "guide.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        assert "://" in link or (document.parent / link).exists(), link


def test_every_recipe_is_in_the_guide():
    recipes = {str(path.relative_to(config.RECIPES)) for path in config.RECIPES.rglob("*.yaml")}
    assert recipes == set(re.findall(r"configs/([\w./-]+\.yaml)", GUIDE))


def flags_of(program: str) -> set[str]:
    if program == "prune":
        parser = config.parser()
    elif program == "distill":
        parser = config.parser(Distillation)
    else:
        parser = launched(program).parser()
    return {flag for action in parser._actions for flag in action.option_strings}


@pytest.mark.parametrize("program", ["prune", "distill", "evaluate", "export"])
def test_the_commands_to_copy_have_flags_that_exist(program):
    blocks = "".join(re.findall(r"```bash\n(.*?)```", GUIDE, re.S)).replace("\\\n", " ")
    lines = [
        line.partition(f"launch/{program}.py")[2]
        for line in blocks.splitlines()
        if f"launch/{program}.py" in line
    ]
    used = {flag for line in lines for flag in re.findall(r"(?<!\S)--[\w-]+", line)}
    assert used and used <= flags_of(program)
